"""The held-out loss against a plain sum: at the middles of equal parts of time, each sample counted once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.evaluation.heldout import heldout_loss, heldout_times
from ecdit_ds.model.ecdit import Prediction
from tests.helpers.made_sets import write_set

SHAPE = (3, 4, 4)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_times_are_the_middles_of_equal_parts(count: int) -> None:
    assert heldout_times(count).tolist() == pytest.approx([(2 * i + 1) / (2 * count) for i in range(count)])


class Still:
    """Predicts no velocity, and notes the times that it is asked for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, latents: Tensor, times_B: Tensor, *_: Tensor | None) -> Prediction:
        self.times += times_B.tolist()
        return Prediction(velocity_BCHW=torch.zeros_like(latents), auxiliary_loss=torch.zeros(()))


@pytest.mark.parametrize(("batch_size", "dp_size"), [(5, 1), (2, 1), (3, 2), (4, 1)])
def test_every_sample_counts_once_however_batches_and_ranks_divide_them(
    tmp_path: Path, batch_size: int, dp_size: int
) -> None:
    held_out = LatentDataset(write_set(tmp_path / "set", [(SHAPE, 5)]))
    sums: list[Tensor] = []

    def loss(size: int, rank: int, ranks: int, others: Tensor | None) -> list[float]:
        def total(own: Tensor) -> Tensor:
            sums.append(own)
            return own if others is None else own + others

        model = Still()
        found = heldout_loss(
            model,
            held_out,
            batch_size=size,
            dp_rank=rank,
            dp_size=ranks,
            device=torch.device("cpu"),
            total=total,
            num_times=2,
        )
        assert set(model.times) == {0.25, 0.75}
        return found

    each = loss(1, 0, 1, None)
    parts: Tensor | None = None
    for rank in range(dp_size):
        found = loss(batch_size, rank, dp_size, parts)
        parts = sums[-1] if parts is None else parts + sums[-1]
    assert found == pytest.approx(each, rel=1e-6)
    assert each[0] > 1.0, "sample i is all i, and nothing is predicted"
