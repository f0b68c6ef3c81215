"""What is measured, against counts by hand: routing, and the log of steps.

Suffixes: B pools, S tokens of a pool, D hidden_size, E experts.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.sources.bad_sample import BadSampleReason, ReplacedSample
from ecdit_ds.errors import UnrecoverableError
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.moe import ExpertChoiceRouter
from ecdit_ds.parallel.expert_parallel import serial_layers
from ecdit_ds.parallel.world import World
from ecdit_ds.training.metrics import (
    MAX_TOLD,
    BadSamples,
    MetricLog,
    RoutingProbe,
    bad_sample_lines,
    count_bad_samples,
    peak_flops_per_s,
)

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
    model = ECDiT(replace(config, capacity_factor=1.5), serial_layers())
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
    model = ECDiT(config, serial_layers())
    randomize(model)
    probe = RoutingProbe(model)
    model(*inputs_of(config, 1))
    assert probe.latest() == {}


def test_token_choice_counts_the_tokens_that_found_no_place(
    make_recipe: MakeRecipe, randomize: Callable[[nn.Module], None]
) -> None:
    config = make_recipe("model.ffn=token_choice", "model.top_k=1", "model.capacity_factor=1.0").model
    model = ECDiT(config, serial_layers())
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


class WorldOfTwo(WorldOfOne):
    """Two ranks; the other one says what it is told to."""

    def __init__(self, theirs: tuple[Counter[str], list[ReplacedSample]]) -> None:
        self.theirs = theirs
        self.asked = 0

    @property
    def size(self) -> int:
        return 2

    def share(self, value: Any) -> list[Any]:
        self.asked += 1
        return [value, self.theirs]


def bad_sample(position: int, cause: BadSampleReason = "not finite") -> ReplacedSample:
    """Return a bad sample named after its position."""
    return ReplacedSample(position=position, set="a set", key=f"picture {position}", cause=cause)


def test_counts_are_added_over_ranks_beside_means() -> None:
    log = MetricLog()
    for step, count in ((1, 3), (2, 0)):
        log.record({"step": step}, {"loss": torch.tensor(0.5)}, {"bad_samples": count})
    # This world's mean is what one rank says, as of two that say the same.
    assert log.flush(WorldOfTwo((Counter(), [])), (True,)) == (
        [{"step": 1, "bad_samples": 6, "loss": 0.5}, {"step": 2, "bad_samples": 0, "loss": 0.5}],
        [1.0],
    )


def test_without_bad_samples_nobody_is_asked() -> None:
    bad, world = BadSamples(0.0), WorldOfTwo((Counter(), []))
    assert bad.note([]) == 0
    assert bad.agree(world, 100, 0) == [] and world.asked == 0
    bad.check()


def test_what_ranks_met_is_told_in_the_order_of_the_stream_once() -> None:
    theirs = [bad_sample(1), bad_sample(4, "no image")]
    bad, world = BadSamples(1.0), WorldOfTwo((Counter({"not finite": 1, "no image": 1}), theirs))
    assert bad.note([bad_sample(5), bad_sample(2)]) == 2
    told = bad.agree(world, 100, 4)
    assert [what.position for what in told] == [1, 2, 4, 5]
    world.theirs = (Counter({"no image": 1}), [bad_sample(9, "no image")])
    assert [what.position for what in bad.agree(world, 100, 1)] == [9]


@pytest.mark.parametrize(
    ("share", "trained", "count", "is_too_many"),
    [
        (0.01, 100, 10, False),
        (0.01, 100, 11, True),  # of 1,000, though 111 were read
        (0.01, 4990, 50, False),
        (0.01, 4990, 51, True),  # of 5,041
        (0.0, 100, 1, True),
        (0.5, 500, 500, False),
        (0.5, 600, 601, True),
    ],
)
def test_a_run_ends_above_the_share_of_a_thousand_samples_or_of_all_that_were_read(
    share: float, trained: int, count: int, is_too_many: bool
) -> None:
    bad = BadSamples(share)
    bad.note([bad_sample(i, "not finite" if i else "no image") for i in range(count)])
    bad.agree(WorldOfTwo((Counter(), [])), trained, count)
    if not is_too_many:
        bad.check()
        return
    with pytest.raises(UnrecoverableError) as caught:
        bad.check()
    said = str(caught.value)
    assert "\n" not in said and f"{count} of {trained + count} samples" in said and f"more than {share:g} of" in said
    assert "1 no image" in said
    if count > 4:
        assert f"{count - 1} not finite" in said and "picture 1, picture 2, picture 3;" in said


def test_a_run_ends_for_what_another_rank_met() -> None:
    bad = BadSamples(0.01)
    bad.note([bad_sample(0)])
    theirs = [bad_sample(1 + i) for i in range(10)]
    bad.agree(WorldOfTwo((Counter({"not finite": 10}), theirs)), 100, 11)
    with pytest.raises(UnrecoverableError, match="11 of 111 samples"):
        bad.check()


def test_samples_of_earlier_reports_count_on() -> None:
    bad = BadSamples(0.01)
    for _ in range(2):
        bad.check()
        bad.note([bad_sample(i) for i in range(6)])
        bad.agree(WorldOfTwo((Counter(), [])), 100, 6)
    with pytest.raises(UnrecoverableError, match="12 of 212 samples"):
        bad.check()


def test_samples_of_reports_without_a_bad_one_count_as_read() -> None:
    bad, world = BadSamples(0.01), WorldOfTwo((Counter(), []))
    for _ in range(20):
        assert bad.agree(world, 100, 0) == []
    bad.note([bad_sample(i) for i in range(21)])
    bad.agree(world, 100, 21)
    bad.check()  # 21 of 2,121
    bad.note([bad_sample(21)])
    bad.agree(world, 0, 1)
    with pytest.raises(UnrecoverableError, match="22 of 2122 samples"):
        bad.check()


def test_bad_samples_of_earlier_lives_count_on_with_all_that_was_read() -> None:
    lines = [json.dumps({"step": 1, **asdict(bad_sample(i))}) + "\n" for i in range(6)]
    bad = BadSamples(0.01, before=count_bad_samples(lines), num_trained=500)
    bad.check()
    bad.note([bad_sample(i, "no image") for i in range(10, 15)])
    bad.agree(WorldOfTwo((Counter(), [])), 100, 5)
    with pytest.raises(UnrecoverableError) as caught:
        bad.check()
    said = str(caught.value)
    assert "11 of 611 samples read are bad (6 not finite, 5 no image)" in said
    assert "not finite: picture 0, picture 1, picture 2;" in said
    BadSamples(0.01, before=count_bad_samples(lines[:5]), num_trained=100_000).check()


def test_more_than_a_rank_may_name_are_counted_all_the_same() -> None:
    bad = BadSamples(0.0)
    bad.note([bad_sample(i) for i in range(MAX_TOLD + 5)])
    assert len(bad.agree(WorldOfTwo((Counter(), [])), 10, MAX_TOLD + 5)) == MAX_TOLD
    with pytest.raises(UnrecoverableError, match=f"{MAX_TOLD + 5} of "):
        bad.check()


def test_a_line_names_the_first_of_each_cause() -> None:
    told = [*(bad_sample(i) for i in range(4)), replace(bad_sample(4, "no image"), key="picture\n4")]
    assert bad_sample_lines(told, 20) == [
        "step 20 | 4 bad samples replaced: not finite (picture 0, picture 1, picture 2, ...)",
        "step 20 | 1 bad samples replaced: no image (picture 4)",
    ]


def test_what_earlier_lives_met_is_left_as_it_was() -> None:
    lines = ['{"cause": "not finite", "key": "a"}']
    before = count_bad_samples(lines)
    bad, world = BadSamples(1.0, before=before, num_trained=100), WorldOfTwo((Counter(), []))
    bad.note([bad_sample(7)])
    bad.agree(world, 8, 1)
    assert before == count_bad_samples(lines)
