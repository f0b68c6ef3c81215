"""What a set says of its encoders, and how they are opened again by it: to decode pictures and to read prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ecdit_ds.data.encoders import ImageEncoder, PixelCodec, TextEncoder, WordEncoder
from ecdit_ds.data.pretrained import (
    PretrainedImageEncoder,
    PretrainedTextEncoder,
    load_image_encoder,
    load_text_encoder,
)
from ecdit_ds.errors import DataError


def image_facts(encoder: ImageEncoder, name: str | None = None) -> dict[str, Any]:
    """Return what `open_image_encoder` opens an encoder by.

    Args:
        name: folder or hub name of an AutoencoderKL; embedded encoders have none.
    """
    if name is not None:
        assert isinstance(encoder, PretrainedImageEncoder)
        return {
            "identity": encoder.identity, "kind": "AutoencoderKL", "name": name, "precision": encoder.precision
        }  # fmt: skip
    if type(encoder) is PixelCodec:
        return {"identity": encoder.identity, "kind": "pixels", **asdict(encoder)}
    return {"identity": encoder.identity}


def text_facts(encoder: TextEncoder, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `open_text_encoder` opens an encoder by; `names` as `load_text_encoder` takes them."""
    if names:
        assert isinstance(encoder, PretrainedTextEncoder)
        return {
            "identity": encoder.identity, "kind": "transformers", "names": list(names),
            "max_tokens": encoder.max_tokens, "precision": encoder.precision,
        }  # fmt: skip
    if type(encoder) is WordEncoder:
        return {"identity": encoder.identity, "kind": "words", **asdict(encoder)}
    return {"identity": encoder.identity}


def open_image_encoder(
    facts: Mapping[str, Any], *, name: str | None = None, device: torch.device | None = None
) -> ImageEncoder:
    """Return the image encoder that a set was encoded with.

    Args:
        facts: `SetIndex.image_encoder`.
        name: where the encoder is now, if not where it was.

    Raises:
        DataError: it is not there, or another one is.
    """
    encoder: ImageEncoder
    try:
        if facts.get("kind") == "pixels":
            encoder = PixelCodec(shift_factor=facts["shift_factor"], scaling_factor=facts["scaling_factor"])
        elif facts.get("kind") == "AutoencoderKL":
            encoder = load_image_encoder(str(name or facts["name"]), device=device, precision=facts["precision"])
        else:
            raise DataError(f"image encoder {facts.get('identity')}: the set does not say how it is opened")
    except KeyError as error:
        raise DataError(f"image encoder {facts.get('identity')}: the set does not say its {error}") from None
    return _same(encoder, facts, "image encoder")


def open_text_encoder(
    facts: Mapping[str, Any], *, names: Sequence[str] = (), device: torch.device | None = None
) -> TextEncoder:
    """Return the text encoder that a set was encoded with; as `open_image_encoder`."""
    encoder: TextEncoder
    try:
        if facts.get("kind") == "words":
            encoder = WordEncoder(embed_dim=facts["embed_dim"], max_tokens=facts["max_tokens"])
        elif facts.get("kind") == "transformers":
            encoder = load_text_encoder(
                names or facts["names"], max_tokens=facts["max_tokens"], device=device, precision=facts["precision"]
            )
        else:
            raise DataError(f"text encoder {facts.get('identity')}: the set does not say how it is opened")
    except KeyError as error:
        raise DataError(f"text encoder {facts.get('identity')}: the set does not say its {error}") from None
    return _same(encoder, facts, "text encoder")


def count_frozen(encoder: ImageEncoder | TextEncoder) -> tuple[int, int]:
    """Return the number of an encoder's parameters, and their bytes; the embedded ones have none."""
    models = []
    if isinstance(encoder, PretrainedImageEncoder):
        models = [encoder.model]
    elif isinstance(encoder, PretrainedTextEncoder):
        models = [tower.model for tower in encoder.towers]
    parameters = [parameter for model in models for parameter in model.parameters()]
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def _same(encoder: Any, facts: Mapping[str, Any], what: str) -> Any:
    if encoder.identity != facts["identity"]:
        raise DataError(
            f"{what}: the set was encoded with {facts['identity']}, but this is {encoder.identity}; name the former's "
            "folder"
        )
    return encoder
