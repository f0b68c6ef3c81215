"""Where Slurm fails to start tasks, srun says so and exits with 0; no job takes that for work that is done.

The scripts of slurm/ in a lab, whose PMI plugin gives up on a step's nodes. Ranks of training only tell what they see.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ecdit_ds.errors import ExitCode
from ecdit_ds.slurm.job_history import JobHistory
from tests.helpers.launch import ROOT
from tests.helpers.slurm_jobs import ON_CPUS, Job, seen, submit_witness
from tools.local_slurm import LocalSlurm

PMI = {"ECDIT_SRUN_FLAGS": "--mpi=pmi2"}
ARRAYS = {"sample.sh": ("--checkpoint", "RUN"), "evaluate.sh": ("RUN", "loss"), "encode.sh": ("SRC", "DST")}


@dataclass(frozen=True)
class Story:
    """Jobs of which Slurm does not start everything."""

    folder: Path
    trainings: dict[str, Job]
    """By which step of their only life is not started on any node."""
    after: str
    """Number of a job that waits for the first of them to end well."""
    one_node: Job
    """Training is started on one of two nodes, in its first life."""
    arrays: dict[str, Job]
    """Single tasks, by script."""


@pytest.fixture(scope="module")
def story(lab: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Submit all jobs side by side."""
    folder = tmp_path_factory.mktemp("unlaunched")

    def train(name: str, first_node: int, step: int, num_broken: int, **environment: str) -> tuple[Job, list[Path]]:
        nodes = [f"n{first_node}", f"n{first_node + 1}"]
        flags = ("--hold", "--nodes=2", f"--nodelist={','.join(nodes)}", "--ntasks-per-node=1")
        job = submit_witness(lab, folder, name, "0,0", *flags, environment=PMI | environment)
        return job, job.break_launch(step, *nodes[-num_broken:])

    def array(script: str) -> Job:
        environment = PMI | {
            "ECDIT_REHEARSAL": "1",
            "ECDIT_ROOT": str(ROOT),
            "ECDIT_STEPS_PER_INDEX": "1",
            "ECDIT_COMPLETION_DIR": str(folder / "marks"),
        }
        arguments = [str(folder / word) if word.isupper() else word for word in ARRAYS[script]]
        log = folder / f"{script}.log"
        number = lab.ask(
            "sbatch",
            "--parsable",
            "--hold",
            "--array=1",
            f"--output={log}",
            *ON_CPUS,
            "--mem-per-cpu=30",
            f"slurm/{script}",
            *arguments,
            environment=environment,
        ).strip()
        job = Job(lab=lab, number=number, output=folder, log=log)
        job.break_launch(0, *lab.node_names)
        return job

    (folder / "RUN" / "checkpoints" / "step_1").mkdir(parents=True)
    (folder / "RUN" / "checkpoints" / "step_1" / "manifest.json").touch()
    trainings = {
        name: train(name, first_node=1 + 2 * step, step=step, num_broken=2, ECDIT_MAX_LIVES="1")[0]
        for step, name in enumerate(("dry_run", "preflight", "train"))
    }
    one_node, obstacles = train("one_node", 7, step=0, num_broken=1, ECDIT_PREFLIGHT="0")
    arrays = {script: array(script) for script in ARRAYS}
    after = lab.ask(
        "sbatch",
        "--parsable",
        f"--dependency=afterok:{trainings['dry_run'].number}",
        "--output=/dev/null",
        "--wrap=true",
    ).strip()
    for job in (*trainings.values(), one_node, *arrays.values()):
        lab.ask("scontrol", "release", job.number)
    one_node.wait_until(lambda: len(one_node.ends()) == 1, "the end of its first life")
    for obstacle in obstacles:
        obstacle.rmdir()
    yield Story(folder=folder, trainings=trainings, after=after, one_node=one_node, arrays=arrays)
    lab.ask("scancel", after)


@pytest.mark.parametrize("step", ["dry_run", "preflight", "train"])
def test_a_step_that_was_started_on_no_node_is_neither_passed_nor_done(story: Story, step: str) -> None:
    job = story.trainings[step]
    assert job.wait() == "FAILED", job.text
    (end,) = job.ends()
    assert (end["code"], end["is_again"], end["step"]) == (ExitCode.RETRY, False, 0)
    assert "launch failed" in job.text + "".join(log.read_text() for log in job.output.glob("slurm/*/rank_*.log"))
    (line,) = [line for line in job.text.splitlines() if " error: srun ended with exit code 0, but rank 0 " in line]
    assert "not started by Slurm" in line
    why = (job.output / "slurm" / "why_it_stopped.txt").read_text()
    assert "exit code 75 (srun ended with exit code 0, but rank 0 never reported" in why
    started = [what for what in ("dry_run", "preflight", "train") if seen(story.folder, job, 0, what)]
    assert started == ["dry_run", "preflight", "train"][: ["dry_run", "preflight", "train"].index(step)]
    assert JobHistory(job.output).is_checked(job.number) == (step != "dry_run")
    assert not list(job.output.glob("slurm/*/.complete-*"))


def test_a_job_that_waits_for_a_good_end_does_not_start_after_a_launch_that_failed(story: Story) -> None:
    story.trainings["dry_run"].wait()
    time.sleep(1)
    assert "JobState=PENDING" in story.trainings["dry_run"].lab.ask("scontrol", "show", "job", "-o", story.after)


def test_training_that_was_started_on_one_of_two_nodes_has_another_life(story: Story) -> None:
    job = story.one_node
    assert job.wait() == "COMPLETED", job.text
    assert [(end["code"], end["is_again"]) for end in job.ends()] == [(ExitCode.RETRY, True), (0, False)]
    assert [len(seen(story.folder, job, life, "train")) for life in (0, 1)] == [1, 2]
    assert job.text.count(" error: srun ended with exit code 0, but rank 1 of 2 never reported its training") == 1


@pytest.mark.parametrize("script", ARRAYS)
def test_a_task_of_an_array_that_was_not_started_is_not_done(story: Story, script: str) -> None:
    job = story.arrays[script]
    assert job.wait() == "FAILED", job.text
    assert "ExitCode=75:0" in job.lab.ask("scontrol", "show", "job", "-o", job.number)
    (line,) = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: srun ended with exit code 0, but rank 0 never reported its array task as complete")
    assert list((story.folder / "marks").iterdir()) == []
