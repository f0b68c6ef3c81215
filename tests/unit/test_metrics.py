"""What is measured, against counts by hand: routing, and the log of steps.

Suffixes: B pools, S tokens of a pool, D hidden_size, E experts.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.config import Recipe
from ecdit_ds.metrics import MetricLog, RoutingProbe, peak_flops_per_s
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.moe import ExpertChoiceRouter
from ecdit_ds.model_config import ModelConfig
from ecdit_ds.parallel.layers import SerialLayers
from ecdit_ds.parallel.world import World

MakeRecipe = Callable[..., Recipe]


class WorldOfOne(World):
    """The only process: its own mean."""

    def mean(self, values: Tensor) -> Tensor:
        return values


@pytest.fixture
def config(make_recipe: MakeRecipe) -> ModelConfig:
    """Return the tiny sparse architecture."""
    return make_recipe().model


def inputs_of(config: ModelConfig, images: int) -> tuple[Tensor, ...]:
    """Return arguments for ECDiT's forward."""
    return (
        torch.linspace(-1, 1, images * config.in_channels * config.latent_height * config.latent_width).view(
            images, config.in_channels, config.latent_height, config.latent_width
        ),
        torch.full((images,), 0.5),
        torch.ones(images, config.max_text_tokens, config.text_embed_dim),
        torch.ones(images, config.max_text_tokens, dtype=torch.bool),
        torch.ones(images, config.text_embed_dim),
    )


def test_routing_is_counted_as_by_hand(config: ModelConfig) -> None:
    # Two experts with 2 of 4 tokens each: one wants tokens 0 and 1, the other 1 and 2; nobody wants token 3.
    config = replace(config, num_experts=2, capacity_factor=1.0, router_scores="sigmoid")
    layers = nn.ModuleDict({"first": ExpertChoiceRouter(config), "second": ExpertChoiceRouter(config)})
    probe = RoutingProbe(layers)
    with torch.no_grad():
        for router in layers.values():
            assert isinstance(router, ExpertChoiceRouter)
            router.weight.copy_(torch.eye(2, config.hidden_size))
    wish_SE = torch.tensor([[3.0, -9.0], [2.0, 2.0], [-9.0, 3.0], [-9.0, -9.0]])
    x_BSD = nn.functional.pad(wish_SE, (0, config.hidden_size - 2))[None]
    layers["first"](x_BSD)
    layers["second"](x_BSD[:, [1, 1, 1, 1]])  # all alike: which two are taken is not specified, how often is

    latest = probe.latest()
    assert latest["experts_per_token"].tolist() == [1.0, 1.0]
    assert float(latest["untaken_fraction"][0]) == 0.25

    def entropy(logits: list[float]) -> float:
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        return -sum(s / sum(scores) * math.log(s / sum(scores)) for s in scores)

    by_hand = sum(entropy(row) for row in wish_SE.tolist()) / 4
    assert latest["router_entropy"].tolist() == pytest.approx([by_hand, math.log(2)], rel=1e-5)


def test_a_uniform_router_has_the_entropy_of_a_fair_choice(config: ModelConfig) -> None:
    router = ExpertChoiceRouter(config)
    nn.init.zeros_(router.weight)
    probe = RoutingProbe(router)
    router(torch.ones(3, 16, config.hidden_size))
    assert probe.latest()["router_entropy"].tolist() == pytest.approx([math.log(config.num_experts)], rel=1e-6)


def test_a_model_reports_one_number_a_sparse_layer(config: ModelConfig, randomize: Callable[[nn.Module], None]) -> None:
    model = ECDiT(replace(config, capacity_factor=1.5), SerialLayers())
    randomize(model)
    probe = RoutingProbe(model)
    assert probe.latest() == {}
    model(*inputs_of(config, 2))
    latest = probe.latest()
    assert set(latest) == {"experts_per_token", "untaken_fraction", "router_entropy"}
    assert latest["experts_per_token"].tolist() == [1.5, 1.5]
    assert all(0.0 <= share < 1.0 for share in latest["untaken_fraction"].tolist())
    assert all(0.0 < entropy < math.log(4) for entropy in latest["router_entropy"].tolist())


def test_a_dense_model_reports_no_routing(make_recipe: MakeRecipe, randomize: Callable[[nn.Module], None]) -> None:
    config = make_recipe("model.ffn=dense").model
    model = ECDiT(config, SerialLayers())
    randomize(model)
    probe = RoutingProbe(model)
    model(*inputs_of(config, 1))
    assert probe.latest() == {}


def test_token_choice_counts_the_tokens_that_found_no_place(
    make_recipe: MakeRecipe, randomize: Callable[[nn.Module], None]
) -> None:
    config = make_recipe("model.ffn=token_choice", "model.top_k=1", "model.capacity_factor=1.0").model
    model = ECDiT(config, SerialLayers())
    randomize(model)
    for name, parameter in model.named_parameters():
        if "gate.wg" in name:
            nn.init.zeros_(parameter)  # every token's first choice is now the same expert, which has 16 / 4 places
    probe = RoutingProbe(model)
    model(*inputs_of(config, 1))
    latest = probe.latest()
    assert latest["experts_per_token"].tolist() == [0.25, 0.25]
    assert latest["untaken_fraction"].tolist() == [0.75, 0.75]
    assert "router_entropy" not in latest


def test_steps_come_back_in_order_as_plain_numbers() -> None:
    log = MetricLog()
    for step in (1, 2):
        log.record(
            {"step": step, "is_skipped": False, "note": None},
            {"loss": torch.tensor(0.5 * step), "untaken": torch.tensor([0.25, step]), "one": torch.tensor([3.0])},
        )
    assert log.flush(WorldOfOne())[0] == [
        {"step": 1, "is_skipped": False, "note": None, "loss": 0.5, "untaken": [0.25, 1.0], "one": [3.0]},
        {"step": 2, "is_skipped": False, "note": None, "loss": 1.0, "untaken": [0.25, 2.0], "one": [3.0]},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_none_and_its_neighbours_are_kept(value: float) -> None:
    log = MetricLog()
    log.record({"step": 1}, {"loss": torch.tensor(value), "layers": torch.tensor([1.0, value]), "norm": torch.ones(())})
    assert log.flush(WorldOfOne())[0] == [{"step": 1, "loss": None, "layers": [1.0, None], "norm": 1.0}]


def test_a_step_is_reported_once() -> None:
    log = MetricLog()
    assert log.flush(WorldOfOne())[0] == []
    log.record({"step": 1}, {"loss": torch.ones((), requires_grad=True)})
    assert [record["step"] for record in log.flush(WorldOfOne())[0]] == [1]
    assert log.flush(WorldOfOne())[0] == []


def test_the_peak_of_an_unknown_device_is_unknown() -> None:
    assert peak_flops_per_s(torch.device("cpu")) is None


@pytest.mark.parametrize(("wishes", "share"), [((False, False), 0), ((False, True), 0.5), ((True, True), 1)])
def test_what_one_rank_answers_is_heard_by_all(wishes: tuple[bool, bool], share: float) -> None:
    tables: list[Tensor] = []

    class Listening:
        def mean(self, values: Tensor) -> Tensor:
            tables.append(values)
            return values

    class Speaking:
        def mean(self, values: Tensor) -> Tensor:
            return (tables[0] + values) / 2

    for world, wish in ((Listening(), wishes[0]), (Speaking(), wishes[1])):
        log = MetricLog()
        log.record({"step": 1}, {"loss": torch.tensor(2.0)})
        records, heard = log.flush(world, (wish, True))  # type: ignore[arg-type]
    assert heard == [share, 1]
    assert records == [{"step": 1, "loss": 2.0}]
