"""A ZeRO-1 or 2 checkpoint as DeepSpeed's `engine.save_checkpoint` writes it, read as global tensors.

    FOLDER/latest                                                  names the tag
    FOLDER/TAG/mp_rank_00_model_states.pt                          local shapes of parameters, by optimizer group
    FOLDER/TAG/[bf16_]zero_pp_rank_D_mp_rank_T_optim_states.pt     data-parallel rank D of tensor-parallel rank T

An optimizer group is one flat fp32 tensor of all its parameters, cut over the ranks that hold the same; so is each
thing the optimizer keeps. Ranks note where in their part a parameter begins. Files of single experts, which DeepSpeed
may write as well, hold rounded copies and are not needed.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box, check_cover, flat_range_boxes, shifted
from ecdit_ds.checkpoint.convert import universal
from ecdit_ds.checkpoint.convert.model_spec import ModelFacts
from ecdit_ds.checkpoint.convert.pt_file import PtTensor, TorchFile
from ecdit_ds.checkpoint.convert.sources import check_tensors
from ecdit_ds.checkpoint.file_ranges import reading
from ecdit_ds.errors import CheckpointError

LATEST = "latest"
_MODEL_STATES = "mp_rank_00_model_states.pt"
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_EXPERT_GROUP = re.compile(r"ep_size_([1-9][0-9]*)")


class FragmentAddress:
    """Takes the place of DeepSpeed's class of the same purpose: where a parameter lies in a rank's flat tensor."""

    numel: int
    start: int


_STAND_INS: dict[str, type] = {
    **universal.STAND_INS,
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
}


def is_zero_folder(folder: Path) -> bool:
    """Return whether a folder is a tag's folder of a ZeRO checkpoint."""
    try:
        return any(_OPTIMIZER_FILE.fullmatch(path.name) for path in folder.iterdir())
    except OSError:
        return False


@dataclass(frozen=True, kw_only=True)
class _Group:
    """One rank's part of one optimizer group."""

    file: TorchFile
    flats: dict[str, PtTensor]
    """Kind (`weight`, `exp_avg`, ...) -> flat tensor."""
    places: dict[str, FragmentAddress]
    """Parameter -> where it lies in each of them; those that other ranks hold are not there."""
    ep: int
    """Expert-parallel ranks, which hold different experts; 1 for what is no expert."""
    num_updates: int


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A box of a global tensor, and where its numbers lie one after another."""

    file: TorchFile
    flat: PtTensor
    at: int
    box: Box


class ZeroSource:
    """A tag's folder. Parameters that tensor-parallel ranks hold alike are read from all of them and compared."""

    nonfinite: Mapping[str, int] | None = None

    def __init__(self, folder: Path, facts: ModelFacts | None) -> None:
        self.folder = folder
        if facts is None:
            raise CheckpointError(f"{folder}: holds no recipe; say which one it is of, with --config NAME|PATH [--set]")
        self._files = {place: TorchFile(path, _STAND_INS) for place, path in _optimizer_files(folder).items()}
        model_states_file = TorchFile(folder / _MODEL_STATES, _STAND_INS)
        model_states = model_states_file.content
        ranks = {place: _groups_of(file) for place, file in self._files.items()}
        with _Named(folder / _MODEL_STATES):
            self._dp, self._tp = int(model_states["dp_world_size"]), int(model_states["mp_world_size"])
            local_shapes = [{n: tuple(map(int, s)) for n, s in g.items()} for g in model_states["param_shapes"]]
            skipped_steps = model_states_file.whole_number(model_states["skipped_steps"])
            if min(self._dp, self._tp) < 1:
                raise ValueError(f"{self._dp} data-parallel and {self._tp} tensor-parallel ranks")
        self._check_ranks_are_there(ranks, len(local_shapes))
        updates = {group.num_updates for groups in ranks.values() for group in groups}
        if len(updates) != 1:
            raise CheckpointError(f"{folder}: its ranks are at different optimizer steps, {sorted(updates)}")
        self.step, self.meta = facts.progress(updates.pop(), skipped_steps)
        self._copies: dict[str, list[list[_Piece]]] = {}
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for index, shapes in enumerate(local_shapes):
            groups = {place: ranks[place][index] for place in ranks}
            for parameter, local_shape in shapes.items():
                with _Named(folder / _MODEL_STATES):
                    self._add(parameter, local_shape, groups, facts)
        facts.check_complete((parameter for shapes in local_shapes for parameter in shapes), folder)
        check_tensors(folder, self.tensors)

    @property
    def identity(self) -> list[str]:
        return [file.identity for file in self._files.values()]

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a global tensor."""
        first, *others = (self._assembled(name, pieces, box) for pieces in self._copies[name])
        for tp, other in enumerate(others, start=1):
            if not torch.equal(_bits(first), _bits(other)):
                raise CheckpointError(
                    f"{self.folder}: {name} differs between tensor-parallel ranks 0 and {tp}, which must hold the "
                    "same: training went wrong before it was saved"
                )
        return first

    def _assembled(self, name: str, pieces: list[_Piece], box: Box) -> Tensor:
        out = torch.empty(box.shape, dtype=self.tensors[name][0])
        for piece in pieces:
            common = piece.box.intersect(box)
            if common is not None:
                local = shifted(common, tuple(-start for start in piece.box.offset))
                data = piece.file.read(piece.flat, local, start=piece.at, shape=piece.box.shape)
                out[common.within(box.offset)] = data
        return out

    def _add(
        self, parameter: str, local_shape: tuple[int, ...], groups: dict[tuple[int, int], _Group], facts: ModelFacts
    ) -> None:
        """Find all pieces of a parameter, of each kind, and prove that they tile it."""
        first = next(iter(groups.values()))
        counts = {"tp": self._tp, "ep": first.ep}
        if self._dp % first.ep:
            raise ValueError(f"{first.ep} expert-parallel among {self._dp} data-parallel ranks")
        axes = {way: axis for way, axis in facts.cut_axes(parameter).items() if counts[way] > 1}
        shape = list(local_shape)
        for way, axis in axes.items():
            shape[axis] *= counts[way]
        for kind, flat in first.flats.items():
            name = f"{kind}/{parameter}"
            if facts.shape(name, math.prod(shape), self.folder) != tuple(shape):
                raise CheckpointError(f"{self.folder}: {parameter} has shape {shape}, not what the recipe says")
            by_tp: list[list[_Piece]] = [[] for _ in range(self._tp)]
            for tp, ep in itertools.product(range(self._tp), range(first.ep)):
                offset = _offset(local_shape, axes, {"tp": tp, "ep": ep})
                # DeepSpeed deals experts out over neighbours: every EP-th data-parallel rank holds the same ones.
                holders = [groups[tp, dp] for dp in range(ep, self._dp, first.ep)]
                by_tp[tp] += self._pieces(kind, parameter, local_shape, offset, holders)
            copies = [list(itertools.chain.from_iterable(by_tp))] if "tp" in axes else by_tp
            for pieces in copies:
                try:
                    check_cover(tuple(shape), (piece.box for piece in pieces))
                except CheckpointError as error:
                    raise CheckpointError(f"{self.folder}: {name} {error}") from None
            self._copies[name], self.tensors[name] = copies, (flat.dtype, tuple(shape))

    def _pieces(
        self, kind: str, parameter: str, local_shape: tuple[int, ...], offset: tuple[int, ...], holders: list[_Group]
    ) -> Iterator[_Piece]:
        """Yield a local tensor's pieces; its flat ranges lie on the ranks in their order."""
        begin = 0
        for group in holders:
            here = group.places.get(parameter)
            if here is None:
                continue
            if kind not in group.flats or here.start + here.numel > group.flats[kind].numel:
                raise CheckpointError(f"{group.file.path}: has no {kind} of {parameter} where it says; use another")
            if begin + here.numel > math.prod(local_shape):
                raise CheckpointError(f"{group.file.path}: has more of {parameter} than its shape {list(local_shape)}")
            for box, at in flat_range_boxes(local_shape, begin, begin + here.numel):
                yield _Piece(file=group.file, flat=group.flats[kind], at=here.start + at, box=shifted(box, offset))
            begin += here.numel

    def _check_ranks_are_there(self, ranks: dict[tuple[int, int], list[_Group]], num_groups: int) -> None:
        for tp, dp in ((tp, dp) for tp in range(self._tp) for dp in range(self._dp)):
            if (tp, dp) not in ranks:
                raise CheckpointError(
                    f"{self.folder}: the file of data-parallel rank {dp} of {self._dp}, tensor-parallel rank {tp} of "
                    f"{self._tp} is missing; copy the folder again"
                )
            if len(ranks[tp, dp]) != num_groups:
                raise CheckpointError(
                    f"{self._files[tp, dp].path}: has {len(ranks[tp, dp])} optimizer groups, {_MODEL_STATES} "
                    f"{num_groups}; the files are not of one checkpoint"
                )
        if surplus := sorted(ranks.keys() - set(itertools.product(range(self._tp), range(self._dp)))):
            raise CheckpointError(
                f"{self._files[surplus[0]].path}: is of a rank that {_MODEL_STATES} does not know; move it away"
            )


def _offset(local_shape: tuple[int, ...], axes: dict[str, int], index: dict[str, int]) -> tuple[int, ...]:
    """Return where a rank's local tensor begins in the global one."""
    offset = [0] * len(local_shape)
    for way, axis in axes.items():
        offset[axis] = index[way] * local_shape[axis]
    return tuple(offset)


def _optimizer_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Return (tensor-parallel rank, data-parallel rank) -> file."""
    if not (folder / _MODEL_STATES).exists() and list(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise CheckpointError(
            f"{folder}: is of ZeRO-3, which is not read here; make it a universal one with DeepSpeed's ds_to_universal"
        )
    with reading(folder):
        paths = sorted(folder.iterdir())
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        if match := _OPTIMIZER_FILE.fullmatch(path.name):
            place = int(match[2]), int(match[1])
            if place in found:
                raise CheckpointError(f"{path}: is of the same rank as {found[place].name}; keep one of them")
            found[place] = path
    return found


def _groups_of(file: TorchFile) -> list[_Group]:
    with _Named(file.path):
        state = file.content["optimizer_state_dict"]
        base = state["base_optimizer_state"]
        return [
            _group(file, flat, base["state"].get(group["params"][0], {}), group, places)
            for flat, group, places in zip(
                state["single_partition_of_fp32_groups"],
                base["param_groups"],
                state["param_slice_mappings"],
                strict=True,
            )
        ]


def _group(
    file: TorchFile, flat: PtTensor, kept: dict[str, Any], group: dict[str, Any], places: dict[str, FragmentAddress]
) -> _Group:
    for place in places.values():
        if type(place.numel) is not int or type(place.start) is not int or min(place.numel, place.start) < 0:
            raise ValueError("a place in a flat tensor is no pair of whole numbers")
    flats = {"weight": flat} | {
        kind: value for kind, value in kept.items() if isinstance(value, PtTensor) and len(value.shape) == 1
    }
    expert_group = _EXPERT_GROUP.fullmatch(str(group.get("name", ""))) if group.get("moe") else None
    return _Group(
        file=file,
        flats=flats,
        places=places,
        ep=int(expert_group[1]) if expert_group else 1,
        num_updates=file.whole_number(kept.get("step", 0)),
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


class _Named:
    """Turns what is amiss in a file's content into one line with its name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if isinstance(error, KeyError | TypeError | ValueError | AttributeError | IndexError | OverflowError):
            raise CheckpointError(
                f"{self._path}: is not as DeepSpeed 0.19.8 writes it ({type(error).__name__}: {error}); use another"
            ) from None
