"""What the files of a frozen model hold that its maker's library would lose without a word.

`from_pretrained` casts numbers of any kind to the kind asked for, and lets go of what it has no place for. Of weights
in fp8 or int8 with scales beside, that leaves numbers of another size, and vectors that are far off and look plausible.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ecdit_ds.errors import EcditError

_WHOLE = ("F64", "F32", "F16", "BF16")
"""Kinds of numbers, as safetensors names them, that are weights as they are."""
_COUNTS = ("I64", "I32", "BOOL")
"""Kinds of positions, counts and masks; packed weights of these come with scales, which have another kind."""
_MASK = ".bias"
"""What GPT-2 calls its masks, which are bytes in old files; a bias has no scale."""
_STEMS = ("model", "diffusion_pytorch_model")
_QUANTIZED = ("quantization_config", "compression_config")


def refuse_quantized(who: str, folder: Path, error: type[EcditError]) -> None:
    """Refuse a model that is stored quantised.

    Args:
        who: it is; the message begins with it.
        folder: of the model, as `save_pretrained` of transformers or diffusers writes it.
        error: to raise.

    Raises:
        EcditError: its weights, or its configuration, say so.
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """
    found = _quantization_of(folder)
    if found:
        raise error(
            f"{who}: is quantised ({found}) and would be loaded without its scales; name the original, or dequantise "
            "it and save it in bf16 or fp32"
        )


def refuse_left_over(who: str, names: Iterable[str], error: type[EcditError]) -> None:
    """Refuse a model that did not take some tensors of its files, as `left_over` names them."""
    names = sorted(names)
    if names:
        raise error(
            f"{who}: {len(names)} tensors of its files have no place in the model, such as {names[0]!r}; scales, "
            "adapters, or layers that its config.json does not tell of would be left out: save it anew, whole"
        )


def left_over(model: Any, unexpected: Iterable[str], folder: Path) -> list[str]:
    """Return the tensors that a model did not take although they are of a part that it has, sorted.

    Such are scales of its weights, adapters, and layers of which its configuration does not tell. What is of a part
    that it does without (a head, a decoder, another tower) is no loss, nor are positions, counts and masks.

    Args:
        model: of transformers.
        unexpected: `unexpected_keys` of its loading info.
        folder: it was loaded from.
    """
    parts = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
    counts = tuple(f".{name}" for name, kind in _kinds_of(folder).items() if kind in _COUNTS)

    def is_of_a_part(key: str) -> bool:
        steps = key.removeprefix(f"{model.base_model_prefix}.").split(".")
        return any(".".join(steps[:end]) in parts for end in range(1, len(steps)))

    # The library tells of names as the model has them, files have longer ones.
    return sorted(
        key for key in unexpected if is_of_a_part(key) and not any(name.endswith(f".{key}") for name in counts)
    )


def not_in_index(folder: Path) -> list[str]:
    """Return the tensors of a model's shards that its index does not name."""
    indexed = [name for stem in _STEMS for name in _index_of(folder, stem)]
    return sorted(_kinds_of(folder).keys() - indexed) if indexed else []


def _quantization_of(folder: Path) -> str | None:
    """Return what says that a model is stored quantised, in words; None where nothing does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _QUANTIZED:
            if method := part.get(key):
                name = method.get("quant_method") if isinstance(method, dict) else method
                return f"config.json has a {key}, {name!r}"
    kinds = _kinds_of(folder)
    odd = sorted(name for name, kind in kinds.items() if kind not in _WHOLE + _COUNTS and not name.endswith(_MASK))
    return f"{len(odd)} tensors such as {odd[0]!r} are stored as {kinds[odd[0]]}" if odd else None


def _kinds_of(folder: Path) -> dict[str, str]:
    """Return of each tensor in the files that are loaded what kind of numbers it holds; only headers are read."""
    kinds: dict[str, str] = {}
    for path in _files_of(folder):
        with safe_open(path, framework="pt") as file:
            kinds |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  no dict
    return kinds


def _files_of(folder: Path) -> list[Path]:
    """Return one file or the shards that an index names; variants may lie beside them."""
    for stem in _STEMS:
        path = folder / f"{stem}.safetensors"
        if path.is_file():
            return [path]
        if shards := _index_of(folder, stem):
            return [folder / name for name in sorted(set(shards.values()))]
    return sorted(folder.glob("*.safetensors"))


def _index_of(folder: Path, stem: str) -> dict[str, str]:
    """Return tensor -> shard, empty where there is no index."""
    path = folder / f"{stem}.safetensors.index.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"]) if path.is_file() else {}
