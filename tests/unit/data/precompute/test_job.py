"""Corpora: real photographs through real encoders, killed and raced, and what is left out is counted and named."""

import errno
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE
from ecdit_ds.data.encoders.pretrained import load_image_encoder, load_text_encoder
from ecdit_ds.data.encoders.spec import image_encoder_spec, open_image_encoder, open_text_encoder, text_encoder_spec
from ecdit_ds.data.latents.columns import LatentStats
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.precompute import job as corpus
from ecdit_ds.data.precompute.job import PrecomputeJob, encode_corpus
from ecdit_ds.data.precompute.unit import MAX_NAMES, EncodeSettings, UnitRecord, _Output, read_record
from ecdit_ds.data.sources.bad_sample import BadSample
from ecdit_ds.data.sources.base import Columns
from ecdit_ds.data.sources.images import decode_image, fit_image, to_tensor
from ecdit_ds.data.sources.open import open_source
from ecdit_ds.errors import DataError
from tests.helpers.colour_profiles import P3_TO_SRGB, SRGB_CURVE, in_srgb, rgb_profile
from tests.helpers.photographs import crops, encoded, huge_png, photographs
from tests.helpers.tiny_encoders import save_clip_text, save_t5, save_vae

Refusal = Callable[[Callable[[], object]], str]
MakeJob = Callable[..., PrecomputeJob]
COUNT = 17
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of photographs with captions beside them."""
    root = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(crops(COUNT)):
        (root / f"{i:02}.jpg").write_bytes(encoded(image))
        (root / f"{i:02}.txt").write_text(f"part {i} of a photograph")
    return root


@pytest.fixture
def make_job(pictures: Path, tmp_path: Path) -> MakeJob:
    """Return `make_job(**changes)`: a job with embedded encoders and units of four samples."""

    def make(
        source: Path | str = pictures, *, sizes: Any = ((16, 16),), dtype: str = "float32", **changes: Any
    ) -> PrecomputeJob:
        image, text = PixelVAE(), HashedWordEncoder(embed_dim=6, max_tokens=8)
        encoding = EncodeSettings(
            image_encoder=image, text_encoder=text, sizes=sizes, dtype=dtype, batch_size=3, threads=1
        )
        job = PrecomputeJob(
            source=open_source(str(source), unit_samples=4),
            destination=tmp_path / "set",
            encoding=encoding,
            image_facts=image_encoder_spec(image),
            text_facts=text_encoder_spec(text),
            settings={},
        )
        return replace(job, **changes)

    return make


def content_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_set_holds_the_pictures_in_order(make_job: MakeJob, pictures: Path) -> None:
    job = make_job()
    report = encode_corpus(job)
    dataset = LatentDataset(job.destination)
    assert report == {"samples": COUNT, "left_out": 0, "causes": {}, "converted": {}, "ignored_files": {}}
    assert [shard.count for shard in dataset.index.shards] == [4, 4, 4, 4, 1]
    batch = dataset.gather(np.array([16, 0, 5, 0]), np.arange(4))
    assert batch.captions == tuple(f"part {i} of a photograph" for i in (16, 0, 5, 0))
    images = [decode_image((pictures / f"{i:02}.jpg").read_bytes(), "") for i in (16, 0, 5, 0)]
    pixels = to_tensor([fit_image(image, (16, 16)) for image in images if not hasattr(image, "cause")])
    assert torch.equal(batch.latents_BCHW, PixelVAE().encode(pixels))
    every = dataset.gather(np.arange(COUNT), np.arange(COUNT)).latents_BCHW.double()
    assert dataset.index.latents_mean == pytest.approx(every.mean(dim=(0, 2, 3)).tolist())
    assert dataset.index.latents_std == pytest.approx(every.std(dim=(0, 2, 3), correction=0).tolist())
    assert dataset.texts("key", np.array([3, 12])) == ["03", "12"]
    assert torch.equal(dataset.null_text.embeds_BTD, job.encoding.text_encoder.null().embeds_BTD)
    assert not job.partial.exists()


def test_a_set_of_the_hubs_says_of_which_revision_it_is(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"image": [encoded(crops(1)[0])], "text": ["a photograph"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert open_source("owner/photographs", unit_samples=4).revision is None
    part = f"hf://datasets/owner/photographs@{'5' * 40}/data/train-0.parquet"
    rows.info.download_checksums = {part: {"num_bytes": 3, "checksum": None}}
    report = encode_corpus(make_job(source="owner/photographs"))
    assert report is not None and report["source_revision"] == "5" * 40


def test_half_the_bytes_hold_the_same_to_eight_bits(make_job: MakeJob, tmp_path: Path) -> None:
    encode_corpus(make_job())
    encode_corpus(make_job(dtype="bfloat16", destination=tmp_path / "half"))
    full, half = LatentDataset(tmp_path / "set"), LatentDataset(tmp_path / "half")
    assert half.index.latents_dtype == "bfloat16"
    for one, other in ((full[5].latents_CHW, half[5].latents_CHW), (full[5].text_embeds_TD, half[5].text_embeds_TD)):
        assert torch.equal(one.to(torch.bfloat16).float(), other)
    batch = half.gather(np.array([5]), np.array([0]))
    assert batch.latents_BCHW.dtype == batch.text_embeds_BTD.dtype == batch.text_pooled_BD.dtype == torch.bfloat16
    assert torch.equal(batch.float().latents_BCHW[0], half[5].latents_CHW)
    assert torch.equal(half.null_text.pooled_BD, full.null_text.pooled_BD.to(torch.bfloat16).float())


def test_pictures_keep_their_proportions_in_buckets(make_job: MakeJob, tmp_path: Path) -> None:
    source = tmp_path / "wide"
    source.mkdir()
    for i, image in enumerate([*photographs(), *crops(2)]):
        (source / f"{i}.png").write_bytes(encoded(image, "PNG"))
        (source / f"{i}.txt").write_text(f"picture {i}")
    job = make_job(source, sizes=((20, 16), (16, 16), (12, 20)))
    encode_corpus(job)
    dataset = LatentDataset(job.destination)
    assert dataset.index.buckets == ((3, 20, 16), (3, 16, 16), (3, 12, 20))
    assert [(shard.bucket, shard.count) for shard in dataset.index.shards] == [(0, 1), (1, 1), (2, 2), (1, 1)]
    by_caption = {dataset[i].caption: dataset[i].latents_CHW.shape for i in range(len(dataset))}
    assert by_caption["picture 0"] == (3, 12, 20), "the temple is wide"
    assert by_caption["picture 2"] == (3, 20, 16), "the portrait is tall"
    assert by_caption["picture 3"] == by_caption["picture 4"] == (3, 16, 16)
    places = np.flatnonzero(dataset.buckets_of(np.arange(len(dataset))) == 1)
    assert dataset.gather(places[::-1].copy(), places).captions == ("picture 4", "picture 3")
    with pytest.raises(AssertionError, match="in one batch"):
        dataset.gather(np.arange(5), np.arange(5))


def test_real_encoders_go_through_and_the_pictures_come_back(make_job: MakeJob, tmp_path: Path) -> None:
    vae, names = save_vae(tmp_path / "vae"), [str(save_t5(tmp_path / "t5")), str(save_clip_text(tmp_path / "clip"))]
    image, text = load_image_encoder(str(vae)), load_text_encoder(names, max_tokens=40)
    encoding = EncodeSettings(
        image_encoder=image, text_encoder=text, sizes=((24, 32),), dtype="float32", batch_size=3, threads=1
    )
    job = make_job(
        encoding=encoding, image_facts=image_encoder_spec(image, str(vae)), text_facts=text_encoder_spec(text, names)
    )
    encode_corpus(job)
    dataset = LatentDataset(job.destination)
    assert dataset.index.buckets == ((5, 6, 8),)
    assert (dataset.index.text_shape, dataset.index.pooled_width) == ((40, 28), 28)

    again = open_image_encoder(dataset.index.image_encoder)
    results = [result for unit in job.source.units for result in job.source.read(unit)]
    for i in (0, 7, 16):
        picture = decode_image(results[i].content, "")  # type: ignore[union-attr]
        images = to_tensor([fit_image(picture, (24, 32))])  # type: ignore[arg-type]
        with torch.no_grad():
            own = image.model(images, sample_posterior=False).sample.clamp(-1, 1)
        torch.testing.assert_close(again.decode(dataset[i].latents_CHW[None]), own, rtol=0, atol=1e-5)
    words = open_text_encoder(dataset.index.text_encoder).encode([dataset[3].caption])
    torch.testing.assert_close(words.embeds_BTD[0], dataset[3].text_embeds_TD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(words.pooled_BD[0], dataset[3].text_pooled_D, atol=1e-5, rtol=1e-5)


def test_an_encoder_that_is_another_one_is_refused(make_job: MakeJob, tmp_path: Path, refusal_of: Refusal) -> None:
    vae, other = save_vae(tmp_path / "vae"), save_vae(tmp_path / "other", seed=1)
    facts = image_encoder_spec(load_image_encoder(str(vae)), str(vae))
    assert open_image_encoder(facts).downsampling == 4
    assert "encoded with AutoencoderKL-" in refusal_of(lambda: open_image_encoder(facts, name=str(other)))
    assert "does not say how" in refusal_of(lambda: open_text_encoder({"identity": "x"}))


def bad_folder(root: Path) -> Path:
    """Return a folder with nine good pictures of every odd kind, and one of each that is bad."""
    root.mkdir()
    image = crops(1)[0]
    exif = image.getexif()
    exif[0x0112] = 6
    good = {
        "cmyk.jpg": encoded(image.convert("CMYK")),
        "palette.png": encoded(image.quantize(16), "PNG"),
        "alpha.png": encoded(image.convert("RGBA"), "PNG"),
        "grey.png": encoded(image.convert("L"), "PNG"),
        "deep.png": encoded(image.convert("L").convert("I;16"), "PNG"),
        "turned.jpg": encoded(image, exif=exif),
        "plain.webp": encoded(image, "WEBP"),
    }
    bad = {
        "cut.jpg": encoded(image)[:300],
        "page.jpg": b"<!DOCTYPE html><title>404</title>",
        "empty.jpg": b"",
        "huge.png": huge_png(),
        "other.jpg": b"\x00" * 64,
        "long.jpg": encoded(image),
        "silent.jpg": encoded(image),
        "blank.jpg": encoded(image),
        "plain.png": encoded(image, "PNG"),
    }
    for name, content in (good | bad).items():
        (root / name).write_bytes(content)
        if name not in ("silent.jpg", "plain.png"):
            words = {"long.jpg": "word " * 9, "blank.jpg": " "}.get(name, "a photograph")
            (root / name).with_suffix(".txt").write_text(words)
    return root


def test_every_bad_sample_has_its_line_in_the_report(make_job: MakeJob, tmp_path: Path, refusal_of: Refusal) -> None:
    source = bad_folder(tmp_path / "bad")
    message = refusal_of(lambda: encode_corpus(make_job(source)))
    assert "9 of 16 samples are bad (56.2%), more than --max-bad 0.05" in message
    assert message.endswith(f"mend them, delete {tmp_path / 'set.partial'} and encode anew")
    assert not (tmp_path / "set").exists()
    (source / "blank.txt").write_text("mended")
    message = refusal_of(lambda: encode_corpus(make_job(source, max_bad=0.6)))
    assert message.startswith(f"{tmp_path / 'set.partial'}: the source has changed since it was begun")
    (source / "blank.txt").write_text(" ")
    shutil.rmtree(tmp_path / "set.partial")

    job = make_job(source, max_bad=0.6)
    report = encode_corpus(job)
    assert report == json.loads((job.destination / "report.json").read_bytes())
    assert report is not None and (report["samples"], report["left_out"]) == (7, 9)
    assert {cause: (facts["count"], facts["names"]) for cause, facts in report["causes"].items()} == {
        "truncated image": (1, ["cut"]),
        "web page instead of an image": (1, ["page"]),
        "empty image file": (1, ["empty"]),
        "too many pixels": (1, ["huge"]),
        "not an image": (1, ["other"]),
        "caption too long": (1, ["long"]),
        "no caption": (1, ["silent.jpg"]),
        "empty caption": (1, ["blank"]),
        "duplicate key": (1, ["plain.webp"]),
    }
    assert report["converted"] == {"16 bits": 1, "CMYK": 1, "alpha": 1, "grey": 1, "palette": 1, "turned": 1}
    assert len(LatentDataset(job.destination)) == 7


def test_what_is_chosen_changed_or_passed_over_has_its_line_in_the_report(make_job: MakeJob, tmp_path: Path) -> None:
    image = crops(1)[0]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [
            ("._0.png", b"x"),
            ("0.png", encoded(image, "PNG", icc_profile=rgb_profile())),
            ("0.txt", b"one"),
            (".DS_Store", b"x"),
            ("1.png", encoded(image, "PNG", icc_profile=b"broken")),
            ("__MACOSX/1.png", b"x"),
            ("1.txt", b"two"),
            ("2.png", b""),
            ("2.webp", b""),
            ("2.txt", b"three"),
            ("3.png", encoded(image, "PNG")),
            ("3.json", b'{"captions": ["four", "five"]}'),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    job = make_job(tmp_path / "a.tar", max_bad=0.5, sizes=((48, 48),))
    report = encode_corpus(job)
    assert (
        report
        == json.loads((job.destination / "report.json").read_bytes())
        == {
            "samples": 3,
            "left_out": 1,
            "causes": {"several pictures": {"count": 1, "names": ["a.tar/2 ('png', 'webp')"]}},
            "converted": {"colour profile": 1, "colour profile ignored": 1, "first of several captions": 1},
            "ignored_files": {"._*": 1, ".DS_Store": 1, "__MACOSX": 1},
        }
    )
    stored = job.encoding.image_encoder.decode(LatentDataset(job.destination)[0].latents_CHW[None])
    truth = in_srgb(np.asarray(image), P3_TO_SRGB, SRGB_CURVE)
    assert np.abs((stored[0].permute(1, 2, 0).numpy() + 1) * 127.5 - truth).max() <= 1.01


def test_a_report_counts_all_that_is_bad_and_names_the_first_of_each_cause() -> None:
    record = UnitRecord(
        unit=0,
        shards=(),
        latents_shapes={},
        sums=LatentStats(),
        bad_counts={"no image": 30, "no caption": 1},
        bad_names={"no image": [str(i) for i in range(15)], "no caption": ["x"]},
        converted={"grey": 2},
        ignored={".md": 1},
    )
    later = replace(record, unit=1, bad_names={"no image": [str(i) for i in range(15, 30)], "no caption": ["y"]})
    report = corpus._report_of([record, later, record], {".md": 4, ".py": 5})
    assert report == {
        "samples": 0,
        "left_out": 3 * 31,
        "converted": {"grey": 6},
        "ignored_files": {".md": 7, ".py": 5},
        "causes": {
            "no caption": {"count": 3, "names": ["x", "y", "x"]},
            "no image": {"count": 90, "names": [str(i) for i in range(MAX_NAMES)]},
        },
    }
    output = _Output()
    for i in range(MAX_NAMES + 5):
        output.leave_out(BadSample(cause="damaged row", name=str(i), samples=2))
    assert output.counts == {"damaged row": 2 * (MAX_NAMES + 5)}
    assert output.names == {"damaged row": [str(i) for i in range(MAX_NAMES)]}


def test_half_a_set_that_was_decoded_otherwise_is_not_gone_on_with(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, refusal_of: Refusal
) -> None:
    assert encode_corpus(make_job(task=0, tasks=2)) is None
    monkeypatch.setattr(corpus, "DECODING", corpus.DECODING + 1)
    assert "was begun with other settings (decoding: " in refusal_of(lambda: encode_corpus(make_job(task=1, tasks=2)))
    monkeypatch.undo()
    assert encode_corpus(make_job(task=1, tasks=2)) is not None
    monkeypatch.setattr(corpus, "DECODING", corpus.DECODING + 1)
    assert encode_corpus(make_job()) is not None, "a whole set stays what it is"


class _Overflowing(PixelVAE):
    """An encoder that gives infinity for the brightest of each batch."""

    def encode(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        latents_BCHW = super().encode(images_B3HW)
        latents_BCHW[images_B3HW.mean(dim=(1, 2, 3)).argmax(), 0, 1, 2] = torch.inf
        return latents_BCHW


def test_a_sample_that_an_encoder_has_no_numbers_for_is_left_out(make_job: MakeJob) -> None:
    job = make_job(max_bad=0.6)
    job = replace(job, encoding=replace(job.encoding, image_encoder=_Overflowing()))
    report = encode_corpus(job)
    # Units of four, in batches of three and of one: nine batches, and in those of one nothing is left.
    assert report is not None and (report["samples"], report["left_out"]) == (COUNT - 9, 9)
    assert report["causes"]["not finite"]["count"] == 9
    dataset = LatentDataset(job.destination)
    assert dataset.gather(np.arange(COUNT - 9), np.arange(COUNT - 9)).latents_BCHW.isfinite().all()
    assert np.isfinite(dataset.index.latents_mean).all()


def test_a_source_that_is_mostly_bad_is_not_read_to_its_end(
    make_job: MakeJob, tmp_path: Path, refusal_of: Refusal
) -> None:
    (tmp_path / "list").mkdir()
    rows = [json.dumps({"path": f"{i}.jpg", "caption": "nothing"}) for i in range(2400)]
    (tmp_path / "list" / "all.jsonl").write_text("\n".join(rows))
    job = make_job()
    units: list[str] = []
    job = replace(job, source=open_source(str(tmp_path / "list" / "all.jsonl"), unit_samples=600))
    message = refusal_of(lambda: encode_corpus(job, moment=units.append))
    assert "no sample of 1200 is usable, most for: no image (1200, such as" in message
    assert units.count("unit") == 2, "after a thousand it is plain"


def test_a_source_without_one_good_sample_is_refused(make_job: MakeJob, tmp_path: Path, refusal_of: Refusal) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    assert "no sample of 1 is usable" in refusal_of(lambda: encode_corpus(make_job(tmp_path / "bad", max_bad=1.0)))


JPEG = encoded(crops(1)[0])
GOOD = [("0.jpg", JPEG), ("0.txt", b"one")]
CAPTIONED_TWICE = [
    (f"{i}.{suffix}", JPEG if suffix == "jpg" else suffix.encode())
    for i in range(1, 4)
    for suffix in ("jpg", "txt", "caption")
]


@pytest.mark.parametrize(
    ("members", "column", "told"),
    [
        ([*GOOD, *CAPTIONED_TWICE], None, "choose by --caption-column, such as --caption-column txt; nothing"),
        (
            [*((f"{i}.jpg", JPEG) for i in range(3)), *((f"{i}.txt", b"one") for i in range(3))],
            None,
            "duplicate key (3, such as a.tar/0); in tars, members of a sample must stand together",
        ),
        (GOOD, "canny.png", "no image (1, such as a.tar/0 ('jpg', 'txt'))"),
        (
            [(".0.jpg", b""), ("._0.txt", b""), (".x/0.jpg", b""), ("a.md", b"")],
            None,
            "no sample of 0 is usable; 4 files were not looked at, most: '.*': 2, '._*': 1, '.md': 1; nothing",
        ),
    ],
    ids=["several captions", "kind by kind", "no such suffix", "hidden"],
)
def test_a_tar_that_gives_too_few_samples_is_refused_with_the_way_out(
    make_job: MakeJob,
    tmp_path: Path,
    refusal_of: Refusal,
    members: list[tuple[str, bytes]],
    column: str | None,
    told: str,
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = open_source(str(tmp_path / "a.tar"), unit_samples=4, columns=Columns(image=column))
    assert told in refusal_of(lambda: encode_corpus(replace(make_job(), source=source)))


def killed_at(job: PrecomputeJob, fatal: int) -> int:
    """Encode in a process that ends without ceremony at its moment number `fatal`; return its exit code."""
    moments = iter(range(10_000))

    def moment(_name: str) -> None:
        if next(moments) == fatal:
            os._exit(9)

    process = FORK.Process(target=encode_corpus, args=(job,), kwargs={"moment": moment})
    process.start()
    process.join(timeout=60)
    assert process.exitcode is not None
    return process.exitcode


def test_killed_at_twenty_moments_the_set_is_the_same_byte_for_byte(make_job: MakeJob, tmp_path: Path) -> None:
    sizes = ((20, 16), (16, 16))
    seen: list[str] = []
    encode_corpus(make_job(sizes=sizes, destination=tmp_path / "whole"), moment=seen.append)
    expected = content_of(tmp_path / "whole")
    assert len(seen) >= 20 and len(expected) == 5 + 3
    draws = random.Random(0).sample(range(len(seen)), 20)
    job = make_job(sizes=sizes)
    for fatal in draws:
        assert killed_at(job, fatal) == 9
        again: list[str] = []
        encode_corpus(job, moment=again.append)
        assert content_of(job.destination) == expected, seen[fatal]
        assert not job.partial.exists()
        done_before = seen[:fatal].count("record") - (seen[fatal - 1] == "record")
        assert again.count("unit") <= 5 - done_before, "a unit was done twice"
        shutil.rmtree(job.destination)


def test_killed_again_and_again_it_gets_there(make_job: MakeJob, tmp_path: Path) -> None:
    encode_corpus(make_job(destination=tmp_path / "whole"))
    job, draws = make_job(), random.Random(1)
    lives = 1
    while killed_at(job, draws.randint(2, 9)) == 9:
        lives += 1
        assert lives < 40
    assert content_of(job.destination) == content_of(tmp_path / "whole")
    assert lives > 3


def test_tasks_share_the_units_and_the_last_one_publishes(make_job: MakeJob, tmp_path: Path) -> None:
    encode_corpus(make_job(destination=tmp_path / "whole"))
    done: list[str] = []
    assert encode_corpus(make_job(task=1, tasks=3), moment=done.append) is None
    assert encode_corpus(make_job(task=0, tasks=3), moment=done.append) is None
    assert encode_corpus(make_job(task=2, tasks=3), moment=done.append) is not None
    assert done.count("unit") == 5
    assert content_of(tmp_path / "set") == content_of(tmp_path / "whole")
    assert encode_corpus(make_job(task=1, tasks=3), moment=done.append) is not None, "the set is there"
    assert done.count("unit") == 5


def test_a_task_that_is_not_the_last_reads_no_records_of_others(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_corpus(make_job(task=1, tasks=3))
    read: list[str] = []

    def noted(path: Path) -> UnitRecord | None:
        read.append(path.stem)
        return read_record(path)

    monkeypatch.setattr(corpus, "read_record", noted)
    assert encode_corpus(make_job(task=0, tasks=3)) is None
    assert set(read) == {"00000", "00003"}


def test_tasks_may_race_for_everything(make_job: MakeJob, tmp_path: Path) -> None:
    encode_corpus(make_job(destination=tmp_path / "whole"))
    for _ in range(3):
        processes = [FORK.Process(target=encode_corpus, args=(make_job(),)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert content_of(tmp_path / "set") == content_of(tmp_path / "whole")
        shutil.rmtree(tmp_path / "set")


def test_a_task_that_is_slower_than_the_others_finds_the_set(make_job: MakeJob) -> None:
    for late in ("plan", "unit", "batch", "shard", "record", "index", "null text", "part", "publish", "clear"):
        job = make_job()
        raced: list[object] = []

        def race(name: str, late: str = late, job: PrecomputeJob = job, raced: list[object] = raced) -> None:
            if name == late and not raced:
                raced.append(None)
                encode_corpus(job)

        report = encode_corpus(job, moment=race)
        assert report is not None and report["samples"] == COUNT, late
        assert len(LatentDataset(job.destination)) == COUNT
        shutil.rmtree(job.destination)
        shutil.rmtree(job.partial, ignore_errors=True)


@pytest.mark.parametrize("full_at", ["batch", "shard", "record", "null text", "part"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    make_job: MakeJob, tmp_path: Path, refusal_of: Refusal, full_at: str
) -> None:
    def fill(name: str) -> None:
        if name == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = refusal_of(lambda: encode_corpus(make_job(), moment=fill))
    assert "No space left on device" in message and "goes on where it was" in message
    assert not (tmp_path / "set").exists()
    assert encode_corpus(make_job()) is not None


def test_a_file_system_that_takes_no_more_is_one_line_too(make_job: MakeJob, tmp_path: Path) -> None:
    def encode() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            encode_corpus(make_job())
        except DataError as error:
            (tmp_path / "message").write_text(str(error))

    process = FORK.Process(target=encode)
    process.start()
    process.join(timeout=60)
    assert "File too large" in (tmp_path / "message").read_text()
    assert encode_corpus(make_job()) is not None


def test_a_shard_that_lost_its_end_is_written_again(make_job: MakeJob) -> None:
    job = make_job(task=0, tasks=2)
    assert encode_corpus(job) is None
    os.truncate(job.partial / "set" / "shard-00002.arrow", 100)
    (job.partial / "records" / "00004.json").write_text("{")
    done: list[str] = []
    encode_corpus(make_job(), moment=done.append)
    assert done.count("unit") == 2 + 2
    assert len(LatentDataset(job.destination)) == COUNT


def test_other_settings_do_not_mix_with_what_is_there(
    make_job: MakeJob, pictures: Path, tmp_path: Path, refusal_of: Refusal
) -> None:
    encode_corpus(make_job(task=0, tasks=2))
    assert "was begun with other settings (dtype" in refusal_of(lambda: encode_corpus(make_job(dtype="bfloat16")))
    encode_corpus(make_job())
    assert "holds another set (sizes" in refusal_of(lambda: encode_corpus(make_job(sizes=((8, 8),))))
    more = Path(shutil.copytree(pictures, tmp_path / "more"))
    (more / "16.txt").write_text("another caption")
    message = refusal_of(lambda: encode_corpus(make_job(more)))
    assert message.startswith(f"{tmp_path / 'set'}: the source has changed since") and "restore the source" in message
    (tmp_path / "taken").mkdir()
    assert "no encoded set" in refusal_of(lambda: encode_corpus(make_job(destination=tmp_path / "taken")))
    asked = make_job(destination=tmp_path / "asked", settings={"image_column": "other"})
    encode_corpus(asked)
    assert "(image_column: other, not None)" in refusal_of(lambda: encode_corpus(replace(asked, settings={})))


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("what", ["image_encoder", "text_encoder", "batch_size", "has_text", "image_column"])
def test_what_shapes_a_set_is_the_same_for_all_of_it(
    make_job: MakeJob, refusal_of: Refusal, what: str, is_whole: bool
) -> None:
    job = make_job()
    changed = {
        "image_encoder": replace(job, image_facts=image_encoder_spec(PixelVAE(shift_factor=0.5))),
        "text_encoder": replace(job, text_facts=text_encoder_spec(HashedWordEncoder(embed_dim=6, max_tokens=9))),
        "batch_size": replace(job, encoding=replace(job.encoding, batch_size=4)),
        "has_text": replace(job, encoding=replace(job.encoding, has_text=False)),
        "image_column": replace(job, settings={"image_column": "other"}),
    }[what]
    encode_corpus(job if is_whole else make_job(task=0, tasks=2))
    assert f"({what}" in refusal_of(lambda: encode_corpus(changed))


def test_a_plan_is_another_one_with_whatever_shapes_a_set(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    changed = [
        replace(job, source=replace(job.source, **{name: other}))  # type: ignore[type-var]
        for name, other in (("kind", "another"), ("fingerprint", "0"), ("units", job.source.units[:1]))
    ]
    changed += [
        replace(job, encoding=encoding)
        for encoding in (
            replace(job.encoding, sizes=((8, 16),)),
            replace(job.encoding, dtype="bfloat16"),
            replace(job.encoding, has_text=False),
            replace(job.encoding, batch_size=4),
        )
    ]
    changed += [
        replace(job, image_facts={"identity": "another"}),
        replace(job, text_facts={"identity": "another"}),
        replace(job, settings={"more": 1}),
    ]
    plans = [job.plan, *(one.plan for one in changed)]
    for name in ("SCHEMA_VERSION", "DECODING"):
        monkeypatch.setattr(corpus, name, getattr(corpus, name) + 1)
        plans.append(job.plan)
    assert len({json.dumps(plan) for plan in plans}) == len(plans)


def test_nothing_outside_the_set_is_written(make_job: MakeJob, pictures: Path, tmp_path: Path) -> None:
    before = sorted(pictures.iterdir())
    encode_corpus(make_job())
    assert sorted(pictures.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
