"""A disk that loses what was not synced: what would be left if the power failed now, and every rename on the way."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True, kw_only=True)
class Move:
    """A name that something got by `rename`, `replace` or `link`."""

    target: str
    """Relative to the disk's root, as all names here."""
    unsynced: list[str]
    """What of it was not on the disk before."""
    pending: list[str]
    """What got its name earlier, and would have lost it or its content if the power had failed now."""


class Disk:
    """Watches a folder, all of which is on the disk at first. Nothing is truly synced, which would take long."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.moves: list[Move] = []
        self._synced: dict[int, bytes | dict[str, int]] = {}
        """Inode -> content of a file, or names and inodes of a folder, when it was last synced."""
        for path in (root, *root.rglob("*")):
            self._sync(path)
        patch.setattr(os, "fsync", lambda descriptor: self._sync(Path(f"/proc/self/fd/{descriptor}").resolve()))
        for name in ("rename", "replace", "link"):
            patch.setattr(os, name, self._watched(getattr(os, name)))
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, self._forgetting(getattr(os, name)))

    def lost(self, path: Path) -> list[str]:
        """Return what of a file or folder, or of the names that lead to it, would not be there."""
        above = [place for place in (path, *path.parents) if place.is_relative_to(self.root)][:-1]
        return [self._name(place) for place in above if not self._has_name(place)] + self._unsynced(path)

    def _unsynced(self, path: Path) -> list[str]:
        if not path.is_dir() or path.is_symlink():
            return [] if self._synced.get(path.lstat().st_ino) == path.read_bytes() else [self._name(path)]
        lost = [self._name(place) for place in path.iterdir() if not self._has_name(place)]
        return lost + [name for place in path.iterdir() for name in self._unsynced(place)]

    def _has_name(self, path: Path) -> bool:
        names = self._synced.get(path.parent.stat().st_ino)
        return isinstance(names, dict) and names.get(path.name) == path.lstat().st_ino

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _sync(self, path: Path) -> None:
        is_folder = path.is_dir()
        held = {entry.name: entry.lstat().st_ino for entry in path.iterdir()} if is_folder else path.read_bytes()
        self._synced[path.stat().st_ino] = held

    def _watched(self, move: Any) -> Any:
        def watched(source: Any, target: Any) -> None:
            if not Path(target).is_relative_to(self.root):
                move(source, target)
                return
            named = dict.fromkeys(self.root / earlier.target for earlier in self.moves)
            pending = [name for place in named if place.exists() for name in self.lost(place)]
            unsynced = self._unsynced(Path(source))
            move(source, target)
            self.moves.append(Move(target=self._name(Path(target)), unsynced=unsynced, pending=pending))

        return watched

    def _forgetting(self, remove: Any) -> Any:
        """Forget what is removed: the next file may get its inode."""

        def forgetting(path: Any, *, dir_fd: int | None = None) -> None:
            status = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
            remove(path, dir_fd=dir_fd)
            if status.st_nlink == 1 or stat.S_ISDIR(status.st_mode):
                self._synced.pop(status.st_ino, None)

        return forgetting
