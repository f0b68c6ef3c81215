"""The planner's FLOPs are what torch counts, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.flow.objective import sample_visible_tokens
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.parallel.activation_checkpoint import Recompute
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.planner.flops import Flops, block_flops, forward_flops, recomputed_flops, training_flops
from ecdit_ds.training.setup import _Flops

IMAGES = 4
CHANGES: dict[str, dict[str, Any]] = {
    "experts": {},
    "dense": {"ffn": "dense"},
    "swiglu": {"ffn_activation": "swiglu", "num_shared_experts": 2},
    "heads": {"num_kv_heads": 4, "head_dim": 12, "cross_num_heads": 3, "cross_head_dim": 12},
    "rounding": {"num_experts": 3, "capacity_factor": 1.3, "capacity_rounding": "nearest"},
    "group": {"num_experts": 3, "routing_pool": "group", "routing_group": 2},
    "batch": {"num_experts": 3, "routing_pool": "batch"},
    "decoder": {"decoder_layers": 2, "num_layers": 3},
}
CASES = [(name, kept) for name in CHANGES for kept in (16, 8)]


def inputs_of(config: ModelConfig, kept: int) -> tuple[Tensor, ...]:
    """Return what the model's forward wants."""
    size = config.latent_height
    tensors: list[Any] = [
        torch.zeros(IMAGES, config.in_channels, size, size),
        torch.zeros(IMAGES),
        torch.zeros(IMAGES, config.max_text_tokens, config.text_embed_dim),
        torch.ones(IMAGES, config.max_text_tokens, dtype=torch.bool),
        torch.zeros(IMAGES, config.text_embed_dim),
        sample_visible_tokens(torch.arange(IMAGES), 0, config.num_tokens, kept),
    ]
    return tuple(tensors)


@sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused kernel
def counted(config: ModelConfig, kept: int, recompute: Recompute | None = None) -> tuple[Flops, float]:
    """Return what torch counts an image: forward by part, and forward and backward together."""
    model = ECDiT(config, serial_layers(), recompute or Recompute())
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(*inputs_of(config, kept))
    with FlopCounterMode(display=False) as both:
        model(*inputs_of(config, kept)).velocity_BCHW.sum().backward()
    modules = {name: sum(flops.values()) / IMAGES for name, flops in forward.get_flop_counts().items()}

    def of(*endings: str) -> float:
        return sum(flops for name, flops in modules.items() if name.endswith(endings))

    router = of("ffn.router")
    shared = of("ffn.shared")
    layers = range(config.num_layers + config.decoder_layers)
    in_moe = [config.is_moe_layer(layer) for layer in layers]
    names = [f"ECDiT.{'blocks' if n < config.num_layers else 'decoder'}.{n % config.num_layers}.ffn" for n in layers]
    moe = sum(modules[name] for name, has_experts in zip(names, in_moe, strict=True) if has_experts)
    dense = sum(modules[name] for name, has_experts in zip(names, in_moe, strict=True) if not has_experts)
    parts = Flops(
        attention=of(".self_attention"),
        cross_attention=of(".cross_attention"),
        dense_ffn=dense + shared,
        experts=moe - router - shared,
        router=router,
        modulation=of("ECDiT.modulation", "final.modulation"),
        other=of("ECDiT.patches", "ECDiT.condition", "final.linear"),
    )
    assert parts.total == pytest.approx(forward.get_total_flops() / IMAGES)
    return parts, both.get_total_flops() / IMAGES


def gradients_of_gates(c: ModelConfig, kept: int, pool: int) -> float:
    """Return the FLOPs of a product in backward that has no twin in forward: D for each row that an expert took."""
    rows = c.num_experts * c.expert_capacity(kept * pool) / pool
    return 2.0 * sum(map(c.is_moe_layer, range(c.num_layers))) * rows * c.hidden_size


@pytest.mark.parametrize(("name", "kept"), CASES, ids=[f"{name}-{kept}" for name, kept in CASES])
def test_each_part_of_forward_and_the_sum_with_backward_are_what_torch_counts(
    tiny_config: ModelConfig, name: str, kept: int
) -> None:
    config = replace(tiny_config, **CHANGES[name])
    if kept < config.num_tokens and not config.decoder_layers:
        config = replace(config, decoder_layers=1)
    parts, both = counted(config, kept)
    pool = config.pool_images(IMAGES)
    ours = forward_flops(config, kept, pool)
    assert vars(ours) == pytest.approx(vars(parts))
    assert training_flops(config, kept, pool).total == pytest.approx(both - gradients_of_gates(config, kept, pool))


@pytest.mark.parametrize(("every", "num_blocks"), [(1, 6), (2, 3), (3, 2), (4, 1)])
def test_recomputing_adds_the_forward_of_the_blocks_that_forgot(
    tiny_recipe: Recipe, every: int, num_blocks: int
) -> None:
    model = replace(tiny_recipe.model, decoder_layers=2)
    recompute = Recompute(mode="block", every=every)
    recipe = replace(
        tiny_recipe, model=model, train=replace(tiny_recipe.train, recompute="block", recompute_every=every)
    )
    extra = counted(model, 8, recompute)[1] - counted(model, 8)[1]
    assert recomputed_flops(recipe, 8, 1).total == pytest.approx(extra)
    assert sum((layer + 1) % every == 0 for layer in range(6)) == num_blocks
    assert recomputed_flops(tiny_recipe, 8, 1) == Flops()


def test_a_block_is_counted_by_hand(tiny_config: ModelConfig) -> None:
    flops = block_flops(tiny_config, 1, 16, 1)  # 16 tokens, widths 32, 16 and 32, text 6 x 24, 4 experts of 48
    assert flops.attention == 2 * 16 * 32 * (32 + 16 + 16 + 32) + 4 * 16 * 16 * 32
    assert flops.cross_attention == 2 * 16 * 32 * 64 + 2 * 6 * 24 * 64 + 4 * 16 * 6 * 32
    assert flops.experts == 4 * 8 * 2 * 2 * 32 * 48
    assert flops.router == 2 * 16 * 32 * 4
    assert flops.dense_ffn == 0


def test_an_image_costs_less_where_tokens_are_left_out(tiny_config: ModelConfig) -> None:
    config = replace(tiny_config, decoder_layers=1)
    masked, whole = forward_flops(config, 8, 1), forward_flops(config, 16, 1)
    assert masked.experts == whole.experts / 2
    assert masked.other == whole.other
    assert masked.dense_ffn == whole.dense_ffn * (2 / 2 + 1) / 3  # two blocks at half, and the decoder's


def test_token_choice_is_counted_as_expert_choice(tiny_config: ModelConfig) -> None:
    token_choice = replace(tiny_config, ffn="token_choice")
    assert forward_flops(token_choice, 16, 1) == forward_flops(tiny_config, 16, 1)


@dataclass(frozen=True)
class SizesOnly:
    """Of a set, as much as a mixture asks before it reads: as many samples of each size."""

    buckets: Sequence[tuple[int, int, int]]

    @property
    def runs(self) -> Sequence[tuple[int, int]]:
        """One run a bucket."""
        return [(number, 8) for number in range(len(self.buckets))]

    def __len__(self) -> int:
        return 8 * len(self.buckets)


def test_a_run_counts_each_step_by_its_own_mask_and_size(tiny_recipe: Recipe) -> None:
    train = replace(tiny_recipe.train, mask_ratio=0.5, unmasked_from_step=4)
    model = replace(tiny_recipe.model, decoder_layers=1)
    recipe = replace(tiny_recipe, model=model, train=train)
    sizes: Any = SizesOnly(((3, 8, 8), (3, 4, 8)))
    mixture = Mixture([sizes], seed=0, global_batch_size=8)
    flops = _Flops(recipe, mixture, 8)
    seen = set()
    for step in range(12):
        height, kept = mixture.bucket_at(step)[1], 1 if step >= 4 else 2
        tokens = height * 8 // 4
        expected = training_flops(replace(model, latent_height=height), tokens // kept, 1).total
        assert flops(step) == flops(step) == expected
        seen.add((height, kept))
    assert len(seen) == 4
