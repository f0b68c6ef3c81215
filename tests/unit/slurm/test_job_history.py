"""Whether a job gets another life, told as whole stories, and what is left to read of them."""

import json
from pathlib import Path

import pytest
import torch

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.retention import quarantine
from ecdit_ds.checkpoint.writer import TensorShard, save_checkpoint
from ecdit_ds.errors import ExitCode
from ecdit_ds.slurm.job_history import (
    AttemptStarted,
    JobHistory,
    RequeueDecision,
    count_barren,
    decide_requeue,
    newest_step,
)

AGAIN = RequeueDecision(is_again=True, exit_code=75, reason="exit code 75; 0 of 3 lives without progress")
OVER = RequeueDecision(is_again=False, exit_code=2, reason="there is something to mend first")
DONE = RequeueDecision(is_again=False, exit_code=0, reason="training is done")


def beginning(life: str, step: int = 0) -> AttemptStarted:
    """Return a life that began with the checkpoint of a step."""
    return AttemptStarted(life=life, step=step, nodes="n[1-4]", ranks=8)


def save_step(run: Path, step: int) -> Path:
    """Publish a whole checkpoint of one number."""
    piece = TensorShard(name="weight/a", global_shape=(1,), box=Box((0,), (1,)), data=torch.zeros(1))
    return save_checkpoint(run / "checkpoints", step, [piece], {}, SoloPeers())


@pytest.mark.parametrize(
    ("steps", "now", "barren"),
    [
        ([], 0, 0),  # before the first life
        ([0], 0, 1),
        ([0], 10, 0),
        ([0, 0, 0], 0, 3),
        ([0, 0, 10], 10, 1),  # progress starts the count anew
        ([0, 10, 20, 30], 40, 0),
        ([10, 10, 10], 20, 0),
        ([20, 10], 10, 2),  # a checkpoint proved damaged
        ([40, 40, 50, 50, 50], 50, 3),
    ],
)
def test_lives_in_a_row_without_a_later_checkpoint_are_counted(steps: list[int], now: int, barren: int) -> None:
    lives = [beginning(f"12.{restarts}", step) for restarts, step in enumerate(steps)]
    assert count_barren(lives, now) == barren


def test_lives_of_other_jobs_do_not_count(tmp_path: Path) -> None:
    ledger = JobHistory(tmp_path)
    for life, step in (("11.0", 0), ("12.0", 0), ("112.0", 0), ("12.1", 0), ("1.2", 5)):
        ledger.begin(beginning(life, step))
    assert count_barren(ledger.lives_of("12"), 0) == 2
    assert count_barren(ledger.lives_of("13"), 0) == 0


def test_a_job_inherits_nothing_from_an_earlier_one_of_its_number(tmp_path: Path) -> None:
    ledger = JobHistory(tmp_path)
    for life in ("12.0", "12.1", "12.2"):
        ledger.begin(beginning(life))
    ledger.pass_check("12.1")
    assert ledger.is_checked("12") and len(ledger.lives_of("12")) == 3
    ledger.begin(beginning("12.0", 40))
    assert not ledger.is_checked("12")
    assert [life.step for life in ledger.lives_of("12")] == [40]
    assert len(ledger.beginnings()) == 4


def test_a_recipe_is_checked_once_one_life_found_it_in_order(tmp_path: Path) -> None:
    ledger = JobHistory(tmp_path)
    ledger.begin(beginning("12.0"))  # interrupted before it could tell
    assert not ledger.is_checked("12")
    ledger.begin(beginning("12.1"))
    ledger.pass_check("12.1")
    ledger.begin(beginning("12.2"))
    assert ledger.is_checked("12")
    assert not ledger.is_checked("1") and not ledger.is_checked("13")


def test_a_life_without_an_end_counts_as_one(tmp_path: Path) -> None:
    """As when a job loses its first node: nobody is left to write how it ended."""
    ledger = JobHistory(tmp_path)
    ledger.begin(beginning("12.0"))
    ledger.begin(beginning("12.1"))
    ledger.end("12.1", 75, 0, AGAIN)
    ledger.begin(beginning("12.2"))
    assert count_barren(ledger.lives_of("12"), 0) == 3


@pytest.mark.parametrize("code", [ExitCode.DONE, ExitCode.USER_ERROR, ExitCode.UNRECOVERABLE, ExitCode.INTERRUPTED])
@pytest.mark.parametrize("barren", [0, 1, 99])
def test_some_ends_are_for_good_whatever_came_before(code: ExitCode, barren: int) -> None:
    verdict = decide_requeue(code, barren=barren, allowed=3)
    assert not verdict.is_again and verdict.exit_code == code
    assert (f"exit code {code}:" in verdict.reason) == (code != ExitCode.DONE)


@pytest.mark.parametrize(
    "code", [ExitCode.CRASHED, ExitCode.CHECKPOINTED, ExitCode.RETRY, 134, 135, 137, 139, 143, 255]
)
def test_other_ends_have_another_life_until_too_many_were_barren(code: int) -> None:
    for barren in (0, 1, 2):
        verdict = decide_requeue(code, barren=barren, allowed=3)
        assert verdict.is_again and verdict.exit_code == code
        assert f"{barren} of 3" in verdict.reason
    verdict = decide_requeue(code, barren=3, allowed=3)
    assert not verdict.is_again and verdict.exit_code == code
    assert "3 lives in a row" in verdict.reason and "ECDIT_MAX_LIVES=3" in verdict.reason


@pytest.mark.parametrize("code", [*ExitCode, 137, 139, 255])
def test_every_end_has_a_reason_of_one_line(code: int) -> None:
    for barren in (0, 3):
        assert len(decide_requeue(code, barren=barren, allowed=3).reason.splitlines()) == 1


@pytest.mark.parametrize(
    ("ends", "num_lives"),
    [
        ([(75, 0)] * 9, 3),  # storage hangs each time
        ([(137, 0), (137, 0), (42, 10), (137, 10), (137, 10), (137, 10), (75, 10)], 6),  # one save pays for two deaths
        ([(42, 10), (42, 20), (42, 30), (42, 40), (0, 50)], 5),  # longer than a job may be
        ([(1, 0), (2, 0), (0, 10)], 2),  # it proved a mistake of the user
        ([(139, 10), (3, 20), (0, 30)], 2),
        ([(0, 10)], 1),
    ],
)
def test_a_job_lives_until_its_story_ends(tmp_path: Path, ends: list[tuple[int, int]], num_lives: int) -> None:
    """Each pair is how a life ended and which step it reached."""
    ledger, step = JobHistory(tmp_path), 0
    for restarts, (code, reached) in enumerate(ends):
        ledger.begin(beginning(f"12.{restarts}", step))
        verdict = decide_requeue(code, barren=count_barren(ledger.lives_of("12"), reached), allowed=3)
        ledger.end(f"12.{restarts}", code, reached, verdict)
        step = reached
        if not verdict.is_again:
            break
    assert restarts + 1 == num_lives
    assert verdict.exit_code == ends[num_lives - 1][0]


def test_a_job_that_is_submitted_anew_has_all_its_lives_again(tmp_path: Path) -> None:
    ledger = JobHistory(tmp_path)
    for life in ("12.0", "12.1", "12.2", "13.0"):
        ledger.begin(beginning(life, 10))
    assert decide_requeue(75, barren=count_barren(ledger.lives_of("13"), 10), allowed=3).is_again


def test_a_ledger_tells_what_was_written_and_a_new_one_nothing(tmp_path: Path) -> None:
    assert JobHistory(tmp_path / "new").beginnings() == []
    lives = [beginning("12.0"), beginning("12.1", 10)]
    for life in lives:
        JobHistory(tmp_path).begin(life)
        JobHistory(tmp_path).end(life.life, 42, 10, AGAIN)
    assert JobHistory(tmp_path).beginnings() == lives
    assert [life.job for life in lives] == ["12", "12"]
    records = [json.loads(line) for line in (tmp_path / "slurm/lives.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records] == ["begin", "end"] * 2
    assert records[1].items() >= {"life": "12.0", "code": 42, "step": 10, "is_again": True}.items()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe\x00",
        b"\0" * 512,  # as some file systems leave after a crash
        b"[]",
        b"[" * 100_000,
        b'{"event": "begin", "life": "--help.0", "step": 0, "nodes": "n1", "ranks": 8}',
        b'{"event": "begin", "life": "\\ud800.0", "step": 0, "nodes": "n1", "ranks": 8}',
        b"null",
        b'{"event": "begin"}',
        b'{"event": "rained"}',
        b'{"event": "begin", "life": "12.7", "step": null, "nodes": "n1", "ranks": 8}',
        b'{"event": "begin", "life": "12.7", "step": "ten", "nodes": "n1", "ranks": 8}',
        b'{"event": "begin", "life": "12.7", "step": Infinity, "nodes": "n1", "ranks": 8}',
    ],
)
def test_a_line_that_is_no_ones_is_passed_over(tmp_path: Path, line: bytes) -> None:
    ledger = JobHistory(tmp_path)
    ledger.begin(beginning("12.0"))
    with open(tmp_path / "slurm/lives.jsonl", "ab") as file:
        file.write(line + b"\n")
    ledger.begin(beginning("12.1"))
    assert [life.life for life in ledger.beginnings()] == ["12.0", "12.1"]


def test_a_line_that_was_cut_off_costs_no_other_line(tmp_path: Path) -> None:
    ledger, path = JobHistory(tmp_path), tmp_path / "slurm/lives.jsonl"
    ledger.begin(beginning("12.0"))
    ledger.begin(beginning("12.1"))
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in (second + 1, second + 20, len(whole) - 2):
        path.write_bytes(whole[:cut])
        assert [life.life for life in ledger.beginnings()] == ["12.0"]
        ledger.begin(beginning("12.2"))
        assert [life.life for life in ledger.beginnings()] == ["12.0", "12.2"]
    path.write_bytes(whole[:-1])  # whole but for its newline
    ledger.begin(beginning("12.2"))
    assert [life.life for life in ledger.beginnings()] == ["12.0", "12.1", "12.2"]


def test_why_a_job_stopped_is_there_for_people_until_another_one_begins(tmp_path: Path) -> None:
    ledger, why = JobHistory(tmp_path), tmp_path / "slurm/why_it_stopped.txt"
    ledger.begin(beginning("12.0"))
    ledger.end("12.0", 75, 0, AGAIN)
    assert not why.exists()
    ledger.begin(beginning("12.1"))
    ledger.end("12.1", 2, 0, OVER)
    (line,) = why.read_text(encoding="utf-8").splitlines()
    assert "12.1" in line and OVER.reason in line
    ledger.begin(beginning("13.0"))
    assert not why.exists()
    ledger.end("13.0", 0, 40, DONE)
    assert not why.exists()


def test_the_newest_checkpoint_is_a_published_one(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    (tmp_path / "checkpoints").mkdir()
    assert newest_step(tmp_path) == 0
    for step in (9, 10, 100):
        save_step(tmp_path, step)
    assert newest_step(tmp_path) == 100
    quarantine(tmp_path / "checkpoints/step_100")
    assert newest_step(tmp_path) == 10


@pytest.mark.parametrize(
    "name",
    ["step_50.tmp-12.0.a", ".trash-step_50-1f", "step_50.damaged-1f", "step_50x", "step_", "step_5e1", "last", "50"],
)
def test_what_is_not_named_like_a_published_checkpoint_is_none(tmp_path: Path, name: str) -> None:
    save_step(tmp_path, 20)
    save_step(tmp_path, 50).rename(tmp_path / "checkpoints" / name)
    assert newest_step(tmp_path) == 20


def test_a_folder_without_a_manifest_is_no_checkpoint_nor_is_a_file(tmp_path: Path) -> None:
    save_step(tmp_path, 20)
    (save_step(tmp_path, 50) / "manifest.json").unlink()
    (tmp_path / "checkpoints/step_60").touch()
    (tmp_path / "checkpoints/step_70/manifest.json").mkdir(parents=True)
    assert newest_step(tmp_path) == 20


def test_a_run_whose_checkpoints_are_a_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    assert newest_step(tmp_path) == 0
