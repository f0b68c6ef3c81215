"""What a trace tells, as numbers and as one page of HTML that needs nothing but a browser.

The page holds its pictures, its numbers and its program, and forbids itself to load anything else. Numbers go in as
JSON whose angle brackets are escaped, so that no prompt can end the script it stands in.

Suffixes: T steps, L layers of experts, E experts, P patches, H, W patches or pixels, C channels.
"""

import base64
import html
import io
import json
import math
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from ecdit_ds.interpret.concentration import (
    gini,
    ink_mask,
    normalised_entropy,
    object_share,
    top_share,
    untaken_share,
)
from ecdit_ds.interpret.routing_trace import RoutingTrace

_PAGE = Path(__file__).parent / "page.html"
_PICTURE_SIDE = 512
_STATE_SIDE = 128
"""Pixels of the longer side in the page; noise hardly compresses, and there is one state a step."""

_MEASURES = {
    "gini": ("Gini coefficient", "0: every patch gets the same. Towards 1: few patches get all."),
    "entropy": ("Entropy, of its largest", "1: every patch gets the same. 0: one patch gets all."),
    "untaken_share": ("Patches that no expert takes", "Share of all patches; they pass the layer unchanged."),
    "top_share": ("Largest share of the experts at one patch", "1: every expert took that patch."),
    "ink_ratio": ("Experts on ink, over experts on background", "Above 1: compute goes where something is drawn."),
    "ink_rank_correlation": ("Rank correlation with ink", "Above 0: patches with something on them get more."),
}
"""Key, name and meaning of what the page can plot, in the order it offers them."""


class _Page(string.Template):
    """A template whose places are `@@name`, since the page's own program says `$`."""

    delimiter = "@@"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What a person asked for."""

    prompt: str
    seed: int
    sampler: str
    num_steps: int
    guidance_scale: float
    recipe: str


def concentration_of(trace: RoutingTrace, patch_pixels: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return each measure of concentration (T, L); of ink, by the finished picture's."""
    counts_TLP = trace.counts_TLHW.reshape(*trace.counts_TLHW.shape[:2], -1)
    ink = object_share(counts_TLP, ink_mask(trace.image_HWC, patch_pixels).reshape(-1))
    return {
        "gini": gini(counts_TLP),
        "entropy": normalised_entropy(counts_TLP),
        "untaken_share": untaken_share(counts_TLP),
        "top_share": top_share(counts_TLP, trace.taken_TLEHW.shape[2]),
        "experts_on_ink": ink.on_object,
        "experts_on_background": ink.on_background,
        "ink_ratio": ink.ratio,
        "ink_rank_correlation": ink.rank_correlation,
    }


def trace_numbers(trace: RoutingTrace, drawing: Drawing, patch_pixels: int) -> dict[str, Any]:
    """Return all of a trace but its pictures, ready for JSON; what has no value is None.

    `counts` and each measure are lists by step, then layer; `taken_patches` goes on by expert and holds the numbers
    of the patches it took, row by row from 0.
    """
    _, _, experts, rows, columns = trace.taken_TLEHW.shape
    flat = trace.taken_TLEHW.reshape(*trace.taken_TLEHW.shape[:3], -1)
    return {
        **vars(drawing),
        "experts": experts,
        "mean_experts_per_patch": trace.expected,
        "rows": rows,
        "columns": columns,
        "steps": [step + 1 for step in trace.steps],
        "times": trace.times,
        "layers": trace.layers,
        "ink_patches": np.flatnonzero(ink_mask(trace.image_HWC, patch_pixels)).tolist(),
        "concentration": {
            name: to_json_lists(values) for name, values in concentration_of(trace, patch_pixels).items()
        },
        "counts": trace.counts_TLHW.tolist(),
        "taken_patches": [
            [[np.flatnonzero(taken_P).tolist() for taken_P in taken_EP] for taken_EP in taken_LEP] for taken_LEP in flat
        ],
    }


def trace_page(trace: RoutingTrace, drawing: Drawing, patch_pixels: int) -> str:
    """Return one self-contained page of HTML: sliders over steps and layers, and what the routers did there."""
    _, _, experts, rows, columns = trace.taken_TLEHW.shape
    top = int(trace.counts_TLHW.max())
    measures = concentration_of(trace, patch_pixels)
    data = {
        "experts": experts,
        "rows": rows,
        "columns": columns,
        "expected": trace.expected,
        "top": top,
        "steps": [step + 1 for step in trace.steps],
        "times": trace.times,
        "layers": trace.layers,
        "colours": [to_hex(colormaps["inferno"](count / max(top, 1))) for count in range(top + 1)],
        # Bit by bit: steps, layers, experts, patches.
        "taken": base64.b64encode(np.packbits(trace.taken_TLEHW).tobytes()).decode("ascii"),
        "picture": _data_url(trace.image_HWC, _PICTURE_SIDE),
        "states": [_data_url(state_HWC, _STATE_SIDE) for state_HWC in trace.states_THWC],
        "measures": [
            {"key": key, "name": name, "note": note, "values": to_json_lists(np.round(measures[key], 4))}
            for key, (name, note) in _MEASURES.items()
        ],
    }
    facts = (
        f"{drawing.num_steps} steps of {drawing.sampler}, guidance {drawing.guidance_scale:g}, seed {drawing.seed} · "
        f"{drawing.recipe}: {experts} experts in each of {len(trace.layers)} layers, {rows} x {columns} patches"
    )
    return _Page(_PAGE.read_text(encoding="utf-8")).substitute(
        prompt=html.escape(drawing.prompt), facts=html.escape(facts), data=json_in_script(data)
    )


def to_json_lists(values: npt.NDArray[np.float64]) -> Any:
    """Return nested lists of numbers, None where one is not finite, since JSON knows no NaN."""
    if values.ndim == 0:
        return float(values) if math.isfinite(values) else None
    return [to_json_lists(inner) for inner in values]


def json_in_script(data: dict[str, Any]) -> str:
    """Return JSON that a script element can hold: no angle bracket, so no end of the element and no comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data_url(image_HWC: npt.NDArray[np.uint8], side: int) -> str:
    image, buffer = Image.fromarray(image_HWC), io.BytesIO()
    image.thumbnail((side, side), Image.Resampling.BOX)  # never enlarges
    image.save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
