"""One task of an array, from its batch script:  run_task.py FOLDER srun FLAGS slurm/rank.sh tools/sample.py FLAGS

Runs it, and ends with its exit code; but a 0 becomes 75 unless every rank has left its mark in FOLDER, and a rank that
ended for good decides (`completion.py`). On the job's first node, with the standard library only.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ecdit_ds.errors import ConfigError, EcditError, ExitCode, exit_code_of
from ecdit_ds.slurm.completion import ARRAY_TASK, RANK_SCRIPT, expect_completion, refuse_to_repeat


def main(arguments: list[str]) -> int:
    """Run a task; return the exit code of the batch script."""
    folder, *command = arguments
    try:
        if RANK_SCRIPT in command:
            refuse_to_repeat(command[command.index(RANK_SCRIPT) + 1 :])
        with expect_completion(Path(folder)) as completion:
            code = _run(completion.told_to(command), os.environ | completion.environment)
            if code != ExitCode.DONE:
                return completion.judge(code)
            completion.confirm(lambda: ARRAY_TASK)
            return code
    except EcditError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end; srun, and by it the ranks, have the signals that come to the batch script alone."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        process = subprocess.Popen(command, env=environment)
        for number in before:
            signal.signal(number, lambda n, _: process.send_signal(n))
        for early in came:  # before there was one to have them
            process.send_signal(early)
        code = process.wait()
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
