"""Absolute positions: without them equal patches are equal tokens; with them each place is its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from einops import rearrange
from torch import Tensor

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.errors import ConfigError
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.embedders import sincos_pos_embed
from ecdit_ds.model.init import initialize_by_name
from ecdit_ds.model.layers import SerialLayers


@pytest.mark.parametrize(("positions", "num_different"), [("rotary", 1), ("rotary_and_absolute", 16)])
def test_equal_patches_are_told_apart_by_absolute_positions_only(
    positions: Literal["rotary", "rotary_and_absolute"],
    num_different: int,
    tiny_config: ModelConfig,
    draw: Callable[..., Tensor],
) -> None:
    # Fresh blocks are identities, so what differs came in with the patches.
    model = ECDiT(replace(tiny_config, positions=positions), SerialLayers())
    initialize_by_name(model, seed=0)
    with torch.no_grad():
        model.final.linear.weight.copy_(draw("final", *model.final.linear.weight.shape))
    velocity = model(
        torch.ones(1, 3, 8, 8),
        torch.tensor([0.5]),
        draw("text", 1, 6, 24),
        torch.ones(1, 6, dtype=torch.bool),
        draw("pooled", 1, 24),
    ).velocity_BCHW
    patches = rearrange(velocity, "1 c (h p) (w q) -> (h w) (c p q)", p=2, q=2)
    far_apart = (patches[:, None] - patches[None, :]).abs().amax(dim=-1) > 1e-4
    assert len({tuple(row) for row in far_apart.tolist()}) == num_different


def test_the_first_half_of_sines_and_of_cosines_says_the_row_and_the_second_the_column() -> None:
    positions_HWD = rearrange(sincos_pos_embed(3, 5, 8, torch.device("cpu")), "(h w) d -> h w d", h=3)
    sines, cosines = positions_HWD.chunk(2, dim=-1)
    rows, columns = torch.arange(3.0), torch.arange(5.0)
    torch.testing.assert_close(sines[..., 0], rows.sin()[:, None].expand(3, 5))
    torch.testing.assert_close(cosines[..., 2], columns.cos()[None, :].expand(3, 5))
    torch.testing.assert_close(positions_HWD.square().sum(dim=-1), torch.full((3, 5), 4.0))


def test_a_width_that_absolute_positions_cannot_split_is_refused_with_the_nearest(tiny_config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match=r"model\.hidden_size: 34 is not a multiple of 4.*choose 32 or 36"):
        replace(tiny_config, hidden_size=34, positions="rotary_and_absolute")
