"""Jobs of slurm/train_97b.sh in a lab: the rehearsal's recipe, slowed down, so that there is time to interfere."""

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ecdit_ds.slurm.job_history import JobHistory
from tests.helpers.checkpoints import digest
from tests.helpers.launch import ROOT, metrics_of
from tools.local_slurm import LocalSlurm

SCRIPT = str(ROOT / "slurm" / "train_97b.sh")
STEPS = 30
RECIPE = (
    "parallel.tp=1",
    f"train.max_steps={STEPS}",
    "train.checkpoint_every=6",
    "train.log_every=1",
    "train.evaluate_every=1000",
    "train.sample_every=1000",
    "train.unmasked_from_step=24",
    "data.num_workers=0",
    "data.num_train=64",
    "sample.prompts=[]",
)
"""The rehearsal on two ranks with a half of the experts each."""
ON_CPUS = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
PATIENCE_S = 900.0


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    lab: LocalSlurm
    number: str
    output: Path
    log: Path

    @property
    def text(self) -> str:
        """Return what all its lives said so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def restarts(self) -> int:
        """Return what the controller counts."""
        shown = self.lab.ask("scontrol", "show", "job", "-o", self.number)
        return int(shown.partition("Restarts=")[2].split()[0])

    def ends(self) -> list[dict[str, Any]]:
        """Return the last lines of the lives that wrote one."""
        lines = (self.output / "slurm" / "lives.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == "end"]

    def nodes(self) -> list[str]:
        """Return the nodes of each life, as Slurm writes them."""
        return [life.nodes for life in JobHistory(self.output).beginnings()]

    def hosts(self) -> list[str]:
        """Return the nodes of the newest life, one by one."""
        return self.lab.ask("scontrol", "show", "hostnames", self.nodes()[-1]).split()

    def said_by_first_rank(self, life: int) -> str:
        """Return the log of rank 0 of a life."""
        return (self.output / "slurm" / f"{self.number}.{life}" / "rank_0000.log").read_text()

    def wait(self) -> str:
        """Wait until the job is over, whatever its number of lives; return its last state."""
        state = ""

        def is_over() -> bool:
            nonlocal state
            shown = self.lab.ask("scontrol", "show", "job", "-o", self.number)
            state = shown.partition("JobState=")[2].split()[0]
            return state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING")

        self.wait_until(is_over, "its end")
        return state

    def wait_for_step(self, step: int) -> None:
        """Wait until that step was trained and written down."""
        log = self.output / "metrics.jsonl"
        self.wait_until(
            lambda: log.exists() and any(m["step"] >= step for m in metrics_of(self.output)[-1:]), f"step {step}"
        )

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for something that this job does, or fail with all that it said."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                if is_so():
                    return
            except (OSError, ValueError):  # a line that is being written, a controller that is away
                pass
            time.sleep(0.1)
        logs = [f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(self.output.glob("slurm/*/*.log"))]
        raise AssertionError("\n".join([f"job {self.number} did not come to {what}:", self.text, *logs]))

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that train now, by rank."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or ()
            if "ecdit_ds/train.py" in command and str(self.output) in command and "--hold-signals" not in command:
                found.append((int(process.environ()["RANK"]), process))
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def break_launch(self, step: int, *nodes: str) -> list[Path]:
        """Have Slurm fail to start a step's tasks on some nodes, as long as what this returns is there.

        Its PMI plugin finds a folder where its socket is to be, and gives up. Needs `srun --mpi=pmi2`.
        """
        obstacles = [self.lab.folder / "spool" / node / f"sock.pmi2.{self.number}.{step}" for node in nodes]
        for obstacle in obstacles:
            obstacle.mkdir()
        return obstacles

    def signal(self, *numbers: signal.Signals, rank: int) -> None:
        """Send signals to one rank, shortly after one another."""
        for number in numbers:
            self.ranks()[rank].send_signal(number)
            time.sleep(0.05)


class Submitter:
    """Submits jobs that share encoded data."""

    def __init__(self, lab: LocalSlurm, root: Path) -> None:
        self.lab, self.root = lab, root

    @property
    def recipe(self) -> list[str]:
        """Return train.py's arguments that make the rehearsal short."""
        changes = (*RECIPE, f"data.cache_dir={self.root / 'cache'}")
        return [part for change in changes for part in ("--set", change)]

    def __call__(
        self,
        name: str,
        *flags: str,
        faults: str = "delay=0.2@step",
        changes: tuple[str, ...] = (),
        nodes: int = 2,
        environment: dict[str, str] | None = None,
    ) -> Job:
        """Submit slurm/train_97b.sh as a rehearsal with sbatch's `flags`; preflight is off unless asked for."""
        output, log = self.root / name, self.root / f"{name}.log"
        given = {
            "ECDIT_REHEARSAL": "1",
            "ECDIT_PYTHON": sys.executable,
            "ECDIT_OUTPUT": str(output),
            "ECDIT_PREFLIGHT": "0",
            "ECDIT_MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "ECDIT_FAULTS": faults,
            "ECDIT_SIGNAL_SECONDS": "0",
            "PYTHONDONTWRITEBYTECODE": "",
        }
        settings = [part for change in changes for part in ("--set", change)]
        number = self.lab.ask(
            "sbatch",
            "--parsable",
            f"--nodes={nodes}",
            *ON_CPUS,
            "--time=60",
            f"--output={log}",
            *flags,
            f"--chdir={ROOT}",
            SCRIPT,
            *self.recipe,
            *settings,
            environment=given | {"ECDIT_ROOT": str(ROOT)} | (environment or {}),
        ).strip()
        return Job(lab=self.lab, number=number, output=output, log=log)


def losses(output: Path) -> list[tuple[int, float]]:
    """Return the steps of a run with their losses."""
    return [(record["step"], record["loss"]) for record in metrics_of(output)]


def check_equal(job: Job, uninterrupted: Path) -> None:
    """Check that the job's run is the uninterrupted one, to the last bit."""
    assert digest(job.output, STEPS) == digest(uninterrupted, STEPS)
    assert losses(job.output) == losses(uninterrupted)
    assert not list(job.output.glob("checkpoints/*.tmp-*"))


def is_gone(pid: int) -> bool:
    """Return whether a process has ended."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def submit_witness(
    lab: LocalSlurm, folder: Path, name: str, codes: str, *flags: str, environment: dict[str, str] | None = None
) -> Job:
    """Submit a job whose ranks only tell, in `folder`, what they see."""
    log, given = folder / f"{name}.log", without_a_model(folder, name, codes)
    # `--nodes` is the one number that a lab with fewer than 64 nodes needs otherwise.
    number = lab.ask(
        "sbatch", "--parsable", "--nodes=1", f"--output={log}", *flags, SCRIPT, environment=given | (environment or {})
    ).strip()
    return Job(lab=lab, number=number, output=folder / name, log=log)


def without_a_model(folder: Path, name: str, codes: str) -> dict[str, str]:
    """Return the environment of a job whose ranks only tell what they see."""
    wrapper = folder / "no_model.sh"
    wrapper.write_text(
        '#!/bin/bash\nuntil [[ $1 == *.py ]]; do before+=("$1"); shift; done\n'
        'exec "${before[@]}" tests/helpers/rank_witness.py "$@"\n'
    )
    wrapper.chmod(0o755)
    return {
        "ECDIT_ROOT": str(ROOT),
        "ECDIT_PYTHON": sys.executable,
        "ECDIT_OUTPUT": str(folder / name),
        "ECDIT_WRAPPER": str(wrapper),
        "WITNESS": str(folder),
        "WITNESS_CODES": codes,
    }


def seen(folder: Path, job: Job, life: int, what: str) -> list[dict[str, Any]]:
    """Return what the ranks of a step saw, by rank."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{job.number}.{life}.{what}.*.json")]
    return sorted(found, key=lambda facts: int(facts["environment"]["RANK"]))
