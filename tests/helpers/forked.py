"""Commands in a copy of this process: what they set up is gone with it, and imports are paid once."""

import os
import sys
import tempfile
from collections.abc import Callable

BROKE_OFF = 70
"""Exit code of a copy whose command raised."""


def in_a_copy(command: Callable[[], int]) -> tuple[int, str, str]:
    """Run `command` in a forked process; return its exit code, stdout and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            code = BROKE_OFF
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                code = command()
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return code, texts[0], texts[1]
