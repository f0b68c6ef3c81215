"""The digit-scenes score while training: what ranks draw together is scored as one process would score it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from ecdit_ds.data.digit_scenes.scenes import Scene
from ecdit_ds.evaluation.digit_scenes.alignment import drawn_alignment
from ecdit_ds.evaluation.digit_scenes.score import SceneAlignment, heldout_prompts, mismatched_specs, score_alignment
from ecdit_ds.model.sharding import ShardIndex


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Return one scene of each kind, and another of the first."""
    first, second, *others = heldout_prompts(seed=0, canvas_height=16, canvas_width=16, per_kind=2)
    return [first, second, *others[::2]]


@pytest.mark.parametrize(("batch_size", "num_ranks"), [(7, 1), (3, 1), (2, 2), (3, 2), (4, 3)])
def test_pictures_are_drawn_by_their_numbers_and_counted_once_on_any_ranks(
    scenes: list[Scene], batch_size: int, num_ranks: int
) -> None:
    # The model draws the first four right, and of the others what another caption asks for.
    drawn = np.stack([scenes[i if i < 4 else 10 - i].image_HWC for i in range(len(scenes))])
    others = mismatched_specs([scene.claim for scene in scenes])
    whole = score_alignment(drawn, scenes, others)
    sums: Tensor | None = None
    seen: list[list[int]] = []

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> npt.NDArray[np.uint8]:
        assert len(prompts) == len(seeds) == batch_size
        assert list(prompts) == [scenes[seed].caption for seed in seeds]
        seen[-1].extend(seeds)
        return drawn[list(seeds)]

    def total(own: Tensor) -> Tensor:
        nonlocal sums
        assert own.dtype == torch.float64
        sums = own if sums is None else sums + own
        return sums

    for rank in range(num_ranks):
        seen.append([])
        share = ShardIndex(index=rank, count=num_ranks)
        alignment: SceneAlignment = drawn_alignment(draw, scenes, batch_size=batch_size, dp=share, total=total)
    assert alignment == whole
    assert 0.0 < whole.model.overall < whole.ceiling.overall
    assert len({len(of_rank) for of_rank in seen}) == 1, "all ranks draw together"
    assert {seed for of_rank in seen for seed in of_rank} == set(range(len(scenes)))
