"""A job at its time limit goes on by itself; one that gets nowhere ends, and says why.

The model is the rehearsal's; script, scheduler, signals, ranks and files are those of a real job.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from ecdit_ds.errors import ExitCode
from tests.helpers.checkpoints import digest
from tests.helpers.slurm_jobs import STEPS, Job, Submitter, check_equal, losses


@dataclass(frozen=True)
class Story:
    """Jobs that need nobody to interfere."""

    time_limit: Job
    crashes_with_progress: Job
    to_be_mended: Job


@pytest.fixture(scope="module")
def story(submit: Submitter, uninterrupted: Path) -> Story:
    """Submit them all, so that they wait for clocks side by side.

    The one with a time limit is slowed down in its first life only, so that on a slow machine it needs few others.
    """
    slow_once = submit.root / "slow_once.sh"
    slow_once.write_text('#!/bin/bash\n[ -z "$SLURM_RESTART_COUNT" ] || unset ECDIT_FAULTS\nexec "$@"\n')
    slow_once.chmod(0o755)
    return Story(
        time_limit=submit(
            "time limit",
            "--time=3",
            "--signal=USR1@60",
            faults="delay=4.5@step",
            environment={"ECDIT_WRAPPER": str(slow_once)},
        ),
        crashes_with_progress=submit(
            "crashes",
            faults="exit=7@after-rename; delay=0.2@step",
            environment={"ECDIT_MAX_LIVES": "1"},
            changes=("train.checkpoint_every=15",),
        ),
        to_be_mended=submit("to be mended", changes=("train.max_steps=many",)),
    )


def test_a_job_at_its_time_limit_saves_is_requeued_and_ends_as_the_uninterrupted_run(
    story: Story, uninterrupted: Path
) -> None:
    job = story.time_limit
    assert job.wait() == "COMPLETED", job.text
    assert job.restarts >= 1
    *before, last = job.ends()
    assert len(before) == job.restarts
    assert {(end["code"], end["is_again"]) for end in before} == {(ExitCode.CHECKPOINTED, True)}
    assert (last["code"], last["step"]) == (ExitCode.DONE, STEPS)
    assert "DUE TO TIME LIMIT" not in job.text
    check_equal(job, uninterrupted)


def test_crashes_that_leave_progress_are_not_capped(story: Story, uninterrupted: Path) -> None:
    job = story.crashes_with_progress
    assert job.wait() == "COMPLETED", job.text
    assert [end["step"] for end in job.ends()] == [15, 30, 30]
    assert "rank 0 died" in job.text  # the ranks' last words, in the job's own log
    assert digest(job.output, STEPS)["samples_seen"] == digest(uninterrupted, STEPS)["samples_seen"]
    assert losses(job.output) == losses(uninterrupted)


def test_what_must_be_mended_first_is_never_requeued(story: Story) -> None:
    job = story.to_be_mended
    assert job.wait() == "FAILED", job.text
    (end,) = job.ends()
    assert (end["code"], end["is_again"]) == (ExitCode.USER_ERROR, False)
    assert "train.max_steps" in job.text
    assert job.restarts == 0
