"""Writing DeepSpeed's Universal Checkpoint, as `universal.py` describes it, the way every conversion is written."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecdit_ds.checkpoint.convert.convert import convert, nonfinite_of
from ecdit_ds.checkpoint.convert.file_plan import FileDigest, FilePlan, OutputTensor, whole_target
from ecdit_ds.checkpoint.convert.pt_file import TorchFile, torch_bytes, write_torch_file
from ecdit_ds.checkpoint.convert.sources import CheckpointSource, Tick
from ecdit_ds.checkpoint.convert.universal import LATEST, OPTIMIZER_STATE, OURS, STEP, checksum, path_of, tensor_in
from ecdit_ds.checkpoint.file_ranges import bytes_of
from ecdit_ds.errors import CheckpointError

_DEEPSPEED_VERSION = "0.19.8"
_PARAM = "param"
# DeepSpeed walks its groups and these side by side and stops at the shorter list, so that groups beyond would be left
# as they are, in silence. All are empty: rates and decays stay what the engine was built with.
_PARAM_GROUPS: list[dict[str, Any]] = [{} for _ in range(64)]


@dataclass(frozen=True, kw_only=True)
class _ParameterFile(FilePlan):
    """A `.pt` file with one whole tensor."""

    marks: Mapping[str, Any]
    """What DeepSpeed's loader must know besides the numbers."""

    def writer(self, path: Path) -> "_ParameterWriter":
        """Begin the file."""
        return _ParameterWriter(path, self.targets[0], self.marks)

    def read_back(self, path: Path) -> FileDigest:
        """Return what a file on the disk holds of this plan."""
        file = TorchFile(path)
        stored = tensor_in(file)
        marks = {key: mark for key, mark in file.content.items() if key != _PARAM}
        header = _checksum_of(stored.dtype, stored.shape, marks)
        return FileDigest(xxh3=(file.xxh3(stored),), header_xxh3=header, size_bytes=file.size_bytes)


class _ParameterWriter:
    """Holds the whole tensor until it is written, as PyTorch wants it."""

    def __init__(self, path: Path, target: OutputTensor, marks: Mapping[str, Any]) -> None:
        self._path, self._marks = path, marks
        self._whole, self._filled = torch.empty(target.box.shape, dtype=target.dtype), 0
        self.header_xxh3 = _checksum_of(target.dtype, target.box.shape, marks)

    def append(self, data: Tensor) -> memoryview:
        """Take the next values."""
        into = self._whole.view(-1)[self._filled : self._filled + data.numel()]
        into.copy_(data.reshape(-1))
        self._filled += data.numel()
        return bytes_of(into)

    def close(self) -> int:
        """Write the file."""
        assert self._filled == self._whole.numel(), f"{self._whole.numel() - self._filled} numbers are missing"
        return write_torch_file(self._path, {_PARAM: self._whole} | dict(self._marks))


def plan_universal(
    source: CheckpointSource, cut_axes: Callable[[str], dict[str, int]], tp: int, *, marks_experts: bool = True
) -> list[FilePlan]:
    """Give each tensor a file.

    Args:
        cut_axes: parameter -> which axis tensor and expert parallelism cut.
        tp: tensor-parallel ranks that will load it.
        marks_experts: tell DeepSpeed which tensors are experts', to be cut over expert-parallel ranks; it then asks the
            model's own parameters for their expert group, which a plain model lacks.
    """
    if not all(type(source.meta.get(name)) is int for name in ("num_updates", "samples_seen")):
        raise CheckpointError("the source does not say num_updates and samples_seen, which DeepSpeed is to go on from")
    if not 0 <= source.meta["num_updates"] <= source.step:
        raise CheckpointError(f"the source says {source.meta['num_updates']} updates in {source.step} steps")
    files: list[FilePlan] = []
    for name, (dtype, shape) in source.tensors.items():
        if dtype != torch.float32:
            raise CheckpointError(f"{name}: is {dtype}; a Universal Checkpoint holds fp32, convert what was not cast")
        axes, marks = cut_axes(name.split("/", 1)[1]), dict[str, Any]()
        for way, axis in axes.items():
            if axis >= len(shape) or (way == "tp" and shape[axis] % tp):
                raise CheckpointError(f"tensor {name}: {tp} slices do not divide axis {axis} of shape {list(shape)}")
        if "tp" in axes:
            marks["cat_dim"] = axes["tp"]
        if "ep" in axes and marks_experts:
            marks |= {"is_expert_param": True, "ep_num_experts": shape[axes["ep"]]}
        target = replace(whole_target(source, name, None), key=_PARAM)
        files.append(_ParameterFile(name=f"{_tag(source)}/{path_of(name)}", targets=(target,), marks=marks))
    if tp > 1 and not any(isinstance(file, _ParameterFile) and "cat_dim" in file.marks for file in files):
        raise CheckpointError(f"no tensor of the source is cut over {tp} tensor-parallel ranks; leave --tp away")
    return files


def convert_to_universal(
    source: CheckpointSource, destination: Path, files: list[FilePlan], tp: int, tick: Tick
) -> dict[str, int]:
    """Write a Universal Checkpoint; as `convert`.

    Args:
        files: as `plan_universal` returned them.
        tp: as many files tell the tensor-parallel ranks where training is.
    """

    def texts(held: Sequence[FileDigest]) -> dict[str, bytes]:
        tag, contents = _tag(source), _torch_texts(source, tp)
        folders = sorted({file.name.rsplit("/", 1)[0] for file in files})
        step = torch_bytes(_step(source))
        content = {
            "step": source.step,
            "meta": dict(source.meta),
            "tensors": sorted(source.tensors),
            "nonfinite": nonfinite_of(files, held),
        }
        text = json.dumps(content | {"xxh3": checksum(content)}, indent=1, sort_keys=True, allow_nan=False)
        return (
            {f"{folder}/{STEP}.pt": step for folder in folders}
            | {f"{tag}/{name}": torch_bytes(held) for name, held in contents.items()}
            | {f"{tag}/{OURS}": text.encode() + b"\n", LATEST: tag.encode()}
        )

    return convert(source, destination, files, texts, tick)


def _torch_texts(source: CheckpointSource, tp: int) -> dict[str, Any]:
    """Return what is not a parameter's, by its name in the tag's folder: the counts."""
    common = {
        "ds_version": _DEEPSPEED_VERSION,
        "param_groups": _PARAM_GROUPS,
        # ZeRO-3 looks here.
        "optimizer_state_dict": {"state": {0: {STEP: _step(source)}}, "param_groups": [{}]},
    }
    counts = {
        "ds_version": _DEEPSPEED_VERSION,
        "dp_world_size": 1,
        "mp_world_size": tp,
        "global_steps": source.step,
        "global_samples": source.meta["samples_seen"],
        "skipped_steps": source.step - source.meta["num_updates"],
        "lr_scheduler": None,
        "samples_seen": source.meta["samples_seen"],
    }
    return {f"zero/{OPTIMIZER_STATE}": common} | {
        f"{prefix}mp_rank_{rank:02d}_model_states.pt": counts
        for rank in range(tp)
        for prefix in ("", "zero_pp_rank_0_")  # ZeRO-1 and 2, ZeRO-3
    }


def _step(source: CheckpointSource) -> Tensor:
    return torch.tensor(float(source.meta["num_updates"]))  # what torch's optimizers keep


def _tag(source: CheckpointSource) -> str:
    return f"global_step{source.step}_universal"


def _checksum_of(dtype: torch.dtype, shape: tuple[int, ...], marks: Mapping[str, Any]) -> str:
    return checksum(repr((dtype, shape, dict(marks))))
