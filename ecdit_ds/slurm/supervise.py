"""One life of a job, from its batch script:  supervise.py srun FLAGS slurm/rank.sh --hold-signals -- train.py FLAGS

What stands before `--` starts ranks, what comes after it is what they run. Refuses what can be known beforehand, checks
the recipe and every node, starts the ranks, and decides by their exit code, and by the marks and the checkpoints they
left, whether Slurm shall give the job another life. Runs on the job's first node, with the standard library only: a
container that ranks live in need not be there.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ecdit_ds.errors import ConfigError, EcditError, ExitCode, RankLostError, escape_unprintable, exit_code_of
from ecdit_ds.slurm.completion import (
    DRY_RUN,
    NODE_CHECK,
    expect_completion,
    refuse_to_repeat,
    tell_ranks,
    training_to,
)
from ecdit_ds.slurm.controller import (
    AwayError,
    JobState,
    SlurmJob,
    ask_patiently,
    ask_state,
    end_steps,
    is_alive,
    kill_wait_seconds,
    own_job,
    requeue,
    requeues_after,
    seconds_of_warning,
)
from ecdit_ds.slurm.job_history import (
    AttemptStarted,
    JobHistory,
    RequeueDecision,
    count_barren,
    decide_requeue,
    newest_step,
)
from ecdit_ds.slurm.rank_logs import flags_for_logs, last_words, remove_links
from ecdit_ds.slurm.signals import TerminationWatch

CONTROLLER_PATIENCE_S = 600.0
"""How long a controller that does not answer is waited for before a job gives up asking for another life."""
CHECK_MINUTES = 15
"""Time limit of a check before training, after which srun ends it."""
OUT_OF_TIME = 124
"""Exit code of a life that did not leave before its time limit, as that of timeout(1)."""
EARLY_SIGNAL_S = 60
"""How much earlier than asked for Slurm may send a signal."""
OTHERS_PATIENCE_S = 60.0
"""How much longer than KillWait a job that is being taken down is waited for, if the run's folder is its."""
LEAVING_PATIENCE_S = 600.0
"""How long ranks that lost their srun may save, before they are killed."""
_LOOK_EVERY_S = 1.0


class JobAttempt:
    """This life of this job."""

    def __init__(
        self, job: SlurmJob, launcher: Sequence[str], program: Sequence[str], allowed: int, ending: TerminationWatch
    ) -> None:
        self._job, self._launcher, self._program, self._allowed = job, list(launcher), list(program), allowed
        self._ending, self._kill_wait_s = ending, kill_wait_seconds()
        self._warning_s = int_from_env("ECDIT_SIGNAL_SECONDS", seconds_of_warning(job) or 0)
        self.output = output_of(program)
        self._ledger = JobHistory(self.output)
        self._logs = self._ledger.folder / job.life
        self._doubt = ""
        """Why a 0 of srun was not believed."""

    def live(self, *, is_checked: bool) -> RequeueDecision:
        """Do all there is to do, but for asking Slurm for another life.

        Args:
            is_checked: whether recipe and nodes are checked before the ranks start.

        Raises:
            ConfigError: nothing was begun, and why.
        """
        began, step = time.monotonic(), newest_step(self.output)
        limit = self._limit_seconds()
        self._refuse_what_is_known(step, limit)
        self._begin(step)
        code = self._check(limit) if is_checked else ExitCode.DONE
        is_late = limit is not None and time.monotonic() - began > limit - self._warning_s
        if code == ExitCode.DONE and (self._ending.was_asked or is_late):
            log("the signal to stop came before training began")
            code = ExitCode.RETRY
        elif code == ExitCode.DONE:
            code = self._train()
            for words in last_words(self._logs, is_why_wanted=code not in (ExitCode.DONE, 128 + signal.SIGKILL)):
                log(words)
        reached = newest_step(self.output)
        barren = count_barren(self._ledger.lives_of(self._job.number), reached)
        verdict = decide_requeue(code, barren=barren, allowed=self._allowed, cause=self._doubt)
        try:
            self._ledger.end(self._job.life, code, reached, verdict)
        except OSError as error:  # such as a full disk: what is decided stands all the same
            log(f"{self._ledger.folder}: cannot be written: {error.strerror}")
        log(
            f"life {self._job.life} ended after {(time.monotonic() - began) / 60:.1f} min with exit code {code}; "
            f"newest checkpoint: step {reached}, {step} when it began"
        )
        return verdict

    def stop(self, reason: str) -> None:
        """Say, for good, why there will be no other life."""
        log(reason)
        with suppress(OSError):
            self._ledger.tell_why(self._job.life, reason)

    def _limit_seconds(self) -> float | None:
        """Return the time limit; None where there is none, or nobody here can tell: ranks need not know it."""
        try:
            return ask_state(self._job, CONTROLLER_PATIENCE_S, _tell_of_waiting).limit_seconds
        except ConfigError as error:
            log(f"the time limit is not known here ({error}); going on without")
            return None

    def _refuse_what_is_known(self, step: int, limit_seconds: float | None) -> None:
        early_s = EARLY_SIGNAL_S if self._warning_s else 0
        if limit_seconds is not None and limit_seconds <= self._warning_s + early_s:
            raise ConfigError(
                f"the time limit is {limit_seconds / 60:.0f} min, and the signal to save comes {self._warning_s} s "
                "before it or a minute earlier, so at the beginning; submit with a longer --time, or with "
                "--signal=USR1@S and ECDIT_SIGNAL_SECONDS=S"
            )
        if "\\" in str(self.output):  # srun takes it out of the names of logs
            raise ConfigError(f"{self.output}: a backslash in its name; choose another ECDIT_OUTPUT")
        lives = self._ledger.beginnings()
        patience_s = self._kill_wait_s + OTHERS_PATIENCE_S
        if lives and lives[-1].job != self._job.number and is_alive(lives[-1].job, patience_s):
            raise ConfigError(
                f"{self.output}: job {lives[-1].job} is not over and trains there; submit with "
                f"--dependency=afterany:{lives[-1].job}, or with another ECDIT_OUTPUT"
            )
        # A first life has none before it, whoever had its number.
        barren = count_barren(self._ledger.lives_of(self._job.number), step) if self._job.restarts else 0
        if barren >= self._allowed:
            reason = (
                f"job {self._job.name}: {barren} lives in a row published no later checkpoint than step {step} "
                f"(ECDIT_MAX_LIVES={self._allowed}), see {self._ledger.folder}; mend the cause and submit anew"
            )
            with suppress(OSError):
                self._ledger.tell_why(self._job.life, reason)
            raise ConfigError(reason)

    def _begin(self, step: int) -> None:
        job = self._job
        try:
            self._ledger.begin(AttemptStarted(life=job.life, step=step, nodes=job.nodes, ranks=job.num_ranks))
            self._logs.mkdir(exist_ok=True)
            remove_links(self._logs)
        except OSError as error:
            raise ConfigError(
                f"{self._ledger.folder}: cannot be written: {error.strerror}; choose another ECDIT_OUTPUT"
            ) from None
        log(f"life {job.life} of {self.output}: {job.num_ranks} ranks on {job.nodes}, from step {step}")

    def _check(self, limit: float | None) -> int:
        """Check the recipe, unless an earlier life of this job did, and every node; return 0 where all is well."""
        code: int = ExitCode.DONE
        if not self._ledger.is_checked(self._job.number):
            one_task = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
            code = self._run_check(
                one_task, [*self._program, "--dry-run", f"--world-size={self._job.num_ranks}"], DRY_RUN
            )
            if code == ExitCode.DONE:
                self._ledger.pass_check(self._job.life)
        if code == ExitCode.DONE:
            limit_flags = ["--limit-seconds", f"{limit:.0f}"] if limit else []
            preflight = ["ecdit_ds/slurm/preflight.py", *limit_flags, "--", *self._program[1:]]
            code = self._run_check([], preflight, NODE_CHECK)
        if code:
            log(f"the check before training failed with exit code {code}; no rank was started")
        return code

    def _run_check(self, flags: Sequence[str], program: Sequence[str], work: str) -> int:
        return self._srun([f"--time={CHECK_MINUTES}", *flags], program, lambda: work, may_leave=self._ending.is_near)

    def _train(self) -> int:
        log(f"logs of ranks: {self._logs}/rank_*.log")
        flags, words = flags_for_logs(self._logs)
        # What the ranks say they have come to is to be what anybody finds published.
        return self._srun(
            flags, self._program, lambda: training_to(newest_step(self.output)), self._is_out_of_time, words
        )

    def _srun(
        self,
        flags: Sequence[str],
        program: Sequence[str],
        work: Callable[[], str],
        may_leave: Callable[[float], bool],
        words: Sequence[str] = (),
    ) -> int:
        """Run a program on ranks; return the highest exit code, or OUT_OF_TIME where it does not leave in time.

        A rank that ended for good decides, and a 0 is RETRY where not every rank says that the work is complete.

        Args:
            work: what is complete after a 0.
            may_leave: told how long Slurm waits before it kills, says whether this life is to be ended without it.
            words: for slurm/rank.sh.
        """
        command = tell_ranks([*self._launcher[1:], *program], *words)
        with expect_completion(self._logs) as completion:
            code = self._wait_for_srun([*flags, *completion.told_to(command)], completion.environment, may_leave)
            if code == ExitCode.DONE:
                try:
                    completion.confirm(work)
                except RankLostError as error:
                    self._doubt = str(error)
                    log(f"error: {error}")
                    return exit_code_of(error)
                return code
            return completion.judge(code)

    def _wait_for_srun(
        self, arguments: Sequence[str], told: Mapping[str, str], may_leave: Callable[[float], bool]
    ) -> int:
        srun = self._launcher[0]
        with suppress(ConfigError):
            ask_state(
                self._job, CONTROLLER_PATIENCE_S, _tell_of_waiting
            )  # srun does not wait for a controller that is away
        try:
            process = subprocess.Popen([srun, *arguments], env=os.environ | told)
        except OSError as error:
            raise ConfigError(f"{srun}: {error.strerror}") from None
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(_LOOK_EVERY_S)
                return code if code >= 0 else self._outlive_srun(-code)
            if self._ending.take_warning():
                process.send_signal(signal.SIGUSR1)  # srun hands it on to all ranks
            if may_leave(self._kill_wait_s):
                return OUT_OF_TIME

    def _outlive_srun(self, number: int) -> int:
        """Have ranks that outlived their srun save and leave: what they reach counts.

        As a rule a child of srun kills them when srun is killed, but that child may be killed as well.
        """
        log(f"srun was killed by signal {number}; ranks that are left are asked to save")
        end_steps(self._job, LEAVING_PATIENCE_S)
        return 128 + number

    def _is_out_of_time(self, kill_wait_s: float) -> bool:
        """Return whether ranks did not leave before the time limit; where others end the job, they have until then."""
        if self._ending.is_near(kill_wait_s):
            with suppress(ConfigError):
                state = ask_state(self._job, 0)
                if state.is_running:
                    self._ending.start_anew()
                return state.is_at_its_limit
        return False


def output_of(program: Sequence[str]) -> Path:
    """Return the run's folder that train.py's arguments name.

    Raises:
        ConfigError: they name none, or ask for no training, which no life of a job would ever complete.
    """
    refuse_to_repeat(program, "--dry-run", "--print-config")
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--output", type=Path)
    output: Path | None = None
    with suppress(argparse.ArgumentError):  # the last word, with nothing after it
        output = parser.parse_known_args(list(program))[0].output
    if output is None:
        raise ConfigError("train.py --output: is missing; it says where lives and logs are kept")
    return output


def requeue_blocker(job: SlurmJob, state: JobState) -> str | None:
    """Return why a job must not be requeued from this life; None where it may.

    What somebody else has decided stands: a cancelled job stays cancelled, and a life that Slurm believed dead, and
    replaced by another, leaves that one alone.
    """
    if state.restarts != job.restarts:
        return f"Slurm has begun life {state.restarts} of it already"
    if state.is_running or state.is_at_its_limit:
        return None
    return f"Slurm is ending it (state {state.state}, reason {state.reason})"


def request_requeue(life: JobAttempt, job: SlurmJob, verdict: RequeueDecision) -> int:
    """Have Slurm give the job another life, if that is for this one to decide; return the exit code."""

    def ask() -> str | None:
        against = requeue_blocker(job, ask_state(job, 0))
        if against is None:
            log(f"to be requeued: {verdict.reason}")
            requeue(job)
        return against

    try:
        against = ask_patiently(ask, CONTROLLER_PATIENCE_S, lambda error: log(f"not requeued yet: {error}"))
    except ConfigError as error:
        by_itself = requeues_after(verdict.exit_code)
        if by_itself:
            log(f"left to Slurm, which requeues after exit code {verdict.exit_code} (RequeueExit): {error}")
        else:
            unless = "" if by_itself is False else f"unless Slurm does after exit code {verdict.exit_code}, "
            life.stop(f"not requeued: {error}; {unless}submit anew: it goes on from the newest checkpoint")
        return verdict.exit_code
    if against is None:
        return ExitCode.DONE
    log(f"not requeued from here: {against}")
    return verdict.exit_code


def _tell_of_waiting(error: AwayError) -> None:
    log(f"waiting for Slurm's controller: {error}")


def log(text: str) -> None:
    """Print into the job's log, with the time."""
    with suppress(OSError):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), escape_unprintable(text), flush=True)


def main(arguments: list[str], ending: TerminationWatch) -> int:
    """Live once; return the exit code of the batch script."""
    try:
        if "--" not in arguments:
            raise ConfigError("supervise.py: no -- between what starts ranks and what they run")
        at = arguments.index("--")
        if at == 0 or at == len(arguments) - 1:
            raise ConfigError("supervise.py: nothing on one side of --; before it srun, after it what ranks run")
        job = own_job(os.environ)
        allowed, is_checked = int_from_env("ECDIT_MAX_LIVES", 3, least=1), bool(int_from_env("ECDIT_PREFLIGHT", 1))
        int_from_env("ECDIT_REHEARSAL", 0)  # "yes" would be no rehearsal, in silence
        life = JobAttempt(job, arguments[:at], arguments[at + 1 :], allowed, ending)
        verdict = life.live(is_checked=is_checked)
    except EcditError as error:
        log(f"error: {error}")
        return ExitCode.USER_ERROR
    except OSError as error:  # such as a run's folder that somebody else owns
        log(f"error: {error.filename}: {error.strerror or error}")
        return ExitCode.USER_ERROR
    if verdict.is_again:
        return request_requeue(life, job, verdict)
    code = verdict.exit_code
    by_slurm = f"; but Slurm does it after exit code {code} (RequeueExit)" if code and requeues_after(code) else ""
    log(f"not requeued: {verdict.reason}{by_slurm}")
    return code


def int_from_env(variable: str, default: int, least: int = 0) -> int:
    """Return an environment variable's whole number.

    Raises:
        ConfigError: it is none.
    """
    text = os.environ.get(variable) or str(default)
    if not re.fullmatch("[0-9]+", text) or int(text) < least:
        raise ConfigError(f"environment variable {variable}: {text!r} is not {least} or more, in whole numbers")
    return int(text)


def _leave(code: int) -> NoReturn:
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    _ending = TerminationWatch()
    _ending.listen()
    _leave(main(sys.argv[1:], _ending))
