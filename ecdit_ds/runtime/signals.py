"""Being asked to stop: SIGTERM and SIGUSR1 set a flag, and nothing else.

A scheduler sends them before it takes the machine away. Saving inside a handler would be unsafe, and ranks get the
signal at different moments or not at all, so the trainer asks the flag where ranks talk anyway.
"""

import signal
from collections.abc import Sequence
from types import FrameType

_RANKS_NAMED = 8


class StopSignal:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """What asked first, such as SIGTERM; what asks later changes nothing."""
        self._is_listening = False

    def listen(self) -> None:
        """Take over both signals; until then their default kills, so call this before slow imports.

        Those that `slurm/rank.sh` held back until here come in now.
        """
        self._is_listening = True
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))

    def stand_down(self) -> None:
        """Let both signals end this process, also one that came before: there is nothing that it would save."""
        if self._is_listening:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            if self.reason in (signal.SIGTERM.name, signal.SIGUSR1.name):
                signal.raise_signal(signal.Signals[self.reason])

    def launcher_died(self) -> None:
        """Take the end of the launcher for a wish to stop."""
        self.reason = self.reason or "the launcher died"

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name


def format_stop_reasons(reason_by_rank: Sequence[str | None]) -> str:
    """Return who was asked to stop and by what, such as `SIGTERM on rank 3` or `SIGUSR1 on all ranks`."""
    ranks_by_reason: dict[str, list[int]] = {}
    for rank, reason in enumerate(reason_by_rank):
        if reason is not None:
            ranks_by_reason.setdefault(reason, []).append(rank)
    size = len(reason_by_rank)
    return "; ".join(f"{reason} on {_ranks_in_words(ranks, size)}" for reason, ranks in ranks_by_reason.items())


def _ranks_in_words(ranks: list[int], size: int) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) == size:
        return "all ranks"
    if len(ranks) <= _RANKS_NAMED:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"{len(ranks)} of {size} ranks, rank {ranks[0]} first"
