"""What is checked before training: by its decisions, and by real ranks that check."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.planner.memory import checkpoint_bytes
from ecdit_ds.slurm.preflight import LIBRARIES, NodeInfo, check_device, check_nodes, parse_arguments
from tests.helpers.launch import free_port

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 60.0
RefusalOf = Callable[[Callable[[], object]], str]
StartRank = Callable[..., subprocess.Popen[str]]

INSTALLED = ("Python 3.11.7", "torch 2.13.0", "numpy 2.4.6", "ecdit_ds source 0123abcd")
NEWER = ("Python 3.11.7", "torch 2.14.0", "numpy 2.4.6", "ecdit_ds source 0123abcd")
ALIKE = [
    NodeInfo(node=f"n{node}", installed=INSTALLED, device="GPU 80GB", write_bytes_per_s=1e9 * node if first else 0.0)
    for node in (1, 2, 3)
    for first in (True, False)
]
"""Two ranks on each of three nodes, which write 1, 2 and 3 GB a second."""


def test_nodes_that_are_alike_are_told_with_what_they_have_in_common(tiny_recipe: Recipe) -> None:
    table = "\n".join(check_nodes(ALIKE, tiny_recipe, None))
    assert "3 with the same" in table
    for fact in (*INSTALLED, "GPU 80GB", "6 GB/s", "slowest n1"):
        assert fact in table, fact


def test_a_node_with_another_version_is_named_with_both_versions(tiny_recipe: Recipe, refusal_of: RefusalOf) -> None:
    facts = [replace(rank, installed=NEWER) if rank.node == "n2" else rank for rank in ALIKE]
    message = refusal_of(lambda: check_nodes(facts, tiny_recipe, None))
    assert message.startswith("n2: has torch 2.14.0, where others have torch 2.13.0;")
    assert "numpy" not in message


def test_many_nodes_with_another_version_are_named_by_the_first_and_a_count(
    tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    usual = [replace(ALIKE[0], node=f"a{node:02}") for node in range(20)]
    other = [replace(ALIKE[0], node=f"b{node:02}", installed=NEWER) for node in range(19)]
    message = refusal_of(lambda: check_nodes([*other, *usual], tiny_recipe, None))
    assert message.startswith("b00, b01,") and " and 11 more: has torch 2.14.0" in message


def test_a_node_that_lacks_nothing_but_has_other_sources_is_named(tiny_recipe: Recipe, refusal_of: RefusalOf) -> None:
    edited = (*INSTALLED[:-1], "ecdit_ds source 99999999")
    facts = [replace(rank, installed=edited) if rank.node == "n3" else rank for rank in ALIKE]
    assert "n3: has ecdit_ds source 99999999, where" in refusal_of(lambda: check_nodes(facts, tiny_recipe, None))


def test_a_time_limit_without_room_for_a_save_is_refused_with_the_numbers(
    tiny_recipe: Recipe, refusal_of: RefusalOf
) -> None:
    speed = checkpoint_bytes(tiny_recipe) / 600.0  # all nodes together save in ten minutes
    facts = [replace(rank, write_bytes_per_s=speed / 3 if rank.write_bytes_per_s else 0.0) for rank in ALIKE]
    message = refusal_of(lambda: check_nodes(facts, tiny_recipe, 660.0))
    assert "is 11 min" in message and "takes about 2 min" in message and "10.0 min" in message
    assert f"{checkpoint_bytes(tiny_recipe) / 1e9:,.3g} GB" in message and "--time" in message
    for enough in (730.0, None):
        assert "at least 660 s" in "\n".join(check_nodes(facts, tiny_recipe, enough))


def test_a_rank_without_a_gpu_is_refused_unless_it_rehearses(
    refusal_of: RefusalOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    rank = {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}
    message = refusal_of(lambda: check_device(rank))
    assert "NoDevFiles" in message and "ECDIT_REHEARSAL=1" in message
    check_device(rank | {"ECDIT_REHEARSAL": "1"})


def test_a_rank_without_a_gpu_of_amd_is_told_what_slurm_gave(
    refusal_of: RefusalOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    rank = {"LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    assert "Slurm gave ROCR_VISIBLE_DEVICES='9';" in refusal_of(
        lambda: check_device(rank | {"ROCR_VISIBLE_DEVICES": "9"})
    )
    assert "Slurm gave no CUDA_VISIBLE_DEVICES;" in refusal_of(lambda: check_device(rank))


def test_ranks_bound_to_some_of_the_nodes_gpus_are_told_to_see_all(
    refusal_of: RefusalOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --gpu-bind=closest does it: each task sees those of its socket."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    bound = {"LOCAL_RANK": "4", "LOCAL_SIZE": "8", "SLURM_GPUS_ON_NODE": "8"}
    message = refusal_of(lambda: check_device(bound))
    assert "4 of the node's 8 GPUs" in message and "--gpu-bind=none" in message and "ntasks" not in message
    assert "lower --ntasks-per-node" in refusal_of(lambda: check_device(bound | {"SLURM_GPUS_ON_NODE": "4"}))


def test_more_ranks_than_gpus_are_refused_on_the_rank_that_has_none(
    refusal_of: RefusalOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_device({"LOCAL_RANK": "3", "LOCAL_SIZE": "8"})
    message = refusal_of(lambda: check_device({"LOCAL_RANK": "4", "LOCAL_SIZE": "8"}))
    assert message.startswith("8 ranks on this node, and 4 GPUs")


def test_ranks_that_all_see_the_only_gpu_are_refused_and_those_that_see_their_own_are_not(
    refusal_of: RefusalOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rank = {"LOCAL_RANK": "0", "LOCAL_SIZE": "8"}  # rank_environment counts from 0 in what each sees
    assert "8 ranks on this node, and 1 GPUs" in refusal_of(lambda: check_device(rank | {"SLURM_GPUS_ON_NODE": "1"}))
    check_device(rank | {"SLURM_GPUS_ON_NODE": "8"})
    check_device({"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "SLURM_GPUS_ON_NODE": "1"})


def test_trainings_arguments_say_what_is_checked(tmp_path: Path) -> None:
    train = ["--config", "rehearsal", "--deepspeed", "x.json", "--set", "train.max_steps=7", f"--output={tmp_path}"]
    options, recipe = parse_arguments(["--limit-seconds", "600", "--", *train, "--resume", "never"])
    assert (options.limit_seconds, options.output) == (600.0, tmp_path)
    assert (recipe.name, recipe.train.max_steps) == ("rehearsal", 7)
    assert parse_arguments(["--", *train])[0].limit_seconds is None


@pytest.fixture
def start_rank() -> Iterator[StartRank]:
    """Return `start_rank(rank, output, patience_seconds, *flags)`: one of two ranks, each on a node of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment = kept | {
        "ECDIT_REHEARSAL": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    started = []

    def start(rank: int, output: Path, patience_seconds: float, *flags: str) -> subprocess.Popen[str]:
        command = ["ecdit_ds/slurm/preflight.py", f"--patience-seconds={patience_seconds}", *flags]
        process = subprocess.Popen(
            [sys.executable, *command, "--", "--config", "rehearsal", "--output", str(output)],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.communicate()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, output and complaints."""
    output, complaints = process.communicate(timeout=SECONDS)
    return process.returncode, output, complaints


def test_two_nodes_that_are_well_pass_and_leave_nothing(tmp_path: Path, start_rank: StartRank) -> None:
    for name in (".sign-12", ".speed-12-7"):  # of a check that was killed
        (tmp_path / "slurm" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "slurm" / name).touch()
    (tmp_path / "slurm/lives.jsonl").touch()
    first, second = [end_of(process) for process in [start_rank(rank, tmp_path, 60) for rank in (0, 1)]]
    assert (first[0], second) == (0, (0, "", "")), first
    assert first[2] == ""
    said = first[1].splitlines()
    assert [line.split()[0] for line in said] == ["nodes", "devices", "disk", "ranks"]
    assert "2 with the same Python" in said[0] and all(name in said[0] for name in LIBRARIES)
    assert "missing" not in said[0]
    assert "2 nodes together write" in said[2] and "2 summed up alike" in said[3]
    assert [path.name for path in (tmp_path / "slurm").iterdir()] == ["lives.jsonl"]


def test_all_ranks_end_alike_when_the_time_limit_is_too_short(tmp_path: Path, start_rank: StartRank) -> None:
    """The first one says why; the highest exit code, which is what srun gives, says the same."""
    first, second = [
        end_of(process) for process in [start_rank(rank, tmp_path, 60, "--limit-seconds=30") for rank in (0, 1)]
    ]
    assert (first[0], second) == (2, (2, "", ""))
    (line,) = first[2].splitlines()
    assert line.startswith("error: the job's time limit")


def test_a_node_that_sees_another_folder_is_named(tmp_path: Path, start_rank: StartRank) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    first, second = [end_of(process) for process in [start_rank(0, here, 18), start_rank(1, elsewhere, 18)]]
    assert (first[0], second) == (2, (2, "", ""))
    (line,) = first[2].splitlines()
    assert line.startswith(f"error: {elsewhere}/slurm: n2 does not see what rank 0 wrote there within 3 s")
    assert list((here / "slurm").iterdir()) == []
    assert not elsewhere.exists()


def test_a_folder_that_cannot_be_written_to_is_told_at_once(tmp_path: Path, start_rank: StartRank) -> None:
    (tmp_path / "file").touch()
    first, second = [end_of(process) for process in [start_rank(rank, tmp_path / "file", 240) for rank in (0, 1)]]
    assert (first[0], second) == (2, (2, "", ""))
    (line,) = first[2].splitlines()
    assert line == f"error: {tmp_path}/file/slurm: n1 cannot write there: Not a directory"


def test_a_rank_that_never_comes_is_waited_for_as_long_as_was_said(tmp_path: Path, start_rank: StartRank) -> None:
    began = time.monotonic()
    code, output, complaints = end_of(start_rank(0, tmp_path, 2))
    assert (code, output) == (75, "")
    (line,) = complaints.splitlines()
    assert line.startswith("error: n1: the ranks did not meet at 127.0.0.1:") and "1/2 clients" in line
    assert time.monotonic() - began < 30
    assert not (tmp_path / "slurm").exists()


def test_a_rank_that_dies_in_the_middle_ends_the_others_with_one_line(tmp_path: Path, start_rank: StartRank) -> None:
    """It dies while it looks for what the first has written elsewhere."""
    first, second = start_rank(0, tmp_path / "here", 90), start_rank(1, tmp_path / "elsewhere", 90)
    deadline = time.monotonic() + SECONDS
    while not list((tmp_path / "here").glob("slurm/.sign-*")):
        assert first.poll() is None and time.monotonic() < deadline, "it does not come as far as that"
        time.sleep(0.02)
    second.kill()
    code, output, complaints = end_of(first)
    assert (code, output) == (75, "")
    (line,) = complaints.splitlines()
    assert line.startswith("error: n1: checking the disk together failed: ")
    assert list((tmp_path / "here/slurm").iterdir()) == []
