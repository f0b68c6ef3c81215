"""A lab for all tests of this folder, and the run that nobody interrupted."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import train_many
from tests.helpers.slurm_jobs import PATIENCE_S, Submitter
from tools.local_slurm import LocalSlurm, why_not

NODES = 12


@pytest.fixture(scope="session")
def lab() -> Iterator[LocalSlurm]:
    """Start a Slurm of our own, and leave nothing of it."""
    if reason := why_not():
        pytest.skip(f"no Slurm here: {reason}")
    with LocalSlurm(nodes=NODES) as running:
        yield running


@pytest.fixture(scope="session")
def submit(lab: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Submitter:
    """Return `submit(name, *sbatch_flags, ...)`: a rehearsal of two ranks of slurm/train_97b.sh."""
    return Submitter(lab, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="session")
def uninterrupted(submit: Submitter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same run on the same layout, started without Slurm and left alone."""
    # Tests that run side by side (pytest-xdist) have folders beside one another; the first to come trains for all.
    shared = tmp_path_factory.getbasetemp()
    output = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "uninterrupted"
    done = output.with_suffix(".done")
    try:
        output.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + PATIENCE_S
        while not done.exists():
            assert time.monotonic() < deadline, f"{output} was never finished"
            time.sleep(0.2)
        return output
    flags = ["--config", "rehearsal", "--deepspeed", "ds_configs/zero2_overlap.json", "--output", str(output)]
    train_many(submit.root, [(2, [*flags, *submit.recipe])])
    done.touch()
    return output
