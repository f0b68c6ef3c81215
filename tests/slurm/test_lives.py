"""slurm/train_97b.sh on a real scheduler: whatever ends a life, the job ends as if nothing had, or says why not.

The model is the rehearsal's; script, scheduler, signals, ranks and files are those of a real job.
"""

import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ecdit_ds.checkpoint.manifest import list_checkpoints
from ecdit_ds.checkpoint.tending import fault_of
from ecdit_ds.errors import ExitCode
from tests.helpers.slurm_jobs import STEPS, Job, Submitter, digest, is_gone, losses
from tools.slurm_lab import Lab


@dataclass(frozen=True)
class Story:
    """Jobs that need nobody to interfere."""

    time_limit: Job
    crash_loop: Job
    crashes_with_progress: Job
    to_be_mended: Job


@pytest.fixture(scope="module")
def story(submit: Submitter, uninterrupted: Path) -> Story:
    """Submit them all, so that they wait for clocks side by side."""
    return Story(
        time_limit=submit("time limit", "--time=2", "--signal=USR1@60", faults="delay=1.8@step"),
        crash_loop=submit("crash loop", faults="exit=7@step,step=2,rank=1"),
        crashes_with_progress=submit(
            "crashes", faults="exit=7@after-rename; delay=0.2@step", environment={"ECDIT_MAX_LIVES": "1"},
            changes=("train.checkpoint_every=15",),
        ),
        to_be_mended=submit("to be mended", changes=("train.max_steps=many",)),
    )  # fmt: skip


def check_equal(job: Job, uninterrupted: Path) -> None:
    """The job's run is the uninterrupted one, to the last bit."""
    assert digest(job.output) == digest(uninterrupted)
    assert losses(job.output) == losses(uninterrupted)
    assert not list(job.output.glob("checkpoints/*.tmp-*"))


def nodes_of(lab: Lab, job: Job) -> list[str]:
    """Return the nodes of the job's newest life."""
    return lab.ask("scontrol", "show", "hostnames", job.nodes()[-1]).split()


def said_by_first_rank(job: Job, life: int) -> str:
    """Return the log of rank 0 of a life."""
    return (job.output / "slurm" / f"{job.number}.{life}" / "rank_0000.log").read_text()


def test_a_signal_while_ranks_import_and_signals_during_a_save_end_in_one_save_and_the_same_run(
    story: Story, submit: Submitter, uninterrupted: Path
) -> None:
    job = submit("signals", faults="delay=0.2@step; delay=2@mid-shard,step=12")
    job.wait_until(lambda: len(job.ranks()) == 2, "two ranks")
    submit.lab.ask("scancel", "--signal=USR1", f"{job.number}.0")  # no rank has imported anything yet
    job.wait_until(lambda: len(job.ends()) == 1, "the first life's end")
    first = job.ends()[0]
    assert (first["code"], first["is_again"]) == (ExitCode.SAVED, True), job.text
    assert first["step"] >= 1

    job.wait_until(lambda: bool(list(job.output.glob("checkpoints/step_12.tmp-*"))), "the save of step 12")
    job.signal(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, rank=1)
    assert job.wait() == "COMPLETED", job.text
    second = job.ends()[1]
    assert second["code"] == ExitCode.SAVED
    assert 12 <= second["step"] < STEPS
    said = said_by_first_rank(job, life=1)
    assert said.count(f"saved {job.output / 'checkpoints' / 'step_'}{second['step']}:") == 1
    assert said.count("stopped at step") == 1
    assert job.restarts == 2
    check_equal(job, uninterrupted)


@pytest.mark.parametrize(("partition", "is_saved"), [("low", True), ("rude", False)])
def test_a_preempted_job_saves_within_its_budget_or_goes_on_from_the_save_before(
    submit: Submitter, uninterrupted: Path, partition: str, is_saved: bool
) -> None:
    # From step 8 on, to save takes longer than the time there is: none in `rude`, and KillWait.
    faults = "delay=0.3@step" if is_saved else "delay=0.3@step; delay=25@mid-shard,step=8; delay=25@mid-shard,step=9"
    faults += "" if is_saved else "; delay=25@mid-shard,step=10; delay=25@mid-shard,step=11"
    job = submit(f"preempted {partition}", f"--partition={partition}", faults=faults)
    job.wait_for_step(7)
    nodes = job.nodes()[0]
    high = ["sbatch", "--parsable", "--partition=high", f"--nodelist={nodes}", "--nodes=2", "--exclusive", "--time=1"]
    other = submit.lab.ask(*high, "--output=/dev/null", "--wrap=sleep 1").strip()
    assert job.wait() == "COMPLETED", job.text
    assert submit.lab.ask("scontrol", "show", "job", "-o", other).count("JobState=COMPLETED") == 1
    assert job.restarts >= 1
    second = said_by_first_rank(job, life=1)
    step = int(second.partition("goes on from ")[2].split("at step ")[1].split()[0])
    assert step > 6 if is_saved else step == 6
    check_equal(job, uninterrupted)


def test_a_job_goes_on_elsewhere_when_a_node_is_lost_with_all_that_ran_on_it(
    lab: Lab, submit: Submitter, uninterrupted: Path
) -> None:
    job = submit("lost node")
    job.wait_for_step(7)
    lost = nodes_of(lab, job)[1]
    began = time.monotonic()
    lab.lose_node(lost)
    job.wait_until(lambda: len(job.nodes()) == 2, "its second life")
    assert time.monotonic() - began < 90
    assert lost not in nodes_of(lab, job)
    lab.start_node(lost)
    assert job.wait() == "COMPLETED", job.text
    check_equal(job, uninterrupted)


def test_a_life_that_slurm_lost_sight_of_neither_publishes_nor_ends_the_one_that_took_over(
    lab: Lab, submit: Submitter, uninterrupted: Path
) -> None:
    # On the first node are the batch script, srun and rank 0. Its daemon dies and they do not; rank 0 stands still in
    # the midst of a save until the second life has begun.
    job = submit("two lives", faults="delay=0.2@step; delay=2@mid-shard,step=12")
    job.wait_until(lambda: bool(list(job.output.glob("checkpoints/step_12.tmp-*"))), "the save of step 12")
    old, first_node = job.ranks()[0], nodes_of(lab, job)[0]
    old.suspend()
    lab.kill(first_node)
    job.wait_until(lambda: len(job.nodes()) == 2, "its second life")
    assert not is_gone(old.pid), "the first life was to be still there"
    job.wait_until(lambda: "goes on from" in said_by_first_rank(job, life=1), "training in the second life")
    old.resume()
    job.wait_until(lambda: is_gone(old.pid), "the end of the first life's rank")
    lab.start_node(first_node)
    assert job.wait() == "COMPLETED", job.text
    assert job.restarts == 1
    assert "step_12:" not in said_by_first_rank(job, life=0)
    assert "step_6 at step 6" in said_by_first_rank(job, life=1)
    assert "not requeued from here" in job.text
    check_equal(job, uninterrupted)


def test_a_controller_that_dies_and_comes_back_disturbs_nobody(
    lab: Lab, submit: Submitter, uninterrupted: Path
) -> None:
    job = submit("controller", faults="delay=0.6@step")
    job.wait_for_step(2)
    time.sleep(6)  # it writes its state down every few seconds; what it never knew, nobody can bring back
    lab.kill("slurmctld")
    time.sleep(15)
    lab.start_controller()
    assert job.wait() == "COMPLETED", job.text
    assert job.restarts == 0
    check_equal(job, uninterrupted)


def test_a_requeue_by_an_operator_during_a_save_leaves_the_save_before_and_the_same_run(
    submit: Submitter, uninterrupted: Path
) -> None:
    job = submit("operator", faults="delay=0.2@step; delay=25@mid-shard,step=12")
    job.wait_until(lambda: bool(list(job.output.glob("checkpoints/step_12.tmp-*"))), "the save of step 12")
    submit.lab.ask("scontrol", "requeue", job.number)
    job.wait_until(lambda: len(job.nodes()) == 2, "its second life")
    newest = list_checkpoints(job.output / "checkpoints")[0]
    assert newest.name in ("step_6", "step_12")  # 12 where the last of KillWait was enough
    assert job.wait() == "COMPLETED", job.text
    assert job.restarts == 1
    check_equal(job, uninterrupted)


def test_a_cancelled_job_stays_cancelled_and_leaves_a_valid_checkpoint(submit: Submitter) -> None:
    job = submit("cancelled", faults="delay=0.3@step")
    job.wait_for_step(8)
    submit.lab.ask("scancel", job.number)
    assert job.wait() == "CANCELLED", job.text
    time.sleep(10)  # as long as a requeued job waits here before it starts
    assert job.restarts == 0
    assert len(job.nodes()) == 1
    newest = list_checkpoints(job.output / "checkpoints")[0]
    assert fault_of(newest) is None
    assert int(newest.name.removeprefix("step_")) >= 8


def test_a_job_at_its_time_limit_saves_is_requeued_and_ends_as_the_uninterrupted_run(
    story: Story, uninterrupted: Path
) -> None:
    job = story.time_limit
    assert job.wait() == "COMPLETED", job.text
    assert job.restarts >= 1
    *before, last = job.ends()
    assert len(before) == job.restarts
    assert {(end["code"], end["is_again"]) for end in before} == {(ExitCode.SAVED, True)}
    assert (last["code"], last["step"]) == (ExitCode.DONE, STEPS)
    assert "DUE TO TIME LIMIT" not in job.text
    check_equal(job, uninterrupted)


def test_a_crash_loop_ends_after_three_lives_without_progress_and_says_why(story: Story) -> None:
    job = story.crash_loop
    assert job.wait() == "FAILED", job.text
    assert [end["is_again"] for end in job.ends()] == [True, True, False]
    assert "3 lives in a row" in (job.output / "slurm" / "why_it_stopped.txt").read_text()
    assert "rank 1 died" in job.text  # the ranks' last words, in the job's own log


def test_crashes_that_leave_progress_are_not_capped(story: Story, uninterrupted: Path) -> None:
    job = story.crashes_with_progress
    assert job.wait() == "COMPLETED", job.text
    assert [end["step"] for end in job.ends()] == [15, 30, 30]
    assert digest(job.output)["samples_seen"] == digest(uninterrupted)["samples_seen"]
    assert losses(job.output) == losses(uninterrupted)


def test_what_must_be_mended_first_is_never_requeued(story: Story) -> None:
    job = story.to_be_mended
    assert job.wait() == "FAILED", job.text
    (end,) = job.ends()
    assert (end["code"], end["is_again"]) == (ExitCode.USER_ERROR, False)
    assert "train.max_steps" in job.text
    assert job.restarts == 0


def test_shellcheck_finds_nothing_in_any_script() -> None:
    scripts = sorted(str(path) for path in Path("slurm").glob("*.sh"))
    assert len(scripts) >= 3
    assert subprocess.run(["shellcheck", "-x", *scripts], check=False).returncode == 0
