"""Of several captions of a picture the user's choice is taken, from every kind of source, whoever reads it."""

import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.sources.base import Captions, Choice, Columns, RawSample
from ecdit_ds.data.sources.open import open_source
from ecdit_ds.errors import ExitCode
from tests.helpers.photographs import crops, encoded
from tests.unit.data.sources.test_open import write_tar
from tools.encode_data import main

JPEG = encoded(crops(1)[0])
COUNT = 12
KINDS = ("text files", "CSV rows", "JSON rows", "JSON lists", "Parquet lists", "saved lists", "tar text", "tar JSON")


def captions_of(i: int) -> list[str]:
    """Return the captions of picture `i`; the last one has but one."""
    return [f"{i} by day", f"{i} by night", f"{i} in rain"][: 1 if i == COUNT - 1 else 3]


def make_source(place: Path, kind: str) -> Path:
    """Return a source of `COUNT` pictures with several captions each."""
    place.mkdir()
    several = [captions_of(i) for i in range(COUNT)]
    names = [f"{i:02}" for i in range(COUNT)]
    if kind.startswith("tar"):
        parts = [
            [
                (f"{name}.jpg", JPEG),
                (f"{name}.txt", "\n".join(said).encode())
                if kind == "tar text"
                else (f"{name}.json", json.dumps({"caption": said}).encode()),
            ]
            for name, said in zip(names, several, strict=True)
        ]
        return write_tar(place / "a.tar", [member for pair in parts for member in pair])
    if kind == "Parquet lists":
        pq.write_table(pa.table({"image": [JPEG] * COUNT, "captions": several}), place / "a.parquet")
        return place
    if kind == "saved lists":
        datasets.Dataset.from_dict({"image": [JPEG] * COUNT, "captions": several}).save_to_disk(str(place / "saved"))
        return place / "saved"
    for name, said in zip(names, several, strict=True):
        (place / f"{name}.jpg").write_bytes(JPEG)
        if kind == "text files":
            (place / f"{name}.txt").write_text("\r\n".join(["", *said, " "]))
    rows = [(f"{name}.jpg", one) for name, said in zip(names, several, strict=True) for one in said]
    if kind == "CSV rows":
        with (place / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *sorted(rows, key=lambda row: row[1][::-1])])
        return place / "a.csv"
    if kind == "JSON rows":
        lines = [{"file_name": name, "caption": one, "id": i} for i, (name, one) in enumerate(rows)]
    else:
        lines = [{"image": f"{name}.jpg", "caption": said} for name, said in zip(names, several, strict=True)]
    if kind.startswith("JSON"):
        (place / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return place / "a.jsonl"
    return place


def read(source: Path, choice: Choice | None, *, seed: int = 0, unit_samples: int = 5) -> list[RawSample]:
    """Return all samples; none is bad."""
    columns = Columns(captions=Captions(choice=choice, seed=seed))
    opened = open_source(str(source), unit_samples=unit_samples, columns=columns)
    samples = [one for unit in opened.units for one in opened.read(unit)]
    good = [one for one in samples if isinstance(one, RawSample)]
    assert good == samples
    assert {one.content for one in good} == {JPEG} and len({one.key for one in good}) == len(good)
    return good


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_several_captions_is_taken_or_each(tmp_path: Path, kind: str) -> None:
    source = make_source(tmp_path / "source", kind)
    order = [one for i in range(COUNT) for one in captions_of(i)]
    assert sorted(one.caption for one in read(source, "all")) == sorted(order)
    first, taken = (read(source, choice) for choice in ("first", "random"))
    assert len(first) == len(taken) == COUNT
    number = {one.caption.partition(" ")[0] for one in taken}
    assert len(number) == COUNT, "one of each picture's own"
    if kind != "CSV rows":  # which are sorted otherwise
        assert [one.caption for one in read(source, "all")] == order
        assert [one.caption for one in first] == [captions_of(i)[0] for i in range(COUNT)]
    assert len({one.caption.partition(" ")[2] for one in taken}) == 3, "of the first, the second and the third"
    assert Counter(told for one in taken for told in one.converted) == {"one of several captions": COUNT - 1}
    assert [one.caption for one in read(source, "random", unit_samples=2)] == [one.caption for one in taken]
    assert [one.caption for one in read(source, "random", seed=1)] != [one.caption for one in taken]


def test_without_a_choice_lines_of_a_text_file_are_one_caption(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "text files")
    assert read(source, None)[0].caption == "0 by day 0 by night 0 in rain"


@pytest.mark.parametrize("choice", ["first", "random", "all"])
def test_captions_that_say_nothing_are_passed_over_and_equal_ones_are_one(choice: Choice) -> None:
    captions = Captions(choice=choice)
    (sample,) = captions.samples("a", JPEG, ["", None, 3, " a  cat", "a cat", "\ufeff", "\x00"])
    assert isinstance(sample, RawSample) and (sample.key, sample.caption, sample.converted) == ("a", "a cat", ())
    (bad,) = captions.samples("a", JPEG, ["", None])
    assert not isinstance(bad, RawSample) and bad.cause == "empty caption"
    (bad,) = captions.samples("a", "not an image", ["one", "two"])
    assert not isinstance(bad, RawSample) and bad.cause == "not an image"


def test_the_tool_takes_the_choice_and_goes_on_with_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "source", "JSON lists")

    def run(destination: str, *flags: str) -> int:
        arguments = ["encode", str(source), str(tmp_path / destination), "--size", "16", "--batch-size", "5"]
        return main([*arguments, *flags])

    sets = {}
    for name, flags in {
        "default": (),
        "first": ("--captions", "first"),
        "all": ("--captions", "all"),
        "random": ("--captions", "random"),
        "again": ("--captions", "random", "--shard-samples", "2"),
        "seed": ("--captions", "random", "--caption-seed", "1"),
    }.items():
        assert run(name, *flags) == ExitCode.DONE
        sets[name] = LatentDataset(tmp_path / name)
    captions = {name: dataset.texts("caption", np.arange(len(dataset))) for name, dataset in sets.items()}
    assert captions["default"] == captions["first"] and sets["default"].fingerprint == sets["first"].fingerprint
    assert captions["again"] == captions["random"] != captions["seed"]
    assert len(captions["all"]) == 3 * COUNT - 2
    assert len({sets[name].fingerprint for name in ("default", "all", "random", "seed")}) == 4
    capsys.readouterr()
    assert run("random", "--captions", "all") == ExitCode.USER_ERROR
    assert "captions: random, not all" in capsys.readouterr().err
    assert run("random", "--captions", "random", "--caption-seed", "2") == ExitCode.USER_ERROR
    assert "caption_seed: None, not 2" in capsys.readouterr().err
    assert run("new", "--captions", "all", "--caption-seed", "2") == ExitCode.USER_ERROR
    assert "--caption-seed 2: has no effect without --captions random" in capsys.readouterr().err
