"""The benchmark of the layer: what it writes, that its sides do equal work, how it refuses. Times are not judged."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.bench import parse_arguments

ROOT = Path(__file__).resolve().parents[3]
PEERS = {"dense", "deepspeed", "nucleus", "nucleus_grouped"}
TOKENS, EXPERTS, CALL_TOKENS = (16, 64), (4, 8), 256


def run_bench(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/bench.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what one small run wrote, with its printed lines under `lines`."""
    path = tmp_path_factory.mktemp("bench") / "moe.json"
    sizes = ["--tokens", *map(str, TOKENS), "--experts", *map(str, EXPERTS), "--call-tokens", str(CALL_TOKENS)]
    done = run_bench("moe", "--quick", "--device", "cpu", "--hidden-size", "64", *sizes, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()) | {"lines": done.stdout.splitlines()}


def test_every_peer_meets_the_layer_in_every_case(report: dict[str, Any]) -> None:
    cases = {(row["tokens_an_image"], row["num_experts"], row["peer"]) for row in report["rows"]}
    assert cases == {(tokens, experts, peer) for tokens in TOKENS for experts in EXPERTS for peer in PEERS}
    assert len(report["rows"]) == len(cases)


def test_a_report_says_what_machine_versions_and_command_it_came_from(report: dict[str, Any]) -> None:
    meta = report["meta"]
    assert {"device", "versions", "commit", "command", "threads", "clock", "gradients", "dtype"} <= meta.keys()
    assert {"python", "torch", "deepspeed", "diffusers"} <= meta["versions"].keys()
    assert meta["threads"] == 1 and meta["command"].startswith("python tools/bench.py moe --quick")


def test_both_sides_ran_and_the_ratio_lies_between_the_extremes_of_their_medians(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert row["ours_ms"] > 0 and row["peer_ms"] > 0 and math.isfinite(row["ratio"])
        for value, quartiles in (("ours_ms", "ours_quartiles_ms"), ("peer_ms", "peer_quartiles_ms")):
            low, high = row[quartiles]
            assert low <= row[value] <= high
        # Of paired ratios, the median is not the ratio of medians; it is near unless the machine stalls for a round.
        assert 0.2 < row["ratio"] / (row["ours_ms"] / row["peer_ms"]) < 5.0


def test_rows_an_expert_are_its_capacity_in_every_image_of_the_call(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert row["rows_an_expert"] == 2 * CALL_TOKENS // row["num_experts"]


def test_all_sides_do_equal_work_within_three_percent(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert row["ours_flops"] > 0
        assert row["peer_flops"] == pytest.approx(row["ours_flops"], rel=0.03), (row["case"], row["peer"])


def test_the_work_counted_is_that_of_two_experts_a_token_their_gates_and_the_router(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        hidden, inner = report["meta"]["hidden_size"], report["meta"]["ffn_hidden_size"]
        products = 2 * 2 * hidden * inner + hidden * row["num_experts"]
        gate_gradients = 2 * hidden  # of each of the two, a dot product of its output with the gradient
        # A multiply-add is two; the backward of a product is two products.
        assert row["ours_flops"] == 2 * CALL_TOKENS * (3 * products + gate_gradients)


def test_one_line_a_row_and_a_summary_are_printed(report: dict[str, Any]) -> None:
    assert len(report["lines"]) == len(report["rows"]) + 1
    assert "worst ratio to the fastest peer" in report["lines"][-1] and "time a token" in report["lines"][-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["moe", "--tokens", "48", "--call-tokens", "100"], "48"),
        (["moe", "--experts", "1"], "--experts 1"),
        (["moe", "--rounds", "0"], "'0'"),
        (["moe", "--hidden-size", "7"], "--hidden-size 7"),
        (["moe", "--json", "nowhere/out.json"], "--json nowhere/out.json"),
        (["dispatch", "--ranks", "3"], "1, 2, 4, 8"),
        (["dispatch", "--tokens", "100", "--call-tokens", "200", "--experts", "16"], "--tokens 100"),
        (["dispatch", "--chunks", "64", "--quick"], "--chunks 64"),
        (["dispatch", "--json", "."], "is a folder"),
        (["attention"], "attention"),
    ],
)
def test_a_flag_that_cannot_work_is_named_in_one_line(
    flags: list[str], said: str, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    assert said in refusal_of(lambda: parse_arguments(flags))


def test_the_command_refuses_in_one_line_with_exit_code_2() -> None:
    done = run_bench("moe", "--rounds", "0")
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "'0'" in done.stderr


def test_dispatch_sends_no_more_bytes_than_it_must_and_says_what_they_cost(tmp_path: Path) -> None:
    path = tmp_path / "dispatch.json"
    done = run_bench("dispatch", "--quick", "--device", "cpu", "--hidden-size", "32", "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["meta"]["ranks"] == 2 and report["meta"]["command"].startswith("python tools/bench.py dispatch")
    assert [row["dispatch_chunks"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        # 512 tokens of 32 numbers of 4 bytes, to 2 experts each and back, half of them on the other rank.
        assert row["bytes_sent"] == row["bytes_floor"] == 2 * 2 * 512 * 32 * 4 / 2
        assert row["peer"] == "bare" and row["ratio"] > 0 and row["ours_ms"] > 0
    assert len(done.stdout.splitlines()) == 2
