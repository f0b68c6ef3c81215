"""Bad samples in real runs: the same others stand in on any layout and after a stop, all are named, too many end it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from ecdit_ds.errors import ExitCode
from tests.helpers.launch import Planned, metrics_of, train_many
from tests.helpers.made_sets import write_set
from tests.helpers.recipes import SMALL_MODEL, arguments

STEPS, HALFWAY, BATCH, COUNT = 8, 3, 8, 40
BROKEN = {
    1: "latents nan",
    7: "latents inf",
    12: "text_embeds nan",
    19: "text_pooled -inf",
    23: "mask",
    31: "mask",
    38: "latents nan",
}
UNRECOVERABLE = (ExitCode.UNRECOVERABLE,)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train on a set with bad samples in many ways; return the folder and what was said."""
    root = tmp_path_factory.mktemp("bad_samples")
    shape = (3, 16, 16)
    write_set(root / "train", [(shape, COUNT)], tokens=12, width=128, broken=BROKEN)
    write_set(root / "whole", [(shape, COUNT)], tokens=12, width=128)
    write_set(
        root / "hopeless_set", [(shape, COUNT)], tokens=12, width=128, broken=dict.fromkeys(range(COUNT), "latents nan")
    )
    common = (
        *SMALL_MODEL,
        "data.num_train=16384",
        "data.num_heldout=256",
        "data.dataset=encoded",
        f"data.path={root / 'train'}",
        f"data.heldout_path={root / 'whole'}",
        f"train.checkpoint_every={HALFWAY}",
        "train.log_every=2",
        f"train.max_steps={STEPS}",
        "data.max_bad=0.5",
        "optimizer.learning_rate=1e-5",
    )

    def planned(name: str, ranks: int, *overrides: str, codes: tuple[int, ...] = (0,)) -> Planned:
        return Planned(ranks, arguments(root / name, root / "unused", *common, *overrides), codes=codes)

    said = train_many(
        root,
        [
            planned("one", 1),
            planned("two", 2, "data.num_workers=2"),
            planned("four", 4, "parallel.tp=2", "parallel.ep=2", "data.num_workers=1"),
            planned("lives", 1, f"train.max_steps={HALFWAY}", "data.num_workers=2"),
            planned("none", 1, f"data.path={root / 'whole'}", "data.max_bad=0"),
            planned("strict", 2, "data.max_bad=0.008", codes=UNRECOVERABLE),
            planned(
                "hopeless", 1, f"data.path={root / 'hopeless_set'}", "data.num_workers=1", codes=(ExitCode.USER_ERROR,)
            ),
        ],
        [
            planned("lives", 1, "data.max_bad=0.6"),
        ],
    )
    return root, said


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Return the bad samples that a run's file names."""
    return [json.loads(line) for line in (run / "bad_samples.jsonl").read_text(encoding="ascii").splitlines()]


def test_every_bad_sample_is_named_with_its_cause(story: tuple[Path, str]) -> None:
    root, _ = story
    lines = lines_of(root / "one")
    assert {line["key"] for line in lines} == {str(i) for i in BROKEN}
    for line in lines:
        assert line["cause"] == ("text without a token" if BROKEN[int(line["key"])] == "mask" else "not finite")
        assert line["set"] == str(root / "train") and line["step"] == line["position"] // BATCH + 1
    assert [line["position"] for line in lines] == sorted(line["position"] for line in lines)


@pytest.mark.parametrize("name", ["two", "four", "lives"])
def test_the_same_samples_are_replaced_on_any_ranks_and_workers_and_after_a_stop(
    story: tuple[Path, str], name: str
) -> None:
    root, _ = story
    assert lines_of(root / name) == lines_of(root / "one")
    ours, theirs = metrics_of(root / name), metrics_of(root / "one")
    assert [m["bad_samples"] for m in ours] == [m["bad_samples"] for m in theirs]
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in ours] == pytest.approx([m[key] for m in theirs], rel=1e-4), key


def test_after_a_stop_losses_are_the_same_to_the_last_bit(story: tuple[Path, str]) -> None:
    root, _ = story
    assert [m["loss"] for m in metrics_of(root / "lives")] == [m["loss"] for m in metrics_of(root / "one")]


def test_every_step_says_how_many_and_is_finite(story: tuple[Path, str]) -> None:
    root, _ = story
    by_step = Counter(line["step"] for line in lines_of(root / "one"))
    records = metrics_of(root / "one")
    assert len(records) == STEPS
    for record in records:
        assert record["bad_samples"] == by_step[record["step"]]
        assert record["loss"] is not None and not record["is_skipped"]
    board = EventAccumulator(str(root / "one" / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/bad_samples")] == [m["bad_samples"] for m in records]


def test_a_whole_set_leaves_no_file_and_counts_nothing(story: tuple[Path, str]) -> None:
    root, _ = story
    assert not (root / "none" / "bad_samples.jsonl").exists()
    assert [m["bad_samples"] for m in metrics_of(root / "none")] == [0] * STEPS


def test_too_many_end_the_run_on_all_ranks_in_one_line_and_the_last_checkpoint_stays(
    story: tuple[Path, str],
) -> None:
    root, said = story
    of_steps = Counter(line["step"] for line in lines_of(root / "one"))
    # Reports come after every second step and every checkpoint; more than 8 bad ones (0.008 of 1,000) end the run.
    reports = [2, 3, 4, 6, 8]
    last = next(step for step in reports if sum(of_steps[i] for i in range(1, step + 1)) > 8)
    records = metrics_of(root / "strict")
    assert [m["step"] for m in records] == list(range(1, last + 1))
    bad = sum(m["bad_samples"] for m in records)
    assert len(lines_of(root / "strict")) == bad
    (line,) = [line for line in said.splitlines() if line.startswith("error: data.max_bad")]
    assert f"{bad} of {last * BATCH + bad} samples read are bad" in line and "0.008 of 1000" in line
    assert "not finite" in line and "higher data.max_bad" in line
    saved = [path.name for path in (root / "strict" / "checkpoints").glob("step_*")]
    assert saved == [f"step_{step}" for step in range(HALFWAY, last, HALFWAY)]


def test_reports_say_how_many_for_which_cause_with_the_first_names(story: tuple[Path, str]) -> None:
    root, said = story
    of_report = [line for line in lines_of(root / "one") if line["step"] <= 2]
    for cause, count in Counter(line["cause"] for line in of_report).items():
        first = next(line["key"] for line in of_report if line["cause"] == cause)
        assert f"step 2 | {count} bad samples replaced: {cause} ({first}" in said


def test_a_set_without_a_good_sample_is_answered_with_one_line(story: tuple[Path, str]) -> None:
    root, said = story
    (line,) = [line for line in said.splitlines() if line.startswith(f"error: {root / 'hopeless_set'}")]
    assert "replacements in a row are bad" in line
    assert "Traceback" not in said
