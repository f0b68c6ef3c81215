"""Which of DeepSpeed's formats a folder is of; ours and safetensors are in `sources.py`."""

from pathlib import Path

from ecdit_ds.checkpoint.convert import universal
from ecdit_ds.checkpoint.convert import zero_checkpoint as zero_folder
from ecdit_ds.checkpoint.convert.model_spec import ModelFacts
from ecdit_ds.checkpoint.convert.universal import UniversalSource
from ecdit_ds.checkpoint.convert.zero_checkpoint import ZeroSource, is_zero_folder
from ecdit_ds.checkpoint.file_ranges import reading
from ecdit_ds.errors import CheckpointError


def deepspeed_folder(path: Path) -> Path | None:
    """Return the folder with the files: `path`, or the tag that it names as the latest; None if it is no such.

    Raises:
        CheckpointError: what names the tag names something else, or the system refuses to look.
    """
    with reading(path):
        if _is_universal(path) or is_zero_folder(path):
            return path
        for latest in (path / universal.LATEST, path / zero_folder.LATEST):
            if latest.is_file():
                return path / _tag_in(latest)
    return None


def open_deepspeed(folder: Path, facts: ModelFacts | None) -> UniversalSource | ZeroSource:
    """Open what `deepspeed_folder` returned.

    Args:
        facts: of the model; a folder of DeepSpeed's own holds no recipe.

    Raises:
        CheckpointError: damage, content that is no plain data, facts that are missing or do not fit.
    """
    return UniversalSource(folder, facts) if _is_universal(folder) else ZeroSource(folder, facts)


def lacks_recipe(path: Path) -> bool:
    """Return whether a checkpoint is of DeepSpeed's own making, so that its recipe must be said."""
    folder = deepspeed_folder(path)
    with reading(path):
        return folder is not None and not universal.holds_recipe(folder)


def _tag_in(latest: Path) -> str:
    with reading(latest):
        tag = latest.read_bytes()[:1000].decode(errors="backslashreplace").strip()
    if not tag or tag != Path(tag).name or tag == "..":
        raise CheckpointError(f"{latest}: names {tag!r}, which is no folder beside it; give the tag's folder")
    folder = latest.parent / tag
    if not (_is_universal(folder) or is_zero_folder(folder)):
        raise CheckpointError(f"{latest}: names {tag}, which holds no checkpoint of DeepSpeed's; copy it again")
    return tag


def _is_universal(path: Path) -> bool:
    return (path / "zero" / universal.OPTIMIZER_STATE).is_file()
