"""The signals that the batch script gets: whether Slurm ends the job, and how soon; standard library only."""

import signal
import time

_LAST_SECONDS = 5.0


class TerminationWatch:
    """Whether Slurm ends the whole job, and how long it is until it kills: it signals the batch script as well."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._is_warned = self._was_warned = False

    def listen(self) -> None:
        """Outlive the signals: the ranks have them too, and what comes of it is to be told.

        A handler, unlike an ignored signal, is not handed on to srun.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    @property
    def was_asked(self) -> bool:
        """Return whether any signal came."""
        return self._was_warned

    def take_warning(self) -> bool:
        """Return, once, whether ranks are to be warned: the script may be alone to know, as by --signal=B:USR1@S."""
        is_warned, self._is_warned = self._is_warned, False
        return is_warned

    def start_anew(self) -> None:
        """Count from now: Slurm was not ending the job yet when SIGTERM came, as by --signal=B:TERM@S."""
        self._since = time.monotonic()

    def is_near(self, kill_wait_s: float) -> bool:
        """Return whether SIGKILL will come so soon that what is left to do must be done now."""
        patience_s = max(kill_wait_s / 2, kill_wait_s - _LAST_SECONDS)
        return self._since is not None and time.monotonic() > self._since + patience_s

    def _note(self, number: int, _frame: object) -> None:
        self._is_warned = self._was_warned = True
        if number == signal.SIGTERM and self._since is None:
            self._since = time.monotonic()
