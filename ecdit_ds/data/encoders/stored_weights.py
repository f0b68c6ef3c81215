"""Files of a frozen model: how they are opened, and what they hold that the library would lose without a word.

Models that are handed over choose nothing: no code of theirs runs, no file of theirs is fetched from anywhere.

`from_pretrained` casts numbers of any kind to the kind asked for, and lets go of what it has no place for. Of weights
in fp8 or int8 with scales beside, that leaves numbers of another size, and vectors that are far off and look plausible.
So what may be stored in other kinds, left over, or lie beside is listed here, and all else is refused.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ecdit_ds.errors import EcditError
from ecdit_ds.files.durable import plain_file

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Options of every `from_pretrained` of transformers; without the second it would ask on standard input."""
_WHOLE = ("F64", "F32", "F16", "BF16")
"""Kinds of numbers, as safetensors names them, that are weights as they are."""
_COUNTS = ("I64", "I32", "U8", "BOOL")
"""Kinds of positions, counts and masks; of a weight they would need a scale."""
_POSITIONS = re.compile(r"(.*\.)?(position_ids|token_type_ids|relative_position_index|num_batches_tracked|inv_freq)")
_MASKS = re.compile(r"(.*\.)?(attn|attention|self_attention)\.bias")
"""Causal masks of GPT-2, of one place for each pair of tokens, which are bytes in old files."""
_SCALARS = re.compile(r"(.*\.)?(masked_bias|version|_float_tensor)")
_LAYERS = re.compile(r"(.*_)?(n_)?(layers?|depths?)")
"""What configurations call a number of layers: num_hidden_layers, encoder_layers, n_layer, depths."""
_MOST_LAYERS_BUILT = 1000
_QUANTIZED = ("quantization_config", "compression_config")
_VARIANT = re.compile(r"\.((fp|bf|int|nf)\d+\w*|ema|non_ema)")
_SHARD = re.compile(r"-\d+-of-\d+")
_OTHER_LAYOUTS = re.compile(r"(open_clip|consolidated|sdxl).*")
"""The same weights for other programs, as their makers put them beside."""


@contextmanager
def opening(message: str, error: type[EcditError]) -> Iterator[None]:
    """Keep the libraries quiet and offline, and turn what they raise into one line that begins with `message`.

    Offline also where a file names what it wants from the hub, as a detector's configuration names its backbone.
    """
    from huggingface_hub import constants
    from transformers.utils import logging

    verbosity, has_bars, is_offline = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        constants.HF_HUB_OFFLINE,
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except EcditError:
        raise
    except Exception as failure:  # whatever the libraries raise for files that are damaged or of another kind
        raise error(f"{message} ({_cause_of(failure)})") from failure
    except BaseException as failure:  # of what Rust panics over, which the `tokenizers` library raises as none of these
        if type(failure).__name__ != "PanicException":
            raise
        raise error(f"{message} ({_cause_of(failure)})") from None
    finally:
        constants.HF_HUB_OFFLINE = is_offline
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _cause_of(failure: BaseException) -> str:
    return next(iter(str(failure).strip().splitlines()), type(failure).__name__)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a library names the files of a model, and which it reads where there are several."""

    stem: str
    prefers_index: bool


TRANSFORMERS = Layout(stem="model", prefers_index=False)
DIFFUSERS = Layout(stem="diffusion_pytorch_model", prefers_index=True)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """How a tensor is stored."""

    kind: str
    shape: tuple[int, ...]

    def is_no_weight(self, name: str) -> bool:
        """Return whether a tensor of that name is of positions, counts or a mask, which no model needs to be told."""
        is_square = len(self.shape) == 4 and self.shape[:2] == (1, 1) and self.shape[2] == self.shape[3]
        is_scalar = self.shape in ((), (1,))
        return self.kind in _WHOLE + _COUNTS and bool(
            _POSITIONS.fullmatch(name)
            or (is_square and _MASKS.fullmatch(name))
            or (is_scalar and _SCALARS.fullmatch(name))
        )


def refuse_quantized(who: str, folder: Path, layout: Layout, error: type[EcditError]) -> None:
    """Refuse a model that is stored quantised, or whose files beside would be left out.

    Args:
        who: it is; the message begins with it.
        folder: of the model, as `save_pretrained` of transformers or diffusers writes it.
        layout: of the library that loads it.
        error: to raise.

    Raises:
        EcditError: its weights, or its configuration, say so, or an adapter or other tensors lie beside.
        OSError, ValueError, SafetensorError: a file is missing or damaged.
    """
    found = _quantization_of(folder, layout)
    if found:
        raise error(
            f"{who}: is quantised ({found}) and would be loaded without its scales; name the original, or dequantise "
            "it and save it in bf16 or fp32"
        )
    beside = _beside(folder, layout)
    if beside:
        raise error(
            f"{who}: {beside[0]!r} lies beside its weights and would be left out; merge an adapter or scales into the "
            "weights and save them anew, or move the file away"
        )


def refuse_larger(
    who: str,
    folder: Path,
    layout: Layout,
    error: type[EcditError],
    *,
    depth: int,
    build: Callable[[], Any],
    times: int = 2,
) -> None:
    """Refuse a model that its configuration makes far larger than its files are, before memory is taken for it.

    Args:
        who, folder, layout, error: as `refuse_quantized`.
        depth: the number of layers that the configuration tells of, in its longest row.
        build: makes the model from its configuration.
        times: how many times as many numbers it may have as the files; those of a decoder may be left out.
    """
    import torch

    tensors = _tensors_of(folder, layout)
    if depth > len(tensors):
        raise error(
            f"{who}: its config.json tells of {depth} layers, and its files hold {len(tensors)} tensors; mend it"
        )
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in build().parameters())
    held = sum(prod(stored.shape) for stored in tensors.values())
    if needed > times * held:
        raise error(f"{who}: its config.json tells of {needed:,} numbers, and its files hold {held:,}; mend it")


def refuse_larger_of_transformers(
    who: str, folder: Path, error: type[EcditError], *, config: Any, model_class: Any
) -> None:
    """Refuse a model of transformers likewise, given the configuration and the class that it is loaded with."""
    if hasattr(model_class, "from_config"):
        build = partial(model_class.from_config, config, trust_remote_code=False)
    else:
        own = model_class.config_class.from_pretrained(str(folder), **LOCAL)  # of one tower, where there are several
        build = partial(model_class._from_config, own)
    depth = _depth_of(config.to_dict())
    # Up to here it takes no time to build, and some configurations name a layer that a small model has not.
    depth = depth if depth > _MOST_LAYERS_BUILT else 0
    refuse_larger(who, folder, TRANSFORMERS, error, depth=depth, build=build, times=8)


def _depth_of(config: Any) -> int:
    """Return the largest number of layers that a configuration tells of, in whichever of its sections."""
    found = [0]
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            found.append(_depth_of(value))
        elif _LAYERS.fullmatch(str(key)):
            found += [count for count in (value if isinstance(value, list) else [value]) if type(count) is int]
    return max(found)


def refuse_left_over(who: str, names: Iterable[str], error: type[EcditError]) -> None:
    """Refuse a model that did not take some tensors of its files, as `left_over` names them."""
    names = sorted(names)
    if names:
        raise error(
            f"{who}: {len(names)} tensors of its files have no place in the model, such as {names[0]!r}; scales, "
            "adapters, or layers that its config.json does not tell of would be left out: save it anew, whole"
        )


def left_over(model: Any, config: Any, unexpected: Iterable[str], folder: Path) -> list[str]:
    """Return the tensors that a model did not take and that are of no known model of its configuration, sorted.

    Such are scales of its weights, adapters, and layers of which its configuration does not tell. What is of a part
    that it does without (a head, a decoder, another tower) is no loss, nor are positions, counts and masks.

    Args:
        model: of transformers.
        config: that its folder holds, which may be of more than the model.
        unexpected: `unexpected_keys` of its loading info.
        folder: it was loaded from.
    """
    no_weights = [name for name, stored in _tensors_of(folder, TRANSFORMERS).items() if stored.is_no_weight(name)]
    # The library tells of names as the model has them, files have longer ones.
    rest = {key for key in unexpected if not any(f".{name}".endswith(f".{key}") for name in no_weights)}
    for whole in _whole_models(config):
        if not rest:
            break
        rest -= _known_to(whole, rest, f"{model.base_model_prefix}.")
    return sorted(rest)


def _whole_models(config: Any) -> Iterator[Any]:
    """Yield a model without memory of each class that the library has for a configuration, its own first."""
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    of_type = (v.get(config.model_type) for k, v in vars(modeling_auto).items() if k.endswith("_MAPPING_NAMES"))
    listed = (name for names in of_type if names for name in ((names,) if isinstance(names, str) else names))
    for name in dict.fromkeys((*(config.architectures or ()), *listed)):
        model_class = getattr(transformers, name, None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            continue
        try:
            with torch.device("meta"):
                model = model_class(config)
        except Exception:  # this configuration does not make it, so it has nothing to tell
            continue
        yield model


def _known_to(model: Any, keys: Iterable[str], prefix: str) -> set[str]:
    """Return those keys that are of a model, by the names that it has now or had in files of before."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    own = f"{model.base_model_prefix}."
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    names = {name.removeprefix(own) for name, _ in held}
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]

    def is_known(key: str) -> bool:
        now, _ = rename_source_key(key, renamings, [])
        return not names.isdisjoint((key.removeprefix(prefix), now.removeprefix(own)))

    return {key for key in keys if is_known(key)}


def not_in_index(folder: Path, layout: Layout) -> list[str]:
    """Return the tensors of a model's shards that its index does not name."""
    index = _index_of(folder, layout)
    return sorted(_tensors_of(folder, layout).keys() - index) if index else []


def _quantization_of(folder: Path, layout: Layout) -> str | None:
    """Return what says that a model is stored quantised, in words; None where nothing does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _QUANTIZED:
            if method := part.get(key):
                name = method.get("quant_method") if isinstance(method, dict) else method
                return f"config.json has a {key}, {name!r}"
    tensors = _tensors_of(folder, layout)
    odd = sorted(name for name, at in tensors.items() if at.kind not in _WHOLE and not at.is_no_weight(name))
    return f"{len(odd)} tensors such as {odd[0]!r} are stored as {tensors[odd[0]].kind}" if odd else None


def _beside(folder: Path, layout: Layout) -> list[str]:
    """Return the names of files that change a model's weights and are not read with them, sorted."""

    def is_of_the_model(path: Path) -> bool:
        rest = path.stem.removeprefix(layout.stem)
        is_weights = path.stem.startswith(layout.stem) and not _SHARD.sub("", _VARIANT.sub("", rest, 1), 1)
        return is_weights or bool(_OTHER_LAYOUTS.fullmatch(path.stem))

    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    if named:  # which transformers would read in place of what is looked at here
        return [str(named)]
    adapters = [path for path in folder.glob("adapter_config.json") if path.is_file()]
    others = [path for path in folder.glob("*.safetensors") if not is_of_the_model(path)]
    return sorted(path.name for path in {*adapters, *others} - set(_files_of(folder, layout)))


def _tensors_of(folder: Path, layout: Layout) -> dict[str, _Stored]:
    """Return how each tensor in the files that are loaded is stored; only headers are read."""
    tensors: dict[str, _Stored] = {}
    for path in _files_of(folder, layout):
        with safe_open(plain_file(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  no dict
                at = file.get_slice(name)
                tensors[name] = _Stored(kind=at.get_dtype(), shape=tuple(at.get_shape()))
    return tensors


def _files_of(folder: Path, layout: Layout) -> list[Path]:
    """Return the one file or the shards that a library reads, as it chooses; other files may lie beside them."""
    index = _index_of(folder, layout)
    return [folder / name for name in sorted(set(index.values()))] or [folder / f"{layout.stem}.safetensors"]


def _index_of(folder: Path, layout: Layout) -> dict[str, str]:
    """Return tensor -> shard, empty where one file is read."""
    path = folder / f"{layout.stem}.safetensors.index.json"
    if not path.is_file() or (not layout.prefers_index and (folder / f"{layout.stem}.safetensors").is_file()):
        return {}
    index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    for name in index.values():  # which is joined to the folder, and read, wherever that leads
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{path.name} names {name!r}, which is no file beside it")
    return index
