"""The study of held-out scenes as numbers for JSON, as a chart, and as the few lines that a person reads first.

Suffixes: T times, L layers of experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ecdit_ds.inference.figures import save_figure
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.interpret.heatmap_page import to_json_lists
from ecdit_ds.interpret.heatmaps import plot_by_time
from ecdit_ds.interpret.scene_study import Estimate, SceneCounts, control_estimates, count_scenes, estimates

_CONTROL_MODELS = 5
_CHARTED = {
    "gini": "Gini coefficient",
    "cell_ratio": "experts on objects / on background",
    "cell_rank_correlation": "rank correlation with objects",
}


@dataclass(frozen=True, kw_only=True)
class SceneReport:
    """Held-out scenes under a model, and under models of random weights."""

    num_scenes: int
    times: list[float]
    layers: list[int]
    measured: dict[str, Estimate]
    """Mean and deviation over scenes."""
    control: dict[str, Estimate]
    """Mean and deviation over models."""


def report_scenes(pipeline: TextToImage, num_scenes: int, *, seed: int = 0) -> SceneReport:
    """Route the first `num_scenes` held-out scenes; see `scene_study`.

    Raises:
        ConfigError: no scene, or a model without an expert-choice layer.
    """
    counts: SceneCounts = count_scenes(pipeline, num_scenes, seed=seed)
    return SceneReport(
        num_scenes=num_scenes,
        times=counts.times,
        layers=counts.layers,
        measured=estimates(counts),
        control=control_estimates(pipeline, num_scenes, models=_CONTROL_MODELS, seed=seed),
    )


def scene_numbers(report: SceneReport) -> dict[str, Any]:
    """Return the report ready for JSON: each measure a list by time, then layer; None where it has no value."""
    return {
        "scenes": report.num_scenes,
        "control_models": _CONTROL_MODELS,
        "times": report.times,
        "layers": report.layers,
        **{
            whose: {
                name: {
                    "mean": to_json_lists(one.mean_TL),
                    "standard_deviation": to_json_lists(one.deviation_TL),
                    "number": one.number_TL.tolist(),
                }
                for name, one in found.items()
            }
            for whose, found in (("measured", report.measured), ("control", report.control))
        },
    }


def scene_summary(report: SceneReport) -> list[str]:
    """Return a line a measure, with its mean by layer, its mean by time from noise to data, and the control's."""
    lines = [
        f"{report.num_scenes} held-out scenes; layers {_joined(report.layers)}; from t = {report.times[-1]:.2f} "
        f"to {report.times[0]:.2f}"
    ]
    for name, label in _CHARTED.items():
        mean_TL = report.measured[name].mean_TL
        by_layer, by_time = (_joined(f"{value:.2f}" for value in mean_TL.mean(axis=axis)) for axis in (0, 1))
        by_time = " ".join(reversed(by_time.split()))
        chance = report.control[name].mean_TL.mean()
        lines.append(f"{label}: by layer {by_layer}; by time {by_time}; random weights {chance:.2f}")
    return lines


def save_scene_chart(report: SceneReport, path: Path) -> None:
    """Write each charted measure by time (above) and by layer (below), with bands of two standard errors.

    Grey is the control: its mean over times and layers' spread, and two deviations from one random model to another.
    """
    figure = Figure(figsize=(4 * len(_CHARTED), 7), layout="constrained")
    axes = figure.subplots(2, len(_CHARTED), squeeze=False, sharey="col")
    for column, (name, label) in enumerate(_CHARTED.items()):
        by_time, by_layer = axes[:, column]
        _chart(by_time, by_layer, report, name)
        by_time.set_title(label, fontsize=10)
        by_layer.set_xlabel("layer")
        by_layer.set_xticks(report.layers)
    for axis in axes[:, 0]:
        axis.legend(fontsize=7)
    figure.suptitle(
        f"{report.num_scenes} held-out scenes, two standard errors; grey: {_CONTROL_MODELS} models of random weights, "
        "two deviations",
        fontsize=10,
    )
    save_figure(figure, path)


def _chart(by_time: Axes, by_layer: Axes, report: SceneReport, name: str) -> None:
    measured, chance = report.measured[name], report.control[name]
    error_TL = 2 * measured.error_TL
    plot_by_time(by_time, report.times, measured.mean_TL, report.layers)
    for column, line in enumerate(list(by_time.lines)):
        low, high = (measured.mean_TL[:, column] + sign * error_TL[:, column] for sign in (-1, 1))
        by_time.fill_between(report.times, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    places = {"close to data": 0, "halfway": len(report.times) // 2, "close to noise": len(report.times) - 1}
    colours = colormaps["inferno"](np.linspace(0.8, 0.15, len(places)))
    for (moment, place), colour in zip(places.items(), colours, strict=True):
        by_layer.errorbar(
            report.layers,
            measured.mean_TL[place],
            error_TL[place],
            marker="o",
            capsize=2,
            color=colour,
            label=f"{moment}, t = {report.times[place]:.2f}",
        )
    for axis, xs, over in ((by_time, report.times, 1), (by_layer, report.layers, 0)):
        mean, spread = chance.mean_TL.mean(axis=over), 2 * chance.deviation_TL.mean(axis=over)
        axis.plot(xs, mean, color="0.5", linestyle="--", label="random weights")
        axis.fill_between(xs, mean - spread, mean + spread, color="0.5", alpha=0.15, linewidth=0)


def _joined(values: Any) -> str:
    return " ".join(str(value) for value in values)
