"""The benchmarks of the data path: all sides read the same samples, shares are what they say. Times are not judged."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ecdit_ds.config.yaml_loader import load_recipe
from tools.bench import parse_arguments
from tools.benchmarks import encode as bench_encode
from tools.benchmarks import step as bench_step
from tools.benchmarks.corpus import Corpus, write_corpus
from tools.benchmarks.data import FORMATTER, ONE_CALL, OURS, OURS_FP32, RAW, SEQUENTIAL, Result, check_alike, to_rows
from tools.benchmarks.step import StepTime, step_time, way_lines


@pytest.fixture(scope="module", params=["demo", "ecdit_xl_8e"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Return the least corpus of a recipe's shapes: fp32 of the demo, bf16 of the paper's."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), load_recipe(request.param), 8, 1e-6)


def test_all_sides_read_the_same_samples(corpus: Corpus) -> None:
    assert corpus.dtype == ("float32" if corpus.recipe.data.dataset == "digit_scenes" else "bfloat16")
    assert len(corpus.ours) == len(corpus.flat) == len(corpus.formatted) == 128
    check_alike(corpus)
    ids = np.concatenate(corpus.order())
    assert sorted(ids.tolist()) == list(range(128))


def test_a_side_that_reads_something_else_is_found_out(corpus: Corpus) -> None:
    flat = np.array(corpus.flat)
    flat[corpus.order()[0][3], -1] ^= 1
    changed = Corpus(**(vars(corpus) | {"flat": flat}))
    with pytest.raises(AssertionError):
        check_alike(changed)
    other = Corpus(**(vars(corpus) | {"formatted": corpus.formatted.select(range(127, -1, -1))}))
    with pytest.raises(AssertionError):
        check_alike(other)


def test_shares_of_raw_and_ratios_to_the_formatter_are_paired_within_rounds() -> None:
    result = Result(samples=100, bytes_a_sample=1000)
    result.seconds.update({RAW: [1.0, 2.0, 3.0], OURS: [2.0, 2.0, 4.0], FORMATTER: [20.0, 40.0, 30.0]})
    rows = {row["side"]: row for row in to_rows("a case", result)}
    assert rows[OURS]["of_raw"] == 0.75 and rows[OURS]["of_raw_spread"] == [0.5, 1.0]
    assert rows[OURS]["over_formatter"] == 10.0 and rows[OURS]["over_formatter_spread"] == [7.5, 20.0]
    assert rows[OURS]["samples_per_second"] == 50.0 and rows[OURS]["bytes_per_second"] == 50_000.0
    assert rows[RAW]["of_raw"] == 1.0 and rows[FORMATTER]["over_formatter"] == 1.0


def test_an_estimated_step_is_flops_over_what_a_gpu_does() -> None:
    recipe = load_recipe("ecdit_xl_8e")
    half, whole = (step_time(recipe, 32, utilization) for utilization in (0.5, 1.0))
    assert half.seconds is not None and whole.seconds is not None
    assert half.seconds == pytest.approx(2 * whole.seconds)
    more = step_time(recipe, 64, 1.0)
    assert more.seconds == pytest.approx(2 * whole.seconds)
    # XL has about 2 x 10^11 multiply-adds an image at half the tokens; three passes of two FLOPs each.
    assert 5e11 < whole.seconds * 989e12 / 32 < 1e12 and "estimate" in whole.source
    assert step_time(load_recipe("demo"), 32, 1.0) == StepTime(
        micro_batch_size=64, seconds=None, source="forward and backward, measured here"
    )


def test_the_way_to_a_step_is_told_as_shares_of_it() -> None:
    way = {
        "micro_batch_size": 8,
        "step_seconds": 0.2,
        "step_source": "somewhere",
        "worker_seconds": 0.05,
        "parts_seconds": {"gather": 0.01, "noise": 0.04},
        "waits_seconds": {0: 0.05, 2: 0.002},
    }
    lines = way_lines(way)
    assert "200.0 ms (somewhere)" in lines[0]
    assert "50.00 ms: gather 10.00, noise 40.00; one worker is busy 25.0%" in lines[1]
    assert (
        "0 workers a step waits 50.000 ms: 25.00%" in lines[2] and "2 workers a step waits 2.000 ms: 1.00%" in lines[3]
    )


def test_the_loader_command_writes_every_side_and_the_way_to_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_step, "STEPS_WAITED", 1)
    monkeypatch.setattr(bench_step, "MEASURED_STEPS", 1)
    path, folder, threads = tmp_path / "loader.json", tmp_path / "there", torch.get_num_threads()
    folder.mkdir()
    options = parse_arguments(
        [
            "loader",
            "--quick",
            "--configs",
            "demo",
            "--gigabytes",
            "0.000001",
            "--workers",
            "1",
            "--folder",
            str(folder),
            "--json",
            str(path),
        ]
    )
    options.run(options)
    report, said = json.loads(path.read_text()), capsys.readouterr().out
    sides = [RAW, ONE_CALL, SEQUENTIAL, OURS, OURS_FP32, FORMATTER, "ours, 1 worker"]
    assert [row["side"] for row in report["rows"]] == sides
    assert all(row["samples_per_second"] > 0 and row["case"] == "demo" for row in report["rows"])
    (way,) = report["steps"]
    assert way["micro_batch_size"] == 64 and set(way["waits_seconds"]) == {"0", "1"}
    assert set(way["parts_seconds"]) == {"gather", "order and check", "noise", "rest"}
    assert report["meta"]["rounds"] == 2 and "datasets" in report["meta"]["versions"]
    assert said.startswith("demo: 128 samples of 9,740 bytes, float32") and "x formatter" in said
    assert not list(folder.iterdir()) and torch.get_num_threads() == threads


def test_outside_is_what_the_encoders_leave_of_a_round() -> None:
    rounds = [
        {"image encoder": 6.0, "text encoder": 3.0, "all": 10.0},
        {"image encoder": 4.0, "text encoder": 4.0, "all": 10.0},
        {"image encoder": 9.0, "text encoder": 0.5, "all": 10.0},
    ]
    row = bench_encode.to_row(rounds, 5)
    assert row["outside"] == pytest.approx(0.1) and row["outside_spread"] == pytest.approx([0.05, 0.2])
    assert row["images_per_second"] == 0.5 and row["text_encoder_ms_an_image"] == 600.0


def test_the_encode_command_times_encoders_and_all_around_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_encode, "TEXT_LAYERS", 1)
    monkeypatch.setattr(bench_encode, "TEXT_WIDTH", 64)
    path, folder = tmp_path / "encode.json", tmp_path / "there"
    folder.mkdir()
    arguments = ["encode", "--quick", "--images", "5", "--size", "32", "--batch-size", "2", "--threads", "3"]
    options = parse_arguments([*arguments, "--folder", str(folder), "--json", str(path)])
    options.run(options)
    report = json.loads(path.read_text())
    (row,) = report["rows"]
    assert row["images"] == 5 and 0 < row["outside"] < 1
    assert row["image_encoder_ms_an_image"] > 0 and row["text_encoder_ms_an_image"] > 0
    in_encoders = row["image_encoder_ms_an_image"] + row["text_encoder_ms_an_image"]
    assert row["outside"] == pytest.approx(1 - in_encoders * 5 / 1e3 / row["seconds"])
    assert {"decode", "cut and resample", "count tokens", "to rows"} < row["parts_ms_an_image"].keys()
    assert (report["meta"]["width"], report["meta"]["threads"]) == (8, 3)
    assert "outside the encoders" in capsys.readouterr().out
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loader", "--utilization", "2"], "--utilization 2"),
        (["loader", "--workers", "0"], "--workers: '0'"),
        (["loader", "--configs", "nowhere"], "nowhere"),
        (["loader", "--folder", "/nowhere"], "--folder /nowhere"),
        (["encode", "--folder", "/nowhere"], "--folder /nowhere"),
        (["encode", "--size", "100"], "--size 100"),
        (["encode", "--width", "12"], "--width 12"),
        (["encode", "--images", "0"], "--images: '0'"),
    ],
)
def test_what_cannot_be_measured_is_answered_with_one_line(
    refusal_of: Callable[[Callable[[], object]], str], arguments: list[str], said: str
) -> None:
    assert said in refusal_of(lambda: parse_arguments(arguments))
