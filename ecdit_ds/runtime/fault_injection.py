"""Faults on purpose, for drills and tests: what breaks, at which moment, on which rank, at which step.

    ECDIT_FAULTS="kill@mid-shard,rank=1,step=6; delay=5@mid-shard; full@mid-shard,probability=0.2,seed=7"

Off unless that variable is set. A moment is `step` (a step begins), one of checkpoint.phases.PHASES, or `any`.
"""

import errno
import os
import random
import signal
import time
from dataclasses import dataclass, field

from ecdit_ds.checkpoint.fault_points import SAVE_PHASES
from ecdit_ds.errors import ConfigError

VARIABLE = "ECDIT_FAULTS"
MOMENTS = ("step", *SAVE_PHASES, "any")
_SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "abort": signal.SIGABRT,
    "segfault": signal.SIGSEGV,
    "sigterm": signal.SIGTERM,
    "sigusr1": signal.SIGUSR1,
}
_ACTIONS = (*_SIGNALS, "exit", "delay", "full")
"""exit=CODE ends the process at once, delay=SECONDS waits, full fails as a disk without room does."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    action: str
    argument: float = 0.0
    moment: str
    rank: int | None = None
    step: int | None = None
    probability: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.action not in _ACTIONS or self.moment not in MOMENTS:
            raise ValueError(f"known are {', '.join(_ACTIONS)} at {', '.join(MOMENTS)}")
        if self.action == "exit" and self.argument not in range(1, 256):
            raise ValueError("exit needs a code from 1 to 255, as exit=137")
        if not (0 <= self.argument < 1e9 and 0 < self.probability <= 1):
            raise ValueError("a delay is 0 or more seconds, a probability above 0 and at most 1")


@dataclass
class Faults:
    """What will go wrong on this rank."""

    rank: int
    faults: tuple[Fault, ...] = ()
    _randoms: dict[Fault, random.Random] = field(default_factory=dict)

    def at(self, moment: str, step: int) -> None:
        """Let happen what was asked for.

        Raises:
            OSError: a full disk.
        """
        for fault in self.faults:
            if fault.moment in (moment, "any") and fault.rank in (None, self.rank) and fault.step in (None, step):
                draws = self._randoms.setdefault(fault, random.Random(f"{fault.seed} {self.rank}"))
                if draws.random() < fault.probability:
                    _happen(fault)


def faults_from_environment(rank: int) -> Faults:
    """Read ECDIT_FAULTS.

    Raises:
        ConfigError: it cannot be understood.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        return Faults(rank=rank, faults=tuple(_parse(part) for part in text.split(";") if part.strip()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"environment variable {VARIABLE}: {text!r} cannot be understood: {error}") from None


def _parse(text: str) -> Fault:
    what, _, where = text.strip().partition("@")
    action, _, argument = what.partition("=")
    moment, *settings = where.split(",")
    pairs = [setting.split("=") for setting in settings]
    numbers = {name: float(value) if name == "probability" else int(value) for name, value in pairs}
    if len(numbers) < len(pairs):
        raise ValueError(f"{text.strip()!r} says something twice")
    return Fault(action=action, argument=float(argument or 0), moment=moment, **numbers)  # type: ignore[arg-type]


def _happen(fault: Fault) -> None:
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
    elif fault.action == "exit":
        os._exit(int(fault.argument))
    elif fault.action == "delay":
        time.sleep(fault.argument)
    else:
        raise OSError(errno.ENOSPC, "a drill")
