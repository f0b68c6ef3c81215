"""What Slurm's controller knows of a job, and asking it for another life; standard library only.

A job is asked after by number, or for an array's task by ARRAY_TASK: the bare number of some tasks is the array's too.
"""

import re
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from ecdit_ds.errors import ConfigError

T = TypeVar("T")
_CALL_SECONDS = 90.0
"""More than the minute for which Slurm's commands wait for a slurm.conf that is not there."""
_LOOK_EVERY_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LOOK_AT_STEPS_EVERY_S = 1.0
_SLURMS_OWN_WARNING_S = 60
"""Where --signal names no time."""
_OF_ONE_THAT_IS_AWAY = (
    r"unable to contact slurm controller|socket timed out|zero bytes were transmitted|in standby mode"
    r"|(message|communication|connection) \w+ failure|connection (refused|reset|timed out)|not connected"
    r"|temporarily unavailable|try again later|create job record, try again|rate limit"
)
"""What Slurm itself says of what passes; a refusal has a site's own words, or others of Slurm's."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
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


def own_job(environment: Mapping[str, str]) -> SlurmJob:
    """Return the job whose batch script this process is part of.

    Raises:
        ConfigError: there is none.
    """
    try:
        number = environment["SLURM_JOB_ID"]
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return SlurmJob(
            name=f"{array}_{task}" if array else number,
            number=number,
            restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),  # not there in the first life
            num_ranks=int(environment["SLURM_NTASKS"]),
            nodes=environment["SLURM_JOB_NODELIST"],
        )
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


def parse_state(told: str) -> JobState:
    """Read what `scontrol show job` tells of one job.

    Names, comments and paths may look like anything of Slurm's, but have lines that begin otherwise.

    Raises:
        ConfigError: it has not what is wanted.
    """
    wanted = {
        "JobState": r"JobState=(\S+)",
        "Reason": r"JobState=\S+ Reason=(\S+)",
        "Restarts": r"Requeue=\S+ Restarts=([0-9]+)",
        "TimeLimit": r"RunTime=\S+ TimeLimit=(\S+)",
    }
    found = {key: re.search(rf"^ *{pattern}", told, re.MULTILINE) for key, pattern in wanted.items()}
    values = {key: match[1] for key, match in found.items() if match}
    if len(values) < len(found):
        raise ConfigError(f"scontrol show job: {told[:200]!r} tells no {', '.join(found.keys() - values)}")
    return JobState(
        state=values["JobState"],
        reason=values["Reason"],
        restarts=int(values["Restarts"]),
        limit_seconds=parse_limit(values["TimeLimit"]),
    )


def parse_limit(text: str) -> float | None:
    """Return the seconds of `[DAYS-]HH:MM:SS`; None for UNLIMITED."""
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 86400.0 * days + 3600 * hours + 60 * minutes + seconds


class AwayError(ConfigError):
    """The controller does not answer now, and may in a moment."""


def ask_patiently(ask: Callable[[], T], patience_s: float, tell: Callable[[AwayError], object]) -> T:
    """Return what the controller answers; one that is away is asked again, after pauses that grow.

    Args:
        tell: told of each question that was in vain, and will be asked again.

    Raises:
        AwayError: it still was after `patience_s`.
        ConfigError: it answered otherwise, or there is no Slurm here to ask; to ask again would not help.
    """
    deadline, pause_s = time.monotonic() + patience_s, _FIRST_PAUSE_S
    while True:
        try:
            return ask()
        except AwayError as error:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise
            tell(error)
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def ask_state(job: SlurmJob, patience_s: float, tell: Callable[[AwayError], object] = lambda _: None) -> JobState:
    """Return the job's state; a controller that restarts is waited for, as in `ask_patiently`."""
    return ask_patiently(lambda: parse_state(_call("scontrol", "show", "job", job.name)), patience_s, tell)


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


def seconds_of_warning(job: SlurmJob) -> int | None:
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


def end_steps(job: SlurmJob, patience_s: float) -> None:
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


def _steps_of(job: SlurmJob) -> set[str]:
    steps = _call("squeue", "--noheader", "--steps", "--jobs", job.name, "--format", "%i")
    return set(re.findall(rf"^\s*({re.escape(job.name)}\.[0-9]+)\s*$", steps, re.MULTILINE))  # not the batch script


def requeue(job: SlurmJob) -> None:
    """Put the job back into the queue; Slurm then ends what is left of this life.

    Raises:
        AwayError: the controller was busy, or is just back.
        ConfigError: it may not be.
    """
    _call("scontrol", "requeue", job.name)


def requeues_after(code: int) -> bool | None:
    """Return whether Slurm gives jobs that end with this exit code another life by itself; None where nobody tells."""
    try:
        told = _call("scontrol", "show", "config")
    except ConfigError:
        return None
    codes = re.search(r"^RequeueExit\s*=\s*([0-9,-]+)\s*$", told, re.MULTILINE)
    ranges = [part.partition("-") for part in codes[1].split(",") if part] if codes else []
    return any(int(first) <= code <= int(last or first) for first, _, last in ranges)


def _call(*command: str) -> str:
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_CALL_SECONDS,
            errors="backslashreplace",  # comments of jobs, and the words of sites, may be in any encoding
        )
    except subprocess.TimeoutExpired as error:
        raise AwayError(f"{' '.join(command)}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{' '.join(command)}: {error.strerror}") from None
    if ended.returncode:
        words = " ".join(ended.stderr.split())
        kind = AwayError if not words or re.search(_OF_ONE_THAT_IS_AWAY, words, re.IGNORECASE) else ConfigError
        raise kind(f"{' '.join(command)}: {words or f'exit {ended.returncode}'}")
    return ended.stdout
