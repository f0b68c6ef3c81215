"""Two forked ranks under the real DeepSpeed against one AdamW: accumulation, clipping, pieces, the average shown."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # an engine's first use imports it, for seconds
import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.config.deepspeed_json import load_deepspeed_config
from ecdit_ds.config.recipe import OptimizerConfig, Recipe
from ecdit_ds.model.sharding import ShardIndex, set_shard, shard_of
from ecdit_ds.parallel.setup import init_process_groups, initialize_distributed
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.training.engine import EMA, WEIGHT, DeepSpeedEngine
from ecdit_ds.training.optimizer import parameter_groups
from ecdit_ds.training.zero_partitions import Range
from tests.helpers.forked_ranks import on_ranks

MakeRecipe = Callable[..., Recipe]

ROOT = Path(__file__).resolve().parents[3]
CONFIG = OptimizerConfig(  # an eps that large lets the size of a gradient matter
    learning_rate=1.0, beta1=0.8, beta2=0.9, eps=1.0, ema_decay=0.5, weight_decay=0.1, gradient_clipping=2.0
)
RATES = (0.1, 0.3)
STEPS, RANKS, MICRO_BATCHES = len(RATES), 2, 2


class Net(nn.Module):
    """Three parameters that halves of a flat tensor cut through; no part of the loss is another's double."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.linspace(-1.0, 1.0, 15).view(5, 3))
        self.outer = nn.Parameter(torch.linspace(0.5, -0.7, 10).view(2, 5))
        self.shift = nn.Parameter(torch.linspace(0.2, 0.4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer @ torch.tanh(self.inner @ x + self.shift)


def loss_of(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model(x)
    return (y - 3.0).square().sum(), 0.5 * y.abs().sum()


def micro_batch(step: int, rank: int, number: int) -> Tensor:
    """Return what one rank trains on."""
    return torch.randn(3, generator=torch.Generator().manual_seed(100 * step + 10 * rank + number))


def by_hand() -> tuple[list[dict[str, Tensor]], list[float], Net]:
    """Return weights, average and moments after each step, the norms before clipping, and the trained model."""
    model = Net()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), betas=(0.8, 0.9), eps=1.0)
    averages = {name: weight.detach().clone() for name, weight in named.items()}
    states, norms = [], []
    for step, rate in enumerate(RATES):
        optimizer.zero_grad()
        for rank in range(RANKS):
            for number in range(MICRO_BATCHES):
                total = sum(loss_of(model, micro_batch(step, rank, number)), torch.zeros(()))
                (total / (RANKS * MICRO_BATCHES)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(named.values(), 2.0)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        averages = {name: decay * averages[name] + (1 - decay) * w.detach() for name, w in named.items()}
        states.append(
            {f"{WEIGHT}/{name}": weight.detach().clone() for name, weight in named.items()}
            | {f"{EMA}/{name}": average.clone() for name, average in averages.items()}
            | {
                f"{kind}/{name}": optimizer.state[w][kind].clone()
                for name, w in named.items()
                for kind in ("exp_avg", "exp_avg_sq")
            }
        )
    return states, norms, model


def pieces_of(engine: DeepSpeedEngine) -> list[tuple[str, int, Tensor]]:
    """Return what this rank keeps and writes: tensor, where the piece begins in it, and its numbers."""
    return [
        (f"{kind}/{here.name}", here.start, values.detach().clone())
        for here in engine.fragments()
        if here.is_saved_by_this_rank
        for kind, values in here.states.items()
    ]


def joined(pieces: list[tuple[str, int, Tensor]], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Return whole tensors of the pieces of all ranks, which must tile them."""
    whole = {}
    for name, shape in shapes.items():
        parts = sorted((start, values) for found, start, values in pieces if found == name)
        ends = [start + len(values) for start, values in parts]
        assert [start for start, _ in parts] == [0, *ends[:-1]], f"{name} is not tiled"
        whole[name] = torch.cat([values for _, values in parts]).view(shape)
    return whole


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_that_accumulate_are_one_adamw_and_show_the_average_and_what_was_restored(
    stage: int, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = make_recipe("train.global_batch_size=4", "train.micro_batch_size=1", "optimizer.gradient_clipping=2.0")
    x = torch.tensor([0.3, -0.2, 0.9])

    def work(rank: int) -> dict[str, Any]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS))
        initialize_distributed()
        grid = init_process_groups(Topology(world_size=RANKS), 1)
        deepspeed_config = load_deepspeed_config(Path(f"ds_configs/zero{stage}.json"), recipe, RANKS)
        engine = DeepSpeedEngine(Net(), CONFIG, deepspeed_config, grid)
        results, pieces = [], []
        for step, rate in enumerate(RATES):
            result = engine.step([micro_batch(step, rank, number) for number in range(2)], loss_of, rate)
            results.append([float(result.loss), float(result.auxiliary_loss), float(result.grad_norm)])
            pieces.append(pieces_of(engine))
        with torch.no_grad():
            shown = {"last": engine.module(x).clone()}
            with engine.ema_weights():
                shown["average"] = engine.module(x).clone()
            shown["after it"] = engine.module(x).clone()
            try:
                with engine.ema_weights():
                    raise InterruptedError
            except InterruptedError:
                shown["after an error"] = engine.module(x).clone()
            for fragment, (_, _, values) in zip(
                engine.fragments(), [piece for piece in pieces[0] if piece[0].startswith(WEIGHT)], strict=True
            ):
                fragment.states[WEIGHT].copy_(values)
            engine.restored(1)
            shown["restored"] = engine.module(x).clone()
        return {"results": results, "pieces": pieces, "shown": shown}

    states, norms, model = by_hand()
    assert min(norms) > 2.0, "clipping matters"
    ranks = on_ranks(RANKS, work)
    shapes = {name: tensor.shape for name, tensor in states[0].items()}
    for step in range(STEPS):
        found = joined([piece for rank in ranks for piece in rank["pieces"][step]], shapes)
        torch.testing.assert_close(found, states[step], rtol=1e-4, atol=1e-6)
        assert [rank["results"][step][2] for rank in ranks] == pytest.approx([norms[step]] * 2, rel=1e-4)
    before = Net()
    for rank, found in enumerate(ranks):
        losses = [loss_of(before, micro_batch(0, rank, number)) for number in range(2)]
        for which in (0, 1):
            mean = sum(float(of[which].detach()) for of in losses) / 2
            assert found["results"][0][which] == pytest.approx(mean, rel=1e-5)

    def output(state: dict[str, Tensor], kind: str) -> Tensor:
        model.load_state_dict({name: state[f"{kind}/{name}"] for name, _ in model.named_parameters()})
        return model(x).detach()

    for found in ranks:
        shown = found["shown"]
        torch.testing.assert_close(shown["last"], output(states[-1], WEIGHT), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(shown["average"], output(states[-1], EMA), rtol=1e-4, atol=1e-6)
        assert torch.equal(shown["after it"], shown["last"])
        assert torch.equal(shown["after an error"], shown["last"])
        torch.testing.assert_close(shown["restored"], output(states[0], WEIGHT), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tp_index", [0, 1])
def test_what_tensor_parallel_ranks_hold_alike_the_first_writes_and_slices_each_its_own(tp_index: int) -> None:
    tp = ShardIndex(index=tp_index, count=2)
    whole, cut = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))
    set_shard(cut, (0, tp), is_tp_sharded=True)
    flat = torch.arange(7.0)
    ranges = [
        Range(parameter=whole, partition=0, at=0, start=0, length=3),
        Range(parameter=cut, partition=0, at=3, start=0, length=4),
    ]
    engine: Any = object.__new__(DeepSpeedEngine)
    engine._tp, engine._optimizer_name, engine.ema = tp, "adamw", SimpleNamespace(averages=[flat + 10])
    engine._places = {id(p): (name, shard_of(p), tuple(p.shape)) for name, p in (("whole", whole), ("cut", cut))}
    engine._partitions = SimpleNamespace(flats=lambda: [flat], ranges=lambda: iter(ranges))
    state = {"exp_avg": flat + 20, "exp_avg_sq": flat + 30}
    engine._zero = SimpleNamespace(optimizer=SimpleNamespace(state={flat: state}))
    fragments = {fragment.name: fragment for fragment in engine.fragments()}
    assert {name: fragment.is_saved_by_this_rank for name, fragment in fragments.items()} == {
        "whole": tp_index == 0,
        "cut": True,
    }
    assert fragments["cut"].shard.offset == (2 * tp_index, 0)
    for offset, kind in ((0, WEIGHT), (10, EMA), (20, "exp_avg"), (30, "exp_avg_sq")):
        assert torch.equal(fragments["cut"].states[kind], flat[3:] + offset), kind
