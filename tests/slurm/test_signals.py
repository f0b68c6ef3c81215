"""Whoever signals a job, or takes its nodes, finds it saved, and it ends as if nothing had been.

The model is the rehearsal's; script, scheduler, signals, ranks and files are those of a real job.
"""

import signal
import time
from pathlib import Path

import pytest

from ecdit_ds.checkpoint.naming import list_checkpoints, step_of
from ecdit_ds.checkpoint.retention import find_damage
from ecdit_ds.errors import ExitCode
from tests.helpers.slurm_jobs import STEPS, Submitter, check_equal


def test_a_signal_while_ranks_import_and_signals_during_a_save_end_in_one_save_and_the_same_run(
    submit: Submitter, uninterrupted: Path
) -> None:
    job = submit("signals", faults="delay=0.2@step; delay=2@mid-shard,step=12")
    job.wait_until(lambda: len(job.ranks()) == 2, "two ranks")
    submit.lab.ask("scancel", "--signal=USR1", f"{job.number}.0")  # no rank has imported anything yet
    job.wait_until(lambda: len(job.ends()) == 1, "the first life's end")
    first = job.ends()[0]
    assert (first["code"], first["is_again"]) == (ExitCode.CHECKPOINTED, True), job.text
    assert first["step"] >= 1

    job.wait_until(lambda: bool(list(job.output.glob("checkpoints/step_12.tmp-*"))), "the save of step 12")
    submit.lab.ask("scancel", "--batch", "--signal=USR1", job.number)  # as --signal=B:USR1@S does: handed on to ranks
    job.signal(signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, rank=1)
    assert job.wait() == "COMPLETED", job.text
    second = job.ends()[1]
    assert second["code"] == ExitCode.CHECKPOINTED
    assert 12 <= second["step"] < STEPS
    said = job.said_by_first_rank(life=1)
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
    second = job.said_by_first_rank(life=1)
    step = int(second.partition("goes on from ")[2].split("at step ")[1].split()[0])
    assert step > 6 if is_saved else step == 6
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
    assert find_damage(newest) is None
    assert step_of(newest) >= 8
