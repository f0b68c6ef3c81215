"""Where an encoder lies, here or in the cache of the hub; what its files are, and by which commit they came."""

import json
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from ecdit_ds.errors import DataError
from ecdit_ds.files.durable import plain_file

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK_BYTES = 2**24


def folder_of(name: str, what: str, may_fetch: bool, revision: str | None) -> Path:
    """Return the folder of an encoder, from the hub (or its cache) where there is none of that name.

    Args:
        name: of a folder, or on the hub.
        what: `image encoder` or `text encoder`, for messages.
        may_fetch: whether somebody typed the name, so that it may be fetched.
        revision: a commit of the hub, which is tried first.

    Raises:
        DataError: there is none, or its weights are pickled.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _from_hub(name, what, may_fetch, revision)
    if not (folder / "config.json").is_file():
        raise DataError(f"{what} {folder}: has no config.json; save_pretrained makes such a folder")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise DataError(
                f"{what} {folder}: has pickled weights ({pickles[0]}), which are programs and are never loaded; "
                "save it as safetensors"
            )
        raise DataError(f"{what} {folder}: has no weights (*.safetensors); save_pretrained writes them")
    return folder


def commit_of(folder: Path) -> str | None:
    """Return the commit of what lies in a snapshot of the hub's cache; None of what lies anywhere else."""
    pairs = zip(folder.parts, folder.parts[1:], strict=False)
    return next((name for around, name in pairs if around == "snapshots" and _COMMIT.fullmatch(name)), None)


def _from_hub(name: str, what: str, may_fetch: bool, revision: str | None) -> Path:
    if Path(name).is_absolute() or not _HUB_NAME.fullmatch(name):
        raise DataError(f"{what} {name}: is no folder, nor can it be a name on the hub (owner/name, owner/name/folder)")
    owner, repository, *subfolder = name.split("/")
    patterns = ["/".join([*subfolder, pattern]) for pattern in _HUB_FILES]
    try:
        from huggingface_hub import snapshot_download

        fetch = partial(
            snapshot_download, f"{owner}/{repository}", allow_patterns=patterns, local_files_only=not may_fetch
        )
        if revision and _COMMIT.fullmatch(revision):
            with suppress(Exception):  # whatever the hub's client raises; it may be gone
                return Path(fetch(revision=revision), *subfolder)
        return Path(fetch(), *subfolder)
    except Exception as error:  # likewise, of its own classes and of several libraries'
        if not may_fetch:
            flag = "--vae" if what == "image encoder" else "--text"
            raise DataError(
                f"{what} {name}: is neither a folder nor in the hub's cache here, and files choose nothing that is "
                f"fetched; give {flag} {name} to fetch it (train.py: --set data.{flag[2:]}={name}), or {flag} FOLDER"
            ) from None
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{what} {name}: is no folder, and the hub does not give it ({cause})") from None


def fingerprint(folder: Path) -> str:
    """Return a name of what an encoder's files hold, every byte of its weights included."""
    digest = xxhash.xxh3_64()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.model"), *folder.glob("*.txt")]):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with plain_file(path).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def read_encoder_config(path: Path) -> dict[str, Any]:
    """Return what an encoder says of itself; nothing, where that is no mapping.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        fields = json.loads(plain_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the encoder again") from None
    return fields if isinstance(fields, dict) else {}
