"""A killed run, started again by the same command, is the run that was never killed: to the last bit."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ecdit_ds.checkpoint.manifest import read_manifest
from ecdit_ds.checkpoint.naming import list_checkpoints, step_of
from ecdit_ds.errors import ExitCode
from tests.helpers.checkpoints import digest
from tests.helpers.launch import ROOT, finish, finish_group, free_port, metrics_of, start, train, train_many
from tests.helpers.recipes import SMALL_MODEL, arguments

STEPS = 30
RANKS = 2
SMALL = (
    *SMALL_MODEL,
    "parallel.ep=2",
    f"train.max_steps={STEPS}",
    "train.checkpoint_every=6",
    "train.log_every=1",
    "data.num_workers=1",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, text = train(RANKS, arguments(output, cache, *SMALL))
    assert code == 0, text
    return output


def test_a_run_killed_three_ways_equals_the_uninterrupted_one_bitwise(
    uninterrupted: Path, cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    # Before the first checkpoint, between two, and soon after one; a rank, the launcher, everything.
    for victim, step in (("rank", 3), ("launcher", 11), ("everything", 19)):
        life = start(RANKS, ROOT / "ecdit_ds" / "train.py", arguments(output, cache, *SMALL))
        _wait_for_step(life, output, step)
        _kill(life, victim)
        assert len(metrics_of(output)) < STEPS, f"the run had ended before {victim} was killed"
    code, text = train(RANKS, arguments(output, cache, *SMALL))
    assert code == 0, text
    assert "goes on from" in text

    for name in ("step", "samples_seen", "loss", "grad_norm", "learning_rate"):
        assert [m[name] for m in metrics_of(output)] == [m[name] for m in metrics_of(uninterrupted)], name
    assert digest(output, STEPS) == digest(uninterrupted, STEPS)
    assert not list(output.glob("checkpoints/*.tmp-*"))


def test_signals_to_one_rank_save_the_same_step_on_all_once_and_the_same_command_goes_on_bitwise(
    uninterrupted: Path, cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    life = start(RANKS, ROOT / "ecdit_ds" / "train.py", arguments(output, cache, *SMALL))
    _wait_for_step(life, output, 8)
    rank = _rank(life, 1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        with contextlib.suppress(psutil.NoSuchProcess):  # the first is enough, and a free machine is quick
            rank.send_signal(number)
        time.sleep(0.05)  # signals that wait together are delivered in no order
    code, text = finish(life)
    steps = len(metrics_of(output))
    assert code == ExitCode.CHECKPOINTED, text
    assert 8 <= steps < STEPS
    assert f"stopped at step {steps} (SIGTERM on rank 1): saved" in text
    assert f"end: checkpointed | cause: SIGTERM on rank 1 | rank 0 | step {steps} |" in text
    assert text.count(f"saved {output / 'checkpoints' / f'step_{steps}'}") == 1
    assert "Traceback" not in text
    assert read_manifest(list_checkpoints(output / "checkpoints")[0]).step == steps
    code, text = train(RANKS, arguments(output, cache, *SMALL))
    assert code == 0, text
    assert f"at step {steps}" in text
    assert [m["loss"] for m in metrics_of(output)] == [m["loss"] for m in metrics_of(uninterrupted)]
    assert digest(output, STEPS) == digest(uninterrupted, STEPS)


@pytest.mark.parametrize(
    ("number", "is_to_all"), [(signal.SIGUSR1, True), (signal.SIGTERM, True), (signal.SIGTERM, False)]
)
def test_a_signal_of_which_launchers_die_still_lets_ranks_save(
    uninterrupted: Path, cache: Path, tmp_path: Path, number: signal.Signals, is_to_all: bool
) -> None:
    output = tmp_path / "run"
    life = start(RANKS, ROOT / "ecdit_ds" / "train.py", arguments(output, cache, *SMALL))
    _wait_for_step(life, output, 8)
    (os.killpg if is_to_all else os.kill)(life.pid, number)
    _, text = finish_group(life)
    newest = list_checkpoints(output / "checkpoints")[0]
    step = step_of(newest)
    assert 8 <= step == len(metrics_of(output)) < STEPS
    # Of a signal to all, launchers die too, and a rank may notice that first.
    reason = f"({number.name}|the launcher died)" if is_to_all else "the launcher died"
    cause = rf"{reason} on (all ranks|rank [01])(; {reason} on rank 1)?"
    assert re.search(
        rf"end: checkpointed \| cause: {cause} \| rank 0 \| step {step} \| last valid .*: {newest}\n", text
    )
    text = train_many(tmp_path, [(RANKS, arguments(output, cache, *SMALL))])
    assert f"at step {step}" in text
    assert digest(output, STEPS) == digest(uninterrupted, STEPS)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_killed_under_a_launcher_leaves_one_line_and_nothing_behind(
    cache: Path, tmp_path: Path, launcher: str
) -> None:
    output, shared_memory, port = tmp_path / "run", set(Path("/dev/shm").iterdir()), free_port()
    command = {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(port)],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(port)],
    }[launcher]
    command = [sys.executable, str(Path(sys.executable).with_name(command[0])), *command[1:], "ecdit_ds/train.py"]
    ended = subprocess.run(
        [*command, *arguments(output, cache, *SMALL)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ECDIT_FAULTS": "kill@step,step=14,rank=1"},
        timeout=300,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode != 0
    [line] = [line for line in said.splitlines() if line.startswith("end: ")]
    assert re.fullmatch(
        rf"end: retry \| cause: rank 1 died \| rank 0 \| step 13 \| last valid checkpoint: {output}/.*/step_(6|12)",
        line,
    )
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if str(output) in " ".join(p.info["cmdline"] or ())]
    left = [path.name for path in set(Path("/dev/shm").iterdir()) - shared_memory]
    assert not [name for name in left if (n := re.search("[0-9]+", name)) and not psutil.pid_exists(int(n[0]))]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections may linger, listeners not
        probe.bind(("127.0.0.1", port))


def test_a_signal_while_a_rank_still_imports_kills_nobody(cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    life = start(1, ROOT / "ecdit_ds" / "train.py", arguments(output, cache, *SMALL, "parallel.ep=1"))
    deadline = time.monotonic() + 120
    while not (ranks := _ranks(life)) or ranks[0].cpu_times().user < 1.5:  # handlers are up, imports are not over
        assert time.monotonic() < deadline and life.poll() is None
        time.sleep(0.02)
    assert not output.exists()
    ranks[0].send_signal(signal.SIGUSR1)
    code, text = finish(life)
    assert code == ExitCode.CHECKPOINTED, text
    assert "stopped at step 1 (SIGUSR1 on rank 0): saved" in text


def test_a_finished_run_started_again_trains_nothing_and_changes_nothing(
    uninterrupted: Path, cache: Path, tmp_path: Path
) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes(), digest(uninterrupted, STEPS)
    text = train_many(tmp_path, [(RANKS, arguments(uninterrupted, cache, *SMALL))])
    assert f"done at step {STEPS}" in text
    assert ((uninterrupted / "metrics.jsonl").read_bytes(), digest(uninterrupted, STEPS)) == before


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(
    uninterrupted: Path, cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    subprocess.run(["cp", "-r", *map(str, uninterrupted.iterdir()), str(output)], check=True)
    newest, older = list_checkpoints(output / "checkpoints")[:2]
    _flip_a_payload_byte(sorted(newest.glob("shard-*"))[1])
    # The lost steps are trained again, but a damaged folder is not overwritten in silence: it is moved aside.
    text = train_many(tmp_path, [(RANKS, arguments(output, cache, *SMALL))])
    assert "rejected" in text
    assert newest.name in text
    assert f"goes on from {older}" in text
    assert digest(output, STEPS) == digest(uninterrupted, STEPS)


def test_starting_from_another_runs_damaged_checkpoint_leaves_that_run_alone(
    uninterrupted: Path, cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["cp", "-r", *map(str, uninterrupted.iterdir()), str(other)], check=True)
    newest, older = list_checkpoints(other / "checkpoints")[:2]
    _flip_a_payload_byte(sorted(newest.glob("shard-*"))[0])
    before = sorted(path.name for path in (other / "checkpoints").iterdir())
    text = train_many(tmp_path, [(RANKS, arguments(tmp_path / "new", cache, *SMALL, resume=str(other)))])
    assert f"goes on from {older}" in text
    assert sorted(path.name for path in (other / "checkpoints").iterdir()) == before
    assert digest(tmp_path / "new", STEPS) == digest(uninterrupted, STEPS)


def test_a_port_that_is_taken_is_one_line(cache: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = os.environ | {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        command = [sys.executable, "ecdit_ds/train.py", *arguments(tmp_path / "run", cache, *SMALL)]
        done = subprocess.run(
            [*command, "--set", "parallel.ep=1"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "MASTER_PORT" in line and line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def _flip_a_payload_byte(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-5] ^= 0x10
    shard.write_bytes(data)


def _wait_for_step(life: "subprocess.Popen[str]", output: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    log = output / "metrics.jsonl"
    while time.monotonic() < deadline:
        assert life.poll() is None, finish(life)
        lines = log.read_text().splitlines() if log.exists() else []
        if any(line.endswith("}") and json.loads(line)["step"] >= step for line in lines[-1:]):
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached: {finish(life, 1)}")


def _kill(life: "subprocess.Popen[str]", victim: str) -> None:
    if victim == "everything":
        os.killpg(life.pid, signal.SIGKILL)
    elif victim == "launcher":
        life.kill()
    else:
        _rank(life, 1).kill()
    life.wait(timeout=120)
    if life.stdout is not None:
        life.stdout.close()


def _ranks(life: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Return the processes of the ranks that have been started so far, in no order."""
    found = []
    for process in psutil.Process(life.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(part.startswith("--local_rank=") for part in process.cmdline()):
                found.append(process)
    return found


def _rank(life: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    return next(process for process in _ranks(life) if f"--local_rank={rank}" in process.cmdline())
