"""What the held-out loss asks a model: the path's points of fixed noise, under each sample's own text."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecdit_ds.data.latents.dataset import LatentDataset, Samples
from ecdit_ds.evaluation.heldout import heldout_loss
from ecdit_ds.flow.objective import sample_noise
from ecdit_ds.model.ecdit import Prediction
from tests.helpers.made_sets import write_set

SHAPE = (3, 4, 4)


def test_a_held_out_sample_is_seen_with_its_own_text_and_always_the_same_noise(tmp_path: Path) -> None:
    held_out = LatentDataset(write_set(tmp_path / "set", [(SHAPE, 5)]))
    noise = sample_noise(SHAPE, torch.arange(5), seed=0, purpose="heldout noise")
    seen: list[tuple[int, float]] = []

    def model(
        latents: Tensor, times_B: Tensor, embeds: Tensor, mask: Tensor, pooled: Tensor, kept: Tensor | None
    ) -> Prediction:
        time, samples_B = float(times_B[0]), pooled[:, 0].long()
        wanted = (1 - time) * samples_B.view(-1, 1, 1, 1) + time * noise[samples_B]
        torch.testing.assert_close(latents, wanted)
        assert (times_B == time).all() and kept is None
        assert (embeds == samples_B.view(-1, 1, 1)).all()
        assert mask.tolist() == [[int(i) != 2, *[True] * 3] for i in samples_B]
        seen.extend((int(i), time) for i in samples_B)
        path_BCHW = noise[samples_B] - samples_B.view(-1, 1, 1, 1)
        return Prediction(velocity_BCHW=path_BCHW + time, auxiliary_loss=torch.ones(()))

    def one_is_shorter(stored: Sequence[Samples]) -> list[Samples]:
        for samples in stored:
            samples.text_mask_BT[samples.stream_index_B == 2, 0] = False
        return list(stored)

    losses = heldout_loss(
        model,
        held_out,
        batch_size=2,
        dp_rank=0,
        dp_size=1,
        device=torch.device("cpu"),
        total=lambda sums: sums,
        num_times=2,
        finish=one_is_shorter,
    )
    assert set(seen) == {(i, time) for i in range(5) for time in (0.25, 0.75)}
    assert losses == pytest.approx([0.25**2, 0.75**2]), "the velocity that is predicted is wrong by the time"
