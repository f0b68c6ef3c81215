"""What makes saving in the background safe: copies, leases, ordered faults, and a last line that anyone can act on."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import psutil
import pytest
import torch

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.lease import LEASE_NAME, attempt_name, claim, is_successor
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.checkpoint.staging import StagingBuffer
from ecdit_ds.checkpoint.writer import Save, TensorShard, save_checkpoint
from ecdit_ds.errors import CheckpointError, ConfigError, StaleRunError
from ecdit_ds.runtime.exit_report import RunStatus, current_process, exit_summary
from ecdit_ds.runtime.fault_injection import Faults, faults_from_environment
from ecdit_ds.training.callbacks import JsonLines


def pieces(tensor: torch.Tensor) -> list[TensorShard]:
    shape = tuple(tensor.shape)
    return [TensorShard(name="w", global_shape=shape, box=Box((0,) * len(shape), shape), data=tensor)]


def read(folder: Path, shape: tuple[int, ...]) -> torch.Tensor:
    out = torch.empty(shape)
    Reader(folder).read_into("w", Box((0,) * len(shape), shape), out)
    return out


def test_a_save_holds_the_values_of_the_call_though_they_change_while_it_is_written(tmp_path: Path) -> None:
    state = torch.arange(6.0)
    host = StagingBuffer(pieces(state), is_pinned=False)
    save = Save(tmp_path, 1, pieces(state), {}, SoloPeers())
    save.pieces = host.of(save.pieces)
    state.fill_(-1.0)
    writer = threading.Thread(target=save.write, kwargs={"read_back": True})
    writer.start()
    writer.join()
    assert read(save.publish(), (6,)).tolist() == [0, 1, 2, 3, 4, 5]


def test_copies_use_the_same_memory_again_and_grow_only_where_they_must() -> None:
    host = StagingBuffer([*pieces(torch.ones(201)), *pieces(torch.ones(7))], is_pinned=False)
    held = host._buffer.data_ptr()
    for sizes in ((201, 7), (10,), (7, 201)):  # the first needs all of it
        assert host.of([piece for size in sizes for piece in pieces(torch.ones(size))])[0].data.data_ptr() == held
    mixed = [*pieces(torch.ones(3)), *pieces(torch.arange(5)), *pieces(torch.tensor(2.5).bfloat16())]
    for original, copy in zip(mixed, host.of(mixed), strict=True):
        assert torch.equal(original.data, copy.data)
    assert torch.equal(host.of(pieces(torch.full((1000,), 3.0)))[0].data, torch.full((1000,), 3.0))


@pytest.mark.parametrize("number", [0, 1])
def test_reading_back_finds_what_the_disk_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def damaging(descriptor: int, *_: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        data = bytearray(path.read_bytes())
        data[-1 if number else -21] ^= 1  # each holds 20 bytes
        path.write_bytes(data)

    monkeypatch.setattr(os, "posix_fadvise", damaging)
    halves = [TensorShard(name="w", global_shape=(10,), box=Box((at,), (5,)), data=torch.ones(5)) for at in (0, 5)]
    with pytest.raises(CheckpointError, match=rf"shard-00000.safetensors: w#{number} reads back with checksum"):
        save_checkpoint(tmp_path, 1, halves, {}, SoloPeers(), read_back=True)
    assert not list(tmp_path.glob("step_*"))


def test_only_the_newest_attempt_publishes(tmp_path: Path) -> None:
    old = claim(tmp_path, "12.0.a")
    save_checkpoint(tmp_path, 1, pieces(torch.ones(2)), {}, SoloPeers(), old)
    stopped = Save(tmp_path, 2, pieces(torch.zeros(2)), {}, SoloPeers(), old)
    stopped.write(read_back=False)
    new = claim(tmp_path, "12.1.b")
    save_checkpoint(tmp_path, 2, pieces(torch.ones(2)), {}, SoloPeers(), new)
    with pytest.raises(StaleRunError, match=r"attempt 12.1.b has taken over from this one, 12.0.a"):
        stopped.publish()
    assert read(tmp_path / "step_2", (2,)).tolist() == [1, 1]
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_1", "step_2"]
    with pytest.raises(StaleRunError, match=r"attempt 12.1.b has taken over"):
        claim(tmp_path, "12.0.a")


def test_a_second_start_within_the_same_life_of_a_job_takes_over_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first, second = (claim(tmp_path, attempt_name()) for _ in range(2))
    with pytest.raises(StaleRunError), first.held():
        pass
    with second.held():
        pass


def test_a_save_that_failed_keeps_no_file_open_whose_space_would_stay_taken(tmp_path: Path) -> None:
    def fail(phase: str) -> None:
        if phase == "mid-shard":
            raise OSError(28, "No space left on device")

    save = Save(tmp_path, 1, [*pieces(torch.ones(9)), *pieces(torch.ones(9))], {}, SoloPeers(), reached=fail)
    save.write(read_back=False)
    assert save.fault is not None and "the disk is full: 72 bytes needed" in save.fault
    open_files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [name for name in open_files if "shard-00000" in name]
    with pytest.raises(CheckpointError, match="the disk is full"):
        save.publish()
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["file", "dangling link"])
def test_what_is_no_folder_of_ours_is_not_moved_away_by_a_save(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match="step_1: is there already and is no folder"):
        save_checkpoint(tmp_path, 1, pieces(torch.ones(2)), {}, SoloPeers())
    assert os.path.lexists(tmp_path / "step_1")
    assert {path.name for path in tmp_path.iterdir()} == {"step_1"}


def test_a_lease_that_was_tidied_away_is_no_takeover(tmp_path: Path) -> None:
    lease = claim(tmp_path, "12.0.a")
    (tmp_path / LEASE_NAME).unlink()
    assert save_checkpoint(tmp_path, 1, pieces(torch.ones(2)), {}, SoloPeers(), lease).is_dir()


def test_an_attempt_that_is_refused_leaves_the_right_to_publish_to_the_former_unless_a_newer_one_has_it(
    tmp_path: Path,
) -> None:
    old = claim(tmp_path, "12.0.a")
    claim(tmp_path, "12.1.b").give_back()
    assert (tmp_path / LEASE_NAME).read_text() == "12.0.a\n"
    with old.held():
        pass
    refused = claim(tmp_path, "12.1.b")
    newest = claim(tmp_path, "12.2.c")
    refused.give_back()
    with newest.held():
        pass
    old.give_back()
    assert (tmp_path / LEASE_NAME).read_text() == "12.2.c\n"


def test_who_waited_for_a_lease_that_was_given_back_has_the_one_that_others_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, lockf = [claim(tmp_path, "a")], fcntl.lockf

    def lock_after_the_other_left(handle: IO[str], how: int) -> None:
        monkeypatch.setattr("fcntl.lockf", lockf)
        refused.pop().give_back()
        lockf(handle, how)

    monkeypatch.setattr("fcntl.lockf", lock_after_the_other_left)
    assert claim(tmp_path, "b").attempt == (tmp_path / LEASE_NAME).read_text().strip() == "b"


@pytest.mark.parametrize("held", [b"\xff\xfe\x00", b"12.7\xff.x\n", b"\xc3", b"\x00" * 4096])
def test_a_lease_that_a_broken_disk_left_is_claimed_by_the_next_start(tmp_path: Path, held: bytes) -> None:
    (tmp_path / LEASE_NAME).write_bytes(held)
    lease = claim(tmp_path, "12.0.a")
    assert (tmp_path / LEASE_NAME).read_bytes() == b"12.0.a\n"
    with lease.held():
        pass


def test_nobody_claims_while_another_process_publishes(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from ecdit_ds.checkpoint.lease import claim\n"
        "with claim(Path(sys.argv[1]), 'first').held():\n print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ecdit_ds.checkpoint.lease._PATIENCE_S", 0.2)
            with pytest.raises(CheckpointError, match="another process may be publishing"):
                claim(tmp_path, "second")
    finally:
        holder.kill()
        holder.communicate()
    assert claim(tmp_path, "second").attempt == (tmp_path / LEASE_NAME).read_text().strip() == "second"


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES, errno.ENOLCK])
def test_a_claim_waits_for_whoever_publishes_and_not_for_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    answers = [OSError(code, "held"), OSError(code, "held"), None]

    def lock(*_: object) -> None:
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr("fcntl.lockf", lock)
    monkeypatch.setattr("ecdit_ds.checkpoint.lease.time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda s: None))
    if code == errno.ENOLCK:
        with pytest.raises(CheckpointError, match="cannot be locked"):
            claim(tmp_path, "12.0.a")
    else:
        assert claim(tmp_path, "12.0.a").attempt == (tmp_path / LEASE_NAME).read_text().strip()
    assert len(answers) == (2 if code == errno.ENOLCK else 0)


def test_a_later_life_of_the_same_job_is_its_successor_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_successor("12.1.b", of="12.0.a") and is_successor("12.10.a", of="12.9.a")
    for attempt, of in (
        ("12.0.a", "12.0.a"),
        ("12.0.b", "12.0.a"),
        ("12.0.a", "12.1.b"),
        ("13.1.a", "12.0.a"),
        ("12.1.b", ""),
        ("a", "b"),
        ("", "12.0.a"),
    ):
        assert not is_successor(attempt, of=of)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert attempt_name() != attempt_name()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert attempt_name().startswith("12.0.") and attempt_name() != attempt_name()  # a batch script may start twice
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert attempt_name().startswith("12.3.")


def test_faults_come_where_they_were_ordered_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECDIT_FAULTS", "full@mid-shard,rank=1,step=6; full@any,step=9")
    ordered = {("mid-shard", 6), *((moment, 9) for moment in ("mid-shard", "step"))}
    for rank in range(2):
        faults = faults_from_environment(rank)
        for moment, step in (("mid-shard", 6), ("mid-shard", 7), ("before-rename", 6), ("mid-shard", 9), ("step", 9)):
            if (moment, step) in ordered and (rank == 1 or step == 9):
                with pytest.raises(OSError, match="a drill"):
                    faults.at(moment, step)
            else:
                faults.at(moment, step)


def test_faults_of_a_seed_come_at_the_same_moments_and_about_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def course(rank: int, seed: int) -> list[bool]:
        monkeypatch.setenv("ECDIT_FAULTS", f"full@step,probability=0.3,seed={seed}")
        return [_fails(faults, step) for faults in [faults_from_environment(rank)] for step in range(400)]

    def _fails(faults: Faults, step: int) -> bool:
        try:
            faults.at("step", step)
        except OSError:
            return True
        return False

    assert course(0, 1) == course(0, 1)
    assert course(0, 1) != course(0, 2) and course(0, 1) != course(1, 1)
    assert 80 < sum(course(0, 1)) < 160


@pytest.mark.parametrize(
    "text",
    [
        "explode@step",
        "kill@lunch",
        "kill",
        "kill@step,when=3",
        "kill@step,step=x",
        "delay=x@step",
        "kill@step,7",
        "kill@step,rank=inf",
        "exit@step",
        "exit=0@step",
        "delay=-1@step",
        "kill@step,probability=2",
        "kill@step,rank=0.5",
        "kill@step,step=3,step=4",
    ],
)
def test_an_order_that_cannot_be_understood_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ECDIT_FAULTS", text)
    with pytest.raises(ConfigError, match="environment variable ECDIT_FAULTS"):
        faults_from_environment(0)


def test_the_last_line_names_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    for step in (3, 6):
        save_checkpoint(tmp_path, step, pieces(torch.ones(2)), {}, SoloPeers())
    status = RunStatus(rank=1, checkpoints=tmp_path, step=7)
    assert exit_summary(status, "crashed", "a\nb") == (
        f"end: crashed | cause: a b | rank 1 | step 7 | last valid checkpoint: {tmp_path / 'step_6'}"
    )
    (tmp_path / "step_6" / "shard-00000.safetensors").unlink()
    assert exit_summary(status, "crashed", "a").endswith(str(tmp_path / "step_3"))
    status.checkpoints = tmp_path / "none"
    assert exit_summary(status, "crashed", "a").endswith("checkpoint: none")


def test_the_first_rank_that_is_left_on_a_machine_speaks() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        seat, theirs = current_process(), current_process()
        theirs = type(seat)(host=seat.host, process=other.pid, born=_born(other.pid))
        status = RunStatus(rank=1, seats=[theirs, seat])
        assert status.lost_ranks() == []
        assert not status.is_reporter([])
        other.send_signal(signal.SIGKILL)
        assert status.lost_ranks() == [0]
        assert status.is_reporter([0])


def test_a_process_that_waits_for_a_dead_peer_ends_by_itself_and_says_why(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from ecdit_ds.runtime.exit_report import RunStatus, ProcessInfo, current_process\n"
        "born = float(sys.argv[2]); here = current_process()\n"
        "peer = ProcessInfo(host=here.host, process=int(sys.argv[1]), born=born)\n"
        "status = RunStatus(rank=0, checkpoints=Path(sys.argv[3]), step=5, seats=[here, peer])\n"
        "status.watch_peers()\nprint('waits', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as peer:
        command = [sys.executable, "-c", script, str(peer.pid), str(_born(peer.pid)), str(tmp_path)]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert waiting.stdout is not None and waiting.stdout.readline() == "waits\n"
        peer.kill()
        _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 75
    assert said == "end: retry | cause: rank 1 died | rank 0 | step 5 | last valid checkpoint: none\n"


@pytest.mark.parametrize("has_exited", [False, True])
def test_a_rank_that_cannot_leave_is_ended(has_exited: bool) -> None:
    script = (
        "import time; from ecdit_ds.runtime import exit_report\n"
        "exit_report._SECONDS_TO_LEAVE = 0.5\nstatus = exit_report.RunStatus(seats=[exit_report.current_process()])\n"
        f"status.watch_peers()\nstatus.is_exiting = True\nstatus.has_exited = {has_exited}\ntime.sleep(4)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == (0 if has_exited else 75)


def _born(process: int) -> float:
    return float(psutil.Process(process).create_time())


def test_lines_that_a_full_disk_refused_are_written_with_the_next_ones_and_none_is_cut(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from ecdit_ds.training.callbacks import JsonLines\n"
        "lines = JsonLines(Path(sys.argv[1]), Path(sys.argv[1] + '.evaluations'))\n"
        "lines.on_report([{'step': 1}])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))\n"
        "for step in (2, 3):\n"
        "    try:\n        lines.on_report([{'step': step}])\n"
        "    except OSError as error:\n        print(error.errno)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print(Path(sys.argv[1]).read_text().count('}'))\n"
        "lines.on_report([{'step': 4}])\n"
    )
    log = tmp_path / "metrics.jsonl"
    said = subprocess.run([sys.executable, "-c", script, str(log)], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["27", "27", "1"]
    assert log.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
    JsonLines(log, log).on_report([])
