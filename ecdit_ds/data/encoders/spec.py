"""What sets and checkpoints say of encoders, and how they are opened again by it: to decode pictures, to read prompts.

Suffixes: T text tokens, D text_embed_dim, N tokens that are not padding.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecdit_ds.data.encoders.base import Factor, HashedWordEncoder, ImageEncoder, PixelVAE, TextEmbeddings, TextEncoder
from ecdit_ds.data.encoders.pretrained import (
    PretrainedImageEncoder,
    PretrainedTextEncoder,
    load_image_encoder,
    load_text_encoder,
)
from ecdit_ds.errors import DataError

MAX_TOKENS, MAX_WIDTH = 2**16, 2**17
"""Largest number of tokens and width of a text: ten times those of any encoder in use."""


def image_encoder_spec(encoder: ImageEncoder, name: str | None = None) -> dict[str, Any]:
    """Return what `open_image_encoder` opens an encoder by.

    Args:
        name: folder or hub name of an AutoencoderKL; embedded encoders have none.
    """
    if name is not None:
        assert isinstance(encoder, PretrainedImageEncoder)
        return {"identity": encoder.identity, "kind": "AutoencoderKL", "name": name, "precision": encoder.precision} | (
            {"revision": encoder.revision} if encoder.revision else {}
        )
    if type(encoder) is PixelVAE:
        return {"identity": encoder.identity, "kind": "pixels", **asdict(encoder)}
    return {"identity": encoder.identity}


def text_encoder_spec(encoder: TextEncoder, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `open_text_encoder` opens an encoder by; `names` as `load_text_encoder` takes them."""
    if names:
        assert isinstance(encoder, PretrainedTextEncoder)
        return {
            "identity": encoder.identity,
            "kind": "transformers",
            "names": list(names),
            "max_tokens": encoder.max_tokens,
            "precision": encoder.precision,
        } | ({"revisions": encoder.revisions} if any(encoder.revisions) else {})
    if type(encoder) is HashedWordEncoder:
        return {"identity": encoder.identity, "kind": "words", **asdict(encoder)}
    return {"identity": encoder.identity}


def open_image_encoder(
    facts: Mapping[str, Any], *, name: str | None = None, device: torch.device | None = None
) -> ImageEncoder:
    """Return the image encoder that a set was encoded with.

    Args:
        facts: as `image_encoder_spec`, such as `LatentIndex.image_encoder`.
        name: where the encoder is now, if not where it was.

    Raises:
        DataError: it is not there, or another one is, or it is nowhere and has a name nevertheless.
    """
    encoder: ImageEncoder
    try:
        if facts.get("kind") == "pixels":
            _refuse_name(name, "--vae", facts)
            encoder = PixelVAE(
                shift_factor=_factor(facts["shift_factor"]), scaling_factor=_factor(facts["scaling_factor"])
            )
        elif facts.get("kind") == "AutoencoderKL":
            encoder = load_image_encoder(
                str(name or facts["name"]),
                device=device,
                precision=facts["precision"],
                may_fetch=bool(name),
                revision=_pinned(facts.get("revision")) if name in (None, facts.get("name")) else None,
            )
        else:
            raise DataError(f"image encoder {facts.get('identity')}: the set does not say how it is opened")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"image encoder {facts.get('identity')}: the set does not say its {error}") from None
    return _same(encoder, facts, "image encoder")


def open_text_encoder(
    facts: Mapping[str, Any], *, names: Sequence[str] = (), device: torch.device | None = None
) -> TextEncoder:
    """Return the text encoder that a set was encoded with; as `open_image_encoder`."""
    encoder: TextEncoder
    try:
        if facts.get("kind") == "words":
            _refuse_name(names, "--text", facts)
            encoder = HashedWordEncoder(
                embed_dim=_size(facts, "embed_dim", MAX_WIDTH), max_tokens=_size(facts, "max_tokens", MAX_TOKENS)
            )
        elif facts.get("kind") == "transformers":
            encoder = load_text_encoder(
                names or facts["names"],
                max_tokens=facts["max_tokens"],
                device=device,
                precision=facts["precision"],
                may_fetch=bool(names),
                revisions=_all_pinned(facts) if not names or list(names) == facts.get("names") else (),
            )
        else:
            raise DataError(f"text encoder {facts.get('identity')}: the set does not say how it is opened")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"text encoder {facts.get('identity')}: the set does not say its {error}") from None
    return _same(encoder, facts, "text encoder")


def _size(facts: Mapping[str, Any], name: str, most: int) -> int:
    """Return a size that a file says; raise ValueError unless it can be one."""
    if type(facts[name]) is not int or not 0 < facts[name] <= most:
        raise ValueError(f"{name}, which is {facts[name]!r} and not 1 to {most:,}")
    return int(facts[name])


def count_encoder_parameters(encoder: ImageEncoder | TextEncoder) -> tuple[int, int]:
    """Return the number of an encoder's parameters, and their bytes; the embedded ones have none."""
    models = []
    if isinstance(encoder, PretrainedImageEncoder):
        models = [encoder.model]
    elif isinstance(encoder, PretrainedTextEncoder):
        models = [tower.model for tower in encoder.towers]
    parameters = [parameter for model in models for parameter in model.parameters()]
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def null_text_facts(null_text: TextEmbeddings) -> dict[str, Any]:
    """Return the text of no text, B = 1, as JSON that `null_text_of` reads: what is not padding, exactly."""
    mask_T = null_text.mask_BT[0].cpu()
    return {
        "tokens": len(mask_T),
        "places": mask_T.nonzero().flatten().tolist(),
        "embeds": _as_text(null_text.embeds_BTD[0].cpu()[mask_T]),
        "pooled": _as_text(null_text.pooled_BD[0]),
    }


def null_text_of(facts: Mapping[str, Any]) -> TextEmbeddings:
    """Return the text of no text, B = 1, fp32, that `null_text_facts` describes.

    Raises:
        DataError: it is damaged.
    """
    try:
        if type(facts["tokens"]) is not int or not 0 < facts["tokens"] <= MAX_TOKENS:
            raise ValueError(f"of {facts['tokens']!r} tokens")
        places, pooled_D = [int(place) for place in facts["places"]], _as_numbers(facts["pooled"])
        embeds_TD, mask_T = torch.zeros(facts["tokens"], len(pooled_D)), torch.zeros(facts["tokens"], dtype=torch.bool)
        embeds_TD[places] = _as_numbers(facts["embeds"]).view(len(places), len(pooled_D))
        mask_T[places] = True
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(f"the text of no text is damaged ({' '.join(str(error).split())})") from None
    return TextEmbeddings(embeds_BTD=embeds_TD[None], mask_BT=mask_T[None], pooled_BD=pooled_D[None])


def _as_text(numbers: Tensor) -> str:
    return base64.b64encode(numbers.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes()).decode("ascii")


def _as_numbers(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32))


def _factor(fact: Any) -> Factor:
    return tuple(map(float, fact)) if isinstance(fact, list | tuple) else float(fact)


def _refuse_name(name: str | Sequence[str] | None, flag: str, facts: Mapping[str, Any]) -> None:
    if name:
        raise DataError(f"{flag}: has no effect, since {facts.get('identity')} needs no folder; leave it out")


def _pinned(revision: Any) -> str | None:
    return revision if isinstance(revision, str) else None


def _all_pinned(facts: Mapping[str, Any]) -> list[str | None]:
    pinned, names = facts.get("revisions"), facts["names"]
    return list(map(_pinned, pinned)) if isinstance(pinned, list) and len(pinned) == len(names) else []


def _same(encoder: Any, facts: Mapping[str, Any], what: str) -> Any:
    if encoder.identity != facts["identity"]:
        former = facts.get("revision") or facts.get("revisions")
        now = getattr(encoder, "revision", None) or getattr(encoder, "revisions", None)
        told = f" (of the hub's revision {former}; here is {now})" if former and former != now else ""
        raise DataError(
            f"{what}: the set was encoded with {facts['identity']}, but this is {encoder.identity}{told}; name the "
            "former's folder"
        )
    return encoder
