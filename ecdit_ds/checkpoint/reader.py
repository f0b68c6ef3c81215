"""Reading a checkpoint: any box of any global tensor, whatever cut wrote it, and never an unchecked byte.

Files are memory-mapped through safetensors (nothing is unpickled) and a slice is compared with its checksum when it is
first touched, before anything of it is copied out.
"""

import difflib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.manifest import (
    DTYPES,
    MANIFEST_NAME,
    StoredSlice,
    StoredTensor,
    header_xxh3,
    list_checkpoints,
    read_manifest,
    tensor_xxh3,
)
from ecdit_ds.errors import CheckpointError


class Reader:
    """One checkpoint, open for reading; files are mapped when first needed and stay mapped with the Reader.

    Args:
        folder: a `step_N` folder.

    Raises:
        CheckpointError: as `read_manifest`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._open_files: dict[str, Any] = {}
        self._verified: set[tuple[str, str]] = set()

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that the checkpoint holds tensor `name` with this global shape.

        Raises:
            CheckpointError: with both shapes, or with the nearest name.
        """
        stored = self._tensor(name)
        if stored.shape != tuple(shape):
            raise CheckpointError(
                f"{self.folder / MANIFEST_NAME}: tensor {name} has shape {list(stored.shape)}, the model needs "
                f"{list(shape)}; use the recipe that wrote the checkpoint"
            )

    def read_into(self, name: str, box: Box, out: Tensor) -> None:
        """Copy a box of a global tensor into `out`, converting from the stored dtype.

        Only slices that share an element with the box are touched; each is verified before the first copy from it.
        After an error `out` may be filled in part, with verified data only.

        Args:
            name: of the global tensor.
            box: in its coordinates.
            out: tensor of `box.shape` on any device, overwritten without autograd. Floating types convert to one
                another; other types must be equal to the stored one.

        Raises:
            CheckpointError: no such tensor, box outside it, incompatible dtype, or damage (the file is named).
            ValueError: `out` has another shape than the box.
        """
        if tuple(out.shape) != box.shape:
            raise ValueError(f"out has shape {tuple(out.shape)}, the box {box.shape}")
        stored = self._tensor(name)
        self._check_request(name, stored, box, out.dtype)
        for cut in stored.slices:
            common = cut.box.intersect(box)
            if common is not None:
                source = self._verified_data(stored, cut)[common.within(cut.box.offset)]
                with torch.no_grad():
                    out[common.within(box.offset)].copy_(source)

    def verify(self) -> None:
        """Check every byte of the checkpoint.

        Raises:
            CheckpointError: naming the first damaged file.
        """
        for file in sorted(self.manifest.files):
            self._open(file)
        for stored in self.manifest.tensors.values():
            for cut in stored.slices:
                self._verified_data(stored, cut)

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.manifest.tensors:
            near = difflib.get_close_matches(name, self.manifest.tensors, n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]}" if near else "it holds none"
            raise CheckpointError(f"{self.folder / MANIFEST_NAME}: holds no tensor {name}; {hint}")
        return self.manifest.tensors[name]

    def _check_request(self, name: str, stored: StoredTensor, box: Box, dtype: torch.dtype) -> None:
        where = f"{self.folder / MANIFEST_NAME}: tensor {name}"
        # The manifest proved that slices tile the tensor, so a gap is possible only outside it.
        if len(box.shape) != len(stored.shape) or any(
            end > size for end, size in zip(box.end, stored.shape, strict=True)
        ):
            raise CheckpointError(
                f"{where} has shape {list(stored.shape)}, and nothing is stored for all of the box at "
                f"{list(box.offset)} of shape {list(box.shape)}; use the recipe that wrote the checkpoint"
            )
        held = DTYPES[stored.dtype]
        if held != dtype and not (held.is_floating_point and dtype.is_floating_point):
            raise CheckpointError(f"{where} is {held}, which does not convert to {dtype}; read it as {held}")

    def _verified_data(self, stored: StoredTensor, cut: StoredSlice) -> Tensor:
        path = self.folder / cut.file
        file = self._open(cut.file)
        try:
            data: Tensor = file.get_tensor(cut.key)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {_one_line(error)}; use an older checkpoint") from None
        if (cut.file, cut.key) in self._verified:
            return data
        if data.dtype != DTYPES[stored.dtype] or tuple(data.shape) != cut.box.shape:
            raise CheckpointError(
                f"{path}: {cut.key} is {data.dtype} {list(data.shape)}, the manifest says {stored.dtype} "
                f"{list(cut.box.shape)}; use an older checkpoint"
            )
        actual = tensor_xxh3(data)
        if actual != cut.xxh3:
            raise CheckpointError(
                f"{path}: {cut.key} has checksum {actual}, recorded {cut.xxh3}: damaged; use an older checkpoint"
            )
        self._verified.add((cut.file, cut.key))
        return data

    def _open(self, name: str) -> Any:
        if name not in self._open_files:
            path = self.folder / name
            try:
                actual, recorded = header_xxh3(path), self.manifest.files[name].header_xxh3
                if actual != recorded:
                    raise CheckpointError(
                        f"{path}: header has checksum {actual}, recorded {recorded}: damaged; use an older checkpoint"
                    )
                self._open_files[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError, RuntimeError) as error:
                told = _one_line(error)
                raise CheckpointError(f"{path}: cannot be opened: {told}; use an older checkpoint") from None
        return self._open_files[name]


def newest_valid(root: Path, thorough: bool = False) -> tuple[Reader | None, list[str]]:
    """Open the newest checkpoint of `root` that is whole, falling back to older ones.

    Args:
        root: holds `step_N` folders; may be missing or empty.
        thorough: check every byte, not only manifests and sizes. Costs one reading of each checkpoint tried.

    Returns:
        The Reader, or None where no folder is named like a checkpoint, and one line for each rejected newer one.

    Raises:
        CheckpointError: there are checkpoints and none is valid, with all reasons. Starting afresh is for a person to
            decide, since it gives up the run so far.
    """
    rejections: list[str] = []
    for folder in list_checkpoints(root):
        try:
            reader = Reader(folder)
            if thorough:
                reader.verify()
            return reader, rejections
        except CheckpointError as error:
            rejections.append(str(error))
    if rejections:
        raise CheckpointError(
            f"{root}: none of its {len(rejections)} checkpoints is valid ({' | '.join(rejections)}); "
            "restore one, or move them away to start afresh"
        )
    return None, []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
