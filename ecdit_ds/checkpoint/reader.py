"""Reading a checkpoint: any box of any global tensor, whatever cut wrote it, and never an unchecked byte.

Files are read by position, not mapped: a page fault costs more than the copy, and nothing stays resident. Where a box
holds whole slices, as on the layout that wrote them, their bytes go straight to their place.
"""

import difflib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box, shifted
from ecdit_ds.checkpoint.finite import require_finite_tensors
from ecdit_ds.checkpoint.manifest import DTYPES, StoredTensor
from ecdit_ds.checkpoint.naming import MANIFEST_NAME, list_checkpoints
from ecdit_ds.checkpoint.slices import CheckedSlices
from ecdit_ds.errors import CheckpointError

_READERS = 4


class Reader:
    """One checkpoint, open for reading by any number of threads.

    Args:
        folder: a `step_N` folder.

    Raises:
        CheckpointError: as `read_manifest`.
    """

    def __init__(self, folder: Path) -> None:
        self._slices = CheckedSlices(folder)
        self.folder, self.manifest = folder, self._slices.manifest

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

        Only slices that share an element with the box are touched, and each is compared with its checksum. After an
        error `out` must not be used.

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
            if common is None:
                continue
            into = out.detach()[common.within(box.offset)]
            if common == cut.box and into.is_contiguous() and into.is_cpu and into.dtype == DTYPES[stored.dtype]:
                self._slices.read_slice_into(stored, cut, into)
            else:
                local = shifted(common, tuple(-start for start in cut.box.offset))
                into.copy_(self._slices.read_slice(stored, cut, local))

    def read_all_into(self, wanted: Iterable[tuple[str, Box, Tensor]]) -> None:
        """Do `read_into` for each (name, box, out), several at once: a disk is fastest with some requests waiting."""
        with ThreadPoolExecutor(_READERS) as readers:
            for _ in readers.map(lambda each: self.read_into(*each), wanted):
                pass

    def verify(self) -> None:
        """Check every byte of the checkpoint.

        Raises:
            CheckpointError: naming the first damaged file.
        """
        for file in sorted(self.manifest.files):
            self._slices.open_file(file)
        for stored in self.manifest.tensors.values():
            for cut in stored.slices:
                self._slices.verify_slice(stored, cut)

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


def newest_valid(root: Path, thorough: bool = False) -> tuple[Reader | None, list[str]]:
    """Open the newest checkpoint of `root` that is whole and says of no number that it is not finite, or an older one.

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
            require_finite_tensors(folder, reader.manifest.nonfinite)
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
