"""One process under the real DeepSpeed, step by step beside torch's own AdamW and an average by hand."""

import math
import traceback
from collections.abc import Callable
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # an engine's first use imports it, for seconds
import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.config.deepspeed_json import load_deepspeed_config
from ecdit_ds.config.recipe import OptimizerConfig, Recipe
from ecdit_ds.parallel.setup import ParallelContext, init_process_groups, initialize_distributed
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.parallel.world import rank_info_from_env
from ecdit_ds.training.engine import EMA, WEIGHT, DeepSpeedEngine
from tests.helpers.forked import in_a_copy

MakeRecipe = Callable[..., Recipe]
States = dict[str, dict[str, Tensor]]

ROOT = Path(__file__).resolve().parents[3]
RATE, DECAY = 0.1, 0.5
TARGETS = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-3.0, 0.25, 4.0]), torch.tensor([0.5, 6.0, -1.0])]
BROKEN = torch.tensor([math.nan, 0.0, 0.0])


class Bowl(nn.Module):
    """A matrix and a vector, and half the squared distance of their sum to a target: the gradient is the difference."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([[0.5, 1.0, -1.0]]))
        self.shift = nn.Parameter(torch.tensor([0.25, 0.5, 0.75]))

    def forward(self, target: Tensor) -> Tensor:
        return 0.5 * (self.place + self.shift - target).square().sum()


def loss_of(model: nn.Module, target: Tensor) -> tuple[Tensor, Tensor]:
    return model(target), torch.zeros(())


def states_of(engine: DeepSpeedEngine) -> States:
    return {
        fragment.name: {name: values.detach().clone() for name, values in fragment.states.items()}
        for fragment in engine.fragments()
    }


def by_hand(targets: list[Tensor]) -> States:
    """Return weights, moments and average after a step for each target; one that is not finite is no step."""
    model = Bowl()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    averages = {name: weight.detach().clone() for name, weight in named.items()}
    for update, target in enumerate(target for target in targets if target.isfinite().all()):
        optimizer.zero_grad()
        model(target).backward()
        optimizer.step()
        decay = min(DECAY, (1 + update) / (10 + update))
        averages = {name: decay * averages[name] + (1 - decay) * weight.detach() for name, weight in named.items()}
    return {
        name: {WEIGHT: weight.detach().flatten(), EMA: averages[name].flatten()}
        | {kind: optimizer.state[weight][kind].flatten() for kind in ("exp_avg", "exp_avg_sq")}
        for name, weight in named.items()
    }


@pytest.fixture
def make_engine(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> Callable[[], DeepSpeedEngine]:
    """Return what makes an engine; to be called in a copy of this process."""
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    recipe = make_recipe("train.global_batch_size=1", "optimizer.gradient_clipping=0")
    config = OptimizerConfig(learning_rate=RATE, beta1=0.9, beta2=0.99, eps=1e-8, ema_decay=DECAY)
    grids: list[ParallelContext] = []

    def make() -> DeepSpeedEngine:
        if not grids:
            rank_info_from_env()
            initialize_distributed()
            grids.append(init_process_groups(Topology(world_size=1, tp=1, ep=1), 1))
        deepspeed_config = load_deepspeed_config(Path("ds_configs/zero2.json"), recipe, 1)
        return DeepSpeedEngine(Bowl(), config, deepspeed_config, grids[0])

    return make


def passes(check: Callable[[], None]) -> None:
    """Run a check in a copy of this process, whose process groups go with it."""

    def command() -> int:
        try:
            check()
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    code, out, err = in_a_copy(command)
    assert code == 0, out + err


def assert_as_by_hand(engine: DeepSpeedEngine, targets: list[Tensor]) -> None:
    torch.testing.assert_close(states_of(engine), by_hand(targets), rtol=1e-5, atol=1e-7)


def test_the_average_follows_the_weights_that_a_step_made_and_stands_still_in_a_skipped_one(
    make_engine: Callable[[], DeepSpeedEngine],
) -> None:
    def check() -> None:
        engine, done = make_engine(), list[Tensor]()
        for target in (TARGETS[0], BROKEN, TARGETS[1], BROKEN, TARGETS[2]):
            result = engine.step([target], loss_of, RATE)
            done.append(target)
            assert result.is_skipped == bool(target.isnan().any())
            assert_as_by_hand(engine, done)
        assert engine.num_updates == 3

    passes(check)


def test_a_resumed_optimizer_corrects_its_bias_as_the_uninterrupted_one(
    make_engine: Callable[[], DeepSpeedEngine],
) -> None:
    # Early, where it matters: the correction of the first step is tenfold, of the second about fivefold.
    def check() -> None:
        first, second = make_engine(), make_engine()
        for before in (1, 2):
            first.step([TARGETS[before - 1]], loss_of, RATE)
            kept = states_of(first)
            for fragment in second.fragments():
                for name, values in fragment.states.items():
                    values.copy_(kept[fragment.name][name])
            second.restored(before)
            second.step([TARGETS[before]], loss_of, RATE)
            assert_as_by_hand(second, TARGETS[: before + 1])
        first.step([TARGETS[2]], loss_of, RATE)
        torch.testing.assert_close(states_of(second), states_of(first), rtol=0, atol=0)

    passes(check)


def test_whatever_is_kept_and_not_finite_is_seen_on_its_rank(make_engine: Callable[[], DeepSpeedEngine]) -> None:
    def check() -> None:
        engine = make_engine()
        engine.step([TARGETS[0]], loss_of, RATE)
        assert engine.is_finite()
        fragments = list(engine.fragments())
        assert len(fragments) == 2
        for values in (values for fragment in fragments for values in fragment.states.values()):
            for number in (math.nan, math.inf, -math.inf):
                sound = values[1].clone()
                values[1] = number
                assert not engine.is_finite()
                values[1] = sound
            assert engine.is_finite()

    passes(check)
