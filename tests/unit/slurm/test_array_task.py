"""Which part of the work is whose: every part somebody's, and no part two tasks'."""

from collections.abc import Callable
from functools import partial

import pytest

from ecdit_ds.slurm.array_task import task_of

RefusalOf = Callable[[Callable[[], object]], str]


def array(index: int, *indices: int, step: int = 1) -> dict[str, str]:
    """Return what Slurm tells task `index` of an array of `indices`; a list has step 1, whatever is in it."""
    numbers = {"ID": index, "COUNT": len(indices), "MIN": min(indices), "MAX": max(indices), "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("environment", "task"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "2"}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "RANK": "0", "WORLD_SIZE": "1"}, (1, 2)),
    ],
)
def test_a_task_is_the_arrays_or_the_launchers_unless_it_is_named(
    environment: dict[str, str], task: tuple[int, int]
) -> None:
    assert task_of(None, environment, are_ranks_tasks=True) == task
    assert task_of("5/8", environment, are_ranks_tasks=True) == (5, 8)


@pytest.mark.parametrize(("indices", "step"), [((0, 1, 2), 1), ((3, 4, 5, 6), 1), ((0, 5, 10), 5), ((0,), 1)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_of_an_arrays_tasks_share_all_of_the_work_and_share_none_twice(
    indices: tuple[int, ...], step: int, ranks: int
) -> None:
    tasks = [
        task_of(None, array(i, *indices, step=step) | {"RANK": str(r), "WORLD_SIZE": str(ranks)}, are_ranks_tasks=True)
        for i in indices
        for r in range(ranks)
    ]
    assert tasks == [(i, len(indices) * ranks) for i in range(len(indices) * ranks)]


def test_ranks_that_work_together_on_each_part_are_one_task() -> None:
    ranks = {"RANK": "3", "WORLD_SIZE": "4"}
    assert task_of(None, ranks, are_ranks_tasks=False) == (0, 1)
    assert task_of(None, ranks | array(2, 0, 1, 2), are_ranks_tasks=False) == (2, 3)


@pytest.mark.parametrize("indices", [(0, 1, 3), (0, 2, 4), (0, 5, 10), (1, 2, 4, 8)])
def test_an_array_with_gaps_is_refused_by_each_of_its_tasks(indices: tuple[int, ...], refusal_of: RefusalOf) -> None:
    for index in indices:
        told = refusal_of(partial(task_of, None, array(index, *indices), are_ranks_tasks=False))
        assert f"{index} of {len(indices)} from {indices[0]} to {indices[-1]}, with gaps" in told
        assert f"--array=0-{len(indices) - 1}" in told
        assert task_of("1/8", array(index, *indices), are_ranks_tasks=False) == (1, 8)


def test_an_index_that_is_submitted_alone_does_not_do_the_work_of_all(refusal_of: RefusalOf) -> None:
    told = refusal_of(lambda: task_of(None, array(7, 7), are_ranks_tasks=False))
    assert "7 is alone in its array" in told and "--task" in told
    assert task_of("7/8", array(7, 7), are_ranks_tasks=False) == (7, 8)


@pytest.mark.parametrize("asked", ["4/4", "-1/4", "x", "1/0", "", "1/2/3", "0.5/2"])
def test_a_task_that_is_none_is_refused(asked: str, refusal_of: RefusalOf) -> None:
    assert refusal_of(lambda: task_of(asked, {}, are_ranks_tasks=True)).startswith("--task: ")


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_ARRAY_TASK_ID": "1"},
        {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "2"},
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_STEP": "0"},
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "2"},
    ],
)
def test_an_array_that_tells_no_numbers_is_refused(environment: dict[str, str], refusal_of: RefusalOf) -> None:
    told = refusal_of(lambda: task_of(None, environment, are_ranks_tasks=False))
    assert told.startswith("SLURM_ARRAY_TASK_ID: ")
