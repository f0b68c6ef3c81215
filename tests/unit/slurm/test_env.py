"""What slurm/env.sh makes of a site's and a user's settings; bash alone, no Slurm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENV = Path(__file__).resolve().parents[3] / "slurm" / "env.sh"


def source(folder: Path, site: str | None = None, then: str = "env", **given: str) -> subprocess.CompletedProcess[str]:
    """Source it in a folder that stands for the repository, and run a command of bash then."""
    (folder / "slurm").mkdir()
    shutil.copy(ENV, folder / "slurm" / "env.sh")
    if site is not None:
        (folder / "slurm" / "site.sh").write_text(site)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "ECDIT_PYTHON": sys.executable} | given
    return subprocess.run(
        ["bash", "-c", f"source slurm/env.sh\n{then}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def variables(told: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the exported ones, as a rank would see them."""
    assert told.returncode == 0, told.stderr
    return dict(line.split("=", 1) for line in told.stdout.splitlines() if "=" in line)


def test_what_a_site_sets_is_seen_by_supervisor_and_ranks(tmp_path: Path) -> None:
    site = "ECDIT_SIGNAL_SECONDS=77\nECDIT_INTERFACE=ib0\nexport NCCL_DEBUG=INFO\n"
    found = variables(source(tmp_path, site))
    assert found["ECDIT_SIGNAL_SECONDS"] == "77"
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("ib0", "ib0")
    assert found["NCCL_DEBUG"] == "INFO"


def test_without_a_site_file_defaults_hold_and_no_interface_is_forced(tmp_path: Path) -> None:
    found = variables(source(tmp_path, SLURM_CPUS_PER_TASK="8"))
    assert (found["OMP_NUM_THREADS"], found["SRUN_CPUS_PER_TASK"], found["SLURM_EXPORT_ENV"]) == ("8", "8", "ALL")
    assert "NCCL_SOCKET_IFNAME" not in found and "GLOO_SOCKET_IFNAME" not in found


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ({}, "runs/run"),
        ({"SLURM_JOB_NAME": "train_97b.sh"}, "runs/train_97b"),
        ({"SLURM_JOB_NAME": "try2", "SLURM_ARRAY_TASK_ID": "3"}, "runs/try2_3"),
        ({"SLURM_JOB_NAME": "my big.run", "SLURM_ARRAY_TASK_ID": "0"}, "runs/my big.run_0"),
        ({"SLURM_JOB_NAME": "try2", "ECDIT_OUTPUT": "/scratch/a b"}, "/scratch/a b"),
    ],
)
def test_a_runs_folder_is_its_jobs_name_unless_it_is_told(tmp_path: Path, given: dict[str, str], output: str) -> None:
    told = source(tmp_path, then='printf "%s" "$ECDIT_OUTPUT"', **given)
    assert told.stdout == output


def test_a_rehearsal_has_a_recipe_of_its_own_and_sees_no_gpu(tmp_path: Path) -> None:
    told = source(tmp_path, then='echo "[$ECDIT_RECIPE]"; env', ECDIT_REHEARSAL="1", CUDA_VISIBLE_DEVICES="0,1")
    assert told.stdout.startswith("[rehearsal]\n")
    assert variables(told)["CUDA_VISIBLE_DEVICES"] == ""


def test_a_python_that_cannot_be_run_is_refused_unless_a_container_has_it(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("bare", "wrapped", "flagged", "supervised")]
    for folder in folders:
        folder.mkdir()
    bare, wrapped, flagged, supervised = folders
    refused = source(bare, ECDIT_PYTHON="/no/python")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ECDIT_PYTHON: /no/python cannot be run; make .venv/installed makes")
    assert source(wrapped, ECDIT_PYTHON="/no/python", ECDIT_WRAPPER="apptainer exec a.sif").returncode == 0
    assert source(flagged, ECDIT_PYTHON="/no/python", ECDIT_SRUN_FLAGS="--container-image=a.sqsh").returncode == 0
    refused = source(supervised, then="supervise srun -- x", ECDIT_PYTHON="/no/python", ECDIT_WRAPPER="apptainer")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ECDIT_HOST_PYTHON: /no/python cannot be run")


def test_a_container_may_be_named_after_its_job_so_that_all_steps_of_it_share_one(tmp_path: Path) -> None:
    site = 'ECDIT_SRUN_FLAGS="--container-image=a.sqsh --container-name=ecdit_$SLURM_JOB_ID"\n'
    told = source(tmp_path, site, then='printf "%s\\n" "${ECDIT_SRUN_FLAGS[@]}"', SLURM_JOB_ID="12")
    assert told.stdout.splitlines() == ["--container-image=a.sqsh", "--container-name=ecdit_12"]


@pytest.mark.parametrize(
    ("arguments", "tasks", "code"),
    [("--task 1/4", "4", 2), ("--task=1/4", "4", 2), ("--task 1/4", "1", 0), ("--tasks 4", "4", 0), ("", "4", 0)],
)
def test_tasks_of_an_array_may_not_all_be_told_to_be_one(tmp_path: Path, arguments: str, tasks: str, code: int) -> None:
    told = source(tmp_path, then=f"refuse_same_task --checkpoint a {arguments}", SLURM_ARRAY_TASK_COUNT=tasks)
    assert told.returncode == code
    assert told.stderr.startswith("error: --task: names one task") == (code == 2)


@pytest.mark.parametrize("name", ["..", ".", "...sh"])
def test_a_job_whose_name_is_no_folders_is_refused(tmp_path: Path, name: str) -> None:
    told = source(tmp_path, SLURM_JOB_NAME=name)
    assert told.returncode == 2
    assert told.stderr.startswith(f"error: --job-name={name}: names no folder")


INHERITED = {
    "SLURM_ARRAY_JOB_ID": "10",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "8",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_JOB_ID": "12",
}
TOLD = (
    "JobId=12 {array}JobName=a UserId=x Requeue=1 Restarts=0 b\n   UserId=root(0) GroupId=root(0)\n"
    "   JobState=RUNNING\n   Requeue=1 Restarts={restarts} BatchFlag=1\n   Comment=Requeue=1 Restarts=0 JobId=12 y\n"
)
"""Its name and its comment look like what is asked for."""


@pytest.mark.parametrize(
    ("told", "has_array", "has_lives"),
    [
        (TOLD.format(array="", restarts=0), False, False),  # sbatch was run by task 3 of array 10, in its third life
        (TOLD.format(array="", restarts=2), False, True),
        (TOLD.format(array="ArrayJobId=10 ArrayTaskId=3 ArrayTaskThrottle=1 ", restarts=2), True, True),
        (TOLD.format(array="ArrayJobId=10 ArrayTaskId=3 ", restarts=0), True, False),
        (TOLD.format(array="ArrayJobId=12 ArrayTaskId=3 ", restarts=0), False, False),
        (
            "JobId=11 ArrayJobId=12 ArrayTaskId=1 JobName=a\n   Requeue=1 Restarts=0 x\n",
            True,
            True,
        ),  # nothing of this job
        ("", True, True),  # a controller that is away
    ],
)
def test_a_job_forgets_what_its_submitter_was_told_of_itself(
    tmp_path: Path, told: str, has_array: bool, has_lives: bool
) -> None:
    (tmp_path / "scontrol").write_text(
        f"#!/bin/sh\nprintf '%s\\n' 'JobId=112 x' '   Requeue=1 Restarts=0 y' '' '{told}'\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    found = variables(source(tmp_path, **INHERITED))
    assert ("SLURM_ARRAY_JOB_ID" in found, "SLURM_ARRAY_TASK_COUNT" in found) == (has_array, has_array)
    assert ("SLURM_RESTART_COUNT" in found) == has_lives
