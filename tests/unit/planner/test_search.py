"""Which layouts are found, in which order, and what is said of the others."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ecdit_ds.config.deepspeed_json import DEFAULT_PATH
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.validation import divisors_of
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.errors import ConfigError
from ecdit_ds.planner import search as search_module
from ecdit_ds.planner.hardware import Cluster, default_assumptions, find_gpu
from ecdit_ds.planner.memory import memory_of_rank
from ecdit_ds.planner.plan import phases_of, with_micro_batch
from ecdit_ds.planner.search import (
    DISPATCH_CHUNKS,
    Candidate,
    SearchResult,
    all_choices,
    check_before_search,
    require_experts_divide,
    search,
    smallest_nodes,
    working_nodes,
)

STAGES = tuple(DEFAULT_PATH.parent / f"zero{stage}.json" for stage in (1, 2, 3))


def _machine(nodes: int, gpu: str = "h100-80gb", **assumptions: float) -> Cluster:
    return Cluster(
        gpu=find_gpu(gpu), nodes=nodes, gpus_per_node=8, assumptions=replace(default_assumptions(), **assumptions)
    )


def _search(recipe: Recipe, machine: Cluster, files: tuple[Path, ...] = STAGES) -> SearchResult:
    return search(recipe, machine, all_choices(recipe, machine, files))


def _needs(candidate: Candidate, micro_batch: int, ratio: float) -> int:
    own = with_micro_batch(candidate.recipe, micro_batch)
    return memory_of_rank(own, candidate.topology, candidate.zero, ratio).total


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Return six layers of size XL with 8 experts, 512 images a step."""
    return load_recipe("ecdit_xl_8e", ["train.global_batch_size=512", "model.num_layers=6"])


@pytest.fixture(scope="module")
def found(recipe: Recipe) -> SearchResult:
    """Return what is found on 16 GPUs of 40 GB."""
    return _search(recipe, _machine(2, "a100-40gb"))


def test_layouts_that_fit_are_ranked_by_the_time_that_the_run_takes(found: SearchResult) -> None:
    assert len(found.feasible) > 5
    seconds = [candidate.seconds for candidate in found.feasible]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_each_layout_fits_with_its_micro_batches_in_every_phase_and_no_larger_one_does(
    found: SearchResult, recipe: Recipe
) -> None:
    usable = _machine(2, "a100-40gb").usable_bytes
    for candidate in found.feasible[::7]:
        share = recipe.train.global_batch_size // candidate.topology.dp
        for name, _, ratio in phases_of(recipe):
            size = candidate.micro_batches[name]
            assert _needs(candidate, size, ratio) <= usable
            larger = [n for n in range(size + 1, share + 1) if share % n == 0 and n % recipe.model.routing_group == 0]
            assert not larger or _needs(candidate, larger[0], ratio) > usable


def test_every_layout_is_somewhere(found: SearchResult, recipe: Recipe) -> None:
    choices = all_choices(recipe, _machine(2), STAGES)
    total = len(choices.tp) * len(choices.ep) * len(choices.deepspeed_files) * len(choices.recompute)
    assert len(found.feasible) + len(found.too_large) + sum(found.refusals.values()) == total


def test_refusals_are_in_the_words_of_who_refuses_and_counted(found: SearchResult) -> None:
    reasons = list(found.refusals)
    assert any(reason.startswith("parallel.tp(4) does not divide model.num_heads(18)") for reason in reasons)
    assert any(reason.startswith("train.recompute: selective keeps what all-to-alls returned") for reason in reasons)
    assert min(found.refusals.values()) >= 1


def test_tensor_parallelism_stays_within_a_node(recipe: Recipe) -> None:
    machine = replace(_machine(16), gpus_per_node=1)
    choices = replace(all_choices(recipe, machine, STAGES), tp=(2,))
    (reason, *others) = search(recipe, machine, choices).refusals
    assert "parallel.tp: 2 is more than the 1 GPUs of a node" in reason and not others


def test_a_fixed_choice_is_kept(recipe: Recipe) -> None:
    machine = _machine(2)
    choices = replace(all_choices(recipe, machine, STAGES), tp=(1,), ep=(4,), recompute=(("block", 2),), micro_batch=8)
    for candidate in search(recipe, machine, choices).feasible:
        train = candidate.recipe.train
        assert (candidate.topology.tp, candidate.topology.ep) == (1, 4)
        assert (train.recompute, train.recompute_every, train.micro_batch_size) == ("block", 2, 8)
        assert set(candidate.micro_batches.values()) == {8}


def test_a_dense_model_has_no_experts_to_spread() -> None:
    dense = load_recipe("dense_xl", ["train.global_batch_size=512"])
    found = _search(dense, _machine(1))
    assert {candidate.topology.ep for candidate in found.feasible} == {1}


def test_what_does_not_fit_says_how_much_it_needs_and_how_many_nodes_would_do(recipe: Recipe) -> None:
    choices = replace(all_choices(recipe, _machine(1), STAGES), micro_batch=8)
    least = min(candidate.needed_bytes for candidate in search(recipe, _machine(1), choices).feasible)
    machine = _machine(1, usable_memory=(least - 1) / _machine(1).gpu.memory_bytes)
    found = search(recipe, machine, choices)
    assert not found.feasible
    needs = [candidate.needed_bytes for candidate in found.too_large]
    assert needs == sorted(needs) and needs[0] > machine.usable_bytes
    nodes = smallest_nodes(recipe, machine, choices)
    assert nodes is not None and nodes > 1
    assert search(recipe, machine.with_nodes(nodes), choices).feasible


def test_nodes_over_which_the_batch_does_not_split_are_told_the_nearest_that_do(recipe: Recipe) -> None:
    machine = _machine(3)
    choices = all_choices(recipe, machine, STAGES)
    found = search(recipe, machine, choices)
    assert not found.feasible and not found.too_large
    assert any("data-parallel ranks(24) does not divide train.global_batch_size(512)" in r for r in found.refusals)
    assert working_nodes(recipe, machine, choices) == [2, 4]


def test_the_97b_model_on_512_gpus_takes_few_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of milliseconds each: memory by halving the sizes, times once a layout and number of chunks."""
    calls = Counter[str]()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return count

    monkeypatch.setattr(search_module, "step_time", counted("time", search_module.step_time))
    monkeypatch.setattr(search_module, "memory_of_rank", counted("memory", search_module.memory_of_rank))
    search_module._needed_bytes.cache_clear()
    found = _search(load_recipe("ecdit_m_64e"), _machine(64))
    assert found.feasible and found.too_large
    layouts = len(found.feasible) + len(found.too_large)
    assert calls["memory"] < 5 * layouts
    assert calls["time"] <= 2 * len(DISPATCH_CHUNKS) * len(found.feasible)


def test_divisors_are_those_that_leave_no_rest_each_once() -> None:
    for number in range(-1, 200):
        assert divisors_of(number) == tuple(n for n in range(1, number + 1) if number % n == 0)


@pytest.mark.parametrize(("dp", "ep", "both"), [(8, 64, "1, 2, 4, 8"), (12, 8, "1, 2, 4"), (3, 2, "1")])
def test_expert_parallelism_is_offered_as_ranks_and_experts_allow(recipe: Recipe, dp: int, ep: int, both: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_experts_divide(recipe, dp, ep)
    assert f"choose ep from {both}, which divide both them and model.num_experts(8)" in str(refused.value)
    require_experts_divide(recipe, dp, 1)


def test_a_batch_is_checked_once_before_a_search(recipe: Recipe) -> None:
    machine = _machine(3)
    choices = all_choices(recipe, machine, STAGES)
    with pytest.raises(ConfigError, match=r"24 \(tp 1\), 12 \(tp 2\), 6 \(tp 4\), 3 \(tp 8\).* over 2 or 4 nodes"):
        check_before_search(recipe, machine, choices)
    check_before_search(recipe, _machine(4), choices)
    with pytest.raises(ConfigError, match=r"micro_batch_size may be 1, 2, 4; the batch splits over 1 nodes"):
        check_before_search(recipe, _machine(16), replace(choices, tp=(1,), micro_batch=64))
    with pytest.raises(ConfigError, match=r"train.micro_batch_size\(24\) does not divide[^;]*; choose[^;]*$"):
        check_before_search(recipe, _machine(2), replace(choices, micro_batch=24))
