"""Run `tools/convert_ckpt.py` in this process, and write small folders for it to read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.sources import CONFIG_NAME, INDEX_NAME
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.writer import TensorShard, save_checkpoint
from tools import convert_ckpt

Run = Callable[..., tuple[int, str, str]]


def tool_runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return `run(argument, ...)`: the exit code and what the command printed on both streams."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = convert_ckpt.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def save_tensors(
    root: Path, tensors: dict[str, Tensor], boxes: dict[str, list[Box]] | None = None, **meta: Any
) -> Path:
    """Write `root/step_1` in our format, a tensor with `boxes` in these slices."""
    pieces = []
    for name, data in tensors.items():
        whole = Box((0,) * data.dim(), tuple(data.shape))
        for box in (boxes or {}).get(name, [whole]):
            part = data[box.within((0,) * data.dim())].contiguous()
            pieces.append(TensorShard(name=name, global_shape=whole.shape, box=box, data=part))
    return save_checkpoint(root, 1, pieces, meta, SoloPeers())


def save_shared(
    folder: Path, tensors: dict[str, Tensor], weight_map: dict[str, str] | None = None, **config: Any
) -> Path:
    """Write a Hugging Face style folder: one file, its index and a `config.json` with some fields changed."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors") if weight_map is None else weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / CONFIG_NAME).write_text(json.dumps({"step": 1, "kind": "ema", "meta": {}} | config))
    return folder
