"""Where a model spends its compute, as pictures: maps of experts per patch, and curves of how even they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ecdit_ds.config.recipe import SampleConfig
from ecdit_ds.inference.figures import save_figure
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.interpret.concentration import gini, normalised_entropy
from ecdit_ds.interpret.routing_trace import RoutingTrace, trace_routing

_MOMENTS = (("early", 0.1), ("middle", 0.5), ("late", 0.9))
_TITLE_CHARACTERS = 90


@dataclass(frozen=True, kw_only=True)
class ComputeMaps:
    """Experts per patch of one drawn picture."""

    image_HWC: np.ndarray
    layers: list[str]
    moments: list[tuple[str, float]]
    """Name and time t of each moment."""
    counts: np.ndarray
    """(moments, layers, rows, columns): how many experts took each patch."""
    expected: float
    """Mean experts per patch."""


def compute_maps(pipeline: TextToImage, prompt: str, *, seed: int, sample: SampleConfig) -> ComputeMaps:
    """Draw `prompt` once and count experts per patch early, in the middle and late.

    The counts are those of the conditional velocity at the latents which the sampler passed through.

    Raises:
        ConfigError: the model has no expert-choice layer.
    """
    steps = list(_moments(sample.num_steps))
    return maps_of(trace_routing(pipeline, prompt, seed=seed, sample=sample, steps=steps), sample.num_steps)


def maps_of(trace: RoutingTrace, num_steps: int) -> ComputeMaps:
    """Return the early, middle and late maps of a drawing of `num_steps`, which the trace must hold."""
    moments = _moments(num_steps)
    places = [trace.steps.index(step) for step in moments]
    return ComputeMaps(
        image_HWC=trace.image_HWC,
        layers=[str(layer) for layer in trace.layers],
        moments=[(name, trace.times[place]) for place, name in zip(places, moments.values(), strict=True)],
        counts=trace.counts_TLHW[places],
        expected=trace.expected,
    )


def _moments(num_steps: int) -> dict[int, str]:
    """Return `{step: name}`; fewer than three where there are few steps."""
    return {round(share * (num_steps - 1)): name for name, share in _MOMENTS}


def save_compute_maps(maps: ComputeMaps, prompt: str, path: Path) -> None:
    """Write one picture: the drawing, and beside it a map for each MoE layer (across) and moment (down)."""
    moments, layers = maps.counts.shape[:2]
    figure = Figure(figsize=(2.2 * (layers + 1) + 0.8, 2.3 * moments + 0.5), layout="constrained")
    axes = figure.subplots(moments, layers + 1, squeeze=False)
    top = maps.counts.max()
    for row, (name, time) in enumerate(maps.moments):
        axes[row, 0].imshow(maps.image_HWC, interpolation="nearest")
        axes[row, 0].set_ylabel(f"{name}, t = {time:.2f}")
        for column in range(layers):
            shown = _show_over(axes[row, column + 1], maps.image_HWC, maps.counts[row, column], top)
            if row == 0:
                axes[row, column + 1].set_title(f"layer {maps.layers[column]}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(shown, ax=axes[:, 1:], label=f"experts per patch (mean {maps.expected:g})")
    figure.suptitle(_title(prompt), fontsize=10, parse_math=False)
    save_figure(figure, path)


def save_expert_maps(trace: RoutingTrace, moment: int, prompt: str, path: Path) -> None:
    """Write what each expert (down) took in each layer (across) at place `moment` of the trace."""
    layers, experts = trace.taken_TLEHW.shape[1:3]
    figure = Figure(figsize=(1.3 * layers + 0.6, 1.3 * experts + 0.9), layout="constrained")
    axes = figure.subplots(experts, layers, squeeze=False)
    for expert in range(experts):
        axes[expert, 0].set_ylabel(f"expert {expert}", fontsize=8)
        for column, layer in enumerate(trace.layers):
            axis = axes[expert, column]
            _show_over(axis, trace.image_HWC, trace.taken_TLEHW[moment, column, expert], 1.4)  # so that 1 is orange
            axis.set_xticks([])
            axis.set_yticks([])
            if expert == 0:
                axis.set_title(f"layer {layer}", fontsize=8)
    figure.suptitle(f"{_title(prompt)}\nt = {trace.times[moment]:.2f}", fontsize=8, parse_math=False)
    save_figure(figure, path)


def save_concentration(trace: RoutingTrace, num_steps: int, prompt: str, path: Path) -> None:
    """Write Gini's coefficient and the entropy of experts per patch, by time (across) and by layer."""
    counts_TLP = flat_patches(trace.counts_TLHW)
    places = {name: trace.steps.index(step) for step, name in _moments(num_steps).items()}
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for row, (label, values_TL) in enumerate(
        [("Gini coefficient", gini(counts_TLP)), ("entropy / log of patches", normalised_entropy(counts_TLP))]
    ):
        by_time, by_layer = axes[row]
        plot_by_time(by_time, trace.times, values_TL, trace.layers)
        for name, place in places.items():
            by_layer.plot(trace.layers, values_TL[place], marker="o", label=f"{name}, t = {trace.times[place]:.2f}")
        by_layer.plot(trace.layers, values_TL.mean(axis=0), "k--", label="mean of all steps")
        by_layer.set_xticks(trace.layers)
        by_layer.set_xlabel("layer")
        by_time.set_ylabel(label)
        for axis in (by_time, by_layer):
            axis.legend(fontsize=7)
    figure.suptitle(_title(prompt), fontsize=10, parse_math=False)
    save_figure(figure, path)


def plot_by_time(axis: Axes, times: Sequence[float], values_TL: npt.NDArray[np.float64], layers: Sequence[int]) -> None:
    """Draw a line a layer, darker for earlier layers, with time as it passes: noise left, data right."""
    colours = colormaps["inferno"](np.linspace(0.15, 0.8, len(layers)))
    for column, layer in enumerate(layers):
        axis.plot(times, values_TL[:, column], marker=".", color=colours[column], label=f"layer {layer}")
    axis.set_xlim(1.0, 0.0)
    axis.set_xlabel("t (1 is noise, 0 is data)")


def flat_patches(maps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return (..., patches) of (..., rows, columns)."""
    return maps.reshape(*maps.shape[:-2], -1)


def _show_over(axis: Axes, image_HWC: npt.NDArray[np.uint8], map_HW: np.ndarray, top: float) -> AxesImage:
    """Lay a map over a picture in one axis."""
    height, width = image_HWC.shape[:2]
    axis.imshow(image_HWC, interpolation="nearest", extent=(0, width, height, 0))
    return axis.imshow(
        map_HW, cmap="inferno", vmin=0, vmax=top, alpha=0.8, extent=(0, width, height, 0), interpolation="nearest"
    )


def _title(prompt: str) -> str:
    short = prompt if len(prompt) <= _TITLE_CHARACTERS else prompt[: _TITLE_CHARACTERS - 1] + "…"
    return f'"{short}"'
