"""tools/plan.py as a user meets it: tables, JSON, files, and one line for each mistake."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ecdit_ds.config.deepspeed_json import DEFAULT_PATH, load_deepspeed_config
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.errors import ConfigError
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.hardware import Cluster, default_assumptions, find_gpu
from ecdit_ds.planner.launch_files import FILES, write_run_files
from ecdit_ds.planner.plan import ClusterAssumptions, Plan, make_plan
from ecdit_ds.planner.zero import zero_settings
from tests.helpers.launch import ROOT
from tools.plan import main

SMALL = (
    "--config",
    "ecdit_xl_8e",
    "--set",
    "train.global_batch_size=512",
    "--set",
    "model.num_layers=6",
    "--nodes",
    "2",
    "--gpu",
    "h100-80gb",
)
FIXED = (*SMALL, "--tp", "1", "--ep", "8")


@dataclass(frozen=True)
class Answer:
    """How the tool ended."""

    code: int
    out: str
    err: str

    @property
    def numbers(self) -> dict[str, Any]:
        """Return what --json printed; NaN and infinity are no JSON."""

        def refuse(text: str) -> float:
            raise AssertionError(f"{text} is no JSON")

        data: dict[str, Any] = json.loads(self.out, parse_constant=refuse)
        return data


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Return a function that runs the tool."""

    def run(*arguments: str) -> Answer:
        code = main(list(arguments))
        seen = capsys.readouterr()
        return Answer(code=code, out=seen.out, err=seen.err)

    return run


@pytest.fixture
def recipe_plan() -> Plan:
    """Return a plan for 16 GPUs."""
    recipe = load_recipe("ecdit_xl_8e", ["train.global_batch_size=512", "model.num_layers=6", "parallel.ep=8"])
    machine = Cluster(gpu=find_gpu("h100-80gb"), nodes=2, gpus_per_node=8, assumptions=default_assumptions())
    zero = zero_settings(load_deepspeed_config(DEFAULT_PATH, recipe, 16))
    around = ClusterAssumptions(storage_bytes_per_s=2e10, recovery_seconds=600)
    return make_plan(recipe, Topology(world_size=16, tp=1, ep=8), zero, machine, around)


def test_a_plan_of_a_layout_says_what_a_user_wants_to_know(plan: Callable[..., Answer]) -> None:
    answer = plan(*FIXED)
    assert answer.code == 0 and answer.err == ""
    for word in ("parameters", "activations", "token_exchanges", "images a second", "MFU", "checkpoint", "effective"):
        assert word in answer.out
    assert "tp 1 x dp 16; experts over ep 8, 2 copies; ZeRO-2" in answer.out


def test_json_has_the_keys_that_were_promised_and_sums_that_add_up(plan: Callable[..., Answer]) -> None:
    data = plan(*FIXED, "--json").numbers
    assert {"parameters", "per_gpu", "step", "checkpoint", "run", "fits"} <= set(data)
    assert {"dit", "with_encoders", "activated"} <= set(data["parameters"])
    assert data["fits"] is True and data["per_gpu"]["total"] <= data["per_gpu"]["limit"]
    step = data["step"]
    flops = {key: value for key, value in step["flops"].items() if key not in ("total", "recomputed")}
    assert sum(flops.values()) == pytest.approx(step["flops"]["total"])
    seconds = step["seconds"]
    parts = sum(seconds["compute"].values()) + sum(seconds["communication"].values())
    assert parts == pytest.approx(seconds["without_overlap"])
    assert step["images_per_second"] == pytest.approx(512 / seconds["with_overlap"])
    assert set(data["phases"]) == {"masked", "unmasked"}
    assert data["checkpoint"]["bytes"] == 16 * data["parameters"]["dit"]


def test_run_length_adds_both_phases(plan: Callable[..., Answer]) -> None:
    data = plan(*FIXED, "--json").numbers
    seconds = sum(phase["steps"] * phase["seconds"]["with_overlap"] for phase in data["phases"].values())
    assert sum(phase["steps"] for phase in data["phases"].values()) == data["run"]["steps"] == 800_000
    assert data["run"]["days"] == pytest.approx(seconds / 86400)


def test_without_a_layout_all_are_searched_and_ranked(plan: Callable[..., Answer]) -> None:
    answer = plan(*SMALL, "--top", "3")
    assert answer.code == 0
    assert answer.out.startswith("layouts that fit:") and "\n3  tp " in answer.out and "\n4  tp " not in answer.out
    assert "layouts that are not possible:" in answer.out
    data = plan(*SMALL, "--json").numbers
    speeds = [layout["images_per_second"] for layout in data["search"]["feasible"]]
    assert speeds == sorted(speeds, reverse=True)
    assert data["layout"]["tp"] == data["search"]["feasible"][0]["tp"]


@pytest.mark.parametrize(
    ("flags", "fixed"),
    [
        (("--tp", "2"), {"tp": {2}}),
        (("--ep", "4"), {"ep": {4}}),
        (("--zero", "3"), {"zero": {3}}),
        (("--recompute", "block", "--recompute-every", "2"), {"recompute": {"block"}, "recompute_every": {2}}),
        (("--deepspeed", "ds_configs/zero1.json"), {"zero": {1}}),
    ],
)
def test_what_a_flag_gives_is_not_searched(
    plan: Callable[..., Answer], flags: tuple[str, ...], fixed: dict[str, set[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    feasible = plan(*SMALL, *flags, "--json").numbers["search"]["feasible"]
    for key, values in fixed.items():
        assert {layout[key] for layout in feasible} == values


def test_a_micro_batch_that_is_given_is_taken_in_all_phases(plan: Callable[..., Answer]) -> None:
    data = plan(*SMALL, "--micro-batch", "8", "--tp", "1", "--json").numbers
    assert {size for layout in data["search"]["feasible"] for size in layout["micro_batch"].values()} == {8}


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (("--network-gbps", "50"), ("step", "seconds", "without_overlap")),
        (("--storage-gbps", "16"), ("checkpoint", "save_seconds")),
        (("--recovery-minutes", "60"), ("run", "outlooks", 0, "effective_share")),
        (("--failures-per-1000-node-days", "9"), ("run", "outlooks", 0, "mean_seconds_between")),
        (("--zero", "3"), ("per_gpu", "total")),
        (("--micro-batch", "8"), ("per_gpu", "activations")),
        (("--recompute", "selective"), ("per_gpu", "activations")),
        (("--recompute", "selective", "--recompute-every", "2"), ("step", "flops", "recomputed")),
        (("--gpus-per-node", "4"), ("step", "bytes", "dense_gradients", "network")),
        (("--set", "train.max_steps=900000"), ("run", "days")),
        (("--set", "train.async_save=false"), ("checkpoint", "stall_seconds")),
        *(
            ((f"--{name.replace('_', '-')}", "0.05"), ("step", "seconds", "without_overlap"))
            for name in vars(default_assumptions())
            if name not in ("usable_memory", "host_bytes_per_s")
        ),
        (("--usable-memory", "0.8"), ("per_gpu", "limit")),
    ],
)
def test_each_flag_has_its_effect(plan: Callable[..., Answer], flags: tuple[str, ...], where: tuple[Any, ...]) -> None:
    before, after = (plan(*FIXED, *more, "--json").numbers for more in ((), flags))
    for key in where:
        before, after = before[key], after[key]
    assert before != after


def test_host_bandwidth_is_what_an_offloaded_optimizer_waits_for(plan: Callable[..., Answer]) -> None:
    offloaded = (*FIXED, "--deepspeed", str(ROOT / "ds_configs" / "zero2_offload.json"), "--json")
    slow = plan(*offloaded, "--host-bytes-per-s", "1e9").numbers["step"]["seconds"]["compute"]["optimizer"]
    assert slow > 10 * plan(*offloaded).numbers["step"]["seconds"]["compute"]["optimizer"]


def test_what_is_written_is_the_plan_that_was_printed(plan: Callable[..., Answer], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    answer = plan(*SMALL, "--recompute", "block", "--json", "--write", str(folder))
    layout = answer.numbers["layout"]
    recipe: Recipe = load_recipe(str(folder / "recipe.yaml"))
    assert (recipe.parallel.tp, recipe.parallel.ep, recipe.train.recompute) == (layout["tp"], layout["ep"], "block")
    config = load_deepspeed_config(folder / "deepspeed.json", recipe, layout["dp"])
    assert config["zero_optimization"]["stage"] == layout["zero"]
    header = (folder / "header.sh").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=USR1@", "--requeue"):
        assert f"#SBATCH {line}" in header
    overrides = (folder / "overrides.txt").read_text()
    lines = [line.removeprefix("--set ") for line in overrides.splitlines() if line.startswith("--set ")]
    assert load_recipe("ecdit_xl_8e", lines) == recipe
    assert "parallel.tp=1" not in lines  # as the recipe has it


def test_overrides_hold_all_that_differs_from_the_named_recipe(plan: Callable[..., Answer], tmp_path: Path) -> None:
    changed = ("train.global_batch_size=1024", "train.unmasked_from_step=null", "optimizer.weight_decay=1e-5")
    sets = [word for change in changed for word in ("--set", change)]
    assert plan(*SMALL, *sets, "--tp", "2", "--write", str(tmp_path)).code == 0
    lines = [line.removeprefix("--set ") for line in (tmp_path / "overrides.txt").read_text().splitlines()]
    assert {"train.global_batch_size=1024", "parallel.tp=2", "train.unmasked_from_step=null"} <= set(lines)
    assert load_recipe("ecdit_xl_8e", lines) == load_recipe(str(tmp_path / "recipe.yaml"))


WHOLE = (
    "--config",
    "ecdit_xl_8e",
    "--set",
    "train.global_batch_size=512",
    "--nodes",
    "1",
    "--gpu",
    "a100-40gb",
    "--ep",
    "8",
    "--zero",
    "2",
)
"""A model that the phases have different room beside."""


def test_the_recipe_fits_in_both_phases_and_says_what_the_first_has_room_for(
    plan: Callable[..., Answer], tmp_path: Path
) -> None:
    answer = plan(*WHOLE, "--json", "--write", str(tmp_path))
    sizes = answer.numbers["search"]["feasible"][0]["micro_batch"]
    assert sizes["masked"] > sizes["unmasked"]
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.train.micro_batch_size == sizes["unmasked"]
    for text in (answer.err, *((tmp_path / name).read_text() for name in ("recipe.yaml", "overrides.txt"))):
        assert f"--set train.micro_batch_size={sizes['masked']}" in text
        assert f"steps 0 to {recipe.train.unmasked_from_step} (masked)" in text
    same = plan(*WHOLE, "--micro-batch", "8", "--write", str(tmp_path), "--overwrite")
    assert "train.micro_batch_size" not in same.err and "#" not in (tmp_path / "overrides.txt").read_text()


def test_slurm_warns_an_hour_before_the_end_at_most(plan: Callable[..., Answer], tmp_path: Path) -> None:
    for gbps, seconds in (("0.001", 3600), ("1e6", 300)):
        assert plan(*FIXED, "--storage-gbps", gbps, "--write", str(tmp_path), "--overwrite").code == 0
        assert f"--signal=USR1@{seconds}\n" in (tmp_path / "header.sh").read_text()


def test_a_folder_that_cannot_be_is_refused_with_a_way_out(plan: Callable[..., Answer], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for folder, said in ((file, "is a file"), (file / "run", "cannot be made a folder (Not a directory)")):
        answer = plan(*FIXED, "--write", str(folder))
        assert answer.code == 2 and answer.out == ""
        assert answer.err == f"error: --write {folder}: {said}; choose another name\n"
    assert file.read_text() == "mine"


def test_a_contradiction_is_found_before_anything_is_written(tmp_path: Path, recipe_plan: Plan) -> None:
    path, folder = tmp_path / "zero.json", tmp_path / "run"
    path.write_text(json.dumps({"train_batch_size": 7, "zero_optimization": {"stage": 2}}))
    with pytest.raises(ConfigError, match="7 differs"):
        write_run_files(recipe_plan, recipe_plan.recipe, path, folder, overwrite=False)
    assert not folder.exists()
    write_run_files(recipe_plan, recipe_plan.recipe, DEFAULT_PATH, folder, overwrite=False)
    assert {path.name for path in folder.iterdir()} == set(FILES)  # and no drafts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds list, not an object"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage: 7; choose 1, 2 or 3"),
    ],
)
@pytest.mark.parametrize("layout", [("--tp", "1", "--ep", "8"), ()])
def test_a_broken_file_beside_zero_says_what_is_broken(
    plan: Callable[..., Answer], tmp_path: Path, content: str, said: str, layout: tuple[str, ...]
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(content)
    answer = plan(*SMALL, *layout, "--zero", "2", "--deepspeed", str(path))
    assert answer.code == 2 and answer.out == "" and said in answer.err and len(answer.err.splitlines()) == 1
    assert "most often" not in answer.err


def test_written_files_are_replaced_only_when_told(plan: Callable[..., Answer], tmp_path: Path) -> None:
    write = (*FIXED, "--write", str(tmp_path))
    assert plan(*write).code == 0
    refused = plan(*write)
    assert refused.code == 2 and f"--write {tmp_path}: recipe.yaml is there" in refused.err
    (tmp_path / "header.sh").write_text("old")
    assert plan(*write, "--overwrite").code == 0
    assert (tmp_path / "header.sh").read_text() != "old"


def _unread(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool with a standard output that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as nobody:
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / "plan.py"), *arguments],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )


def test_files_are_written_though_nobody_reads_the_tables(tmp_path: Path) -> None:
    ended = _unread(*FIXED, "--write", str(tmp_path))
    assert ended.returncode == 0 and ended.stderr.startswith("wrote ") and ended.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


def test_a_plan_that_does_not_fit_fails_though_nobody_reads_the_tables(tmp_path: Path) -> None:
    ended = _unread(*BIG, "--tp", "1", "--ep", "1", "--write", str(tmp_path / "run"))
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


BIG = ("--config", "ecdit_m_64e", "--nodes", "64", "--gpu", "h100-80gb")
MISTAKES = {
    "an unknown GPU": ((*FIXED, "--gpu", "h10"), "--gpu h10: is not known; did you mean h100-80gb"),
    "nodes that do not divide": ((*FIXED, "--nodes", "3"), "the batch splits over 2 or 4 nodes"),
    "nodes that divide for no layout": ((*SMALL, "--nodes", "3"), "the batch splits over 2 or 4 nodes"),
    "no nodes": ((*FIXED, "--nodes", "0"), "--nodes: 0 is outside 1 to 100000"),
    "too many nodes": ((*FIXED, "--nodes", "100001"), "--nodes: 100001 is outside 1 to 100000"),
    "too many GPUs": ((*BIG, "--gpus-per-node", "1000000000"), "--gpus-per-node: 1000000000 is outside 1 to 576"),
    "too many images": ((*BIG, "--set", "train.global_batch_size=1000000000001"), "is more than 1000000000000 images"),
    "nodes that split no batch": (
        (*BIG, "--nodes", "63"),
        "which are 504 (tp 1), 252 (tp 2), 126 (tp 4), 63 (tp 8); the batch splits over",
    ),
    "EP that does not divide ranks": (
        (*BIG, "--nodes", "1", "--tp", "1", "--ep", "64"),
        "choose ep from 1, 2, 4, 8, which divide both them and",
    ),
    "a file that is not there, in a search": (
        (*BIG, "--tp", "2", "--deepspeed", "/none.json"),
        "error: --deepspeed /none.json: No such file",
    ),
    "EP that does not divide experts": ((*SMALL, "--tp", "1", "--ep", "3"), "parallel.ep(3) does not divide"),
    "EP in a search that does not divide": ((*SMALL, "--ep", "3"), "parallel.ep(3) does not divide"),
    "TP across nodes": ((*SMALL, "--gpus-per-node", "1", "--nodes", "16", "--tp", "2", "--ep", "1"), "within a node"),
    "a stage that contradicts": (
        (*FIXED, "--zero", "3", "--deepspeed", str(ROOT / "ds_configs" / "zero2.json")),
        "says stage 2",
    ),
    "a file that is not there": ((*FIXED, "--deepspeed", "none.json"), "none.json"),
    "a mask that leaves too little": ((*BIG, "--set", "train.mask_ratio=0.99"), "less than one token"),
    "a flag and --set": ((*FIXED, "--set", "parallel.tp=2"), "--set parallel.tp=2: the flag for parallel.tp says 1"),
    "a network without speed": ((*FIXED, "--network-gbps", "0"), "--network-gbps: '0' is not a number"),
    "storage without speed": ((*FIXED, "--storage-gbps", "-1"), "--storage-gbps"),
    "a negative recovery": ((*FIXED, "--recovery-minutes", "-1"), "--recovery-minutes: '-1' is not a number"),
    "an impossible efficiency": ((*FIXED, "--matmul-efficiency", "2"), "--matmul-efficiency: '2' is not a number"),
    "recompute-every alone": ((*FIXED, "--recompute-every", "2"), "no effect without --recompute"),
    "overwrite alone": ((*FIXED, "--overwrite"), "no effect without --write"),
    "an unknown flag": ((*FIXED, "--gpu-count", "8"), "(see --help)"),
    "a micro-batch that does not divide": ((*FIXED, "--micro-batch", "24"), "train.micro_batch_size"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(plan: Callable[..., Answer], name: str) -> None:
    arguments, said = MISTAKES[name]
    answer = plan(*arguments)
    assert answer.code == 2 and answer.out == ""
    assert len(answer.err.strip().splitlines()) == 1 and answer.err.startswith("error: ")
    assert said in answer.err


FRACTIONAL = {
    "--network-gbps": ("1e-3", "1e6"),
    "--storage-gbps": ("1e-3", "1e6"),
    "--failures-per-1000-node-days": ("1e-3", "1e6"),
    "--recovery-minutes": ("0", "1e5"),
    "--host-bytes-per-s": ("1e6", "1e13"),
    **{f"--{name.replace('_', '-')}": ("0.01", "1") for name in vars(default_assumptions()) if "host" not in name},
}


@pytest.mark.parametrize("flag", FRACTIONAL)
def test_a_number_beyond_any_machine_is_refused_with_the_range(plan: Callable[..., Answer], flag: str) -> None:
    least, most = map(float, FRACTIONAL[flag])
    for text in ("inf", "nan", "-1", "1e-320" if least else "-2", "1e300", "fast"):
        answer = plan(*FIXED, flag, text)
        assert answer.code == 2 and answer.out == ""
        said = f"error: argument {flag}: {text!r} is not a number from {least:g} to {most:g} (see --help)"
        assert answer.err.strip() == said


def test_everything_stays_finite_at_the_ends_of_the_ranges(plan: Callable[..., Answer]) -> None:
    for end in (0, 1):
        flags = [word for flag, ends in FRACTIONAL.items() if flag != "--usable-memory" for word in (flag, ends[end])]
        answer = plan(*FIXED, *flags, "--json")
        assert answer.code == 0 and answer.numbers["run"]["days"] > 0


def test_a_batch_of_a_million_million_images_is_answered(plan: Callable[..., Answer]) -> None:
    began = time.process_time()
    answer = plan(*BIG, "--set", "train.global_batch_size=1000000000000", "--ep", "64", "--zero", "2")
    assert time.process_time() - began < 10 and answer.code in (0, 2) and len(answer.err.splitlines()) <= 1


@pytest.mark.parametrize("layout", [("--tp", "1", "--ep", "8"), ("--tp", "1"), ()])
def test_a_json_that_contradicts_the_recipe_is_refused(
    plan: Callable[..., Answer], tmp_path: Path, layout: tuple[str, ...]
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"train_batch_size": 7, "zero_optimization": {"stage": 2}}))
    answer = plan(*SMALL, *layout, "--deepspeed", str(path))
    assert answer.err.startswith(f"error: {path}: ")
    assert (
        answer.code == 2 and "train_batch_size: 7 differs from the recipe's train.global_batch_size: 512" in answer.err
    )


def test_a_layout_that_does_not_fit_shows_where_the_memory_goes_and_what_would_fit(
    plan: Callable[..., Answer],
) -> None:
    answer = plan(*BIG, "--tp", "1", "--ep", "1")
    assert answer.code == 2
    assert "optimizer" in answer.out and "does not fit:" in answer.out and "seconds a step" not in answer.out
    assert "GB a GPU; what would fit: tp " in answer.err and len(answer.err.strip().splitlines()) == 1
    numbers = plan(*BIG, "--tp", "1", "--ep", "1", "--json").numbers
    assert numbers["fits"] is False and numbers["per_gpu"]["total"] > numbers["per_gpu"]["limit"]


def test_where_nothing_fits_the_smallest_number_of_nodes_that_would_is_told(plan: Callable[..., Answer]) -> None:
    answer = plan("--config", "ecdit_m_64e", "--nodes", "1", "--gpu", "a100-40gb")
    assert answer.code == 2
    assert "layouts too large for" in answer.out
    assert "no layout fits on 1 nodes" in answer.err and "the smallest number that fits is " in answer.err


def test_the_tool_needs_no_torch() -> None:
    code = "import sys; sys.argv=['plan', '--help']\nimport tools.plan\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_search_finds_and_writes_the_overlap_that_the_batch_script_runs_with(
    plan: Callable[..., Answer], tmp_path: Path
) -> None:
    """The README's command searches more besides, to the same end; docs/97b.md holds what it prints."""
    answer = plan(*BIG, "--tp", "2", "--zero", "2", "--recompute", "none", "--write", str(tmp_path / "plan"))
    assert answer.code == 0 and "overlap, 2 chunks" in answer.out.splitlines()[2]
    script, named = (ROOT / "slurm" / "train_97b.sh").read_text(), load_recipe("ecdit_m_64e").parallel
    file = re.search(r"--deepspeed (ds_configs/\S+\.json)", script)
    assert file and (tmp_path / "plan" / "deepspeed.json").read_text() == (ROOT / file[1]).read_text()
    written = load_recipe(str(tmp_path / "plan" / "recipe.yaml")).parallel
    assert (written.tp, written.ep, written.dispatch_chunks) == (named.tp, named.ep, 2)
    fixed = plan(*BIG, "--tp", "2", "--zero", "3", "--recompute", "none", "--set", "parallel.dispatch_chunks=1")
    assert "overlap" not in fixed.out.splitlines()[2] and "chunks" not in fixed.out.splitlines()[2]


OWN = """
base: h100-80gb
memory_gb: 94
memory_gib: 93.1
network_bytes_per_s: 25.0e+9
gpus_per_node: 4
"""


def test_a_machine_of_the_users_own_is_planned_for(plan: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OWN)
    answer = plan(*_without_gpu(FIXED), "--machine", str(tmp_path / "mine.yaml"))
    assert answer.code == 0, answer.err
    assert re.search(r"machine +\d+ nodes x (4|8) mine, 200 Gb/s", answer.out) and "of 93.1 GiB" in answer.out


def _without_gpu(flags: tuple[str, ...]) -> tuple[str, ...]:
    at = flags.index("--gpu")
    return flags[:at] + flags[at + 2 :]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("base: h100\n", "--gpu h100: is not known; did you mean h100-80gb"),
        ("base: h100-80gb\nmemory: 94\n", "memory: is no field; did you mean memory_gb?"),
        ("memory_gb: 94\n", "bf16_flops_per_s: is missing; write it, or `base: `"),
        ("base: h100-80gb\nmemory_gib: -1\n", "memory_gib: -1 is no positive number"),
        ("base: h100-80gb\nmemory_gib: .inf\n", "memory_gib: inf is no positive number"),
        ("base: h100-80gb\nname: 3\n", "name: 3 is no text"),
        ("base: h100-80gb\ngpus_per_node: 577\n", "gpus_per_node: 577 is outside 1 to 576"),
        ("base: h100-80gb\ngpus_per_node: 2.5\n", "gpus_per_node: 2.5 is outside"),
        ("[]\n", "holds list"),
        ("a: [", "not valid YAML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_machine_that_cannot_be_is_refused_by_field(
    plan: Callable[..., Answer], tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    answer = plan(*_without_gpu(FIXED), "--machine", str(path))
    assert answer.code == 2 and answer.err.startswith(f"error: --machine {path}: ") and said in answer.err


def test_a_rack_of_72_gpus_may_be_a_node(plan: Callable[..., Answer]) -> None:
    rack = ("--config", "ecdit_xl_8e", "--nodes", "1", "--gpus-per-node", "72", "--gpu", "b200-192gb")
    answer = plan(*rack, "--tp", "2", "--ep", "4", "--set", "train.global_batch_size=4032")
    assert answer.code == 0 and "machine     1 nodes x 72 b200-192gb" in answer.out


def test_a_batch_that_does_not_split_is_refused_with_batches_that_do(plan: Callable[..., Answer]) -> None:
    trays = ("--config", "ecdit_m_64e", "--nodes", "18", "--gpus-per-node", "4", "--gpu", "b200-192gb")
    answer = plan(*trays)
    offered = re.search(r"a batch of (\d+) or (\d+) splits over these$", answer.err.strip())
    assert answer.code == 2 and offered
    assert int(offered[1]) < 4096 < int(offered[2])
    for batch in offered.groups():
        assert (
            plan(*trays, "--zero", "3", "--set", f"train.global_batch_size={batch}", "--recompute", "block").code == 0
        )
