"""Rectified flow against closed forms: Gaussian to Gaussian, the logit-normal density, orders of convergence."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from ecdit_ds.config.recipe import FlowConfig, SampleConfig
from ecdit_ds.flow.guidance import with_cfg
from ecdit_ds.flow.objective import (
    FlowBatch,
    apply_text_dropout,
    draw_text_kept,
    flow_losses,
    sample_noise,
    sample_timesteps,
)
from ecdit_ds.flow.rectified import interpolate, shift_timesteps, timesteps_from_uniform, velocity_target
from ecdit_ds.flow.samplers import (
    SamplerStep,
    VelocityFn,
    dpmpp_2m,
    euler,
    euler_ancestral,
    heun,
    integrate,
    make_sampler,
    time_grid,
)
from ecdit_ds.model.ecdit import Prediction

Draw = Callable[..., Tensor]
Rule = Callable[[VelocityFn], SamplerStep]

MEAN, STD = 1.5, 0.5
"""Of the Gaussian data; the noise is N(0, 1)."""

TENSORS = [spec.name for spec in fields(FlowBatch) if spec.name != "replaced"]


def gaussian_velocity(x_t: Tensor, t: Tensor | float) -> Tensor:
    """Return E[noise - x | x_t], the regression line of two jointly Gaussian variables."""
    covariance = t - (1 - t) * STD**2
    variance = ((1 - t) * STD) ** 2 + t**2
    return -MEAN + covariance / variance * (x_t - (1 - t) * MEAN)


def test_the_path_runs_from_data_at_0_to_noise_at_1(draw: Draw) -> None:
    latents, noise = draw("latents", 3, 2, 4, 4), draw("noise", 3, 2, 4, 4)
    x_t = interpolate(latents, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], latents[0])
    assert torch.equal(x_t[1], noise[1])
    torch.testing.assert_close(x_t[2], 0.75 * latents[2] + 0.25 * noise[2])


def test_the_velocity_is_the_slope_of_the_path(draw: Draw) -> None:
    latents, noise = draw("latents", 2, 1, 2, 2).double(), draw("noise", 2, 1, 2, 2).double()
    early, late = (interpolate(latents, noise, torch.full((2,), t, dtype=torch.float64)) for t in (0.3, 0.8))
    torch.testing.assert_close((late - early) / 0.5, velocity_target(latents, noise))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_regression_of_the_target_on_the_path_is_the_closed_form(t: float, draw: Draw) -> None:
    latents, noise = MEAN + STD * draw("latents", 1, 1, 400, 500), draw("noise", 1, 1, 400, 500)
    x_t, target = interpolate(latents, noise, torch.tensor([t])), velocity_target(latents, noise)
    slope, intercept = np.polyfit(x_t.numpy().ravel(), target.numpy().ravel(), 1)
    expected = gaussian_velocity(torch.tensor([0.0, 1.0], dtype=torch.float64), t)
    # 200,000 pairs: standard errors are below 0.005 at these times.
    assert intercept == pytest.approx(float(expected[0]), abs=0.02)
    assert slope == pytest.approx(float(expected[1] - expected[0]), abs=0.02)


@pytest.mark.parametrize(("rule", "num_steps"), [(euler, 800), (heun, 50), (dpmpp_2m, 100)])
def test_sampling_turns_noise_into_the_data_distribution(rule: Rule, num_steps: int, draw: Draw) -> None:
    noise = draw("noise", 2, 1, 40, 50).double()
    samples = integrate(rule(gaussian_velocity), noise, time_grid(num_steps))
    # The flow between two Gaussians is affine, so each sample has a known end, and not only their moments.
    torch.testing.assert_close(samples, MEAN + STD * noise, rtol=0, atol=5e-3)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert samples.std().item() == pytest.approx(STD, abs=0.05)


@pytest.mark.parametrize(("rule", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
@pytest.mark.parametrize("num_steps", [32, 64])
def test_halving_the_step_divides_the_error_by_two_to_the_order(
    rule: Rule, order: int, num_steps: int, draw: Draw
) -> None:
    noise = draw("noise", 1, 1, 5, 5).double()

    def error(steps: int) -> float:
        samples = integrate(rule(gaussian_velocity), noise, time_grid(steps))
        return (samples - (MEAN + STD * noise)).abs().max().item()

    assert 0.85 * 2**order < error(num_steps) / error(2 * num_steps) < 1.15 * 2**order


@pytest.mark.parametrize("num_steps", [100, 400])
def test_the_stochastic_rule_keeps_the_distribution_and_forgets_where_it_came_from(num_steps: int, draw: Draw) -> None:
    noise = draw("noise", 1, 1, 200, 200).double()
    fresh = (draw(f"fresh {i}", 1, 1, 200, 200).double() for i in range(num_steps))
    samples = integrate(euler_ancestral(gaussian_velocity, lambda: next(fresh), 1.0), noise, time_grid(num_steps))
    # 40,000 numbers: standard errors are 0.0025 of the mean and 0.0018 of the deviation; the bias is O(1 / n).
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.01 + 1 / num_steps)
    assert samples.std().item() == pytest.approx(STD, abs=0.01 + 1 / num_steps)
    assert abs(float(torch.corrcoef(torch.stack([samples.ravel(), noise.ravel()]))[0, 1])) < 0.5


def test_the_stochastic_rule_without_renewal_is_eulers(draw: Draw) -> None:
    noise = draw("noise", 1, 1, 5, 5).double()
    calm = integrate(euler_ancestral(gaussian_velocity, lambda: draw("fresh", 1, 1, 5, 5), 0.0), noise, time_grid(7))
    torch.testing.assert_close(calm, integrate(euler(gaussian_velocity), noise, time_grid(7)))


@pytest.mark.parametrize(
    ("eta", "below"), [(0.0, 0.4), (0.5, 0.3), (1.0, 0.2)]
)  # from 0.8 to 0.4: by as much below 0.4 as eta of the way to 0.4 x 0.4 / 0.8
def test_a_stochastic_step_renews_the_share_of_noise_that_the_recipe_asks_for(eta: float, below: float) -> None:
    sample = SampleConfig(sampler="euler_ancestral", eta=eta)
    step = make_sampler(sample, lambda: torch.full((1,), 10.0, dtype=torch.float64))(
        lambda _x, _t: torch.full((1,), 2.0)
    )
    signal = (1 - 0.4) / (1 - below)
    renewed = (0.4**2 - (signal * below) ** 2) ** 0.5 if eta else 0.0
    found = step(torch.ones(1, dtype=torch.float64), 0.8, 0.4).item()
    assert found == pytest.approx(signal * (1 + (below - 0.8) * 2.0) + 10.0 * renewed, rel=1e-6, abs=1e-6)


def test_dpm_solver_is_exact_for_data_of_one_point_however_few_the_steps(draw: Draw) -> None:
    noise, point = draw("noise", 1, 1, 5, 5).double(), draw("point", 1, 1, 5, 5).double()
    drawn = integrate(dpmpp_2m(lambda x_t, t: (x_t - point) / t), noise, time_grid(3))
    torch.testing.assert_close(drawn, point)


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 6), ("heun", 12), ("dpmpp_2m", 6), ("euler_ancestral", 6)])
def test_a_sampler_tells_each_interval_and_evaluates_as_often_as_it_says(name: str, evaluations: int) -> None:
    times_seen: list[float] = []
    reports: list[tuple[int, float]] = []

    def velocity(latents: Tensor, time: float) -> Tensor:
        times_seen.append(time)
        return latents

    def report(step: int, time: float, _latents: Tensor, /) -> None:
        reports.append((step, time))

    sample = SampleConfig(sampler=name)  # type: ignore[arg-type]
    rule = make_sampler(sample, lambda: torch.zeros(2, 1, 2, 2))
    integrate(rule(velocity), torch.ones(2, 1, 2, 2), time_grid(6), report)
    assert len(times_seen) == evaluations
    assert times_seen[0] == 1.0
    assert reports == list(enumerate(time_grid(6)[:-1]))


def test_what_a_callback_returns_takes_the_latents_place() -> None:
    def wipe(step: int, _time: float, latents: Tensor, /) -> Tensor | None:
        return torch.zeros_like(latents) if step == 2 else None

    drawn = integrate(euler(lambda latents, _time: latents), torch.ones(1, 1, 2, 2), time_grid(4), wipe)
    assert torch.equal(drawn, torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_time_grid_falls_from_1_to_0(shift: float) -> None:
    times = torch.tensor(time_grid(8, shift))
    assert times.shape == (9,)
    assert times[0] == 1
    assert times[-1] == 0
    assert bool((times.diff() < 0).all())


def test_a_shift_spends_more_intervals_near_noise() -> None:
    assert sum(time > 0.5 for time in time_grid(10, 3.0)) > sum(time > 0.5 for time in time_grid(10))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_resolution_shift_multiplies_the_odds_of_noise(shift: float) -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = shift_timesteps(t, shift)
    torch.testing.assert_close(shifted / (1 - shifted), shift * t / (1 - t))
    torch.testing.assert_close(shift_timesteps(shifted, 1 / shift), t)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shift_timesteps(ends, shift), ends)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_timesteps_are_quantiles_of_the_logit_normal(mean: float, std: float) -> None:
    uniform = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    t = timesteps_from_uniform(uniform, FlowConfig(logit_mean=mean, logit_std=std)).double()
    logit = torch.logit(t)
    assert logit.mean().item() == pytest.approx(mean, abs=1e-3)
    assert logit.std().item() == pytest.approx(std, rel=5e-3)  # the outermost half quantile is cut: 0.2 % of std
    density = torch.exp(-(((logit - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi) * t * (1 - t))
    slope = (t[2:] - t[:-2]) / (uniform[2:] - uniform[:-2])
    inner = slice(50, -50)  # finite differences are coarse in the tails
    torch.testing.assert_close((slope * density[1:-1])[inner], torch.ones_like(slope)[inner], rtol=2e-3, atol=0)


def test_uniform_timesteps_are_their_quantiles() -> None:
    uniform = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(timesteps_from_uniform(uniform, FlowConfig(timestep_density="uniform")), uniform)


@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
def test_timesteps_of_either_density_are_shifted(density: Literal["logit_normal", "uniform"]) -> None:
    uniform = torch.linspace(0.1, 0.9, 9)
    plain, shifted = (
        timesteps_from_uniform(uniform, FlowConfig(timestep_density=density, timestep_shift=shift)) for shift in (1, 2)
    )
    torch.testing.assert_close(shifted, 2 * plain / (1 + plain))


@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
def test_timesteps_lie_strictly_inside_the_path(density: Literal["logit_normal", "uniform"]) -> None:
    t = timesteps_from_uniform(torch.tensor([0.0, 1.0]), FlowConfig(timestep_density=density))
    assert t.dtype == torch.float32
    assert 0 < t[0] < t[1] < 1


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_each_stratum_of_a_global_batch_holds_exactly_one_timestep(batch: int) -> None:
    stream_index = torch.arange(batch * 64, (batch + 1) * 64)
    t = sample_timesteps(stream_index, 0, 64, FlowConfig(timestep_density="uniform"))
    assert sorted((t * 64).floor().int().tolist()) == list(range(64))


DRAWS: list[Callable[[Tensor], Tensor]] = [
    lambda index: sample_noise((3, 4, 4), index, seed=5),
    lambda index: sample_timesteps(index, 5, 8, FlowConfig()),
    lambda index: draw_text_kept(index, 5, FlowConfig(text_dropout_prob=0.5)),
]


@pytest.mark.parametrize("draws", DRAWS, ids=["noise", "timesteps", "text_kept"])
def test_what_is_random_about_a_sample_depends_on_its_stream_index_alone(draws: Callable[[Tensor], Tensor]) -> None:
    whole = draws(torch.arange(32))
    assert torch.equal(torch.cat([draws(torch.arange(first, first + 4)) for first in range(0, 32, 4)]), whole)
    mixed = torch.tensor([31, 3, 17])
    assert torch.equal(draws(mixed), whole[mixed])
    assert len(whole.flatten(1).unique(dim=0) if whole.dim() > 1 else whole.unique()) > 1


def test_noise_is_standard_normal_and_belongs_to_its_seed_and_purpose() -> None:
    noise = sample_noise((4, 32, 32), torch.arange(20), seed=0)
    assert noise.shape == (20, 4, 32, 32)
    assert noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 5 / math.sqrt(noise.numel())
    assert noise.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / noise.numel()))
    for other in (
        sample_noise((4, 32, 32), torch.arange(20), 1),
        sample_noise((4, 32, 32), torch.arange(20), 0, "sample"),
    ):
        assert not (other == noise).any(dim=(1, 2, 3)).all()
        assert abs(torch.corrcoef(torch.stack([other.flatten(), noise.flatten()]))[0, 1].item()) < 0.02


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_text_is_dropped_for_the_asked_share_of_samples(share: float) -> None:
    kept = draw_text_kept(torch.arange(5000), 0, FlowConfig(text_dropout_prob=share))
    assert abs((~kept).float().mean().item() - share) <= 4 * math.sqrt(share * (1 - share) / 5000)


def test_dropped_text_is_the_null_text_and_kept_text_is_untouched(draw: Draw) -> None:
    text, null = draw("text", 3, 4, 5), draw("null", 4, 5)
    chosen = apply_text_dropout(text.clone(), torch.tensor([True, False, True]), null)
    assert torch.equal(chosen, torch.stack([text[0], null, text[2]]))
    mask = apply_text_dropout(
        torch.ones(2, 3, dtype=torch.bool), torch.tensor([False, True]), torch.tensor([True, False, False])
    )
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def toy_velocities(calls: list[tuple[str, int]]) -> tuple[VelocityFn, VelocityFn]:
    """Return (conditional, unconditional) velocities that write down who is called and with how many latents."""

    def conditional(latents: Tensor, _time: float) -> Tensor:
        calls.append(("conditional", len(latents)))
        return 2 * latents + 1

    def unconditional(latents: Tensor, time: float) -> Tensor:
        calls.append(("unconditional", len(latents)))
        return latents - time

    return conditional, unconditional


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_is_linear_in_its_scale_from_null_at_0_to_text_at_1(scale: float, draw: Draw) -> None:
    conditional, unconditional = toy_velocities([])
    latents, t = draw("latents", 3, 1, 2, 2), 0.25
    v_text, v_null = conditional(latents, t), unconditional(latents, t)
    torch.testing.assert_close(
        with_cfg(conditional, unconditional, scale)(latents, t), (1 - scale) * v_null + scale * v_text
    )


@pytest.mark.parametrize(
    ("scale", "expected"), [(1.0, [("conditional", 3)]), (2.0, [("conditional", 3), ("unconditional", 3)])]
)
def test_guidance_evaluates_text_and_null_in_batches_of_their_own(
    scale: float, expected: list[tuple[str, int]]
) -> None:
    calls: list[tuple[str, int]] = []
    with_cfg(*toy_velocities(calls), scale)(torch.ones(3, 1, 2, 2), 1.0)
    assert sorted(calls) == expected


@pytest.mark.parametrize(("time", "is_guided"), [(0.2, False), (0.3, True), (0.5, True), (0.7, True), (0.8, False)])
def test_guidance_acts_within_its_interval_alone_and_costs_nothing_outside(time: float, is_guided: bool) -> None:
    calls: list[tuple[str, int]] = []
    conditional, unconditional = toy_velocities(calls)
    latents = torch.ones(3, 1, 2, 2)
    velocity = with_cfg(conditional, unconditional, 3.0, (0.3, 0.7))(latents, time)
    assert [name for name, _ in calls] == (["conditional", "unconditional"] if is_guided else ["conditional"])
    expected = (1 - time) + 3 * (3 - (1 - time)) if is_guided else 3.0
    torch.testing.assert_close(velocity, torch.full_like(latents, expected))


@pytest.mark.parametrize(("time", "is_guided"), [(0.05, False), (0.2, True), (0.35, False), (0.7, False), (0.9, False)])
def test_an_interval_near_data_is_not_one_near_noise(time: float, is_guided: bool) -> None:
    calls: list[tuple[str, int]] = []
    with_cfg(*toy_velocities(calls), 3.0, (0.1, 0.3))(torch.ones(1, 1, 2, 2), time)
    assert len(calls) == (2 if is_guided else 1)


@pytest.fixture
def flow_batch() -> FlowBatch:
    """Return two samples of two values, small enough for mental arithmetic."""
    return FlowBatch(
        latents_BCHW=torch.tensor([[1.0, 2.0], [0.0, 4.0]]).view(2, 1, 1, 2),
        noise_BCHW=torch.tensor([[3.0, 0.0], [2.0, 2.0]]).view(2, 1, 1, 2),
        timesteps_B=torch.tensor([0.5, 0.25]),
        text_embeds_BTD=torch.zeros(2, 3, 4),
        text_mask_BT=torch.ones(2, 3, dtype=torch.bool),
        text_pooled_BD=torch.zeros(2, 4),
    )


def test_flow_loss_is_the_hand_computed_one_and_reaches_the_model(flow_batch: FlowBatch) -> None:
    weight = torch.ones((), requires_grad=True)

    def model(
        noisy: Tensor, t: Tensor, embeds: Tensor, mask: Tensor, pooled: Tensor, kept: Tensor | None
    ) -> Prediction:
        assert torch.equal(t, flow_batch.timesteps_B)
        assert mask is flow_batch.text_mask_BT
        return Prediction(velocity_BCHW=weight * noisy, auxiliary_loss=torch.tensor(0.25))

    losses_B, reconstruction, auxiliary_loss = flow_losses(model, flow_batch)
    assert reconstruction.item() == 0.0
    # x_t = [2, 1], [0.5, 3.5]; v = [2, -2], [2, -2]; errors [0, 3], [-1.5, 5.5]
    assert losses_B.tolist() == [4.5, 16.25]
    assert losses_B.dtype == torch.float32
    assert auxiliary_loss.item() == 0.25
    losses_B.mean().backward()
    # d/dw of mean((w x - v)^2) = mean(2 error x): [0, 6] and [-1.5, 38.5], so 3 and 18.5
    assert weight.grad is not None
    assert weight.grad.item() == (3 + 18.5) / 2


def test_flow_loss_is_fp32_for_a_bf16_model(flow_batch: FlowBatch) -> None:
    losses_B, *_ = flow_losses(
        lambda noisy, *_: Prediction(velocity_BCHW=noisy.bfloat16(), auxiliary_loss=torch.zeros(())), flow_batch
    )
    assert losses_B.dtype == torch.float32
    assert losses_B.tolist() == [4.5, 16.25]


def test_every_part_of_a_batch_moves_to_the_device(flow_batch: FlowBatch) -> None:
    moved = replace(flow_batch, visible_BN=torch.zeros(2, 1, dtype=torch.int64)).to(torch.device("meta"))
    assert all(getattr(moved, name).is_meta for name in TENSORS) and moved.replaced == flow_batch.replaced


def test_a_batch_is_pinned_field_by_field(flow_batch: FlowBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pinning needs a device, which may not be here; that each tensor is asked does not.
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.clone())
    flow_batch = replace(flow_batch, visible_BN=torch.zeros(2, 1, dtype=torch.int64))
    pinned = flow_batch.pin_memory()
    for name in TENSORS:
        before, after = getattr(flow_batch, name), getattr(pinned, name)
        assert torch.equal(before, after) and before.data_ptr() != after.data_ptr()


def test_the_multistep_rule_is_exact_where_the_predicted_data_is_linear_in_time() -> None:
    def path(time: float) -> Tensor:  # whose x_0 is 2 + 3 t everywhere
        return torch.tensor([2.0 + 5.0 * time - (3.0 * time * math.log(time) if time else 0.0)], dtype=torch.float64)

    step = dpmpp_2m(lambda latents, time: (latents - (2.0 + 3.0 * time)) / time)
    step(path(1.0), 1.0, 0.8)  # it has one prediction yet, and takes it for a constant
    for time, next_time in ((0.8, 0.5), (0.5, 0.1), (0.1, 0.0)):
        torch.testing.assert_close(step(path(time), time, next_time), path(next_time), rtol=0, atol=1e-12)


def test_within_its_part_of_the_density_every_time_is_as_likely() -> None:
    config = FlowConfig(timestep_density="uniform", timestep_shift=1.0)
    times = sample_timesteps(torch.arange(4000), seed=0, global_batch_size=4, config=config)
    within = (times * 4 - torch.arange(4000) % 4).double()
    tenths = torch.histc(within, bins=10, min=0.0, max=1.0)
    assert float(tenths.sum()) == 4000
    assert float((tenths - 400).abs().max()) < 4 * (4000 * 0.1 * 0.9) ** 0.5


def test_the_model_is_given_each_part_of_the_batch_in_its_place() -> None:
    batch = FlowBatch(
        latents_BCHW=torch.randn(2, 3, 4, 4),
        noise_BCHW=torch.randn(2, 3, 4, 4),
        timesteps_B=torch.rand(2),
        text_embeds_BTD=torch.randn(2, 5, 6),
        text_mask_BT=torch.rand(2, 5) < 0.5,
        text_pooled_BD=torch.randn(2, 6),
        visible_BN=torch.tensor([[0, 2], [1, 3]]),
    )
    given: list[Tensor | None] = []

    def model(latents: Tensor, *others: Tensor | None) -> Prediction:
        given.extend(others)
        return Prediction(velocity_BCHW=latents, auxiliary_loss=latents.new_zeros(()))

    flow_losses(model, batch, patch_size=2)
    wanted = [batch.timesteps_B, batch.text_embeds_BTD, batch.text_mask_BT, batch.text_pooled_BD, batch.visible_BN]
    assert [there is part for there, part in zip(given, wanted, strict=True)] == [True] * 5
