"""What is minimised besides the flow loss: load balance and reconstruction, each times its weight, in every part.

The model here is token choice with a mask, so it has both.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ecdit_ds.config.deepspeed_json import DEFAULT_PATH, load_deepspeed_config
from ecdit_ds.config.recipe import OptimizerConfig, Recipe, TrainConfig
from ecdit_ds.flow.objective import FlowBatch, flow_losses, sample_visible_tokens
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.parallel.setup import init_process_groups, initialize_distributed
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.training.engine import WEIGHT, DeepSpeedEngine
from ecdit_ds.training.trainer import Trainer
from tests.helpers.forked import in_a_copy
from tests.helpers.launch import free_port

Randomize = Callable[[nn.Module], None]
LOAD_BALANCE, RECONSTRUCTION = 0.75, 2.5
RATE, EPS = 0.5, 1e-2


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Return a recipe of two micro-batches of two images, whose optimizer tells large gradients from small ones."""
    return replace(
        tiny_recipe,
        model=replace(tiny_recipe.model, ffn="token_choice", decoder_layers=1, load_balance_weight=LOAD_BALANCE),
        train=TrainConfig(
            max_steps=4, global_batch_size=4, micro_batch_size=2, mask_ratio=0.5, reconstruction_weight=RECONSTRUCTION
        ),
        optimizer=OptimizerConfig(name="rmsprop", learning_rate=RATE, eps=EPS, gradient_clipping=0.0),
    )


@pytest.fixture
def batches(draw: Callable[..., Tensor]) -> list[FlowBatch]:
    """Return two micro-batches."""
    return [
        FlowBatch(
            latents_BCHW=draw(f"latents {i}", 2, 3, 8, 8),
            noise_BCHW=draw(f"noise {i}", 2, 3, 8, 8),
            timesteps_B=torch.tensor([0.2, 0.7]),
            text_embeds_BTD=draw(f"text {i}", 2, 6, 24),
            text_mask_BT=torch.ones(2, 6, dtype=torch.bool),
            text_pooled_BD=draw(f"pooled {i}", 2, 24),
            visible_BN=sample_visible_tokens(torch.tensor([2 * i, 2 * i + 1]), 0, 16, 8),
        )
        for i in range(2)
    ]


def loss_of(recipe: Recipe) -> Callable[[nn.Module, FlowBatch], tuple[Tensor, Tensor]]:
    """Return what the trainer of a recipe gives the engine."""
    return lambda model, batch: Trainer._loss(SimpleNamespace(recipe=recipe), model, batch)  # type: ignore[arg-type]


def by_hand(model: ECDiT, batch: FlowBatch, load_balance: float, reconstruction: float) -> Tensor:
    """Return the weighted sum of the three."""
    losses = flow_losses(model, batch, 2)
    return losses.flow_B.mean() + load_balance * losses.load_balance + reconstruction * losses.reconstruction


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """Return the gradient of every parameter, zero where there is none."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return list(found)


@pytest.mark.parametrize("load_balance", [0.0, LOAD_BALANCE])
@pytest.mark.parametrize("reconstruction", [0.0, RECONSTRUCTION])
def test_the_gradient_of_a_micro_batch_is_that_of_flow_plus_each_weight_times_its_loss(
    load_balance: float, reconstruction: float, recipe: Recipe, batches: list[FlowBatch], randomize: Randomize
) -> None:
    recipe = replace(
        recipe,
        model=replace(recipe.model, load_balance_weight=load_balance),
        train=replace(recipe.train, reconstruction_weight=reconstruction),
    )
    model = ECDiT(recipe.model, serial_layers())
    randomize(model)
    flow, others = loss_of(recipe)(model, batches[0])
    assert flow.item() == pytest.approx(flow_losses(model, batches[0], 2).flow_B.mean().item(), rel=1e-6)
    assert (others.item() > 0) == (load_balance + reconstruction > 0)
    expected = gradients(by_hand(model, batches[0], load_balance, reconstruction), model)
    for actual, wanted in zip(gradients(flow + others, model), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_both_losses_move_weights_that_the_flow_loss_moves_otherwise(
    recipe: Recipe, batches: list[FlowBatch], randomize: Randomize
) -> None:
    """Else no other test here could fail."""
    model = ECDiT(recipe.model, serial_layers())
    randomize(model)
    names = [name for name, _ in model.named_parameters()]
    alone = gradients(by_hand(model, batches[0], 0.0, 0.0), model)
    for weights, part in (((LOAD_BALANCE, 0.0), "gate.wg"), ((0.0, RECONSTRUCTION), "mask_token")):
        with_it = gradients(by_hand(model, batches[0], *weights), model)
        changes = [(one - other).norm() / one.norm() for one, other in zip(with_it, alone, strict=True)]
        assert min(change for name, change in zip(names, changes, strict=True) if part in name) > 0.1


def test_an_engine_minimises_the_mean_over_micro_batches_of_all_losses_and_tells_them_apart(
    recipe: Recipe, batches: list[FlowBatch], randomize: Randomize, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = ECDiT(recipe.model, serial_layers())
    randomize(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parts = [gradients(by_hand(model, batch, LOAD_BALANCE, RECONSTRUCTION), model) for batch in batches]
    wanted = {name: (one + other) / 2 for name, one, other in zip(start, *parts, strict=True)}
    told = torch.stack([torch.stack(loss_of(recipe)(model, batch)) for batch in batches]).mean(dim=0).tolist()
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm().item()

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (alone | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)

    def step() -> int:
        initialize_distributed()
        grid = init_process_groups(Topology(world_size=1), 1)
        own = ECDiT(recipe.model, grid.layers)
        own.load_state_dict(start)
        engine = DeepSpeedEngine(own, recipe.optimizer, load_deepspeed_config(DEFAULT_PATH, recipe, 1), grid)
        result = engine.step(batches, loss_of(recipe), RATE)
        weights = {part.name: part.states[WEIGHT].clone().view(part.local_shape) for part in engine.fragments()}
        numbers = [result.loss, result.auxiliary_loss, torch.as_tensor(result.grad_norm, dtype=torch.float32)]
        save_file(weights | {"numbers": torch.stack(numbers)}, tmp_path / "found.safetensors")
        return 0

    code, _, err = in_a_copy(step)
    assert code == 0, err
    found = load_file(tmp_path / "found.safetensors")
    assert found.pop("numbers").tolist() == pytest.approx([*told, norm], rel=1e-4)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # RMSProp's first step, with momentum still at rest: the mean square is (1 - smoothing) of the square.
        root = (1 - recipe.optimizer.smoothing) ** 0.5 * gradient.abs()
        torch.testing.assert_close(found[name], start[name] - RATE * gradient / (root + EPS), rtol=1e-3, atol=2e-4)
