"""Samples that cannot be trained on are replaced by others, the same ones on any layout: a function of the position.

What a set says is bad is, and so are numbers that are not finite and texts without a token. Attempt k at a position
reads `Mixture.ids_at(position, k)`; noise, time and kept tokens belong to the position, and stay.

What frozen encoders make beside training is known too late for that: there, another sample of the micro-batch comes
twice, so micro-batches of another size may have another one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.data.sources.bad_sample import BadSample, BadSampleReason, ReplacedSample
from ecdit_ds.errors import DataError

MAX_REPLACEMENTS = 20
"""In a row at one position: where one sample in a hundred is bad, it never comes to four."""
_EXPONENTS = {torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000), torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80)}
"""dtype -> integer type of its size, mask of all bits but the sign, and infinity; anything above is not a number."""


def read_valid(mixture: Mixture, positions: npt.NDArray[np.int64]) -> Samples:
    """Return samples to train on at some positions of one step; `replaced` says what others stand in for.

    Raises:
        DataError: `MAX_REPLACEMENTS` in a row are bad at a position; names the last.
    """
    samples = mixture.read(positions)
    bad, replaced = _bad_of(samples), dict[int, tuple[ReplacedSample, ...]]()
    for attempt in range(1 + MAX_REPLACEMENTS):
        if not bad:
            break
        places = np.array(sorted(bad), dtype=np.int64)
        told = _told(mixture, positions[places], attempt, [bad[place] for place in places.tolist()])
        for place, what in zip(places.tolist(), told, strict=True):
            replaced[place] = (*replaced.get(place, ()), what)
        if attempt == MAX_REPLACEMENTS:
            last = told[0]
            mend = "look through the set with tools/encode_data.py inspect, and encode it anew"
            if samples.lacks_latents:  # raw files
                mend = "look whether its files are still there, and mend or leave out those that are bad"
            raise DataError(
                f"{last.set}: {MAX_REPLACEMENTS} replacements in a row are bad at position {last.position} of the "
                f"stream, the last is {last.key} ({last.cause}); {mend}"
            )
        others = mixture.read(positions[places], attempt + 1)
        samples = _with(samples, places, others)
        bad = {int(places[i]): what for i, what in _bad_of(others).items()}
    return dataclasses.replace(samples, bad={}, replaced=replaced)


def replace_nonfinite(mixture: Mixture, samples: Samples) -> Samples:
    """Return what encoders made of a micro-batch, with the next good sample, cyclically, at each bad place.

    Raises:
        DataError: no sample of the micro-batch is good; names the first.
    """
    bad = _bad_of(samples)
    if not bad:
        return samples
    positions, replaced = samples.stream_index_B.numpy(), dict(samples.replaced)
    places = np.array(sorted(bad), dtype=np.int64)
    for place in places.tolist():
        tried = replaced.get(place, ())
        told = _told(mixture, positions[place : place + 1], len(tried), [bad[place]])
        replaced[place] = (*tried, *told)
    good = np.setdiff1d(np.arange(len(positions)), places)
    if not len(good):
        first = replaced[0][-1]
        raise DataError(
            f"{first.set}: the encoders beside training make nothing to train on of any of {len(positions)} samples "
            f"from position {first.position} of the stream on, the first is {first.key} ({first.cause}); let them "
            "compute in fp32, or look at these samples"
        )
    chosen = np.arange(len(positions))
    chosen[places] = good[np.searchsorted(good, places) % len(good)]
    changed: dict[str, Any] = {"captions": tuple(samples.captions[i] for i in chosen.tolist()), "replaced": replaced}
    for name in ("latents_BCHW", "text_embeds_BTD", "text_mask_BT", "text_pooled_BD"):
        changed[name] = getattr(samples, name)[torch.from_numpy(chosen)]
    return dataclasses.replace(samples, **changed)


def _bad_of(samples: Samples) -> dict[int, BadSample | BadSampleReason]:
    """Return the places of what cannot be trained on; only a set knows the names of what it found itself."""
    bad: dict[int, BadSample | BadSampleReason] = {}
    for tensor in (samples.latents_BCHW, samples.text_embeds_BTD, samples.text_pooled_BD):
        bad |= dict.fromkeys(_not_finite(tensor), "not finite")
    if samples.text_mask_BT.numel():  # else texts are still to be encoded
        bad |= dict.fromkeys(np.flatnonzero(~samples.text_mask_BT.any(dim=1).numpy()).tolist(), "text without a token")
    return bad | dict(samples.bad)


def _not_finite(tensor: Tensor) -> list[int]:
    """Return which rows hold a number that is not finite; exact, and a fraction of the time of `isfinite`."""
    if not tensor.numel():
        return []
    integers, magnitude, infinity = _EXPONENTS[tensor.dtype]
    bits = tensor.flatten(1).view(integers).numpy()
    found: list[int] = np.flatnonzero((bits & bits.dtype.type(magnitude)).max(axis=1) >= infinity).tolist()
    return found


def _told(
    mixture: Mixture, positions: npt.NDArray[np.int64], attempt: int, bad: Sequence[BadSample | BadSampleReason]
) -> list[ReplacedSample]:
    """Return where the samples of an attempt are, by name, and why they are not used."""
    places = mixture.ids_at(positions, attempt)
    told = []
    for position, number, sample, what in zip(
        positions.tolist(), places.sets_B.tolist(), places.samples_B.tolist(), bad, strict=True
    ):
        of_set = mixture.sets[number]
        cause, key = (what.cause, what.name) if isinstance(what, BadSample) else (what, of_set.name_of(sample))
        # A file's name may hold bytes that are no text, which nothing could print.
        key = key.encode("utf-8", "backslashreplace").decode()
        told.append(ReplacedSample(position=position, set=of_set.name, key=key, cause=cause))
    return told


def _with(samples: Samples, places: npt.NDArray[np.int64], others: Samples) -> Samples:
    """Return the samples with others at some places; tensors are written in place."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(Samples):
        ours, theirs = getattr(samples, field.name), getattr(others, field.name)
        if isinstance(ours, Tensor):
            ours[torch.from_numpy(places)] = theirs.to(ours.dtype)
        elif isinstance(ours, tuple):
            own = list(ours)
            for i, place in enumerate(places.tolist()):
                own[place] = theirs[i]
            changed[field.name] = tuple(own)
    return dataclasses.replace(samples, **changed)
