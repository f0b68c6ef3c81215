"""A job that loses a node, or its controller, ends as if nothing had been.

The model is the rehearsal's; script, scheduler, signals, ranks and files are those of a real job.
"""

import time
from pathlib import Path

from tests.helpers.slurm_jobs import Submitter, check_equal, is_gone
from tools.local_slurm import LocalSlurm


def test_a_job_goes_on_elsewhere_when_a_node_is_lost_with_all_that_ran_on_it(
    lab: LocalSlurm, submit: Submitter, uninterrupted: Path
) -> None:
    job = submit("lost node")
    job.wait_for_step(7)
    lost = job.hosts()[1]
    began = time.monotonic()
    lab.lose_node(lost)
    job.wait_until(lambda: len(job.nodes()) == 2, "its second life")
    assert time.monotonic() - began < 90
    assert lost not in job.hosts()
    lab.start_node(lost)
    assert job.wait() == "COMPLETED", job.text
    check_equal(job, uninterrupted)


def test_a_life_that_slurm_lost_sight_of_neither_publishes_nor_ends_the_one_that_took_over(
    lab: LocalSlurm, submit: Submitter, uninterrupted: Path
) -> None:
    # On the first node are the batch script, srun and rank 0. Its daemon dies and they do not; rank 0 stands still in
    # the midst of a save until the second life has begun.
    job = submit("two lives", faults="delay=0.2@step; delay=2@mid-shard,step=12")
    job.wait_until(lambda: bool(list(job.output.glob("checkpoints/step_12.tmp-*"))), "the save of step 12")
    old, first_node = job.ranks()[0], job.hosts()[0]
    old.suspend()
    lab.kill(first_node)
    job.wait_until(lambda: len(job.nodes()) == 2, "its second life")
    assert not is_gone(old.pid), "the first life was to be still there"
    job.wait_until(lambda: "goes on from" in job.said_by_first_rank(life=1), "training in the second life")
    old.resume()
    job.wait_until(lambda: is_gone(old.pid), "the end of the first life's rank")
    lab.start_node(first_node)
    assert job.wait() == "COMPLETED", job.text
    assert job.restarts == 1
    assert "step_12:" not in job.said_by_first_rank(life=0)
    assert "step_6 at step 6" in job.said_by_first_rank(life=1)
    assert "not requeued from here" in job.text
    check_equal(job, uninterrupted)


def test_a_controller_that_dies_and_comes_back_disturbs_nobody(
    lab: LocalSlurm, submit: Submitter, uninterrupted: Path
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
