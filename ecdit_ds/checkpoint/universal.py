"""DeepSpeed's Universal Checkpoint: a folder a parameter, a `.pt` file a kind, each with the whole tensor.

    FOLDER/latest_universal                     names the tag
    FOLDER/TAG/zero/PARAMETER/fp32.pt           {"param": tensor}, and how DeepSpeed's loader cuts it
                             /exp_avg.pt ...    the same for what the optimizer keeps; step.pt is a scalar
                             /ema.pt            ours; under ZeRO-1 and 2 the loader hands it to the optimizer's state
    FOLDER/TAG/zero/optimizer_state.pt          one for all
    FOLDER/TAG/*mp_rank_TT_model_states.pt      counts
    FOLDER/TAG/ecdit_ds.json                    step and meta of our checkpoint, so that the way back loses nothing

Written for the loader of DeepSpeed 0.19.8, which docs/conversion.md describes with its limits.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.model_facts import ModelFacts
from ecdit_ds.checkpoint.sources import Source, Tick, parts_of
from ecdit_ds.checkpoint.torch_files import Skipped, StoredTensor, TorchFile, write_torch_file
from ecdit_ds.durable import put_on_disk, write_durably
from ecdit_ds.errors import CheckpointError

LATEST = "latest_universal"
OPTIMIZER_STATE = "optimizer_state.pt"
STAND_INS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Skipped,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Skipped,
}
_OURS, _PLAN = "ecdit_ds.json", "conversion"
_DEEPSPEED_VERSION = "0.19.8"
_WEIGHT, _THEIR_WEIGHT, _STEP = "weight", "fp32", "step"
# DeepSpeed walks its groups and these side by side and stops at the shorter list, so that groups beyond would be left
# as they are, in silence. All are empty: rates and decays stay what the engine was built with.
_PARAM_GROUPS: list[dict[str, Any]] = [{} for _ in range(64)]


class UniversalSource:
    """A tag's folder, by `convert --to universal` or by DeepSpeed's own `ds_to_universal`.

    Args:
        facts: of the model; needed where the folder is not ours, which has a recipe in it.
    """

    def __init__(self, folder: Path, facts: ModelFacts | None) -> None:
        self.folder = folder
        paths = sorted((folder / "zero").glob("*/*.pt"))
        self._files = {_name_of(path): TorchFile(path, STAND_INS) for path in paths if path.stem != _STEP}
        self._stored = {name: _tensor_in(file) for name, file in self._files.items()}
        _check_same_parameters(folder, list(self._files))
        steps = [path for path in paths if path.stem == _STEP]
        if holds_recipe(folder):
            self.step, self.meta = _read_ours(folder / _OURS)
            if (count := _num_updates(folder, steps)) != self.meta.get("num_updates"):
                raise CheckpointError(f"{folder}: {_OURS} does not say {count} updates, as its step.pt files do")
            self.tensors = {name: (stored.dtype, stored.shape) for name, stored in self._stored.items()}
        elif facts is None:
            raise CheckpointError(f"{folder}: holds no recipe; say which one it is of, with --config NAME|PATH [--set]")
        else:
            facts.check_complete((name.split("/", 1)[1] for name in self._files), folder)
            self.step, self.meta = facts.progress(_num_updates(folder, steps), _skipped_steps(folder))
            self.tensors = {
                name: (stored.dtype, facts.shape(name, stored.numel, self._files[name].path))
                for name, stored in self._stored.items()
            }

    @property
    def identity(self) -> list[str]:
        return [f"{name} {file.identity}" for name, file in self._files.items()]

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a global tensor."""
        return self._files[name].read(self._stored[name], box, shape=self.tensors[name][1])


def holds_recipe(folder: Path) -> bool:
    """Return whether a tag's folder is one of ours."""
    return (folder / _OURS).exists()


@dataclass(frozen=True, kw_only=True)
class _ParameterFile:
    """One new file with one whole tensor."""

    path: str
    """Within the folder."""
    name: str
    shape: tuple[int, ...]
    marks: Mapping[str, Any]
    """What DeepSpeed's loader must know besides the numbers."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * torch.float32.itemsize


def convert_to_universal(
    source: Source, destination: Path, cut_axes: Callable[[str], dict[str, int]], tp: int, tick: Tick
) -> None:
    """Write a Universal Checkpoint.

    Args:
        destination: must not exist; `destination.partial` until it is whole, and what it holds then is kept.
        cut_axes: name -> which axis tensor and expert parallelism cut.
        tp: tensor-parallel ranks that will load it: as many files tell them where training is.
    """
    if destination.exists():
        raise CheckpointError(f"{destination}: exists already; a conversion overwrites nothing, choose another name")
    for name, (dtype, _) in source.tensors.items():
        if dtype != torch.float32:
            raise CheckpointError(f"{name}: is {dtype}; a Universal Checkpoint holds fp32, convert what was not cast")
    if not all(type(source.meta.get(name)) is int for name in ("num_updates", "samples_seen")):
        raise CheckpointError("the source does not say num_updates and samples_seen, which DeepSpeed is to go on from")
    partial, tag = destination.with_name(f"{destination.name}.partial"), f"global_step{source.step}_universal"
    files = list(_parameter_files(source, cut_axes))
    try:
        _begin(partial, xxhash.xxh3_64_hexdigest(json.dumps([source.identity, tp, *map(repr, files)]).encode()))
        _check_space(partial, sum(file.nbytes for file in files))
        written = {file.path: _write_once(source, partial / tag / "zero", file, tick) for file in files}
        for file in files:
            _compare(partial / tag / "zero" / file.path, written[file.path], tick)
        _write_counts(partial / tag, source, sorted({file.path.split("/")[0] for file in files}), tp)
        write_durably(partial / LATEST, tag.encode())
        for file in files:
            _note(partial / tag / "zero" / file.path).unlink()
        for folder in (*(partial / tag / "zero").iterdir(), partial / tag, partial):
            if folder.is_dir():
                put_on_disk(folder)
        put_on_disk(partial / tag / "zero")
        partial.rename(destination)
        put_on_disk(destination.parent)
        (destination / _PLAN).unlink()
    except OSError as error:
        raise CheckpointError(
            f"{partial}: cannot be written: {error.strerror or error}; the same command goes on from here"
        ) from None


def _begin(partial: Path, plan: str) -> None:
    """Make the folder; of another conversion, nothing stays."""
    path = partial / _PLAN
    if partial.exists() and not (path.is_file() and path.read_bytes() == plan.encode()):
        if any(partial.iterdir()) and not path.is_file():
            raise CheckpointError(f"{partial}: holds files that are no unfinished conversion's; move it away")
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_durably(path, plan.encode())


def _check_space(folder: Path, need_bytes: int) -> None:
    held_bytes = sum(path.stat().st_size for path in folder.rglob("*.pt"))
    free_bytes = shutil.disk_usage(folder).free + held_bytes
    if free_bytes < need_bytes:
        raise CheckpointError(f"{folder}: the disk is full: {need_bytes} bytes needed, {free_bytes} free; make room")


def _parameter_files(source: Source, cut_axes: Callable[[str], dict[str, int]]) -> Iterator[_ParameterFile]:
    for name, (_, shape) in source.tensors.items():
        kind, parameter = name.split("/", 1)
        if not all(re.fullmatch(r"\w[\w.-]*", part) for part in (kind, parameter)):
            raise CheckpointError(f"{name!r}: cannot be the name of a folder and a file")
        axes, marks = cut_axes(parameter), dict[str, Any]()
        if "tp" in axes:
            marks["cat_dim"] = axes["tp"]
        if "ep" in axes:
            marks |= {"is_expert_param": True, "ep_num_experts": shape[axes["ep"]]}
        file = _THEIR_WEIGHT if kind == _WEIGHT else kind
        yield _ParameterFile(path=f"{parameter}/{file}.pt", name=name, shape=shape, marks=marks)


def _write_once(source: Source, folder: Path, file: _ParameterFile, tick: Tick) -> str:
    """Write one file, or find it whole from an earlier attempt; return the checksum of its numbers."""
    path, origin = folder / file.path, (0,) * len(file.shape)
    if path.is_file() and (note := _read_note(path)):
        tick(file.nbytes)
        return note
    whole = torch.empty(file.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    for box in parts_of(Box(origin, file.shape), whole.itemsize):
        part = source.read(file.name, box)
        whole[box.within(origin)] = part
        tick(part.nbytes)
    write_torch_file(path, {"param": whole} | dict(file.marks))
    xxh3 = xxhash.xxh3_64_hexdigest(whole.reshape(-1).view(torch.uint8).numpy().data)
    # Not put on the disk by itself: a note that is lost, or that outlives its file, costs that file's writing again.
    _note(path).write_text(json.dumps({"bytes": path.stat().st_size, "xxh3": xxh3}))
    return xxh3


def _compare(path: Path, xxh3: str, tick: Tick) -> None:
    """Read a file back."""
    digest = xxhash.xxh3_64()
    try:
        file = TorchFile(path)
        for part in file.chunks(_tensor_in(file)):
            digest.update(part)
            tick(len(part))
        fault = None if digest.hexdigest() == xxh3 else f"{path}: reads back other than written"
    except CheckpointError as error:
        fault = str(error)
    if fault:
        _note(path).unlink()
        raise CheckpointError(f"{fault}; the disk may be failing, the same command writes this file again")


def _write_counts(folder: Path, source: Source, parameters: list[str], tp: int) -> None:
    """Write what is not a parameter's: the step, for DeepSpeed and for our way back."""
    meta = dict(source.meta)
    num_updates = int(meta["num_updates"])
    step = torch.tensor(float(num_updates))  # what torch's optimizers keep
    for parameter in parameters:
        write_torch_file(folder / "zero" / parameter / f"{_STEP}.pt", step)
    common = {
        "ds_version": _DEEPSPEED_VERSION,
        "param_groups": _PARAM_GROUPS,
        # ZeRO-3 looks here.
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }
    write_torch_file(folder / "zero" / OPTIMIZER_STATE, common)
    counts = {
        "ds_version": _DEEPSPEED_VERSION,
        "dp_world_size": 1,
        "mp_world_size": tp,
        "global_steps": source.step,
        "global_samples": meta["samples_seen"],
        "skipped_steps": source.step - num_updates,
        "lr_scheduler": None,
        "samples_seen": meta["samples_seen"],
    }
    for rank in range(tp):
        for prefix in ("", "zero_pp_rank_0_"):  # ZeRO-1 and 2, ZeRO-3
            write_torch_file(folder / f"{prefix}mp_rank_{rank:02d}_model_states.pt", counts)
    content = {"step": source.step, "meta": meta}
    text = json.dumps(content | {"xxh3": _checksum(content)}, indent=1, sort_keys=True)
    write_durably(folder / _OURS, text.encode() + b"\n")


def _name_of(path: Path) -> str:
    return f"{_WEIGHT if path.stem == _THEIR_WEIGHT else path.stem}/{path.parent.name}"


def _check_same_parameters(folder: Path, names: list[str]) -> None:
    by_kind: dict[str, set[str]] = {}
    for kind, parameter in (name.split("/", 1) for name in names):
        by_kind.setdefault(kind, set()).add(parameter)
    everything = set().union(*by_kind.values())
    for kind, parameters in by_kind.items():
        if lacking := sorted(everything - parameters):
            file = _THEIR_WEIGHT if kind == _WEIGHT else kind
            raise CheckpointError(f"{folder / 'zero' / lacking[0] / file}.pt: is missing; copy the folder again")


def _tensor_in(file: TorchFile) -> StoredTensor:
    """Return a file's tensor: in a dict under `param`, or bare and flat, as `ds_to_universal` writes of ZeRO-3."""
    stored = file.content.get("param") if isinstance(file.content, dict) else file.content
    if not isinstance(stored, StoredTensor) or not stored.is_contiguous:
        raise CheckpointError(f"{file.path}: holds no tensor `param` in one piece; use another checkpoint")
    return stored


def _num_updates(folder: Path, step_files: list[Path]) -> int:
    """Return the optimizer's step: of the parameters, which must agree; or of all, as `ds_to_universal` of ZeRO-3."""
    if not step_files:
        file = TorchFile(folder / "zero" / OPTIMIZER_STATE, STAND_INS)
        try:
            return _number(file, file.content["optimizer_state_dict"]["state"][0][_STEP])
        except (KeyError, IndexError, TypeError):
            return _number(file, None)
    found = {path: _number(file, file.content) for path, file in ((path, TorchFile(path)) for path in step_files)}
    first, step = next(iter(found.items()))
    for path in (path for path in found if found[path] != step):
        raise CheckpointError(f"{path}: is at step {found[path]}, {first} at {step}; use another checkpoint")
    return step


def _number(file: TorchFile, value: Any) -> int:
    """Return a whole number, which may be kept as a tensor."""
    if isinstance(value, StoredTensor) and value.numel == 1:
        value = file.read(value, Box((0,) * len(value.shape), value.shape)).item()
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{file.path}: does not say how many steps were taken; use another checkpoint")
    return int(value)


def _skipped_steps(folder: Path) -> int:
    paths = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    content = TorchFile(paths[0], STAND_INS).content if paths else {}
    skipped = content.get("skipped_steps", 0) if isinstance(content, dict) else 0
    return skipped if isinstance(skipped, int) else 0


def _read_ours(path: Path) -> tuple[int, dict[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
        recorded = content.pop("xxh3")
        if recorded != _checksum(content):
            raise CheckpointError(
                f"{path}: has checksum {_checksum(content)}, recorded {recorded}: damaged; use another"
            )
        return int(content["step"]), dict(content["meta"])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: does not say how far the run is: {error}; use another checkpoint") from None


def _checksum(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.note")


def _read_note(path: Path) -> str | None:
    try:
        note: dict[str, Any] = json.loads(_note(path).read_bytes())
        return str(note["xxh3"]) if path.stat().st_size == note["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
