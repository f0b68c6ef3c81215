"""`DST.partial`, where a conversion works until all of it is there: one at a time, and on nothing that is not its own.

DST.partial/lock         held by the conversion at work; the system lets go of it when the process ends, however it ends
DST.partial/NAME.note    what the file NAME holds, written once that file is on the disk; a `/` in NAME is `~` here
DST.partial/files/       what becomes DST, and nothing else
"""

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ecdit_ds.checkpoint.convert import universal
from ecdit_ds.checkpoint.convert.sources import CONFIG_NAME, INDEX_NAME
from ecdit_ds.checkpoint.naming import MANIFEST_NAME
from ecdit_ds.errors import CheckpointError
from ecdit_ds.files.durable import make_folders, private_file, put_on_disk

_LOCK_NAME, _FILES_NAME = "lock", "files"
_SHARD = r"(shard-[0-9]{5,}|model-[0-9]{5,}-of-[0-9]{5,})\.safetensors"
_TEXTS = (MANIFEST_NAME, INDEX_NAME, CONFIG_NAME)
_OWN_FILE = re.compile("|".join([_SHARD, *map(re.escape, _TEXTS), universal.OWN_FILE]))
_OWN_FOLDER = re.compile(universal.OWN_FOLDER)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A conversion's folder, while it is ours."""

    destination: Path

    @property
    def folder(self) -> Path:
        return partial_of(self.destination)

    @property
    def files(self) -> Path:
        return self.folder / _FILES_NAME

    def note(self, name: str) -> Path:
        """Return the path of the note on a file."""
        return self.folder / _note_name(name)

    def place(self, name: str) -> Path:
        """Return where a file is written; the folders that are in its name are made."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def require_space(self, need_bytes: int) -> None:
        """Refuse to begin what the disk cannot hold; what is overwritten counts as free."""
        held = sum(os.lstat(path).st_size for path in _entries(self.files) if not _is_folder(path))
        free = shutil.disk_usage(self.files).free + held
        if free < need_bytes:
            raise CheckpointError(f"{self.folder}: the disk is full: {need_bytes} bytes needed, {free} free; make room")

    def publish(self) -> None:
        """Make the files the destination, in one step, and clear the rest away."""
        for folder in (*filter(_is_folder, _entries(self.files)), self.files):
            put_on_disk(folder)
        _refuse_existing(self.destination)
        self.files.rename(self.destination)
        put_on_disk(self.destination.parent)
        for path in self.folder.glob("*.note"):
            path.unlink()
        _remove(self.folder)


def partial_of(destination: Path) -> Path:
    """Return where a conversion to `destination` works."""
    return destination.parent / f"{destination.name}.partial"


@contextmanager
def workspace(destination: Path, names: Collection[str]) -> Iterator[Workspace]:
    """Make `destination.partial` ours and clear it of files that an earlier conversion wrote and this one will not.

    Args:
        destination: must not exist, not even as a link that leads nowhere.
        names: of the files that this conversion will write.

    Raises:
        CheckpointError: another conversion is at work there, something there is no conversion's, or, for the whole of
            the `with` block, the folder cannot be written.
    """
    _refuse_existing(destination)
    space = Workspace(destination=destination)
    try:
        _make_folder(space.folder)
        _refuse_foreign(space.folder)
        with _locked(space.folder / _LOCK_NAME):
            _refuse_existing(destination)  # the conversion that held the lock may just have published it
            _make_folder(space.files)
            _clear(space, names)
            try:
                yield space
            except KeyboardInterrupt:
                # Only where it is true: whoever reads this acts on it.
                has_some = any(space.folder.glob("*.note")) and not os.path.lexists(destination)
                raise KeyboardInterrupt(*(["the same command goes on from there"] if has_some else [])) from None
            finally:
                with suppress(OSError):
                    _remove_if_empty(space)
    except OSError as error:
        full = error.errno in _DISK_FULL
        mend = "make room and start the same command" if full else "mend that or choose another name"
        raise CheckpointError(f"{space.folder}: cannot be written: {error.strerror or error}; {mend}") from None


def _refuse_existing(destination: Path) -> None:
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination}: exists already; a conversion overwrites nothing, choose another name")


def _make_folder(path: Path) -> None:
    with suppress(FileExistsError):
        make_folders(path)
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise CheckpointError(f"{path}: is not a folder, where a conversion would work; move it away")


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder with anything in it that no conversion made: it may be someone's, and would be lost."""
    found, files = os.listdir(folder), folder / _FILES_NAME
    foreign = [name for name in found if name not in (_LOCK_NAME, _FILES_NAME) and not _is_own_note(name)]
    if found and _LOCK_NAME not in found:
        foreign = found
    elif _is_folder(files):
        for path in _entries(files):
            name = path.relative_to(files).as_posix()
            if not (_OWN_FOLDER if _is_folder(path) else _OWN_FILE).fullmatch(name):
                foreign.append(f"{_FILES_NAME}/{name}")
    if foreign:
        raise CheckpointError(f"{folder}: holds {min(foreign)}, which is no conversion's; move the folder away")


def _clear(space: Workspace, names: Collection[str]) -> None:
    kept = {space.files / name for name in names}
    kept |= {folder for path in kept for folder in path.parents}
    for path in _entries(space.files):
        if path.is_symlink() or path not in kept:
            path.rmdir() if _is_folder(path) else path.unlink()
    notes = set(map(_note_name, names))
    for path in space.folder.glob("*.note"):
        if path.name not in notes:
            path.unlink()


def _entries(folder: Path) -> Iterator[Path]:
    """Yield all that is in a folder, what is in a folder before that folder; a link is what it is, not followed."""
    with os.scandir(folder) as found:
        paths = [Path(entry.path) for entry in found]
    for path in paths:
        if _is_folder(path):
            yield from _entries(path)
        yield path


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _note_name(name: str) -> str:
    return f"{name.replace('/', '~')}.note"


def _is_own_note(name: str) -> bool:
    return name.endswith(".note") and bool(_OWN_FILE.fullmatch(name.removesuffix(".note").replace("~", "/")))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = private_file(str(path), os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(descriptor), path.lstat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:  # held, or just let go of and cleared away
            raise CheckpointError(f"{path.parent}: another conversion is at work there; wait, or choose another name")
        yield
    finally:
        os.close(descriptor)


def _remove_if_empty(space: Workspace) -> None:
    """Leave nothing behind where nothing was begun."""
    has_files = any(not _is_folder(path) for path in _entries(space.files))
    if sorted(os.listdir(space.folder)) == [_FILES_NAME, _LOCK_NAME] and not has_files:
        _clear(space, ())
        space.files.rmdir()
        _remove(space.folder)


def _remove(folder: Path) -> None:
    """Remove the rest of a workspace; another conversion that came just now may keep it."""
    (folder / _LOCK_NAME).unlink()
    with suppress(OSError):
        folder.rmdir()
