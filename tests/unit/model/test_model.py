"""The transformer: what starts silent, what reaches what, and weights that belong to names.

Suffixes: B micro-batch, S image tokens, T text tokens, D hidden_size, H heads, K head_dim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from einops import repeat
from torch import Tensor, nn

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.model.attention import SelfAttention
from ecdit_ds.model.ecdit import ECDiT, Prediction
from ecdit_ds.model.embedders import apply_rope, rope_angles, timestep_embedding
from ecdit_ds.model.experts import Experts
from ecdit_ds.model.init import initialize_by_name
from ecdit_ds.model.moe import ExpertChoiceFFN
from ecdit_ds.model.sharding import ShardIndex, shard_of
from ecdit_ds.parallel.expert_parallel import serial_layers

Draw = Callable[..., Tensor]
Randomize = Callable[[nn.Module], None]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one forward reads."""

    latents_BCHW: Tensor
    timesteps_B: Tensor
    text_embeds_BTD: Tensor
    text_mask_BT: Tensor
    text_pooled_BD: Tensor

    def through(self, model: nn.Module) -> Prediction:
        """Return the model's prediction."""
        return model(self.latents_BCHW, self.timesteps_B, self.text_embeds_BTD, self.text_mask_BT, self.text_pooled_BD)


@pytest.fixture
def inputs(draw: Draw) -> Inputs:
    """Return two images with captions of four and six tokens."""
    return Inputs(
        latents_BCHW=draw("latents", 2, 3, 8, 8),
        timesteps_B=torch.tensor([0.3, 0.8]),
        text_embeds_BTD=draw("text", 2, 6, 24),
        text_mask_BT=torch.arange(6) < torch.tensor([[4], [6]]),
        text_pooled_BD=draw("pooled", 2, 24),
    )


@pytest.fixture(params=["dense", "expert_choice", "token_choice"])
def config(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ModelConfig:
    """Return the tiny architecture with each kind of sparse layer."""
    return replace(tiny_config, ffn=request.param)


@pytest.fixture
def fresh(config: ModelConfig) -> ECDiT:
    """Return a model at its initial weights."""
    model = ECDiT(config, serial_layers())
    initialize_by_name(model, seed=0)
    return model


@pytest.fixture
def awake(config: ModelConfig, randomize: Randomize) -> ECDiT:
    """Return a model none of whose weights is zero."""
    model = ECDiT(config, serial_layers())
    randomize(model)
    return model


def named_copies(module: nn.Module) -> dict[str, Tensor]:
    """Return the values of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def prediction_and_block_changes(model: ECDiT, inputs: Inputs) -> tuple[Tensor, list[float]]:
    """Return the velocity and how much each block changed its tokens."""
    changes: list[float] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: changes.append((out[0] - args[0]).abs().max().item()))
    return inputs.through(model).velocity_BCHW, changes


def test_a_fresh_model_predicts_exactly_zero_through_identity_blocks(fresh: ECDiT, inputs: Inputs) -> None:
    velocity_BCHW, changes = prediction_and_block_changes(fresh, inputs)
    assert not velocity_BCHW.any()
    assert changes == [0.0] * 4


def test_awake_blocks_are_no_identities(awake: ECDiT, inputs: Inputs) -> None:
    velocity_BCHW, changes = prediction_and_block_changes(awake, inputs)
    assert velocity_BCHW.any()
    assert min(changes) > 0.01


def test_every_parameter_of_an_awake_model_learns(awake: ECDiT, inputs: Inputs) -> None:
    prediction = inputs.through(awake)
    (prediction.velocity_BCHW.square().mean() + prediction.auxiliary_loss).backward()
    idle = [name for name, p in awake.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_only_token_choice_has_an_auxiliary_loss(awake: ECDiT, inputs: Inputs) -> None:
    loss = inputs.through(awake).auxiliary_loss
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert (loss.item() > 0) == (awake.config.ffn == "token_choice")


def test_a_model_computes_the_same_in_training_and_out_of_it(
    config: ModelConfig, inputs: Inputs, randomize: Randomize
) -> None:
    model = ECDiT(replace(config, capacity_factor=4.0), serial_layers())
    randomize(model)
    trained, drawn = inputs.through(model.train()), inputs.through(model.eval())
    assert torch.equal(trained.velocity_BCHW, drawn.velocity_BCHW)


def test_masked_text_tokens_never_reach_the_output(awake: ECDiT, inputs: Inputs, draw: Draw) -> None:
    other = torch.where(inputs.text_mask_BT[..., None], inputs.text_embeds_BTD, 100 * draw("other", 2, 6, 24))
    assert not torch.equal(other, inputs.text_embeds_BTD)
    expected = inputs.through(awake).velocity_BCHW
    assert torch.equal(replace(inputs, text_embeds_BTD=other).through(awake).velocity_BCHW, expected)


def test_gradients_reach_every_real_text_token_and_no_masked_one(awake: ECDiT, inputs: Inputs) -> None:
    text_embeds_BTD = inputs.text_embeds_BTD.clone().requires_grad_()
    replace(inputs, text_embeds_BTD=text_embeds_BTD).through(awake).velocity_BCHW.square().sum().backward()
    assert text_embeds_BTD.grad is not None
    assert torch.equal(text_embeds_BTD.grad.abs().sum(-1) > 0, inputs.text_mask_BT)


@pytest.mark.parametrize("field", ["latents_BCHW", "timesteps_B", "text_embeds_BTD", "text_mask_BT", "text_pooled_BD"])
def test_each_input_changes_the_output_of_its_own_image_alone(
    field: str, tiny_config: ModelConfig, inputs: Inputs, randomize: Randomize, draw: Draw
) -> None:
    model = ECDiT(tiny_config, serial_layers())
    randomize(model)
    value = getattr(inputs, field)
    other = value.clone()
    other[0] = ~value[0] if value.dtype == torch.bool else draw("other", *value.shape)[0].sigmoid()
    changed = Inputs(**{**vars(inputs), field: other})
    difference = (changed.through(model).velocity_BCHW - inputs.through(model).velocity_BCHW).abs().amax(dim=(1, 2, 3))
    assert difference[0] > 1e-4
    assert difference[1] == 0


def test_a_fresh_block_stack_sends_each_patch_to_its_own_place(
    tiny_config: ModelConfig, inputs: Inputs, draw: Draw
) -> None:
    """With identity blocks only the patch itself can change its velocity, so a wrong order of patches shows."""
    model = ECDiT(tiny_config, serial_layers())
    initialize_by_name(model, seed=0)
    with torch.no_grad():
        model.final.linear.weight.copy_(draw("final", *model.final.linear.weight.shape))
    latents = inputs.latents_BCHW.clone()
    latents[:, :, 2:4, 6:8] += 1.0
    changed = replace(inputs, latents_BCHW=latents).through(model).velocity_BCHW != inputs.through(model).velocity_BCHW
    patch = torch.zeros(8, 8, dtype=torch.bool)
    patch[2:4, 6:8] = True
    assert torch.equal(changed.any(dim=1), patch.expand(2, 8, 8))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 8), (4, 16), (2, 2)])
def test_other_resolutions_than_the_trained_one_keep_their_shape(
    height: int, width: int, awake: ECDiT, inputs: Inputs, draw: Draw
) -> None:
    velocity = replace(inputs, latents_BCHW=draw("latents", 2, 3, height, width)).through(awake).velocity_BCHW
    assert velocity.shape == (2, 3, height, width)
    assert bool(velocity.isfinite().all())


def test_a_bf16_model_is_close_to_its_fp32_twin(config: ModelConfig, inputs: Inputs, randomize: Randomize) -> None:
    # Every expert takes every token, so that rounding cannot turn a choice over; for token choice nobody is dropped.
    model = ECDiT(replace(config, capacity_factor=4.0), serial_layers())
    randomize(model)
    model.bfloat16().float()
    expected = inputs.through(model).velocity_BCHW
    actual = inputs.through(model.bfloat16()).velocity_BCHW
    assert actual.dtype == inputs.latents_BCHW.dtype
    assert 0 < (actual - expected).norm() / expected.norm() < 0.05


def test_a_model_builds_and_runs_without_memory_on_the_meta_device(config: ModelConfig, inputs: Inputs) -> None:
    with torch.device("meta"):
        model = ECDiT(config, serial_layers())
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {name: parameter.shape for name, parameter in ECDiT(config, serial_layers()).named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    meta = Inputs(**{name: value.to("meta") for name, value in vars(inputs).items()})
    assert meta.through(model).velocity_BCHW.shape == inputs.latents_BCHW.shape


def test_every_second_block_from_the_second_holds_experts(tiny_config: ModelConfig) -> None:
    blocks = ECDiT(tiny_config, serial_layers()).blocks
    assert [isinstance(block.ffn, ExpertChoiceFFN) for block in blocks] == [False, True, False, True]
    dense = ECDiT(replace(tiny_config, ffn="dense"), serial_layers())
    assert not any("experts" in name or "router" in name for name, _ in dense.named_parameters())


def test_rotation_keeps_norms(draw: Draw) -> None:
    x_BHSK = draw("x", 2, 3, 12, 8)
    rotated = apply_rope(x_BHSK, rope_angles(3, 4, 8, torch.device("cpu")))
    torch.testing.assert_close(rotated.norm(dim=-1), x_BHSK.norm(dim=-1))
    assert torch.equal(rotated[:, :, 0], x_BHSK[:, :, 0])  # the origin does not turn
    assert not torch.isclose(rotated[:, :, 1:], x_BHSK[:, :, 1:]).all(dim=-1).any()


def test_attention_logits_depend_on_relative_rows_and_columns_by_the_closed_form(draw: Draw) -> None:
    height, width, head_dim = 4, 5, 16
    query, key = draw("query", head_dim).double(), draw("key", head_dim).double()
    angles_SK = rope_angles(height, width, head_dim, torch.device("cpu")).double()
    query_SK, key_SK = (apply_rope(vector.expand(height * width, head_dim), angles_SK) for vector in (query, key))
    frequency = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    pairs = torch.complex(query[:8], query[8:]) * torch.complex(key[:8], key[8:]).conj()
    for i in range(height * width):
        for j in range(height * width):
            rows, columns = i // width - j // width, i % width - j % width
            turn = torch.cat([rows * frequency, columns * frequency])
            expected = (pairs * torch.polar(torch.ones_like(turn), turn)).real.sum().item()
            assert (query_SK[i] @ key_SK[j]).item() == pytest.approx(expected, abs=1e-5)


def test_attention_sees_relative_positions_only(tiny_config: ModelConfig, draw: Draw, randomize: Randomize) -> None:
    attention = SelfAttention(serial_layers(), tiny_config)
    randomize(attention)
    x_BSD, angles_SK = draw("x", 2, 12, 32), rope_angles(3, 4, 8, torch.device("cpu"))
    moved, stretched = attention(x_BSD, angles_SK + draw("shift", 4)), attention(x_BSD, 2 * angles_SK)
    torch.testing.assert_close(moved, attention(x_BSD, angles_SK), rtol=1e-4, atol=1e-5)
    assert (stretched - attention(x_BSD, angles_SK)).abs().max() > 1e-3


def test_grouped_query_attention_is_full_attention_with_repeated_keys_and_values(
    tiny_config: ModelConfig, draw: Draw, randomize: Randomize
) -> None:
    grouped = SelfAttention(serial_layers(), tiny_config)
    randomize(grouped)
    full = SelfAttention(serial_layers(), replace(tiny_config, num_kv_heads=4))
    weights = named_copies(grouped)
    for name in ("key.weight", "value.weight"):
        weights[name] = repeat(weights[name], "(h k) d -> (h r k) d", h=2, r=2)
    full.load_state_dict(weights)
    x_BSD, angles_SK = draw("x", 2, 12, 32), rope_angles(3, 4, 8, torch.device("cpu"))
    torch.testing.assert_close(grouped(x_BSD, angles_SK), full(x_BSD, angles_SK), rtol=1e-5, atol=1e-6)


def test_timestep_waves_are_the_sinusoids_they_say() -> None:
    waves = timestep_embedding(torch.tensor([0.0, 0.25]))
    assert waves.shape == (2, 256)
    assert waves[0].tolist() == [1.0] * 128 + [0.0] * 128
    for i in (0, 1, 64, 127):
        angle = 250.0 * 10000.0 ** (-i / 128)
        assert waves[1, i].item() == pytest.approx(math.cos(angle), abs=1e-4)
        assert waves[1, 128 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_initial_weights_belong_to_seed_and_name_and_to_nothing_else(fresh: ECDiT) -> None:
    smaller = ECDiT(replace(fresh.config, num_layers=2), serial_layers())
    before = torch.get_rng_state()
    initialize_by_name(smaller, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    whole = named_copies(fresh)
    assert all(torch.equal(value, whole[name]) for name, value in named_copies(smaller).items())
    initialize_by_name(smaller, seed=1)
    assert not torch.equal(smaller.patches.linear.weight, fresh.patches.linear.weight)


def test_no_two_random_parameters_or_experts_start_alike(fresh: ECDiT) -> None:
    pieces: list[Tensor] = []
    for value in named_copies(fresh).values():
        pieces.extend(value if value.dim() == 3 else [value] if value.std() > 0 else [])
    starts = {tuple(piece.flatten()[:4].tolist()) for piece in pieces}
    assert len(pieces) > 30
    assert len(starts) == len(pieces)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_shares_of_the_experts_start_as_slices_of_the_whole(activation: Literal["gelu", "swiglu"]) -> None:
    def experts(num_experts: int, ep_rank: int, ep_size: int) -> dict[str, Tensor]:
        share = Experts(num_experts, 8, 12, activation=activation, ep=ShardIndex(index=ep_rank, count=ep_size))
        initialize_by_name(share, seed=0)
        return named_copies(share)

    whole, halves, fewer = experts(4, 0, 1), [experts(4, rank, 2) for rank in range(2)], experts(2, 0, 1)
    for name, value in whole.items():
        assert torch.equal(torch.cat([half[name] for half in halves]), value)
        assert torch.equal(fewer[name], value[:2])


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_slices_of_each_expert_start_as_slices_of_the_whole_and_their_outputs_add_up_to_its_output(
    activation: Literal["gelu", "swiglu"], draw: Callable[..., Tensor]
) -> None:
    parts = [Experts(4, 8, 12, activation=activation, tp=ShardIndex(index=rank, count=3)) for rank in range(3)]
    whole = Experts(4, 8, 12, activation=activation)
    for experts in (*parts, whole):
        initialize_by_name(experts, seed=0)
    for name, dim in (("w1", 2), ("w2", 1)):
        cut: list[Tensor] = [part.get_parameter(name) for part in parts]
        assert torch.equal(torch.cat(cut, dim), whole.get_parameter(name))
    x_LRD = draw("rows", 4, 5, 8)
    torch.testing.assert_close(torch.stack([part(x_LRD) for part in parts]).sum(0), whole(x_LRD))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_rank_knows_which_box_of_each_experts_matrix_it_holds_and_that_no_peer_has_it(tp_size: int) -> None:
    """By the mark a rank writes its part into a checkpoint, or leaves it to the first of its peers."""
    last = tp_size - 1
    experts = Experts(
        4, 8, 12, activation="gelu", ep=ShardIndex(index=1, count=2), tp=ShardIndex(index=last, count=tp_size)
    )
    w1, w2 = shard_of(experts.w1), shard_of(experts.w2)
    assert (w1.global_shape, w2.global_shape) == ((4, 8, 12), (4, 12, 8))
    assert (w1.offset, w2.offset) == ((2, 0, 6 * last), (2, 6 * last, 0))
    assert w1.is_tp_sharded is w2.is_tp_sharded is (tp_size > 1)


def test_initial_spread_is_that_of_the_table(tiny_config: ModelConfig) -> None:
    wide = replace(tiny_config, hidden_size=64, ffn_hidden_size=192, num_experts=16, decoder_layers=1)
    model = ECDiT(wide, serial_layers())
    initialize_by_name(model, seed=0)
    zero = ("bias", "modulation.weight", "modulation_table", "final.linear.weight", "cross_attention.out.weight")
    for name, value in named_copies(model).items():
        if name.endswith(zero):
            assert not value.any(), name
        elif "norm" in name:
            assert bool((value == 1).all()), name
        elif "router" in name:
            assert value.std().item() == pytest.approx(0.02, rel=0.08), name
        elif "mask_token" in name:  # 64 numbers
            assert value.std().item() == pytest.approx(0.02, rel=0.3) and abs(value.mean().item()) < 0.01, name
        else:
            fan_sum = value.shape[-1] + value.shape[-2]
            assert value.std().item() == pytest.approx(math.sqrt(2 / fan_sum), rel=0.08), name
            assert value.abs().max().item() <= math.sqrt(6 / fan_sum), name
