"""One rank, as srun starts it through slurm/rank.sh:  rank.py [--hold-signals] [FLAGS] PROGRAM.py ARGUMENTS...

Becomes `python PROGRAM.py ARGUMENTS...` with the variables that PyTorch and DeepSpeed read. With --hold-signals, a
SIGTERM or SIGUSR1 that comes before the program listens waits for it instead of killing it: blocked signals outlive the
change of program, and `stopping.StopSignal` lets them in. FLAGS are `--completion PATH`, how the marks of
`completion.py` begin, and `--logs FOLDER`, where the rank writes a log of its own (`rank_logs.py`).
"""

import signal
import sys

HOLD = "--hold-signals"
DEFERRED_SIGNALS = frozenset((signal.SIGTERM, signal.SIGUSR1))
if __name__ == "__main__" and HOLD in sys.argv[1:2]:
    signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED_SIGNALS)
    for _number in DEFERRED_SIGNALS:
        signal.signal(_number, signal.SIG_DFL)  # rank.sh had them ignored until here

import os
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from ecdit_ds.errors import ConfigError, EcditError, ExitCode
from ecdit_ds.slurm.completion import FLAG, VARIABLE, mark_ended
from ecdit_ds.slurm.rank_logs import LOGS_FLAG, write_into_log
from ecdit_ds.slurm.ranks import rank_environment


def main(arguments: list[str]) -> int:
    """Become the program; return only where that cannot be."""
    command = arguments[arguments[:1] == [HOLD] :]
    told = dict[str, str]()
    while command and command[0] in (FLAG, LOGS_FLAG):
        told, command = told | {command[0]: "".join(command[1:2])}, command[2:]
    if FLAG in told:
        os.environ[VARIABLE] = told[FLAG]
    try:
        if LOGS_FLAG in told:
            write_into_log(Path(told[LOGS_FLAG]), os.environ.get("SLURM_PROCID", ""))
        if not command:  # Python would take standard input for the program
            raise ConfigError("slurm/rank.sh: no program; it comes after the flags, such as ecdit_ds/train.py")
        os.environ.update(rank_environment(os.environ))
    except EcditError as error:
        print(f"error: {error}", file=sys.stderr)
        with suppress(KeyError, ValueError):  # which rank it is, may be what is wrong
            mark_ended(ExitCode.USER_ERROR)
        return ExitCode.USER_ERROR
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
