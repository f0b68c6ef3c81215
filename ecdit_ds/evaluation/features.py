"""Features of pictures by a vision model of `transformers`, for distances between sets of pictures.

What the features are, in this order: `image_embeds` of a model with `get_image_features` (CLIP, SigLIP), else
`pooler_output` where the model has one whose weights are in its files, else the mean of `last_hidden_state` over
tokens (or over the pixels of a feature map).

Suffixes: B pictures, D features.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel

from ecdit_ds.errors import EvaluationError
from ecdit_ds.evaluation.pretrained import in_batches, load_image_processor, load_model, model_fingerprint, read_config

_PURPOSE = "features model"


@dataclass(frozen=True, kw_only=True)
class FeatureModel:
    """A frozen vision model and which of its outputs are the features."""

    model: Any
    processor: Any
    output: str
    """image_embeds, pooler_output or last_hidden_state."""
    dim: int
    """D."""
    identity: str
    """Name of everything that fixes the features; statistics of another identity cannot be compared."""
    device: torch.device

    def encode(self, pictures: Iterable[Image.Image], *, batch_size: int) -> Iterator[Tensor]:
        """Yield features_BD (fp32, on the device) of `batch_size` pictures at a time, in order."""
        for rows in in_batches(
            pictures,
            self.processor,
            lambda inputs, _shown: features_of(self.model, inputs["pixel_values"], self.output),
            batch_size=batch_size,
            device=self.device,
        ):
            yield torch.stack(rows)


def load_feature_model(name: str, *, device: torch.device) -> FeatureModel:
    """Load a features model from a folder, or by the hub name of a model in the local cache.

    Raises:
        EvaluationError: no name, no such model, no image processor, weights missing, or an output without features.
    """
    read_config(name, purpose=_PURPOSE)
    processor = load_image_processor(name, purpose=_PURPOSE)
    model, missing = load_model(AutoModel, name, purpose=_PURPOSE, device=device, may_lack=_is_pooler)
    grey = Image.new("RGB", (32, 32), "#999")
    inputs = processor(images=grey, return_tensors="pt")["pixel_values"].to(device)
    with torch.no_grad():
        output = _feature_output(model, inputs, has_pooler=not missing)
        if output is None:
            raise EvaluationError(f"{_PURPOSE} {name}: {type(model).__name__} has no output that describes a picture")
        dim = features_of(model, inputs, output).shape[-1]
    return FeatureModel(
        model=model,
        processor=processor,
        output=output,
        dim=dim,
        identity=f"{model_fingerprint(model, processor, without=missing)}-{output}",
        device=device,
    )


def features_of(model: Any, pixels_B3HW: Tensor, output: str) -> Tensor:
    """Return features_BD, the named output of the model; see the head of this file."""
    if output == "image_embeds":
        return model.get_image_features(pixel_values=pixels_B3HW).pooler_output
    found = model(pixel_values=pixels_B3HW)
    if output == "pooler_output":
        return found.pooler_output.flatten(1)
    states = found.last_hidden_state
    return states.mean(dim=1) if states.dim() == 3 else states.flatten(2).mean(dim=2)


def _is_pooler(parameter: str) -> bool:
    return "pooler" in parameter.split(".")


def _feature_output(model: Any, pixels_B3HW: Tensor, *, has_pooler: bool) -> str | None:
    if hasattr(model, "get_image_features"):
        return "image_embeds"
    try:
        found = model(pixel_values=pixels_B3HW)
    except (TypeError, ValueError):  # wants more than pixels
        return None
    if has_pooler and getattr(found, "pooler_output", None) is not None:
        return "pooler_output"
    return "last_hidden_state" if getattr(found, "last_hidden_state", None) is not None else None
