"""From a checkpoint's folder to a model that draws: on one device, cut by a layout, or spread by accelerate."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.sources import INDEX_NAME, SafetensorsSource, read_part
from ecdit_ds.checkpoint.finite import count_nonfinite, require_finite_tensors
from ecdit_ds.checkpoint.manifest import encode_manifest
from ecdit_ds.checkpoint.naming import MANIFEST_NAME
from ecdit_ds.checkpoint.reader import Reader, newest_valid
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import recipe_from_dict
from ecdit_ds.data.encoders.base import ImageEncoder, TextEmbeddings, TextEncoder
from ecdit_ds.data.encoders.from_recipe import earlier_encoder_facts
from ecdit_ds.data.encoders.spec import null_text_of, open_image_encoder, open_text_encoder
from ecdit_ds.errors import CheckpointError, ConfigError, DataError, escape_unprintable
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.init import empty_model
from ecdit_ds.model.layers import LayerFactory
from ecdit_ds.model.sharding import shard_of
from ecdit_ds.parallel.expert_parallel import serial_layers

WEIGHT_KINDS = ("ema", "weight")
"""Averaged weights, and those of the last step."""


@dataclass(frozen=True, kw_only=True)
class ModelCheckpoint:
    """A model on disk, whatever layout or tool wrote it."""

    folder: Path
    step: int
    kind: str
    """`ema` or `weight`."""
    identity: str
    """Changes with the content, wherever the folder is."""
    recipe: Recipe
    encoders: Mapping[str, Any] | None
    """What `describe_encoders` returned; None of earlier releases, and of what DeepSpeed alone wrote."""
    expect: Callable[[str, tuple[int, ...]], None]
    """(parameter, global shape): raises CheckpointError for one that is missing or of another shape; reads nothing."""
    read_into: Callable[[str, Box, Tensor], None]
    """(parameter, box of it, where to): raises CheckpointError for what is missing or damaged."""

    def expect_all_of(self, model: nn.Module) -> None:
        """Compare the shapes of a model, which may be on `meta`, before memory is taken for what its recipe claims."""
        for name, parameter in model.named_parameters():
            self.expect(name, shard_of(parameter).global_shape)

    def fill(self, name: str, box: Box, out: Tensor) -> None:
        """As `read_into`; and raise CheckpointError for what is not finite, or is not any more as `out` holds it."""
        self.read_into(name, box, out)
        if count := count_nonfinite(out):
            raise CheckpointError(
                f"{self.folder}: {count:,} numbers of {self.kind}/{name} are not finite as {out.dtype}; use a "
                "checkpoint from before, or another type"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderFolders:
    """Where the encoders of a model are now, if not where they were; others in their place are refused."""

    vae: str | None = None
    text: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class DeviceMapConfig:
    """How accelerate shall place a model that is larger than one device."""

    device_map: str | Mapping[str, Any] = "auto"
    """`auto`, or module name -> device."""
    max_memory: Mapping[int | str, int | str] | None = None
    """Device -> bytes or text such as 10GiB; by default what is free."""
    offload_folder: Path | None = None
    """Where weights wait that fit neither devices nor host memory; for one loaded model at a time."""


def open_model(path: Path, kind: str | None = None) -> ModelCheckpoint:
    """Open a checkpoint, the newest valid one of a run's folder, or a folder of safetensors that was exported.

    Args:
        path: any of these.
        kind: of weights; by default the average, or the one kind that an export holds.

    Raises:
        CheckpointError: it is none of these, damaged, without a usable recipe, lacks that kind, or says that some of
            it is not finite.
    """
    if kind not in (None, *WEIGHT_KINDS):
        raise CheckpointError(f"weights: {kind!r} is not known; choose from {', '.join(WEIGHT_KINDS)}")
    if (path / INDEX_NAME).is_file() and not (path / MANIFEST_NAME).is_file():
        return _open_export(path, kind)
    reader = _open_checkpoint(path)
    _require_finite_kind(reader.folder, kind or "ema", reader.manifest.nonfinite)

    def expect(name: str, shape: tuple[int, ...]) -> None:
        reader.expect(f"{kind or 'ema'}/{name}", shape)

    def read_into(name: str, box: Box, out: Tensor) -> None:
        reader.read_into(f"{kind or 'ema'}/{name}", box, out)

    recipe = _recipe_in(reader.manifest.meta, reader.folder)
    identity = xxhash.xxh3_64_hexdigest(encode_manifest(reader.manifest))  # it holds the checksums of all data
    return ModelCheckpoint(
        folder=reader.folder,
        step=reader.manifest.step,
        kind=kind or "ema",
        identity=identity,
        recipe=recipe,
        encoders=reader.manifest.meta.get("encoders"),
        expect=expect,
        read_into=read_into,
    )


def load_generator(
    path: Path,
    *,
    kind: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    layers: LayerFactory | None = None,
    folders: EncoderFolders | None = None,
) -> TextToImage:
    """Load a model for drawing, from any layout's checkpoint.

    Args:
        path: as `open_model`.
        kind: as `open_model`.
        dtype: of weights and activations; scores of routers stay fp32.
        device: the first GPU by default, else the CPU.
        layers: this rank's, where a layout cuts the model; each rank reads what it holds.
        folders: of encoders that have moved.

    Raises:
        CheckpointError: missing, damaged, or of another model than its recipe says.
        DataError: its encoders are not where it says, or others.
    """
    stored = open_model(path, kind)
    encoders = open_encoders(stored, folders)  # before reading weights, which takes longer
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        stored.expect_all_of(ECDiT(stored.recipe.model, serial_layers()))
    model = empty_model(stored.recipe.model, layers or serial_layers(), device, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        stored.fill(name, Box(shard_of(parameter).offset, tuple(parameter.shape)), parameter.detach())
    return _drawer(model, stored.recipe, device, encoders)


def load_with_device_map(
    path: Path,
    spread: DeviceMapConfig,
    *,
    kind: str | None = None,
    dtype: torch.dtype = torch.float32,
    folders: EncoderFolders | None = None,
) -> TextToImage:
    """Load a model that is larger than one device, its blocks placed by accelerate's device map.

    Weights that wait in host memory or on disk come to a device for their layer's forward and go again. No more than
    one tensor is held besides.

    Raises:
        CheckpointError: as `load_generator`.
        ConfigError: the map, its memory or its folder cannot be used.
    """
    from accelerate import dispatch_model
    from accelerate.utils import set_module_tensor_to_device

    stored = open_model(path, kind)
    encoders = open_encoders(stored, folders)
    with torch.device("meta"):
        model = ECDiT(stored.recipe.model, serial_layers()).eval().to(dtype)
    stored.expect_all_of(model)
    device_map = _device_map(model, spread, dtype)
    waiting = _Offloaded(spread.offload_folder)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        values = torch.empty(shape, dtype=dtype)
        stored.fill(name, Box((0,) * len(shape), shape), values)
        place = _place_of(name, device_map)
        if place == "disk":
            waiting.put(name, values)
        else:
            set_module_tensor_to_device(model, name, place, value=values)
    main = next((place for place in device_map.values() if place not in ("cpu", "disk")), "cpu")
    try:
        model = dispatch_model(
            model, device_map, main, offload_dir=spread.offload_folder, offload_index=waiting.index, force_hooks=True
        )
    except ValueError as error:
        raise ConfigError(f"device_map: {device_map} cannot be used: {error}") from None
    return _drawer(model, stored.recipe, torch.device(main), encoders)


class _Offloaded:
    """Weights that wait in a folder, and accelerate's index of them."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.index: dict[str, Any] | None = None

    def put(self, name: str, values: Tensor) -> None:
        from accelerate.utils import offload_weight

        assert self._folder is not None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{name}.dat").unlink(missing_ok=True)  # accelerate would write through a link
            self.index = offload_weight(values, name, str(self._folder), index=self.index or {})
        except OSError as error:
            raise ConfigError(f"offload_folder: {self._folder} cannot be written: {error.strerror}") from None


Encoders = tuple[ImageEncoder, TextEncoder, TextEmbeddings | None]
"""Both, and the text of no text, where the checkpoint has one."""


def open_encoders(
    stored: ModelCheckpoint, folders: EncoderFolders | None = None, device: torch.device | None = None
) -> Encoders:
    """Open the encoders that a model was trained through, by its checkpoint or, if that is an older one, its set.

    Args:
        folders: of those that have moved.
        device: where encoders with weights are; by default in host memory.

    Raises:
        CheckpointError: what the checkpoint says is damaged.
        DataError: they are not where they were, or others.
    """
    folders = folders or EncoderFolders()
    facts, null_text = stored.encoders, None
    if facts is None:
        facts = earlier_encoder_facts(stored.recipe)
    elif not (isinstance(facts, dict) and all(isinstance(facts.get(k), dict) for k in ("image", "text", "null_text"))):
        raise CheckpointError(f"{stored.folder}: does not say what its encoders were; use another checkpoint")
    else:
        null_text = _null_text_in(facts["null_text"], stored)
    with _elsewhere(None if folders.vae else "--vae DIR (in Python, vae=DIR)", facts["image"].get("name")):
        image_encoder = open_image_encoder(facts["image"], name=folders.vae, device=device)
    with _elsewhere(None if folders.text else "--text DIR (in Python, text=DIR)", facts["text"].get("names")):
        text_encoder = open_text_encoder(facts["text"], names=folders.text, device=device)
    return image_encoder, text_encoder, null_text


def _null_text_in(facts: Mapping[str, Any], stored: ModelCheckpoint) -> TextEmbeddings:
    try:
        null_text = null_text_of(facts)
    except DataError as error:
        raise CheckpointError(f"{stored.folder}: {error}; use another checkpoint") from None
    config, shape = stored.recipe.model, tuple(null_text.embeds_BTD.shape[1:])
    if shape != (config.max_text_tokens, config.text_embed_dim):
        raise CheckpointError(
            f"{stored.folder}: the text of no text is {shape}, but the model's texts are "
            f"{(config.max_text_tokens, config.text_embed_dim)} (tokens, width); use another checkpoint"
        )
    return null_text


@contextmanager
def _elsewhere(flag: str | None, place: Any) -> Iterator[None]:
    """Add to what is wrong with an encoder how to say where it is, if that was not said and it is somewhere."""
    try:
        yield
    except DataError as error:
        if flag is None or not place:
            raise
        raise DataError(f"{error}; if it is elsewhere now, say where: {flag}") from None


def _drawer(model: ECDiT, recipe: Recipe, device: torch.device, encoders: Encoders) -> TextToImage:
    image_encoder, text_encoder, null_text = encoders
    return TextToImage(
        model=model,
        recipe=recipe,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        device=device,
        null_text=null_text,
    )


def _device_map(model: nn.Module, spread: DeviceMapConfig, dtype: torch.dtype) -> dict[str, Any]:
    from accelerate import infer_auto_device_map

    if not isinstance(spread.device_map, str):
        device_map = {name: str(at) if isinstance(at, torch.device) else at for name, at in spread.device_map.items()}
    elif spread.device_map != "auto":
        raise ConfigError(f"device_map: {spread.device_map!r} is not known; give auto or a map of modules to devices")
    else:
        memory = None if spread.max_memory is None else dict(spread.max_memory)
        try:
            device_map = dict(infer_auto_device_map(model, memory, no_split_module_classes=["DiTBlock"], dtype=dtype))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"max_memory: {spread.max_memory}: {error}") from None
    for name, _ in model.named_parameters():
        _place_of(name, device_map)
    for module, place in device_map.items():
        _check_place(module, place)
    if "disk" in device_map.values() and spread.offload_folder is None:
        raise ConfigError(
            "device_map: some layers fit neither the devices nor host memory; give an offload_folder on a fast disk, "
            "or raise max_memory"
        )
    return device_map


def _place_of(name: str, device_map: Mapping[str, Any]) -> Any:
    module = name
    while module and module not in device_map:
        module = module.rpartition(".")[0]
    if module not in device_map:
        raise ConfigError(f"device_map: has no device for {name}; it has {', '.join(device_map)}")
    return device_map[module]


def _check_place(module: str, place: Any) -> None:
    if place == "disk":
        return
    try:
        usable = not torch.empty(0, device=torch.device(place)).is_meta
        reason = "which holds no numbers"
    except (RuntimeError, AssertionError, TypeError) as error:
        usable, reason = False, str(error).splitlines()[0]
    if not usable:
        raise ConfigError(
            f"device_map: {module or 'the model'} cannot be on {place!r}: {reason}; this machine has cpu, disk and "
            f"{torch.cuda.device_count()} GPUs"
        )


def _open_export(folder: Path, kind: str | None) -> ModelCheckpoint:
    source = SafetensorsSource(folder)
    held = sorted({name.split("/", 1)[0] for name in source.tensors})
    if len(held) != 1 or kind not in (None, *held):
        raise CheckpointError(f"{folder}: holds {', '.join(held) or 'nothing'}, not {kind or 'one kind of weights'}")

    def expect(name: str, shape: tuple[int, ...]) -> None:
        stored = source.tensors.get(f"{held[0]}/{name}")
        if stored is None or stored[1] != shape:
            found = "none" if stored is None else f"one of shape {list(stored[1])}"
            raise CheckpointError(
                f"{folder}: its recipe's model needs {name} of shape {list(shape)}, but it holds {found}; export again"
            )

    def read_into(name: str, box: Box, out: Tensor) -> None:
        out.copy_(read_part(source, f"{held[0]}/{name}", box))

    _require_finite_kind(folder, held[0], source.nonfinite)
    identity = xxhash.xxh3_64_hexdigest(" ".join(source.identity).encode())
    recipe = _recipe_in(source.meta, folder)
    return ModelCheckpoint(
        folder=folder,
        step=source.step,
        kind=held[0],
        identity=identity,
        recipe=recipe,
        encoders=source.meta.get("encoders"),
        expect=expect,
        read_into=read_into,
    )


def _open_checkpoint(path: Path) -> Reader:
    if (path / MANIFEST_NAME).is_file():
        return Reader(path)
    for root in (path / "checkpoints", path):
        reader, rejections = newest_valid(root)
        for rejection in rejections:
            print(escape_unprintable(f"skipped {rejection}"))
        if reader is not None:
            return reader
    raise CheckpointError(
        f"{path}: is neither a checkpoint, nor a run with checkpoints, nor a folder with {INDEX_NAME}; other formats "
        "become one of these by tools/convert_ckpt.py"
    )


def _require_finite_kind(folder: Path, kind: str, nonfinite: Mapping[str, int] | None) -> None:
    """Refuse what cannot be drawn with; the rest, such as moments, is not looked at."""
    require_finite_tensors(folder, {name: n for name, n in (nonfinite or {}).items() if name.startswith(f"{kind}/")})


def _recipe_in(meta: Mapping[str, Any], where: Path) -> Recipe:
    try:
        return recipe_from_dict(dict(meta["recipe"]))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{where}: its recipe cannot be used: {error}") from None
