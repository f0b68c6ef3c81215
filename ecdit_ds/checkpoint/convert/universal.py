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
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.model_spec import ModelFacts
from ecdit_ds.checkpoint.convert.pt_file import Placeholder, PtTensor, TorchFile
from ecdit_ds.checkpoint.convert.sources import check_tensors, nonfinite_said, read_json, step_and_meta
from ecdit_ds.checkpoint.file_ranges import reading
from ecdit_ds.errors import CheckpointError

LATEST = "latest_universal"
OPTIMIZER_STATE = "optimizer_state.pt"
OURS = "ecdit_ds.json"
STEP = "step"
STAND_INS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Placeholder,
    "deepspeed.runtime.zero.config.ZeroStageEnum": Placeholder,
}
"""What DeepSpeed's own tool leaves in these files, and nobody here needs."""
_WEIGHT, _THEIR_WEIGHT = "weight", "fp32"
_TAG, _NAME = r"global_step[0-9]+_universal", r"\w[\w.-]*"
_COUNTS = r"(zero_pp_rank_0_)?mp_rank_[0-9]{2,}_model_states\.pt"
_IN_ZERO = rf"({re.escape(OPTIMIZER_STATE)}|{_NAME}/{_NAME}\.pt)"
OWN_FILE = rf"{LATEST}|{_TAG}/({re.escape(OURS)}|{_COUNTS}|zero/{_IN_ZERO})"
"""What a conversion writes, as a regular expression; so is what follows."""
OWN_FOLDER = rf"{_TAG}(/zero(/{_NAME})?)?"


class UniversalSource:
    """A tag's folder, by `convert --to universal` or by DeepSpeed's own `ds_to_universal`.

    Args:
        facts: of the model; needed where the folder is not ours, which has a recipe in it.
    """

    step: int
    meta: Mapping[str, Any]
    nonfinite: Mapping[str, int] | None = None

    def __init__(self, folder: Path, facts: ModelFacts | None) -> None:
        self.folder = folder
        paths = _parameter_files(folder)
        self._files = {_name_of(path): TorchFile(path, STAND_INS) for path in paths if path.stem != STEP}
        self._stored = {name: tensor_in(file) for name, file in self._files.items()}
        steps = [path for path in paths if path.stem == STEP]
        if holds_recipe(folder):
            self._read_ours(folder / OURS)
            if (count := _num_updates(folder, steps)) != self.meta.get("num_updates"):
                raise CheckpointError(f"{folder}: {OURS} does not say {count} updates, as its step.pt files do")
            self.tensors = {name: (stored.dtype, stored.shape) for name, stored in self._stored.items()}
        elif facts is None:
            raise CheckpointError(f"{folder}: holds no recipe; say which one it is of, with --config NAME|PATH [--set]")
        else:
            kinds, parameters = ({name.split("/", 1)[part] for name in self._files} for part in (0, 1))
            _check_all_there(folder, self._files, {f"{kind}/{name}" for kind in kinds for name in parameters})
            facts.check_complete(parameters, folder)
            self.step, self.meta = facts.progress(_num_updates(folder, steps), _skipped_steps(folder))
            self.tensors = {
                name: (stored.dtype, facts.shape(name, stored.numel, self._files[name].path))
                for name, stored in self._stored.items()
            }
        check_tensors(folder, self.tensors)

    @property
    def identity(self) -> list[str]:
        return [f"{name} {file.identity}" for name, file in self._files.items()]

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a global tensor."""
        return self._files[name].read(self._stored[name], box, shape=self.tensors[name][1])

    def verify_counts(self) -> None:
        """Check the files that DeepSpeed's loader reads besides the parameters': all there, and whole.

        Raises:
            CheckpointError: naming the file.
        """
        TorchFile(self.folder / "zero" / OPTIMIZER_STATE, STAND_INS)
        with reading(self.folder):
            files = {path.name: TorchFile(path, STAND_INS) for path in self.folder.iterdir() if is_counts(path.name)}
        contents = [file.content for file in files.values() if isinstance(file.content, dict)]
        ranks = max((n for c in contents if type(n := c.get("mp_world_size")) is int), default=1)
        prefixes = {name.split("mp_rank_")[0] for name in files} or {""}
        if holds_recipe(self.folder):
            prefixes = {"", "zero_pp_rank_0_"}
        for name in (f"{prefix}mp_rank_{rank:02d}_model_states.pt" for prefix in prefixes for rank in range(ranks)):
            if name not in files:
                raise CheckpointError(f"{self.folder / name}: is missing; copy the folder again")

    def _read_ours(self, path: Path) -> None:
        content = read_json(path)
        recorded = content.pop("xxh3", None)
        if recorded != (actual := checksum(content)):
            raise CheckpointError(f"{path}: has checksum {actual}, recorded {recorded}: damaged; use another")
        self.step, self.meta = step_and_meta(path, content)
        self.nonfinite = nonfinite_said(path, content, self._files)
        _check_all_there(self.folder, self._files, set(map(str, content.get("tensors", ()))))


def is_counts(name: str) -> bool:
    """Return whether a file of this name holds counts for a tensor-parallel rank."""
    return re.fullmatch(_COUNTS, name) is not None


def holds_recipe(folder: Path) -> bool:
    """Return whether a tag's folder is one of ours."""
    return (folder / OURS).exists()


def path_of(name: str) -> str:
    """Return where tensor `kind/parameter` is kept, in a tag's folder.

    Raises:
        CheckpointError: a folder and a file cannot have these names, or DeepSpeed has taken them.
    """
    kind, parameter = name.split("/", 1)
    file = _THEIR_WEIGHT if kind == _WEIGHT else kind
    is_taken = kind in (_THEIR_WEIGHT, STEP) or parameter == OPTIMIZER_STATE
    if is_taken or not all(re.fullmatch(_NAME, part) for part in (kind, parameter)):
        raise CheckpointError(f"{name!r}: cannot be the name of a folder and a file")
    return f"zero/{parameter}/{file}.pt"


def _name_of(path: Path) -> str:
    return f"{_WEIGHT if path.stem == _THEIR_WEIGHT else path.stem}/{path.parent.name}"


def _parameter_files(folder: Path) -> list[Path]:
    with reading(folder / "zero"):
        parameters = [path for path in sorted((folder / "zero").iterdir()) if path.is_dir()]
    found: list[Path] = []
    for parameter in parameters:
        with reading(parameter):
            found += sorted(path for path in parameter.iterdir() if path.suffix == ".pt")
    return found


def _check_all_there(folder: Path, held: Collection[str], expected: set[str]) -> None:
    if lacking := sorted(expected.difference(held)):
        raise CheckpointError(f"{folder / path_of(lacking[0])}: is missing; copy the folder again")
    if surplus := sorted(set(held) - expected):
        raise CheckpointError(f"{folder}: holds {surplus[0]}, which {OURS} does not know; copy the folder again")


def tensor_in(file: TorchFile) -> PtTensor:
    """Return a file's tensor: in a dict under `param`, or bare and flat, as `ds_to_universal` writes of ZeRO-3."""
    stored = file.content.get("param") if isinstance(file.content, dict) else file.content
    if not isinstance(stored, PtTensor) or not stored.is_contiguous:
        raise CheckpointError(f"{file.path}: holds no tensor `param` in one piece; use another checkpoint")
    return stored


def _num_updates(folder: Path, step_files: list[Path]) -> int:
    """Return the optimizer's step: of the parameters, which must agree; or of all, as `ds_to_universal` of ZeRO-3."""
    if not step_files:
        file = TorchFile(folder / "zero" / OPTIMIZER_STATE, STAND_INS)
        try:
            return file.whole_number(file.content["optimizer_state_dict"]["state"][0][STEP])
        except (KeyError, IndexError, TypeError):
            return file.whole_number(None)
    found = {path: file.whole_number(file.content) for path, file in ((path, TorchFile(path)) for path in step_files)}
    first, step = next(iter(found.items()))
    for path in (path for path in found if found[path] != step):
        raise CheckpointError(f"{path}: is at step {found[path]}, {first} at {step}; use another checkpoint")
    return step


def _skipped_steps(folder: Path) -> int:
    with reading(folder):
        paths = sorted(path for path in folder.iterdir() if path.name.endswith("mp_rank_00_model_states.pt"))
    if not paths:
        return 0
    file = TorchFile(paths[0], STAND_INS)
    return file.whole_number(file.content.get("skipped_steps", 0) if isinstance(file.content, dict) else 0)


def checksum(content: Any) -> str:
    """Return the checksum of plain content."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
