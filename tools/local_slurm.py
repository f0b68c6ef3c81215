"""A Slurm of one's own, for rehearsals:  python tools/local_slurm.py -- sbatch --wait slurm/train_97b.sh

Starts munged, slurmctld and some slurmd, each a virtual node of this machine, runs a command (or your shell) that finds
them through SLURM_CONF, and takes all down again: no process, port or file is left. Everything lies in one temporary
folder, nothing under /etc, and ports are open to this machine only. Nodes are n1, n2, ...; they claim more processors
than there are, and files that stand for GPUs. Needs root and Debian's slurm-wlm and munge.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil

from ecdit_ds.errors import ConfigError, EcditError, ExitCode
from tools.command_line import OneLineParser

PROGRAMS = ("munged", "slurmctld", "slurmd", "setpriv")
NEEDED = "needs root, and Debian's slurm-wlm and munge (apt-get install --no-install-recommends slurm-wlm munge)"
_NULL_DEVICE = os.makedev(1, 3)
_PATIENCE_S = 30.0
_SLURM_VARIABLES = ("SLURM_", "SBATCH_", "SALLOC_", "SRUN_")

_CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
MaxArraySize=100
MinJobAge=86400
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
{settings}
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=64 RealMemory=4000 Gres=gpu:{gpus}
NodeName=cpu1 NodeHostname={host} NodeAddr=127.0.0.1 Port={cpu_port} CPUs=64 RealMemory=4000
PartitionName=low  Nodes=n[1-{nodes}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=rude Nodes=n[1-{nodes}] PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=n[1-{nodes}] PriorityTier=10 PreemptMode=OFF
PartitionName=cpu  Nodes=cpu1 PreemptMode=OFF
"""
"""Jobs of `high` preempt those of `low`, which get GraceTime seconds and KillWait more, and of `rude`, which do not."""
SETTINGS = {
    "KillWait": "10",
    "SlurmdTimeout": "10",
    "UnkillableStepTimeout": "30",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "SlurmctldParameters": "preempt_send_user_signal",
}
"""What a test may want otherwise; more impatient than a real site's."""


def why_not() -> str | None:
    """Return what is missing for a lab on this machine; None where it can be had."""
    missing = [program for program in PROGRAMS if _program(program) is None]
    if missing:
        return f"{', '.join(missing)} not found: {NEEDED}"
    if os.geteuid() != 0:
        return f"user {os.geteuid()} is not root: {NEEDED}"
    if subprocess.run([*on_loopback()[1], "true"], capture_output=True, check=False).returncode:
        return f"{socket.gethostname()} is not 127.0.0.1 and may not be called localhost here; name it so in /etc/hosts"
    return None


def on_loopback() -> tuple[str, list[str]]:
    """Return a name of 127.0.0.1, and what to put before a command so that this host is called so.

    Slurm's daemons listen on all interfaces, or on the one that their host's name stands for.
    """
    with contextlib.suppress(OSError):
        if socket.gethostbyname(socket.gethostname()) == "127.0.0.1":
            return socket.gethostname().split(".")[0], []
    return "localhost", ["unshare", "--uts", "sh", "-c", 'hostname localhost && exec "$0" "$@"']


class LocalSlurm:
    """Virtual nodes and their controller, in a folder of their own.

    Args:
        nodes: how many with GPUs, besides `cpu1` of partition `cpu` that has none.
        gpus: how many files that stand for GPUs a node has.
        settings: further lines of slurm.conf, by name, over `SETTINGS`.
    """

    def __init__(self, nodes: int = 4, gpus: int = 8, settings: Mapping[str, str] | None = None) -> None:
        self.nodes, self.gpus = nodes, gpus
        self._settings = {**SETTINGS, **(settings or {})}
        self._host, self._called_so = on_loopback()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._sweeper: subprocess.Popen[bytes] | None = None
        self.folder = Path()

    @property
    def node_names(self) -> list[str]:
        return [*(f"n{index + 1}" for index in range(self.nodes)), "cpu1"]

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with this lab's configuration and no other Slurm's traces."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_SLURM_VARIABLES)}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "LocalSlurm":
        if reason := why_not():
            raise ConfigError(f"no Slurm here: {reason}")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-"))  # short: a socket's path has room for 107 letters
        # It waits until this process lets go of its input, or is killed, and then ends and removes what is left.
        self._sweeper = subprocess.Popen(
            [sys.executable, __file__, "--sweep", str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._write_files()
            self._start(
                "munged",
                "--foreground",
                "--force",
                f"--key-file={self.folder}/munge.key",
                f"--socket={self.folder}/munge.socket",
                f"--pid-file={self.folder}/munged.pid",
                f"--log-file={self.folder}/munged.log",
                f"--seed-file={self.folder}/munged.seed",
            )
            self._wait_until(lambda: (self.folder / "munge.socket").exists(), "munged opens its socket")
            self.start_controller()
            for name in self.node_names:
                self.start_node(name)
            self._wait_until(lambda: self.num_idle() == len(self.node_names), "all nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End jobs and daemons, whatever state they are in, and remove the folder."""
        for daemon in tuple(self._daemons):  # first of all, so that none starts anything any more
            self.kill(daemon)
        if self._sweeper is not None:
            self._sweeper.communicate()  # lets go of it, and waits

    def ask(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command of Slurm and return what it prints.

        Raises:
            ConfigError: it fails; the message has its words.
        """
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            check=False,
            env=self.environment | dict(environment or {}),
            timeout=_PATIENCE_S,
        )
        if ended.returncode:
            raise ConfigError(f"{' '.join(command)}: exit code {ended.returncode}: {ended.stderr.strip()}")
        return ended.stdout

    def num_idle(self) -> int:
        """Return how many nodes wait for work."""
        return len(set(self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()))

    def start_controller(self) -> None:
        """Start slurmctld, which takes up the state that an earlier one left."""
        self._start("slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        self._start("slurmd", "-D", "-N", name, "-f", f"{self.folder}/slurm.conf", key=name)

    def kill(self, daemon: str) -> None:
        """Kill munged, slurmctld or a node's slurmd with SIGKILL, and nothing that they started."""
        process = self._daemons.pop(daemon)
        process.kill()
        process.wait()

    def lose_node(self, name: str) -> None:
        """Kill a node with all that runs on it, as if its power were cut."""
        self.kill(name)
        log = f"{self.folder}/slurmd.{name}.log"  # a step's own daemon has it open, and no variable that tells
        _kill_all(
            process
            for process in _processes_of(self.folder)
            if f"SLURMD_NODENAME={name}" in _environment(process) or log in (f.path for f in process.open_files())
        )

    def _wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            for name, daemon in self._daemons.items():
                if (code := daemon.poll()) is not None:
                    raise ConfigError(f"{name} ended with exit code {code}: {self._last_words(name)}")
            with contextlib.suppress(ConfigError):
                if is_so():
                    return
            if time.monotonic() > deadline:
                raise ConfigError(f"waited {_PATIENCE_S:.0f} s in vain until {what}; {self._last_words('slurmctld')}")
            time.sleep(0.1)

    def _last_words(self, daemon: str) -> str:
        """Return the last line that a daemon left, as its folder is about to go."""
        lines = ["no word of it"]
        for log in (f"{daemon}.out", f"{daemon}.log", f"slurmd.{daemon}.log"):
            with contextlib.suppress(OSError):
                lines += (self.folder / log).read_text(errors="replace").strip().splitlines()
        return lines[-1]

    def _start(self, program: str, *arguments: str, key: str | None = None) -> None:
        path = _program(program)
        assert path is not None
        # A daemon does not outlive the process that started it, even if that one is killed.
        command = ["setpriv", "--pdeathsig", "TERM", *self._called_so, path, *arguments]
        with open(self.folder / f"{key or program}.out", "ab") as log:
            self._daemons[key or program] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def _write_files(self) -> None:
        self.folder.chmod(0o755)
        for name in ("state", "spool", "dev"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for index in range(self.gpus):
            os.mknod(self.folder / "dev" / f"gpu{index}", stat.S_IFCHR | 0o666, _NULL_DEVICE)
        last = self.gpus - 1
        devices = f"{self.folder}/dev/gpu{f'[0-{last}]' if last else 0}"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{self.nodes}] Name=gpu File={devices}\n")
        # The number of a job decides the port where its ranks meet: labs side by side have other numbers.
        first = _free_ports(self.nodes + 2)
        text = _CONF.format(
            host=self._host,
            folder=self.folder,
            nodes=self.nodes,
            gpus=self.gpus,
            controller_port=first,
            first_job=1 + first // 100 % 90 * 20,
            ports=f"{first + 1}-{first + self.nodes}",
            cpu_port=first + self.nodes + 1,
            settings="\n".join(f"{k}={v}" for k, v in self._settings.items()),
        )
        (self.folder / "slurm.conf").write_text(text)


def remove_leftovers(folder: Path) -> None:
    """End all that belongs to a lab, whatever state it is in, and remove its folder."""
    while found := list(_processes_of(folder)):
        for process in tuple(found):  # what they started may have dropped its environment
            with contextlib.suppress(psutil.Error):
                found += process.children(recursive=True)
        _kill_all(iter(found))
    shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: Path) -> Iterator[psutil.Process]:
    """Yield the processes that belong to a lab: its daemons, their helpers, and what its jobs run."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            command = process.cmdline()
            is_daemon = str(folder) in " ".join(command) and "--sweep" not in command
            if is_daemon or f"SLURM_CONF={folder}/slurm.conf" in _environment(process):
                yield process


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _environment(process: psutil.Process) -> list[str]:
    """Return NAME=VALUE lines; psutil reads none where a program wrote its title over the first of them."""
    return Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0")


def _kill_all(processes: Iterator[psutil.Process]) -> None:
    found = list(processes)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(found, timeout=5)


def _free_ports(count: int) -> int:
    """Return the first of so many successive ports that nobody listens on, below those where ranks meet."""
    for first in range(10000 + os.getpid() % 90 * 100, 20000 - count, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise ConfigError(f"no {count} free ports in a row from 10000 to 20000")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = OneLineParser(
        prog="tools/local_slurm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="of a node (default: %(default)s)")
    parser.add_argument("--sweep", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="(default: your shell)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run a command in a lab; return its exit code."""
    try:
        options = parse_arguments(arguments)
        if options.sweep:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the lab
            sys.stdin.buffer.read()
            remove_leftovers(options.sweep)
            return ExitCode.DONE
        if not (1 <= options.nodes <= 64 and 1 <= options.gpus <= 16):
            raise ConfigError(f"--nodes {options.nodes}, --gpus {options.gpus}: choose 1 to 64 nodes of 1 to 16 GPUs")
        command = options.command[options.command[:1] == ["--"] :] or [os.environ.get("SHELL", "/bin/sh")]
        if shutil.which(command[0]) is None:
            raise ConfigError(f"{command[0]}: no such command")
        signal.signal(signal.SIGTERM, _leave)
        signal.signal(signal.SIGHUP, _leave)
        with LocalSlurm(nodes=options.nodes, gpus=options.gpus) as lab:
            print(f"lab: {options.nodes} nodes x {options.gpus} GPUs, SLURM_CONF={lab.folder}/slurm.conf", flush=True)
            return subprocess.run([*on_loopback()[1], *command], check=False, env=lab.environment).returncode
    except EcditError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
