"""CLIP: pictures and texts as unit vectors whose product says how well they fit (Radford et al. 2103.00020).

Suffixes: B pictures or texts, D the common width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel

from ecdit_ds.errors import EvaluationError
from ecdit_ds.evaluation.pretrained import (
    in_batches,
    load_caption_tokenizer,
    load_image_processor,
    load_model,
    read_config,
)

_PURPOSE = "CLIP model"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A frozen CLIP with its image processor and its tokenizer."""

    model: Any
    processor: Any
    tokenizer: Any
    max_tokens: int
    """Longer texts are cut, their end mark kept."""
    device: torch.device

    def embed_pictures(self, pictures: Iterable[Image.Image], *, batch_size: int) -> Iterator[Tensor]:
        """Yield unit vectors_BD (fp32, on the CPU) of `batch_size` pictures at a time, in order.

        Raises:
            EvaluationError: they are not finite; so does `embed_texts`.
        """
        for rows in in_batches(
            pictures,
            self.processor,
            lambda inputs, _shown: self.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output,
            batch_size=batch_size,
            device=self.device,
        ):
            yield _unit(torch.stack(rows), "pictures")

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors_BD (fp32, on the CPU)."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        found = self.model.get_text_features(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        )
        return _unit(found.pooler_output, "texts")


def _unit(vectors_BD: Tensor, of: str) -> Tensor:
    """Return unit vectors; NaN would be a colour, the first, to whoever asks for the closest."""
    if not bool(vectors_BD.isfinite().all()):
        raise EvaluationError(f"{_PURPOSE}: vectors of {of} are not finite; it overflows or is damaged")
    return normalize(vectors_BD.cpu(), dim=-1)


def load_clip(name: str, *, device: torch.device) -> Clip:
    """Load a CLIP of `transformers` from a folder, or by the hub name of a model in the local cache.

    Raises:
        EvaluationError: no name, no such model, not a CLIP, or a part of it is missing.
    """
    config = read_config(name, purpose=_PURPOSE)
    if config.model_type != "clip":
        raise EvaluationError(f"{_PURPOSE} {name}: is of type {config.model_type}, not clip")
    processor = load_image_processor(name, purpose=_PURPOSE)
    tokenizer = load_caption_tokenizer(name, purpose=_PURPOSE)
    model, _ = load_model(AutoModel, name, purpose=_PURPOSE, device=device)
    return Clip(
        model=model,
        processor=processor,
        tokenizer=tokenizer,
        max_tokens=config.text_config.max_position_embeddings,
        device=device,
    )
