"""The schedule against closed forms, the optimizers against their formulas by hand, and what is decayed."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from ecdit_ds.config.recipe import STATE_NAMES, OptimizerConfig, Recipe
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.training.optimizer import build_optimizer, learning_rate, parameter_groups

Schedule = Literal["constant", "cosine", "linear"]

GRADIENTS = ([0.5, -2.0, 1e-3], [0.25, 1.0, 4.0], [-1.0, 0.0, 3.0])
START = [1.0, -0.5, 2.0]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_warm_up_is_linear_and_ends_at_the_full_rate(schedule: Schedule) -> None:
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=8, schedule=schedule)
    rates = [learning_rate(step, 100, config) for step in range(9)]
    assert rates[:8] == pytest.approx([0.4 * n / 8 for n in range(1, 9)])
    assert rates[8] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("constant", lambda progress: 1.0),
        ("linear", lambda progress: 0.1 + 0.9 * (1 - progress)),
        ("cosine", lambda progress: 0.1 + 0.9 * math.cos(math.pi * progress / 2) ** 2),
    ],
)
def test_the_rate_follows_its_schedule_and_stays_at_the_end(
    schedule: Schedule, shape: Callable[[float], float]
) -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_lr_fraction=0.1, schedule=schedule)
    for step in (10, 20, 35, 59, 60):
        assert learning_rate(step, 60, config) == pytest.approx(2.0 * shape((step - 10) / 50), rel=1e-12)
    assert learning_rate(1000, 60, config) == pytest.approx(2.0 * shape(1.0), rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_run_that_ends_within_its_warm_up_has_a_rate_at_every_step(schedule: Schedule) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule=schedule)
    assert [learning_rate(step, 5, config) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(math.isfinite(learning_rate(step, 10, config)) for step in range(12))


@pytest.fixture
def model(make_recipe: Callable[..., Recipe]) -> ECDiT:
    """Return the tiny sparse model with a shared expert."""
    return ECDiT(make_recipe("model.num_shared_experts=1").model, SerialLayers())


def test_every_parameter_is_in_exactly_one_group(model: ECDiT) -> None:
    groups = parameter_groups(model, 0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}
    assert len({group["name"] for group in groups}) == len(groups)


def test_matrices_and_experts_are_decayed_and_biases_norms_and_tables_are_not(model: ECDiT) -> None:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decay_of = {name_of[id(p)]: g["weight_decay"] for g in parameter_groups(model, 0.1) for p in g["params"]}
    for name in (
        "patches.linear.weight",
        "blocks.0.ffn.up.weight",
        "blocks.1.ffn.experts.w1",
        "blocks.1.ffn.experts.w2",
        "blocks.1.ffn.router.weight",
        "blocks.1.ffn.shared.down.weight",
    ):
        assert decay_of[name] == 0.1, name
    spared = {name for name, decay in decay_of.items() if decay == 0.0}
    assert spared == {n for n in decay_of if n.endswith(("bias", "_norm.weight", "modulation_table"))}
    assert "blocks.0.self_attention.query_norm.weight" in spared


def test_a_frozen_parameter_is_not_trained(model: ECDiT) -> None:
    model.patches.linear.weight.requires_grad_(False)
    grouped = {id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]}
    assert id(model.patches.linear.weight) not in grouped


def trained(config: OptimizerConfig, weight_decay: float) -> tuple[list[list[float]], torch.optim.Optimizer, Tensor]:
    """Return the weights after each of three steps with GRADIENTS, the optimizer and the parameter."""
    parameter = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    group = {"params": [parameter], "weight_decay": weight_decay, "name": "all"}
    optimizer = build_optimizer([group], config)
    weights = []
    for gradient in GRADIENTS:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        weights.append(parameter.tolist())
    return weights, optimizer, parameter


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_rmsprop_divides_by_the_root_mean_square_and_then_gathers_momentum(momentum: float) -> None:
    config = OptimizerConfig(name="rmsprop", learning_rate=0.1, smoothing=0.8, momentum=momentum, eps=1e-3)
    weights, _, _ = trained(config, weight_decay=0.0)
    for i, weight in enumerate(START):
        mean_square = buffer = 0.0
        for step, gradient in enumerate(g[i] for g in GRADIENTS):
            mean_square = 0.8 * mean_square + 0.2 * gradient**2
            buffer = momentum * buffer + gradient / (math.sqrt(mean_square) + 1e-3)
            weight -= 0.1 * buffer
            assert weights[step][i] == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_corrects_both_moments_and_decays_apart_from_the_gradient(weight_decay: float) -> None:
    config = OptimizerConfig(name="adamw", learning_rate=0.1, beta1=0.7, beta2=0.9, eps=1e-3)
    weights, _, _ = trained(config, weight_decay=weight_decay)
    for i, weight in enumerate(START):
        first = second = 0.0
        for step, gradient in enumerate(g[i] for g in GRADIENTS):
            first = 0.7 * first + 0.3 * gradient
            second = 0.9 * second + 0.1 * gradient**2
            corrected = first / (1 - 0.7 ** (step + 1)), second / (1 - 0.9 ** (step + 1))
            weight -= 0.1 * weight_decay * weight
            weight -= 0.1 * corrected[0] / (math.sqrt(corrected[1]) + 1e-3)
            assert weights[step][i] == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_an_optimizer_remembers_exactly_what_is_saved_of_it(name: Literal["adamw", "rmsprop"]) -> None:
    _, optimizer, parameter = trained(OptimizerConfig(name=name), weight_decay=0.0)
    assert set(optimizer.state[parameter]) == {"step", *STATE_NAMES[name]}


def test_rmsprop_without_momentum_remembers_exactly_what_is_saved_of_it() -> None:
    config = OptimizerConfig(name="rmsprop", momentum=0.0)
    _, optimizer, parameter = trained(config, weight_decay=0.0)
    assert set(optimizer.state[parameter]) <= {"step", *STATE_NAMES["rmsprop"]}


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_adamw_is_fused_on_a_cpu_for_offloaded_weights_alone(is_offloaded: bool) -> None:
    group = {"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.0, "name": "all"}
    assert build_optimizer([group], OptimizerConfig(), is_offloaded=is_offloaded).defaults["fused"] == is_offloaded
