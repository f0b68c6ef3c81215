"""Models of `transformers` that judge pictures: from local files, weights as safetensors, and nothing left random.

A model is a folder, or the hub name of one that is in the local cache; nothing is downloaded. A weight that the files
do not hold would be drawn at random, and every number computed with it would look plausible; so it is refused, and so
is one of which the files hold more than the model takes, such as the scales of quantised weights.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import cached_file

from ecdit_ds.data.encoders.folders import commit_of
from ecdit_ds.data.encoders.stored_weights import (
    LOCAL,
    TRANSFORMERS,
    left_over,
    opening,
    refuse_larger_of_transformers,
    refuse_left_over,
    refuse_quantized,
)
from ecdit_ds.errors import EvaluationError

T = TypeVar("T")
_MOST_PIXELS_A_SIDE = 8192
"""Largest side of an image that a judge is shown; published models want a thousand at most."""
_opening = partial(opening, error=EvaluationError)


def read_config(name: str, *, purpose: str) -> Any:
    """Return the configuration of a model.

    Args:
        name: a folder, or the hub name of a model in the local cache.
        purpose: what it is for, such as "features model"; errors begin with it.

    Raises:
        EvaluationError: no name is given, or there is no such model.
    """
    if not name:
        raise EvaluationError(
            f"{purpose}: none given; name a folder of transformers, or a model of the local hub cache"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise EvaluationError(
            f"{purpose} {name}: no model folder, since it has no config.json; save_pretrained makes one"
        )
    with _opening(f"{purpose} {name}: neither a model folder nor a model of the local hub cache"):
        return AutoConfig.from_pretrained(name, **LOCAL)


def load_image_processor(name: str, *, purpose: str) -> Any:
    """Return what turns pictures into a model's input; raise EvaluationError where the model has none."""
    with _opening(
        f"{purpose} {name}: has no image processor (preprocessor_config.json) that works, so it cannot see pictures"
    ):
        processor = AutoImageProcessor.from_pretrained(name, **LOCAL, backend="pil")
        settings = processor.to_dict()
        sides = [side for name in ("size", "crop_size", "pad_size") for side in _numbers_in(settings.get(name))]
        if max(sides, default=0) > _MOST_PIXELS_A_SIDE:
            raise ValueError(f"it makes pictures of {max(sides)} pixels a side, the most is {_MOST_PIXELS_A_SIDE}")
        processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")
    return processor


def _numbers_in(sizes: Any) -> list[int]:
    """Return the sides that a processor's setting names: a number, or several by name."""
    sides = sizes.values() if isinstance(sizes, dict) else [sizes]
    return [side for side in sides if type(side) is int]


def load_caption_tokenizer(name: str, *, purpose: str) -> Any:
    """Return what turns captions into a model's input; raise EvaluationError where the model has none."""
    message = f"{purpose} {name}: has no tokenizer (tokenizer.json), so it cannot read captions"
    with _opening(message):
        tokenizer = AutoTokenizer.from_pretrained(name, **LOCAL)
    # transformers 5 makes an empty tokenizer where a folder has none, and every caption would read the same.
    if not set(tokenizer("a")["input_ids"]) - set(tokenizer.all_special_ids):
        raise EvaluationError(message)
    return tokenizer


def load_model(
    auto_class: Any,
    name: str,
    *,
    purpose: str,
    device: torch.device,
    may_lack: Callable[[str], bool] = lambda name: False,
) -> tuple[Any, frozenset[str]]:
    """Load a frozen model in fp32.

    Args:
        auto_class: one of transformers' AutoModel classes.
        may_lack: says of a parameter's name that the caller does without it.

    Returns:
        The model, and the names of the parameters that its files lack: these hold random numbers.

    Raises:
        EvaluationError: no safetensors, a parameter is missing or of another shape, weights are quantised, or some of
            the files' have no place in the model.
    """
    with _opening(f"{purpose} {name}: cannot be loaded as {auto_class.__name__} from safetensors"):
        folder = Path(str(cached_file(name, "config.json", local_files_only=True))).parent
        refuse_quantized(f"{purpose} {name}", folder, TRANSFORMERS, EvaluationError)
        config = read_config(name, purpose=purpose)
        refuse_larger_of_transformers(
            f"{purpose} {name}", folder, EvaluationError, config=config, model_class=auto_class
        )
        model, found = auto_class.from_pretrained(
            name,
            **LOCAL,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        unknown = left_over(model, config, found["unexpected_keys"], folder)
    absent = {*found["missing_keys"], *(key for key, *_shapes in found["mismatched_keys"])}
    missing = frozenset(absent & {name for name, _ in model.named_parameters()})
    needed = sorted(parameter for parameter in missing if not may_lack(parameter))
    if needed:
        raise EvaluationError(
            f"{purpose} {name}: {len(needed)} weights of {type(model).__name__} are not in its files, or of another "
            f"shape, such as {needed[0]}; they would be random"
        )
    refuse_left_over(f"{purpose} {name}", unknown, EvaluationError)
    return model.eval().requires_grad_(False).to(device), missing


def model_fingerprint(model: nn.Module, processor: Any, *, without: frozenset[str] = frozenset()) -> str:
    """Return a name of what fixes a model's output: its weights, `without` some, and its image processor's settings."""
    digest = xxhash.xxh3_128()
    states = model.state_dict()
    for name in sorted(states.keys() - without):
        tensor = states[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
    return f"{type(model).__name__}-{digest.hexdigest()}"


def revisions(**names: str) -> dict[str, str]:
    """Return the commits of models that came from the hub, as `JUDGE_revision`, for a table of scores.

    Args:
        names: of each judge, as `load_model` has loaded it.
    """
    files = {judge: Path(str(cached_file(name, "config.json", local_files_only=True))) for judge, name in names.items()}
    return {f"{judge}_revision": commit for judge, file in files.items() if (commit := commit_of(file))}


def in_batches(
    pictures: Iterable[Image.Image],
    processor: Any,
    forward: Callable[[dict[str, Tensor], list[Image.Image]], Iterable[T]],
    *,
    batch_size: int,
    device: torch.device,
) -> Iterator[list[T]]:
    """Yield, for every `batch_size` pictures, one result each, in order; no gradients.

    Each picture is prepared alone, and only inputs of one shape go through the model together: a processor that pads
    to the largest picture of a batch would let a result depend on its neighbours.

    Args:
        pictures: of any sizes and modes; consumed as they are needed.
        forward: gets the stacked inputs on `device` and their pictures in RGB; returns one result each.
    """
    for chunk in chunks(pictures, batch_size):
        shown = [picture.convert("RGB") for picture in chunk]
        inputs = [dict(processor(images=picture, return_tensors="pt")) for picture in shown]
        places: dict[tuple[int, ...], list[int]] = {}
        for i, prepared in enumerate(inputs):
            places.setdefault(tuple(prepared["pixel_values"].shape), []).append(i)
        results: dict[int, T] = {}
        for group in places.values():
            tensors = [name for name, value in inputs[group[0]].items() if isinstance(value, Tensor)]
            stacked = {name: torch.cat([inputs[i][name] for i in group]).to(device) for name in tensors}
            with torch.no_grad():
                results.update(zip(group, forward(stacked, [shown[i] for i in group]), strict=True))
        yield [results[i] for i in range(len(chunk))]


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items, the last one shorter; raise EvaluationError unless `size` is at least 1."""
    if size < 1:
        raise EvaluationError(f"batch size {size}: must be at least 1")
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
