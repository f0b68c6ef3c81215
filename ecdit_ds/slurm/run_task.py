"""One task of an array, from its batch script:  run_task.py FOLDER srun FLAGS slurm/rank.sh tools/sample.py FLAGS

Runs it, and ends with its exit code; but a 0 becomes 75 unless every rank has left its mark in FOLDER
(`completion.py`). On the job's first node, with the standard library only.
"""

import os
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
            if code == ExitCode.DONE:
                completion.confirm(lambda: ARRAY_TASK)
            return code
    except EcditError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)


def _run(command: list[str], environment: dict[str, str]) -> int:
    try:
        code = subprocess.run(command, env=environment, check=False).returncode
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from None
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
