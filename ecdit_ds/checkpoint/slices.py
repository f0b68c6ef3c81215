"""The slices of a checkpoint in our format, each compared with its checksum before anyone computes with it."""

from pathlib import Path

from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.manifest import DTYPES, StoredSlice, StoredTensor, read_manifest
from ecdit_ds.checkpoint.safetensors_file import TensorFile
from ecdit_ds.errors import CheckpointError


class CheckedSlices:
    """Any number of threads may read.

    Raises:
        CheckpointError: as `read_manifest`; reading raises it for damage, naming the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._files: dict[str, TensorFile] = {}
        self._verified: set[tuple[str, str]] = set()

    def verify_slice(self, stored: StoredTensor, cut: StoredSlice) -> None:
        """Compare a slice with its checksum, once, without holding it."""
        if (cut.file, cut.key) not in self._verified:
            self._compare(cut, self._file_of(stored, cut).xxh3(cut.key))

    def count_nonfinite(self, stored: StoredTensor, cut: StoredSlice) -> int:
        """Compare a slice with its checksum; return how many of its numbers are not finite."""
        actual, nonfinite = self._file_of(stored, cut).xxh3_and_nonfinite(cut.key)
        self._compare(cut, actual)
        return nonfinite

    def read_slice(self, stored: StoredTensor, cut: StoredSlice, box: Box) -> Tensor:
        """Return a box, in its own coordinates, of a slice."""
        self.verify_slice(stored, cut)
        return self._files[cut.file].read(cut.key, box)

    def read_slice_into(self, stored: StoredTensor, cut: StoredSlice, out: Tensor) -> None:
        """Fill `out`, contiguous and on the host, with a whole slice; compared while it is read, so damaged data may
        be in it when an error is raised."""
        self._compare(cut, self._file_of(stored, cut).read_into(cut.key, out))

    def open_file(self, name: str) -> TensorFile:
        """Return one of the checkpoint's files, its header compared with its checksum."""
        if name not in self._files:
            file, recorded = TensorFile(self.folder / name), self.manifest.files[name].header_xxh3
            if file.header_xxh3 != recorded:
                raise CheckpointError(
                    f"{file.path}: header has checksum {file.header_xxh3}, recorded {recorded}: damaged; "
                    "use another checkpoint"
                )
            self._files[name] = file
        return self._files[name]

    def _file_of(self, stored: StoredTensor, cut: StoredSlice) -> TensorFile:
        file = self.open_file(cut.file)
        found = file.entries.get(cut.key)
        if found is None or (found.dtype, found.shape) != (DTYPES[stored.dtype], cut.box.shape):
            held = f"is {found.dtype} {list(found.shape)}" if found else "is not in it"
            raise CheckpointError(
                f"{file.path}: {cut.key} {held}, the manifest says {stored.dtype} {list(cut.box.shape)}; use another "
                "checkpoint"
            )
        return file

    def _compare(self, cut: StoredSlice, actual: str) -> None:
        if actual != cut.xxh3:
            raise CheckpointError(
                f"{self.folder / cut.file}: {cut.key} has checksum {actual}, recorded {cut.xxh3}: damaged; use another "
                "checkpoint"
            )
        self._verified.add((cut.file, cut.key))
