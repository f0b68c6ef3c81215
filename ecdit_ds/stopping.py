"""Being asked to stop: SIGTERM and SIGUSR1 set a flag, and nothing else.

A scheduler sends them before it takes the machine away. Saving inside a handler would be unsafe, and ranks get the
signal at different moments or not at all, so the trainer asks the flag where ranks talk anyway.
"""

import signal
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """What asked first, such as SIGTERM; what asks later changes nothing."""

    def listen(self) -> None:
        """Take over both signals; until then their default kills, so call this before slow imports.

        Those that `slurm/rank.sh` held back until here come in now.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))

    def launcher_died(self) -> None:
        """Take the end of the launcher for a wish to stop."""
        self.reason = self.reason or "the launcher died"

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
