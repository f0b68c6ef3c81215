"""What Slurm's controller knows of a job, and asking it for another life; standard library only.

A job is asked after by number, or for an array's task by ARRAY_TASK: the bare number of some tasks is the array's too.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from ecdit_ds.errors import ConfigError

_CALL_SECONDS = 60.0
_LOOK_EVERY_S = 5.0
_LOOK_AT_STEPS_EVERY_S = 1.0
_SLURMS_OWN_WARNING_S = 60
"""Where --signal names no time."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """This job, as its own environment tells."""

    name: str
    """What scontrol calls it: `12`, or `12_3`, task 3 of array 12."""
    number: str
    """Its own number, which array tasks have as well."""
    restarts: int
    """How many lives it had before."""
    num_ranks: int
    nodes: str

    @property
    def life(self) -> str:
        """Return what tells this life from all others; leases of checkpoints begin with it too."""
        return f"{self.number}.{self.restarts}"


def own_job(environment: Mapping[str, str]) -> Job:
    """Return the job whose batch script this process is part of.

    Raises:
        ConfigError: there is none.
    """
    try:
        number = environment["SLURM_JOB_ID"]
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return Job(
            name=f"{array}_{task}" if array else number, number=number,
            restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),  # not there in the first life
            num_ranks=int(environment["SLURM_NTASKS"]), nodes=environment["SLURM_JOB_NODELIST"],
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{error}: no batch job; submit one, such as sbatch slurm/train_97b.sh") from None


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What the controller says of a job."""

    state: str
    """RUNNING, COMPLETING (ended by somebody, still being taken down), PENDING, ..."""
    reason: str
    restarts: int
    limit_seconds: float | None
    """None for no limit."""

    @property
    def is_running(self) -> bool:
        """Return whether nobody ends it; SIGNALING and RESIZING are passing states of a job that runs."""
        return self.state in ("RUNNING", "SIGNALING", "RESIZING")

    @property
    def is_at_its_limit(self) -> bool:
        """Return whether its time is over, and nothing else ends it."""
        return self.state in ("COMPLETING", "TIMEOUT") and self.reason == "TimeLimit"


def parse_state(line: str) -> JobState:
    """Read a line of `scontrol show job --oneliner`.

    Raises:
        ConfigError: it has not what is wanted.
    """
    _, _, told = line.partition(" UserId=")  # before it is the job's name, which may hold anything
    wanted = {"JobState": r"\S+", "Reason": r"\S+", "Restarts": "[0-9]+", "TimeLimit": r"\S+"}
    found = {key: re.search(rf" {key}=({pattern})", told) for key, pattern in wanted.items()}
    values = {key: match[1] for key, match in found.items() if match}
    if len(values) < len(found):
        raise ConfigError(f"scontrol show job: {line[:200]!r} tells no {', '.join(found.keys() - values)}")
    return JobState(
        state=values["JobState"], reason=values["Reason"], restarts=int(values["Restarts"]),
        limit_seconds=parse_limit(values["TimeLimit"]),
    )  # fmt: skip


def parse_limit(text: str) -> float | None:
    """Return the seconds of `[DAYS-]HH:MM:SS`; None for UNLIMITED."""
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 86400.0 * days + 3600 * hours + 60 * minutes + seconds


def ask_state(job: Job, patience_s: float) -> JobState:
    """Return the job's state; a controller that restarts is waited for.

    Raises:
        ConfigError: it did not answer within `patience_s`, or there is no Slurm here to ask.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return parse_state(_call("scontrol", "show", "job", "--oneliner", job.name))
        except ConfigError:
            if time.monotonic() > deadline or shutil.which("scontrol") is None:
                raise
        time.sleep(_LOOK_EVERY_S)


def is_alive(job_number: str, patience_s: float) -> bool:
    """Return whether a job waits or runs, or is still being taken down after `patience_s`; False where nobody knows."""
    deadline = time.monotonic() + patience_s
    while True:
        try:  # asked for an array's own number, squeue tells of all its tasks
            told = _call("squeue", "--noheader", "--jobs", job_number, "--format", "%A %T").splitlines()
        except ConfigError:
            return False
        states = [state for number, _, state in (line.strip().partition(" ") for line in told) if number == job_number]
        if not states or states != ["COMPLETING"] or time.monotonic() > deadline:
            return bool(states)
        time.sleep(_LOOK_EVERY_S)


def seconds_of_warning(job: Job) -> int | None:
    """Return how long before its end the job's script has the signal come; None where it says nothing.

    What sbatch's own --signal said instead, Slurm tells nobody; nor the script, on some sites.
    """
    script = ""
    with suppress(ConfigError):
        script = _call("scontrol", "write", "batch_script", job.name, "-")
    found = re.findall(r"^#SBATCH\s(?:.*\s)?--signal[= ]\"?(?:[RB]+:)?\w+(?:@([0-9]+))?", script, re.MULTILINE)
    return int(found[-1] or _SLURMS_OWN_WARNING_S) if found else None


def kill_wait_seconds() -> float:
    """Return how long Slurm waits between SIGTERM and SIGKILL; its default where nobody tells."""
    with suppress(ConfigError):
        if match := re.search(r"^KillWait\s*=\s*([0-9]+)", _call("scontrol", "show", "config"), re.MULTILINE):
            return float(match[1])
    return 30.0


def end_steps(job: Job, patience_s: float) -> None:
    """Ask what srun started within a job to end, by SIGTERM, and kill what has not ended after `patience_s`.

    A controller that does not answer is asked again: what it does not tell of may live.
    """
    for flags, seconds in ((["--signal=TERM"], patience_s), ([], _CALL_SECONDS)):
        asked, deadline = set[str](), time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(ConfigError):
                steps = _steps_of(job)
                if not steps:
                    return
                for step in steps - asked:
                    _call("scancel", *flags, step)
                    asked.add(step)
            time.sleep(_LOOK_AT_STEPS_EVERY_S)


def _steps_of(job: Job) -> set[str]:
    steps = _call("squeue", "--noheader", "--steps", "--jobs", job.name, "--format", "%i")
    return set(re.findall(rf"^\s*({re.escape(job.name)}\.[0-9]+)\s*$", steps, re.MULTILINE))  # not the batch script


class RefusedError(ConfigError):
    """The controller has answered, and will not answer otherwise."""


def requeue(job: Job) -> None:
    """Put the job back into the queue; Slurm then ends what is left of this life.

    Raises:
        RefusedError: it may not be.
        ConfigError: it could not be, such as by a controller that is busy or just back.
    """
    try:
        _call("scontrol", "requeue", job.name)
    except ConfigError as error:
        if re.search("disabled|denied|[Ii]nvalid", str(error)):
            raise RefusedError(str(error)) from None
        raise


def _call(*command: str) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{' '.join(command)}: {error}") from None
    if ended.returncode:
        raise ConfigError(f"{' '.join(command)}: {' '.join(ended.stderr.split()) or f'exit {ended.returncode}'}")
    return ended.stdout
