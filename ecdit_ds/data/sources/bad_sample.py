"""Why a sample is left out: one cause each, with the sample's name, so that a report can count and name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

BadSampleReason = Literal[
    "empty image file",
    "web page instead of an image",
    "not an image",
    "truncated image",
    "damaged image",
    "too many pixels",
    "too many bytes",
    "no image",
    "no caption",
    "empty caption",
    "caption is not text",
    "caption too long",
    "duplicate key",
    "outside the source",
    "no regular file",
    "damaged row",
    "damaged archive",
    "archive ends early",
    "unreadable archive",
    "not finite",
    "text without a token",
    "several pictures",
    "several captions",
    "name given twice",
    "system file",
    "too small",
]
AMBIGUOUS: tuple[BadSampleReason, ...] = ("several pictures", "several captions")
"""Reasons for which the user must say which one is meant."""
WAYS_OUT: Mapping[BadSampleReason, str] = MappingProxyType(
    {
        "several pictures": "in tars, choose by --image-column, such as --image-column png",
        "several captions": "in tars, choose by --caption-column, such as --caption-column txt",
        "duplicate key": "in tars, members of a sample must stand together",
    }
)
"""What to do about a cause, where that is not plain from its name."""
UNCOUNTABLE: tuple[BadSampleReason, ...] = ("archive ends early", "unreadable archive")
"""Reasons for which the number of lost samples is unknown."""


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """One sample that is not used."""

    cause: BadSampleReason
    name: str
    """Where it is in the source."""
    samples: int = 1
    """How many are lost by it, where that is known to be more than one."""


@dataclass(frozen=True, kw_only=True)
class SystemFile:
    """A file among the samples that is part of none: left by a system, hidden, or of another kind. It is counted."""

    kind: str
    """The pattern of its name, or its suffix."""


@dataclass(frozen=True, kw_only=True)
class ReplacedSample:
    """A sample of the training stream that another one stands in for."""

    position: int
    """In the stream."""
    set: str
    """Where it was opened."""
    key: str
    """Its name in the set."""
    cause: BadSampleReason
