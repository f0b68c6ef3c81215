"""tools/encode_data.py: from a folder to a set and its contact sheet, and every wrong flag in one line."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ecdit_ds.data.encoders.base import HashedWordEncoder
from ecdit_ds.data.encoders.spec import open_text_encoder
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.errors import ExitCode
from tests.helpers.photographs import crops, encoded
from tests.helpers.tiny_encoders import save_t5, save_vae
from tools.encode_data import main


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of five photographs with captions, and one that is empty."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i, image in enumerate(crops(5)):
        (root / f"{i}.jpg").write_bytes(encoded(image))
        (root / f"{i}.txt").write_text(f"part {i}")
    (root / "none.jpg").write_bytes(b"")
    (root / "none.txt").write_text("nothing")
    return root


def run(*arguments: object) -> int:
    """Run the tool in this process."""
    return main([str(argument) for argument in arguments])


def test_a_folder_becomes_a_set_with_a_sheet(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "set"
    assert run("encode", pictures, destination, "--size", 32, "--max-bad", 0.2) == ExitCode.DONE
    shown = capsys.readouterr().out
    assert "5 samples, 1 left out" in shown and "1  empty image file: none" in shown
    index = LatentDataset(destination).index
    assert (index.latents_dtype, index.buckets, index.text_shape) == ("bfloat16", ((3, 32, 32),), (64, 128))
    assert run("inspect", destination, "--count", 4) == ExitCode.DONE
    shown = capsys.readouterr().out
    assert "5 samples" in shown and "every size and checksum holds" in shown and "3 x 32 x 32: 5 samples" in shown
    with Image.open(tmp_path / "set.png") as sheet:
        assert sheet.width > 4 * 100


def test_real_encoders_are_named_by_their_folders(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae, t5 = save_vae(tmp_path / "vae"), save_t5(tmp_path / "t5")
    arguments = [
        "encode",
        pictures,
        tmp_path / "set",
        "--vae",
        vae,
        "--text",
        t5,
        "--text-tokens",
        24,
        "--buckets",
        "--size",
        32,
        "--dtype",
        "fp32",
        "--max-bad",
        1,
        "--text-precision",
        "bf16",
    ]
    assert run(*arguments) == ExitCode.DONE
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    assert index["image_encoder"]["name"] == str(vae) and index["text_encoder"]["names"] == [str(t5)]
    assert index["buckets"] == [[5, 8, 8]] and index["text_shape"] == [24, 12]
    assert (index["image_encoder"]["precision"], index["text_encoder"]["precision"]) == ("fp32", "bf16")
    sample = LatentDataset(tmp_path / "set")[2]
    again = open_text_encoder(index["text_encoder"]).encode([sample.caption])
    torch.testing.assert_close(again.embeds_BTD[0], sample.text_embeds_TD)
    vae.rename(tmp_path / "moved")
    assert run("inspect", tmp_path / "set") == ExitCode.USER_ERROR
    assert run("inspect", tmp_path / "set", "--vae", tmp_path / "moved") == ExitCode.DONE


def test_pictures_that_are_enlarged_are_told_with_the_smallest_and_left_out_below_a_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for i, size in enumerate([(32, 32), (40, 64), (31, 90), (8, 60), (12, 9), (32, 33), (64, 16)]):
        (source / f"{i}.png").write_bytes(encoded(crops(1)[0].resize(size), "PNG"))
        (source / f"{i}.txt").write_text(f"picture {i}")
    arguments = ["--size", 32, "--shard-samples", 3, "--batch-size", 1]
    assert run("encode", source, tmp_path / "all", *arguments) == ExitCode.DONE
    assert "       4  converted: enlarged, the smallest from 60 x 8 (--min-size)\n" in capsys.readouterr().out
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert report["converted"] == {"enlarged": 4} and report["smallest_enlarged"] == [60, 8]

    some = [*arguments, "--min-size", 16, "--max-bad", 1]
    assert run("encode", source, tmp_path / "some", *some) == ExitCode.DONE
    assert "       2  too small: 3, 4\n" in capsys.readouterr().out
    report = json.loads((tmp_path / "some" / "report.json").read_text())
    assert report["converted"] == {"enlarged": 2} and report["smallest_enlarged"] == [16, 64]
    assert run("encode", source, tmp_path / "some", *arguments, "--max-bad", 1) == ExitCode.USER_ERROR
    assert "min_size: 16, not None" in capsys.readouterr().err


def test_captions_alone_are_checked_and_stored_without_vectors(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "3.txt").write_text("one two three four five")
    arguments = ["--size", 32, "--max-bad", 1, "--dtype", "fp32", "--text-tokens", 4]
    assert run("encode", pictures, tmp_path / "whole", *arguments) == ExitCode.DONE
    assert run("encode", pictures, tmp_path / "set", *arguments, "--captions-only") == ExitCode.DONE
    assert capsys.readouterr().out.count("1  caption too long: 3") == 2
    whole, captions = LatentDataset(tmp_path / "whole"), LatentDataset(tmp_path / "set")
    assert (whole.index.has_text, captions.index.has_text) == (True, False)
    assert captions.index.text_shape == (4, 128) and captions.index.text_encoder == whole.index.text_encoder
    everything = np.arange(4)
    stored, lean = whole.gather(everything, everything), captions.gather(everything, everything)
    assert lean.captions == stored.captions and torch.equal(lean.latents_BCHW, stored.latents_BCHW)
    assert torch.equal(captions.null_text.embeds_BTD, whole.null_text.embeds_BTD)
    saved = whole.index.shards[0].bytes - captions.index.shards[0].bytes
    assert saved >= 4 * (4 * 128 + 128) * 4
    assert run("inspect", tmp_path / "set") == ExitCode.DONE
    shown = capsys.readouterr().out
    assert "4 tokens x 128, not stored: captions are encoded beside training" in shown
    assert "every size and checksum holds" in shown and (tmp_path / "set.png").is_file()
    assert run("encode", pictures, tmp_path / "set", *arguments) == ExitCode.USER_ERROR
    assert "has_text" in capsys.readouterr().err


def test_the_text_of_no_text_is_not_rounded_where_captions_are_not(pictures: Path, tmp_path: Path) -> None:
    assert run("encode", pictures, tmp_path / "set", "--size", 32, "--max-bad", 1, "--captions-only") == ExitCode.DONE
    dataset = LatentDataset(tmp_path / "set")
    assert dataset.index.latents_dtype == "bfloat16"
    assert torch.equal(dataset.null_text.embeds_BTD, HashedWordEncoder(embed_dim=128, max_tokens=64).null().embeds_BTD)


def test_too_many_bad_samples_end_with_two_and_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("encode", pictures, tmp_path / "set", "--size", 32) == ExitCode.USER_ERROR == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "1 of 6 samples are bad (16.7%)" in line and "empty image file" in line
    assert not (tmp_path / "set").exists()
    assert run("encode", pictures, tmp_path / "set", "--size", 32, "--max-bad", 0.2) == ExitCode.DONE


def test_a_tar_that_ends_early_is_published_only_where_that_is_said(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(5):
            for suffix in ("jpg", "txt"):
                tar.add(pictures / f"{i}.{suffix}", f"{i}.{suffix}")
    with tarfile.open(path) as tar:
        offset = tar.getmember("2.txt").offset
    os.truncate(path, offset)
    arguments = ["encode", path, tmp_path / "set", "--size", 32, "--max-bad", 1]
    assert run(*arguments) == ExitCode.USER_ERROR
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "1 archives end early" in line and f"a.tar at byte {offset}" in line and "--accept-cut-archives" in line
    assert not (tmp_path / "set").exists()
    assert run(*arguments, "--accept-cut-archives") == ExitCode.DONE
    assert "2 samples, 1 left out" in capsys.readouterr().out


def test_columns_name_the_picture_and_the_caption_of_a_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat, deep = (encoded(Image.new("RGB", (32, 32), colour), "PNG") for colour in ("red", "blue"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("0.depth.png", deep),
            ("0.png", flat),
            ("0.txt", b"one"),
            ("0.json", b'{"text": "two"}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    arguments = ["encode", tmp_path / "a.tar", tmp_path / "set", "--size", 32]
    assert run(*arguments) == ExitCode.USER_ERROR
    assert "('depth.png', 'png'): several pictures; name one by --image-column" in capsys.readouterr().err
    assert run(*arguments, "--image-column", "depth.png") == ExitCode.USER_ERROR
    assert "('text in json', 'txt'): several captions; name one by --caption-column" in capsys.readouterr().err
    arguments += ["--image-column", "depth.png", "--caption-column"]
    assert run(*arguments, "text") == ExitCode.DONE
    sample = LatentDataset(tmp_path / "set")[0]
    assert sample.caption == "two"
    assert sample.latents_CHW.mean(dim=(1, 2)).argmax() == 2, "blue"
    assert run(*arguments, "txt") == ExitCode.USER_ERROR
    assert "holds another set (caption_column: text, not txt)" in capsys.readouterr().err


def test_a_set_within_its_source_is_refused(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(pictures)
    for destination in (pictures / "set", tmp_path / "link" / "deep" / "set"):
        assert run("encode", pictures, destination, "--size", 32, "--max-bad", 1) == ExitCode.USER_ERROR
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "is within the source" in line
    assert not (pictures / "set.partial").exists()


def test_tasks_of_the_command_line_share_the_work(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["encode", pictures, tmp_path / "set", "--size", 32, "--max-bad", 1, "--shard-samples", 2]
    assert run(*common, "--task", "0/2") == ExitCode.DONE
    assert "other tasks have units left" in capsys.readouterr().out
    assert not (tmp_path / "set").exists()
    assert run(*common, "--task", "1/2") == ExitCode.DONE
    assert len(LatentDataset(tmp_path / "set")) == 5


def test_ranks_of_an_arrays_tasks_do_not_do_one_anothers_work(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["encode", pictures, tmp_path / "set", "--size", 32, "--max-bad", 1, "--shard-samples", 2]
    for name, value in (("MIN", "0"), ("MAX", "1"), ("COUNT", "2"), ("STEP", "1")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    num_done = []
    for task, rank in ((0, 0), (0, 1), (1, 1), (1, 0)):  # three units of two pictures: none is left for task 1, rank 1
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("RANK", str(rank))
        assert run(*common) == ExitCode.DONE
        num_done.append(len(list((tmp_path / "set.partial" / "records").glob("*.json"))))
    assert num_done == [1, 2, 2, 0]  # the last one has published the set, and cleared up
    assert len(LatentDataset(tmp_path / "set")) == 5


def test_a_damaged_set_is_told_by_inspect(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("encode", pictures, tmp_path / "set", "--size", 32, "--max-bad", 1)
    path = tmp_path / "set" / "shard-00000.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run("inspect", tmp_path / "set") == ExitCode.USER_ERROR
    assert f"{path}: has checksum" in capsys.readouterr().err


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_pictures_that_are_not_finite_are_told_and_not_drawn(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: float
) -> None:
    vae = save_vae(tmp_path / "vae")
    (path,) = vae.glob("*.safetensors")
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"][0] = number
    save_file(tensors, path, metadata={"format": "pt"})
    assert run("encode", pictures, tmp_path / "set", "--size", 32, "--max-bad", 1, "--vae", vae) == ExitCode.DONE
    assert run("inspect", tmp_path / "set") == ExitCode.USER_ERROR
    assert "1 of 1 pictures are not finite, such as of 'part 0'" in capsys.readouterr().err
    assert not (tmp_path / "set.png").exists()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--size", "33"], "is not a multiple of 2"),
        (["--max-bad", "5"], "is a share"),
        (["--size", "0"], "must be at least 1"),
        (["--size", "100000"], "is more than 8192 pixels a side"),
        (["--device", "nonsense"], "--device nonsense: cannot be used"),
        (["--device", "meta"], "--device meta: cannot be used"),
        (["--text-width", "8", "--text", "x"], "--text-width 8"),
        (["--text-precision", "bf16"], "--text-precision bf16: has no effect without --text"),
        (["--caption-column", "alt"], "no columns"),
        (["--images", "."], "has no effect"),
        (["--split", "train"], "has no splits, so --split train has no effect"),
    ],
)
def test_wrong_flags_are_one_line(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], part: str
) -> None:
    code = run("encode", pictures, tmp_path / "set", "--max-bad", "1", "--size", "32", *flags)
    assert code == ExitCode.USER_ERROR
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line


def test_names_of_files_cannot_forge_or_hide_a_line(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of bad pictures, of files that are not looked at, of folders and of columns."""
    evil = "a\x1b[2J\nset: 9 samples\u202e\udcff"
    (pictures / f"{evil}.jpg").write_bytes(b"")
    (pictures / f"{evil}.txt").write_text("words")
    (pictures / f"x.{evil}").touch()
    assert run("encode", pictures, tmp_path / "set", "--size", 32, "--max-bad", 0.5) == ExitCode.DONE
    pictures.rename(tmp_path / f"folder {evil}")
    run("encode", tmp_path / f"folder {evil}", tmp_path / "other", "--size", 32)
    (tmp_path / "list.csv").write_text(f'image,"{evil.encode("ascii", "ignore").decode()}"\na,b\n')
    run("encode", tmp_path / "list.csv", tmp_path / "third", "--size", 32)
    told = capsys.readouterr()
    lines = (told.out + told.err).split("\n")
    assert len(lines) > 4 and all(line.isprintable() for line in lines), lines
    assert not any(line.startswith("set: ") for line in lines)
