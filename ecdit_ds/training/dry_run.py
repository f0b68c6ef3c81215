"""Everything about a run that can be checked without the cluster: as one rank of any number, and without a GPU.

The model, the groups and the cuts are those of training, on a process group that sends nothing and tensors that hold
nothing. What is counted on them stands beside the planner's arithmetic.
"""

import dataclasses
import itertools
import os
import shutil
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.config.recipe import STATE_NAMES, Recipe
from ecdit_ds.data.digit_scenes.scenes import Split
from ecdit_ds.data.encoders.base import Factor, PixelVAE
from ecdit_ds.data.encoders.from_recipe import check_encodable, encoders_of, runs_encoders
from ecdit_ds.data.encoders.spec import count_encoder_parameters
from ecdit_ds.data.mixture import Bucket
from ecdit_ds.data.splits import SplitInfo, pixel_codec, validate_split
from ecdit_ds.errors import CheckpointError, ConfigError
from ecdit_ds.flow.objective import FlowBatch, flow_losses
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.layers import LayerFactory
from ecdit_ds.parallel.activation_checkpoint import Recompute
from ecdit_ds.parallel.deepspeed_moe import zero_shard_of
from ecdit_ds.parallel.layout_table import MAX_RANKS, draw_layout
from ecdit_ds.parallel.setup import init_process_groups, initialize_distributed
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.activations import peak_activations, shapes_of
from ecdit_ds.planner.flops import training_flops
from ecdit_ds.planner.memory import checkpoint_bytes, memory_of_rank
from ecdit_ds.planner.parameters import NUMBER_BYTES, count_parameters
from ecdit_ds.planner.plan import phases_of
from ecdit_ds.planner.zero import zero_settings
from ecdit_ds.training.engine import optimizer_groups
from ecdit_ds.training.memory_tracker import MemoryTracker
from ecdit_ds.training.run_dir import RunDir
from ecdit_ds.training.train_state import check_not_beyond, check_same_recipe, none_valid, rejection_of, schedule_jumps

_FP32 = 4
_GB = 1e9


def dry_run(
    recipe: Recipe,
    topology: Topology,
    deepspeed_config: dict[str, Any],
    rank: int,
    output: Path,
    *,
    is_named: bool,
    resume: str = "auto",
) -> tuple[str, bool]:
    """Check what can be checked, and return what was found: sizes, batch, memory of rank `rank`, disk and data.

    Creates process groups, so it is done once in a process.

    Args:
        output: the run's folder, which need not exist.
        is_named: whether a person named it, and means to train there; only then a lack of room in it, or of data, is an
            error.
        resume: as `RunDir.candidates`.

    Returns:
        What was found, for people, and whether the same command without --dry-run would train.

    Raises:
        EcditError: the run would fail, and why.
    """
    check_encodable(recipe)
    stage = deepspeed_config["zero_optimization"]["stage"]
    disk, has_room = _disk(recipe, output, is_named)
    resumes, can_resume = _resume(recipe, output, resume, is_named)
    lines = [*_sizes(recipe, topology, stage), *_data(recipe), disk, *resumes]
    if 1 < topology.world_size <= MAX_RANKS:
        lines += ["", draw_layout(recipe, topology)]
    lines += ["", *_memory_table(recipe, topology, deepspeed_config, rank), ""]
    unnamed = [f"data.{key}" for key in ("path", "heldout_path") if getattr(recipe.data, key) is None]
    needs = unnamed if recipe.data.dataset == "encoded" else []
    if is_named and needs:
        raise ConfigError(f"{needs[0]}: names no folder; give --set {needs[0]}=DIR")
    needs = needs or ([] if has_room and can_resume else ["another --output"])
    verdict = f"the other checks passed, but training needs {' and '.join(needs)}" if needs else "all checks passed"
    return "\n".join([*lines, f"{verdict}; nothing was trained"]), not needs


def _sizes(recipe: Recipe, topology: Topology, stage: int) -> list[str]:
    config, train = recipe.model, recipe.train
    count, micro = count_parameters(config), recipe.micro_batch_size(topology.dp)
    active = count.activated - (count.with_encoders - count.dit)
    lines = [
        f"recipe       {recipe.name}",
        f"model        {count.dit:,} parameters, {active:,} active a token, {config.num_layers} layers, "
        f"{config.num_tokens} tokens an image",
    ]
    if config.is_sparse:
        tokens = config.num_kept_tokens(train.mask_ratio)
        pool = tokens * (micro if config.ffn == "token_choice" else config.pool_images(micro))
        lines.append(
            f"experts      {config.num_experts} in every second layer, {config.num_experts // topology.ep} a rank, "
            f"each takes {config.expert_capacity(pool)} of {pool} tokens ({config.ffn})"
        )
    lines += [
        f"layout       {topology.world_size} ranks = data {topology.dp} x tensor {topology.tp}; "
        f"experts over {topology.ep}, {topology.edp} copies; ZeRO-{stage}, {train.precision}",
        f"batch        {train.global_batch_size} images a step = {topology.dp} ranks x {micro} "
        f"x {train.global_batch_size // (micro * topology.dp)} accumulated",
    ]
    for _, _, ratio in phases_of(recipe):
        kept = config.num_kept_tokens(ratio)
        whole, main = (
            training_flops(dataclasses.replace(config, decoder_layers=layers), kept, config.pool_images(micro)).total
            / 1e9
            for layers in (config.decoder_layers, 0)
        )
        seen = f"; {main:,.4g} but for the decoder, which alone sees all: {kept} of {config.num_tokens} tokens"
        lines.append(
            f"compute      {whole:,.4g} GFLOP an image, forward and backward{seen if config.decoder_layers else ''}"
        )
    return lines


def _data(recipe: Recipe) -> list[str]:
    data = recipe.data
    if data.dataset == "digit_scenes":
        return [f"data         {data.num_train} digit scenes, {data.num_heldout} held out; encoded in {data.cache_dir}"]
    splits: list[tuple[Split, str, tuple[str, ...]]] = [
        ("train", "path", data.paths),
        ("heldout", "heldout_path", (data.heldout_path,) if data.heldout_path else ()),
    ]
    lines = []
    for split, key, paths in splits:
        if not paths:
            lines.append(f"data         data.{key} names no folder yet, and training will not start without")
            continue
        facts = validate_split(recipe, split)
        lines.append(f"data         {_told(facts, 'raw' if data.is_online else 'encoded')}")
        lines += [f"warning      {', '.join(paths)}: {facts.warning}"] if facts.warning else []
        if split == "train":
            lines += small_sizes(facts.held, recipe.train.global_batch_size)
    return [*lines, *_pixels(recipe), *_beside(recipe)]


def _pixels(recipe: Recipe) -> list[str]:
    """Say by what pixels become latents where no autoencoder makes them."""
    data = recipe.data
    codec = pixel_codec(recipe) if not data.is_online else encoders_of(recipe)[0] if data.paths else None
    if not isinstance(codec, PixelVAE):
        return []
    whose = "as data.shift_factor and scaling_factor say" if data.shift_factor else "by the training set's own factors"
    shift, scale = (_numbers(factor) for factor in (codec.shift_factor, codec.scaling_factor))
    return [f"pixels       are latents without an autoencoder, {whose}: minus {shift}, times {scale}"]


def _numbers(factor: Factor) -> str:
    return " ".join(f"{value:.4g}" for value in (factor if isinstance(factor, tuple) else (factor,)))


def small_sizes(held: Mapping[Bucket, int], batch: int) -> list[str]:
    """Return a line about sizes of latents of which there are fewer samples than a step takes, if any are."""
    few = [f"{height} x {width} ({count})" for (_, height, width), count in held.items() if count < batch]
    if not few:
        return []
    return [
        f"small        fewer samples than the {batch} of a step: {', '.join(few)}; some come twice or more in a "
        "step; encode with fewer --buckets, or lower train.global_batch_size"
    ]


def _beside(recipe: Recipe) -> list[str]:
    """Say what is encoded beside training, and what that keeps on each device."""
    if not runs_encoders(recipe):
        return []
    what = "pictures and captions" if recipe.data.is_online else "captions"
    (images, image_bytes), (texts, text_bytes) = (count_encoder_parameters(encoder) for encoder in encoders_of(recipe))
    sizes = f"{images:,} parameters of the image encoder and {texts:,} of the text encoder"
    return [
        f"beside       {what} are encoded beside training: each device keeps {sizes}, {_gb(image_bytes + text_bytes)}"
    ]


def _told(facts: SplitInfo, kind: str) -> str:
    """Say how many samples a split has, in which sets, and of which sizes; shares where there are several."""
    sets = _with_shares(dict(facts.sets))
    sizes = _with_shares({f"{height} x {width}": share for (_, height, width), share in facts.buckets.items()})
    return f"{facts.count} {kind} samples in {sets}; latents {sizes}"


def _with_shares(shares: dict[str, Fraction]) -> str:
    if len(shares) == 1:
        return next(iter(shares))
    return ", ".join(f"{name} ({float(100 * share):.3g} %)" for name, share in shares.items())


def _disk(recipe: Recipe, output: Path, is_named: bool) -> tuple[str, bool]:
    """Say how the checkpoints compare with the room where they would go: those that are kept, and one being written."""
    one, keep = checkpoint_bytes(recipe), recipe.train.keep_checkpoints
    there = output.absolute()
    while not there.exists():
        there = there.parent
    if is_named and not os.access(there, os.W_OK):
        raise ConfigError(f"--output {output}: nothing can be written in {there}; choose another folder")
    needed, free = one * (keep + 1), shutil.disk_usage(there).free
    sum_text = f"{_gb(one)} a checkpoint x ({keep} kept + 1 being written) = {_gb(needed)}"
    if free >= needed:
        return f"disk         {sum_text}, of {_gb(free)} free in {there}", True
    if is_named:
        raise ConfigError(f"--output {output}: {sum_text}, but {there} has {_gb(free)} free; choose another folder")
    return f"disk         {sum_text}; {there} has {_gb(free)} free, so the run needs another --output", False


def _resume(recipe: Recipe, output: Path, resume: str, is_named: bool) -> tuple[list[str], bool]:
    """Say from where the run would go on, what it would pass over, and what would jump; nothing of a fresh start.

    Manifests are read and sizes compared, no tensors: the run itself passes over what turns out damaged then.
    """

    def check_same(meta: Mapping[str, Any], folder: Path) -> None:
        check_same_recipe(meta["recipe"], recipe, folder)

    faults: list[str] = []
    try:
        for folder in RunDir(path=output).candidates(resume):
            if fault := rejection_of(folder, check_same):
                faults.append(fault)
                continue
            manifest = Reader(folder).manifest
            check_not_beyond(manifest.step, recipe, output)
            told = [f"would be rejected: {fault}" for fault in faults]
            told.append(f"goes on from {folder} at step {manifest.step}")
            told += schedule_jumps(manifest.meta["recipe"], recipe, manifest.step)
            return [f"resume       {told[0]}", *(f"{'':<13}{line}" for line in told[1:])], True
        if faults:
            raise none_valid(faults)
    except (CheckpointError, ConfigError) as error:
        if is_named:
            raise
        return [f"resume       {error}"], False
    return [], True


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / _GB:,.0f} GB" if num_bytes >= 100 * _GB else f"{num_bytes / _GB:.3g} GB"


def _memory_table(recipe: Recipe, topology: Topology, deepspeed_config: dict[str, Any], rank: int) -> list[str]:
    zero = zero_settings(deepspeed_config)
    ratio = min(ratio for _, _, ratio in phases_of(recipe))
    counted = count_memory(recipe, topology, deepspeed_config, rank, ratio)
    planned = memory_of_rank(recipe, topology, zero, ratio, rank)
    shapes = shapes_of(recipe, topology, ratio, is_gpu=False)
    planned_here = {"activations": peak_activations(recipe, shapes)}
    lines = [f"memory of rank {rank}                  counted       planner"]
    for kind, what in (
        ("parameters", "weights"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer, with fp32 weights"),
        ("ema", "average"),
        ("activations", "activations, CPU kernels"),
    ):
        value = planned_here.get(kind, getattr(planned, kind))
        lines.append(f"  {what:<30}{counted[kind] / _GB:>9.3f} GB {value / _GB:>9.3f} GB")
    lines.append(f"  {'activations, GPU kernels':<30}{'':>12} {planned.activations / _GB:>9.3f} GB")
    lines.append(f"  {'buffers':<30}{'':>12} {planned.buffers / _GB:>9.3f} GB")
    return [*lines, f"  {'most at one time, on a GPU':<30}{'':>12} {planned.total / _GB:>9.3f} GB"]


def count_memory(
    recipe: Recipe, topology: Topology, deepspeed_config: dict[str, Any], rank: int, mask_ratio: float
) -> dict[str, int]:
    """Return bytes by kind (as in `Memory`) of the real objects of `rank`, all of them without memory.

    Weights, gradients and what the optimizer keeps follow from the model's parameters, their groups, and the sizes of
    the process groups that ZeRO cuts them over; small ones ZeRO-3 keeps whole besides. Activations are the most that
    lives at one time in a forward and backward of one micro-batch.
    """
    zero = deepspeed_config["zero_optimization"]
    is_offloaded, width = "offload_optimizer" in zero, NUMBER_BYTES[recipe.train.precision]
    layers = _layers_of_rank(topology, rank, recipe.parallel.dispatch_chunks)
    recompute = Recompute(mode=recipe.train.recompute, every=recipe.train.recompute_every)
    with torch.device("meta"):
        model = ECDiT(recipe.model, layers, recompute).to(torch.bfloat16 if width == 2 else torch.float32)
    whole = kept = touched = 0
    for group in optimizer_groups(model, recipe.optimizer.weight_decay, zero["stage"]):
        of_group = count_group(group["params"], is_cut_by_parameter=zero["stage"] == 3)
        whole, kept, touched = (total + more for total, more in zip((whole, kept, touched), of_group, strict=True))
    is_persistent = zero_settings(deepspeed_config).is_persistent
    small = sum(parameter.numel() for parameter in model.parameters() if is_persistent(parameter.numel()))
    on_device = 0 if is_offloaded else kept
    gradients = {1: whole, 2: touched, 3: kept}[zero["stage"]]
    return {
        "parameters": width * (kept + small if zero["stage"] == 3 else whole),
        "gradients": width * (0 if is_offloaded and zero["stage"] > 1 else gradients),
        "optimizer": _FP32 * (1 + len(STATE_NAMES[recipe.optimizer.name])) * on_device,
        "ema": _FP32 * on_device,
        "activations": _peak_of_a_step(model, recipe, recipe.micro_batch_size(topology.dp), mask_ratio),
    }


def count_group(parameters: list[nn.Parameter], *, is_cut_by_parameter: bool) -> tuple[int, int, int]:
    """Return numbers of a group of parameters: all, in this rank's part, and in parameters that it touches.

    ZeRO-1 and 2 lay a group out flat, pad it to twice the number of ranks and cut it; ZeRO-2 keeps gradients of whole
    parameters where it has a piece. ZeRO-3 cuts each parameter.
    """
    sizes = [parameter.numel() for parameter in parameters]
    if is_cut_by_parameter:
        kept = sum(
            -(-size // zero_shard_of(parameter).count) for parameter, size in zip(parameters, sizes, strict=True)
        )
        return sum(sizes), kept, kept
    share = zero_shard_of(parameters[0])
    part = -(-sum(sizes) // (2 * share.count)) * 2
    ends = list(itertools.accumulate(sizes))
    mine = range(share.index * part, (share.index + 1) * part)
    is_touched = [end > mine.start and end - size < mine.stop for end, size in zip(ends, sizes, strict=True)]
    return part * share.count, part, sum(itertools.compress(sizes, is_touched))


def _layers_of_rank(topology: Topology, rank: int, dispatch_chunks: int) -> LayerFactory:
    """Return the layers of a rank whose process group is as large as the run's and sends nothing."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(topology.world_size)}
    dist.init_process_group("fake", rank=rank, world_size=topology.world_size, store=FakeStore())
    initialize_distributed()
    return init_process_groups(topology, dispatch_chunks).layers


class _Step(nn.Module):
    """A forward and backward as one module, so that `functional_call` can give it other parameters."""

    def __init__(self, model: ECDiT, recipe: Recipe) -> None:
        super().__init__()
        self.model, self._recipe = model, recipe

    def forward(self, batch: FlowBatch) -> None:
        losses = flow_losses(self.model, batch, self._recipe.model.patch_size)
        (losses.flow_B.mean() + self._recipe.train.reconstruction_weight * losses.reconstruction).backward()


def _peak_of_a_step(model: ECDiT, recipe: Recipe, images: int, mask_ratio: float) -> int:
    config, live = recipe.model, MemoryTracker()
    with FakeTensorMode():
        parameters = {f"model.{name}": _free_of_gradient(parameter) for name, parameter in model.named_parameters()}
        kept = config.num_kept_tokens(mask_ratio)
        latents = torch.empty(images, config.in_channels, config.latent_height, config.latent_width)
        batch = FlowBatch(
            latents_BCHW=latents,
            noise_BCHW=torch.empty_like(latents),
            timesteps_B=torch.empty(images),
            text_embeds_BTD=torch.empty(images, config.max_text_tokens, config.text_embed_dim),
            text_mask_BT=torch.ones(images, config.max_text_tokens, dtype=torch.bool),
            text_pooled_BD=torch.empty(images, config.text_embed_dim),
            visible_BN=None if kept == config.num_tokens else torch.zeros(images, kept, dtype=torch.int64),
        )
        live.ignore(*parameters.values())
        with live:
            torch.func.functional_call(_Step(model, recipe), parameters, (batch,))
    return live.peak


def _free_of_gradient(parameter: Tensor) -> Tensor:
    """Return a parameter of that shape whose gradient is gone as soon as it is there: it is counted elsewhere."""
    fake = torch.empty(parameter.shape, dtype=parameter.dtype, requires_grad=True)

    def forget(given: Tensor) -> None:
        given.grad = None

    fake.register_post_accumulate_grad_hook(forget)
    return fake
