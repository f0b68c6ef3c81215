"""Masked training: the main blocks see the kept tokens, decoder blocks see every position, drawing sees all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe, SampleConfig, TrainConfig
from ecdit_ds.flow.objective import FlowBatch, flow_losses, sample_visible_tokens
from ecdit_ds.model.ecdit import ECDiT, Prediction
from ecdit_ds.model.layers import SerialLayers
from tests.helpers.random_model import random_pipeline

Refusal = Callable[[Callable[[], object]], str]
KEPT = torch.tensor([[0, 3, 4, 5, 10, 11, 14, 15], [1, 2, 3, 6, 7, 8, 9, 12]])
"""Of 16 tokens, for two images."""


@pytest.fixture
def masked_config(tiny_config: ModelConfig) -> ModelConfig:
    return replace(tiny_config, decoder_layers=2)


@pytest.fixture
def model(masked_config: ModelConfig, randomize: Callable[[nn.Module], None]) -> ECDiT:
    made = ECDiT(masked_config, SerialLayers())
    randomize(made)
    return made


@pytest.fixture
def inputs(draw: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    return (
        draw("latents", 2, 3, 8, 8),
        torch.tensor([0.2, 0.7]),
        draw("text", 2, 6, 24),
        torch.ones(2, 6, dtype=torch.bool),
        draw("pooled", 2, 24),
    )


def patches(visible_BN: Tensor) -> Tensor:
    """Return (B, 1, 8, 8) bool: the pixels of the kept tokens, 4 x 4 tokens of 2 x 2."""
    seen = torch.zeros(len(visible_BN), 16, dtype=torch.bool).scatter(1, visible_BN, True).view(-1, 1, 4, 4)
    return seen.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.mark.parametrize("positions", ["rotary", "rotary_and_absolute"])
def test_keeping_every_token_is_training_without_a_mask(
    masked_config: ModelConfig, inputs: Any, positions: Any, randomize: Callable[[nn.Module], None]
) -> None:
    results = []
    for kept in (None, torch.arange(16).expand(2, -1)):
        model = ECDiT(replace(masked_config, positions=positions), SerialLayers())
        randomize(model)
        velocity = model(*inputs, kept).velocity_BCHW
        velocity.square().sum().backward()
        gradients = [p.grad for name, p in model.named_parameters() if name != "mask_token" and p.grad is not None]
        assert len(gradients) == len(list(model.parameters())) - 1
        results.append([velocity, *gradients])
    for whole, kept_all in zip(*results, strict=True):
        torch.testing.assert_close(kept_all, whole, rtol=1e-5, atol=1e-6)


def test_what_is_left_out_is_seen_by_no_block(model: ECDiT, inputs: Any) -> None:
    noisy, *rest = inputs
    elsewhere = torch.where(patches(KEPT), noisy, noisy + 1.0)
    assert torch.equal(model(elsewhere, *rest, KEPT).velocity_BCHW, model(*inputs, KEPT).velocity_BCHW)
    here = torch.where(patches(KEPT), noisy + 1.0, noisy)
    assert not torch.allclose(model(here, *rest, KEPT).velocity_BCHW, model(*inputs, KEPT).velocity_BCHW)


def test_main_blocks_compute_on_kept_tokens_and_decoder_blocks_on_all(model: ECDiT, inputs: Any) -> None:
    lengths: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.startswith(("blocks.", "decoder.")) and name.count(".") == 1:
            module.register_forward_hook(lambda _m, given, _o, name=name: lengths.update({name: given[0].shape[1]}))
    model(*inputs, KEPT)
    assert lengths == {f"blocks.{i}": 8 for i in range(4)} | {f"decoder.{i}": 16 for i in range(2)}
    assert not any("experts" in name for name, _ in model.decoder.named_parameters())


def test_every_position_is_predicted_and_the_mask_token_learns_from_the_tokens_left_out(
    model: ECDiT, inputs: Any
) -> None:
    velocity = model(*inputs, KEPT).velocity_BCHW
    assert (velocity.abs() > 0).all()
    velocity.where(~patches(KEPT), 0.0).square().sum().backward()
    assert model.mask_token is not None and model.mask_token.grad is not None
    assert model.mask_token.grad.abs().min() > 0


def test_without_a_mask_the_mask_token_has_a_gradient_of_zero(model: ECDiT, inputs: Any) -> None:
    """ZeRO-3 keeps an old gradient where a step makes none."""
    prediction = model(*inputs)
    (prediction.velocity_BCHW.sum() + prediction.auxiliary_loss).backward()
    assert model.mask_token is not None and model.mask_token.grad is not None
    assert model.mask_token.grad.abs().max() == 0


def test_kept_tokens_keep_the_angles_of_their_places(model: ECDiT, inputs: Any) -> None:
    """The same contents in places that are as far apart look the same to the main blocks, in others they do not."""
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _m, _given, out: seen.append(out[0]))
    noisy, *rest = (x[:1] for x in inputs)
    top, one_lower, apart = (torch.tensor([places]) for places in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 15]))
    contents = noisy[:, :, :2]
    for places in (top, one_lower, apart):
        latents = torch.zeros_like(noisy)
        for token, place in enumerate(places[0].tolist()):
            row, column = place // 4 * 2, place % 4 * 2
            latents[:, :, row : row + 2, column : column + 2] = contents[:, :, :, token * 2 : token * 2 + 2]
        model(latents, *rest, places)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[2], seen[0], atol=1e-3)


def test_the_mask_is_a_function_of_the_seed_and_the_sample() -> None:
    alone = sample_visible_tokens(torch.tensor([7]), 3, 256, 128)
    among = sample_visible_tokens(torch.tensor([5, 7, 6]), 3, 256, 128)
    assert alone is not None and among is not None
    assert torch.equal(among[1], alone[0])
    assert alone.dtype == torch.int64 and (alone.diff(dim=1) > 0).all()
    other_seed = sample_visible_tokens(torch.tensor([7]), 4, 256, 128)
    assert other_seed is not None and not torch.equal(other_seed, alone) and not torch.equal(among[0], among[1])


def test_every_token_is_left_out_as_often_as_any_other() -> None:
    kept = sample_visible_tokens(torch.arange(2000), 0, 16, 4)
    assert kept is not None
    shares = torch.bincount(kept.flatten(), minlength=16) / 2000
    # Four standard deviations of a binomial share with p = 1/4.
    assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_no_mask_is_drawn_where_all_tokens_are_kept() -> None:
    assert sample_visible_tokens(torch.arange(3), 0, 16, 16) is None


@pytest.fixture
def batch(draw: Callable[..., Tensor]) -> FlowBatch:
    return FlowBatch(
        latents_BCHW=draw("clean", 2, 3, 8, 8),
        noise_BCHW=draw("noise", 2, 3, 8, 8),
        timesteps_B=torch.tensor([0.5, 0.25]),
        text_embeds_BTD=torch.zeros(2, 6, 24),
        text_mask_BT=torch.ones(2, 6, dtype=torch.bool),
        text_pooled_BD=torch.zeros(2, 24),
        visible_BN=KEPT,
    )


def test_the_loss_is_on_the_kept_tokens_and_reconstruction_on_the_others(batch: FlowBatch) -> None:
    def model(noisy: Tensor, *_: Any) -> Prediction:
        return Prediction(velocity_BCHW=torch.full_like(noisy, 0.5), auxiliary_loss=torch.tensor(0.25))

    losses = flow_losses(model, batch, 2)
    seen = patches(KEPT).expand(-1, 3, -1, -1)
    error = (0.5 - (batch.noise_BCHW - batch.latents_BCHW)).square()
    for image in range(2):
        assert losses.flow_B[image].item() == pytest.approx(error[image][seen[image]].mean().item(), rel=1e-5)
    guess = (0.5 + batch.latents_BCHW).square()
    assert losses.reconstruction.item() == pytest.approx(guess[~seen].mean().item(), rel=1e-5)
    assert losses.load_balance.item() == 0.25


def test_a_perfect_guess_of_what_was_left_out_costs_nothing(batch: FlowBatch) -> None:
    losses = flow_losses(lambda *_: Prediction(-batch.latents_BCHW, torch.zeros(())), batch, 2)
    assert losses.reconstruction.item() == 0.0
    assert losses.flow_B.tolist() != [0.0, 0.0]


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 16), (0.5, 8), (0.49, 9), (0.75, 4), (0.99, 1), (0.3, 12)])
def test_so_many_tokens_are_kept(tiny_config: ModelConfig, ratio: float, kept: int) -> None:
    assert tiny_config.num_kept_tokens(ratio) == kept


def test_the_last_phase_sees_everything() -> None:
    train = TrainConfig(max_steps=10, global_batch_size=8, mask_ratio=0.5, unmasked_from_step=7)
    assert [train.mask_ratio_at(step) for step in (0, 6, 7, 9)] == [0.5, 0.5, 0.0, 0.0]
    assert replace(train, unmasked_from_step=None).mask_ratio_at(9) == 0.5


def test_a_mask_needs_blocks_that_see_every_position(tiny_recipe: Recipe, refusal_of: Refusal) -> None:
    masked = replace(tiny_recipe.train, mask_ratio=0.5)
    message = refusal_of(lambda: replace(tiny_recipe, train=masked))
    assert "train.mask_ratio: 0.5 with model.decoder_layers: 0" in message
    replace(tiny_recipe, train=masked, model=replace(tiny_recipe.model, decoder_layers=1))


def test_a_mask_that_leaves_nothing_out_is_refused(tiny_recipe: Recipe, refusal_of: Refusal) -> None:
    model = replace(tiny_recipe.model, decoder_layers=1)
    message = refusal_of(lambda: replace(tiny_recipe, model=model, train=replace(tiny_recipe.train, mask_ratio=0.06)))
    assert "train.mask_ratio: 0.06 of 16 tokens is less than one" in message and "0.0625 or more" in message


def test_a_mask_that_leaves_less_than_a_token_an_expert_is_refused_with_the_numbers(
    tiny_recipe: Recipe, refusal_of: Refusal
) -> None:
    masked = replace(tiny_recipe.train, mask_ratio=0.93)
    model = replace(tiny_recipe.model, decoder_layers=1)
    replace(tiny_recipe, train=masked, model=model)  # 2 of 16 tokens, of which each of 4 experts takes 2 x 2 / 4
    message = refusal_of(lambda: replace(tiny_recipe, train=replace(masked, mask_ratio=0.94), model=model))
    assert "leaves 1 of 16 tokens" in message and "2.0) x 1 / 4 = 0.5, less than one token" in message
    group = replace(model, routing_pool="group", routing_group=2)
    replace(tiny_recipe, train=replace(masked, mask_ratio=0.94), model=group)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"mask_ratio": 1.0}, "train.mask_ratio: 1.0 is outside [0, 1)"),
        ({"mask_ratio": -0.1}, "train.mask_ratio: -0.1 is outside"),
        ({"mask_ratio": float("nan")}, "train.mask_ratio: nan is outside"),
        ({"unmasked_from_step": 3}, "train.unmasked_from_step: 3 has no effect with train.mask_ratio: 0.0"),
        ({"unmasked_from_step": 0, "mask_ratio": 0.5}, "train.unmasked_from_step: 0 is not a positive"),
        ({"reconstruction_weight": 0.1}, "train.reconstruction_weight: 0.1 has no effect"),
        ({"reconstruction_weight": -1.0, "mask_ratio": 0.5}, "train.reconstruction_weight: -1.0 is negative"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(fields: dict[str, Any], part: str, refusal_of: Refusal) -> None:
    assert part in refusal_of(lambda: TrainConfig(max_steps=4, global_batch_size=8, **fields))


def test_a_model_trained_with_a_mask_draws_without_one(tiny_recipe: Recipe, masked_config: ModelConfig) -> None:
    train = replace(tiny_recipe.train, mask_ratio=0.5)
    drawer = random_pipeline(replace(tiny_recipe, model=masked_config, train=train))
    lengths: list[int] = []
    for block in drawer.model.blocks:
        block.register_forward_hook(lambda _module, given, _out: lengths.append(given[0].shape[1]))
    pictures = drawer.draw(["a red seven"], seeds=[0], sample=SampleConfig(num_steps=2))
    assert pictures.shape == (1, 3, 8, 8)
    assert set(lengths) == {16}
    assert len(lengths) >= 2 * masked_config.num_layers
