"""Checkpoints made of others as they are read: experts out of a dense network, an average out of the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.sources import CheckpointSource
from ecdit_ds.config.model_config import EXPERT_FIELDS
from ecdit_ds.config.recipe import Recipe, with_defaults
from ecdit_ds.errors import CheckpointError

_WEIGHT, _EMA = "weight", "ema"
_DENSE_OF = {"ffn.experts.w1": "ffn.up.weight", "ffn.experts.w2": "ffn.down.weight"}


class WithEmaFromWeights:
    """A checkpoint without an average, which then begins at the weights."""

    nonfinite: Mapping[str, int] | None = None

    def __init__(self, source: CheckpointSource) -> None:
        if any(name.startswith(f"{_EMA}/") for name in source.tensors):
            raise CheckpointError("--ema-from-weights: the checkpoint holds an ema already; leave the flag away")
        self._source, self.step, self.meta = source, source.step, source.meta
        weights = {name: held for name, held in source.tensors.items() if name.startswith(f"{_WEIGHT}/")}
        self.tensors = dict(source.tensors) | {f"{_EMA}/{_parameter(name)}": held for name, held in weights.items()}

    @property
    def identity(self) -> list[str]:
        return ["ema from weights", *self._source.identity]

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a global tensor."""
        is_average = name.startswith(f"{_EMA}/")
        return self._source.read(f"{_WEIGHT}/{_parameter(name)}" if is_average else name, box)


@dataclass(frozen=True, kw_only=True)
class UpcycleSpec:
    """Into what a dense model is made."""

    recipe: Recipe
    shapes: Mapping[str, tuple[int, ...]]
    """Parameter -> global shape, of its model."""
    state_names: tuple[str, ...]
    """What its optimizer keeps of every weight."""
    initial: Callable[[str, tuple[int, ...]], Tensor]
    """(parameter, global shape) -> the project's seeded initial values, for what the dense model has no part of."""


class UpcycledSource:
    """A dense checkpoint whose feed-forward networks became equal experts, at step 0 of a new run.

    An expert computes activate(x w1) w2, a dense network activate(x up^T) down^T, with the same order of columns; so
    every expert gets both matrices transposed. Routers are new. The average is made of the average, and the
    optimizer has seen nothing yet.

    Source: sparse upcycling, arXiv 2212.05055.
    """

    nonfinite: Mapping[str, int] | None = None

    def __init__(self, source: CheckpointSource, upcycling: UpcycleSpec) -> None:
        check_upcyclable(source, upcycling.recipe)
        self._source, self._made = source, upcycling
        self.step = 0
        of_run = {"recipe": upcycling.recipe.to_dict(), "samples_seen": 0, "num_updates": 0}
        # Not the data: other samples may follow, but through the same encoders.
        self.meta: Mapping[str, Any] = {k: v for k, v in source.meta.items() if k == "encoders"} | of_run
        kinds = [_WEIGHT, *([_EMA] if any(name.startswith(f"{_EMA}/") for name in source.tensors) else [])]
        self.tensors = {
            f"{kind}/{parameter}": (torch.float32, shape)
            for kind in (*kinds, *upcycling.state_names)
            for parameter, shape in upcycling.shapes.items()
        }
        self._whole: tuple[str, Tensor] | None = None  # the last that was turned or drawn; its parts come one by one
        for name in (f"{kind}/{parameter}" for kind in kinds for parameter in upcycling.shapes):
            self._check_origin(name)

    @property
    def identity(self) -> list[str]:
        return ["upcycled", repr(self._made.recipe), *self._source.identity]

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a global tensor."""
        kind, parameter = name.split("/", 1)
        if kind in self._made.state_names:
            return torch.zeros(box.shape)
        if not _is_router(parameter) and _dense_name(parameter) == parameter:
            return self._source.read(name, box).float()
        if self._whole is None or self._whole[0] != name:
            self._whole = name, self._make_whole(name)
        return self._whole[1][box.within((0,) * len(box.shape))]

    def _make_whole(self, name: str) -> Tensor:
        kind, parameter = name.split("/", 1)
        if _is_router(parameter):
            return self._made.initial(parameter, self.tensors[name][1])
        origin = f"{kind}/{_dense_name(parameter)}"
        shape = self._source.tensors[origin][1]
        # The same matrix for every expert, turned: (experts, in, out) is made of (out, in).
        return self._source.read(origin, Box((0, 0), shape)).float().T.expand(self.tensors[name][1])

    def _check_origin(self, name: str) -> None:
        """Prove that the dense checkpoint has what tensor `name` is made of, in the right shape."""
        kind, parameter = name.split("/", 1)
        if _is_router(parameter):
            return
        origin, shape = _dense_name(parameter), self.tensors[name][1]
        needed = shape if origin == parameter else shape[:0:-1]
        held = self._source.tensors.get(f"{kind}/{origin}")
        if held is None or held[1] != needed:
            told = "is missing" if held is None else f"has shape {list(held[1])}"
            raise CheckpointError(f"{kind}/{origin}: {told} in the dense checkpoint; {parameter} needs {list(needed)}")


def check_upcyclable(source: CheckpointSource, recipe: Recipe) -> None:
    """Refuse what is no dense checkpoint, or differs from the new recipe in more than its experts.

    Raises:
        CheckpointError: naming the fields.
    """
    written = source.meta.get("recipe")
    model = with_defaults(written).get("model") if isinstance(written, dict) else None
    if not isinstance(model, dict) or model.get("ffn") != "dense":
        found = model.get("ffn") if isinstance(model, dict) else "no recipe"
        raise CheckpointError(f"--upcycle: the checkpoint is of model.ffn: {found}; only a dense one can be upcycled")
    new = recipe.to_dict()["model"]
    if new["ffn"] != "expert_choice" or new["num_shared_experts"]:
        raise CheckpointError(
            f"--upcycle: the new recipe has model.ffn: {new['ffn']} and model.num_shared_experts: "
            f"{new['num_shared_experts']}; a dense network becomes expert_choice without shared experts"
        )
    stays = [field for field in new if field != "ffn" and field not in EXPERT_FIELDS]
    changed = {field: (model.get(field), new[field]) for field in stays if model.get(field) != new[field]}
    if changed:
        told = "; ".join(f"model.{field}: {old!r} there, {now!r} now" for field, (old, now) in changed.items())
        raise CheckpointError(f"--upcycle: the new recipe differs in more than experts ({told}); undo that with --set")


def _dense_name(parameter: str) -> str:
    for ending, dense in _DENSE_OF.items():
        if parameter.endswith(ending):
            return parameter.removesuffix(ending) + dense
    return parameter


def _is_router(parameter: str) -> bool:
    return parameter.endswith("ffn.router.weight")


def _parameter(name: str) -> str:
    return name.split("/", 1)[1]
