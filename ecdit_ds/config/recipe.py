"""The recipe: every fact about a model and its training, as frozen dataclasses.

One home per fact: architecture and training here and in `configs/*.yaml`, DeepSpeed's mechanics in `ds_configs/*.json`.
This module knows no torch: a recipe is checked on a laptop before a cluster sees it.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.validation import (
    divisors,
    require_divides,
    require_fraction,
    require_in_range,
    require_not_negative,
    require_positive,
)
from ecdit_ds.errors import ConfigError

STATE_NAMES = {"adamw": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg", "momentum_buffer")}
"""What each optimizer remembers about every weight; torch's own names."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Rectified flow: t = 0 is data, t = 1 is noise."""

    timestep_density: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timestep_shift: float = 1.0
    """sqrt(tokens / reference tokens) of the resolution shift (SD3, arXiv 2403.03206 sec. 5.3.2); 1 for none."""
    text_dropout_prob: float = 0.1
    """Share of samples trained without their text, for classifier-free guidance."""

    def __post_init__(self) -> None:
        require_in_range("flow", self, at_most={})
        require_positive("flow", "logit_std", self.logit_std)
        require_positive("flow", "timestep_shift", self.timestep_shift)
        if not math.isfinite(self.logit_mean):
            raise ConfigError(f"flow.logit_mean: {self.logit_mean} is not a finite number")
        require_fraction("flow.text_dropout_prob", self.text_dropout_prob)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, schedule and weight average."""

    name: Literal["adamw", "rmsprop"] = "adamw"
    """`rmsprop` with momentum is the paper's."""
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the linear warm-up, until train.max_steps."""
    final_lr_fraction: float = 0.0
    """Where cosine and linear end, as a share of learning_rate."""
    beta1: float = 0.9
    beta2: float = 0.99
    momentum: float = 0.9
    """Momentum; rmsprop only."""
    smoothing: float = 0.99
    """Decay of the running mean of squared gradients; rmsprop only."""
    eps: float = 1e-8
    weight_decay: float = 0.0
    """On matrices only; biases, norms and tables are never decayed."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 for none."""
    ema_decay: float = 0.999
    """Decay of the EMA of the fp32 weights; early steps use a smaller one, so that the EMA forgets its start."""

    def __post_init__(self) -> None:
        require_in_range("optimizer", self, at_most={})
        require_positive("optimizer", "learning_rate", self.learning_rate)
        require_positive("optimizer", "eps", self.eps)
        for name in ("final_lr_fraction", "beta1", "beta2", "momentum", "smoothing", "ema_decay"):
            require_fraction(f"optimizer.{name}", getattr(self, name))
        for name in ("beta1", "beta2", "momentum", "smoothing"):
            if getattr(self, name) == 1.0:
                raise ConfigError(f"optimizer.{name}: 1.0 would never take in a new gradient; choose below 1")
        for name in ("warmup_steps", "weight_decay", "gradient_clipping"):
            require_not_negative("optimizer", name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large, how often."""

    max_steps: int
    global_batch_size: int
    micro_batch_size: int | Literal["auto"] = "auto"
    """Images a rank sees in one forward; `auto` is global_batch_size / data-parallel ranks. The rest is accumulated."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of parameters and activations; the optimizer always keeps fp32 weights."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    """The newest so many stay, not counting those that were never compared with their checksums."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of it stay for ever; 0 for none."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in host memory."""
    save_timeout_minutes: float = 30.0
    """Writing for longer counts as hanging storage and ends the run, so that it can be started again elsewhere."""
    log_every: int = 10
    """Steps between reports and between writes of metrics.jsonl."""
    evaluate_every: int = 500
    sample_every: int = 500
    max_skipped_steps: int = 10
    """Steps in a row with a non-finite gradient that end the run."""
    mask_ratio: float = 0.0
    """Share of each image's tokens that only the decoder blocks see, as a learned mask token; the loss is on the rest.
    Which ones is a function of the seed and the sample. Pictures are drawn without."""
    unmasked_from_step: int | None = None
    """Steps, from this one on (from 0), that train on all tokens; none of them where it is left out."""
    reconstruction_weight: float = 0.0
    """Weight of the error at the tokens left out, beside that at the others; 0 for none."""
    recompute: Literal["none", "block", "selective"] = "none"
    """Activation checkpointing: `block` keeps a block's input only and recomputes the rest in backward; `selective`
    also keeps the results of all-to-alls, so that no token travels twice. Both repeat tensor-parallel all-reduces and
    ZeRO-3 parameter all-gathers."""
    recompute_every: int = 1
    """Recompute the last of every n successive blocks; 2 recomputes the blocks with experts."""

    def __post_init__(self) -> None:
        require_in_range("train", self, at_most={"seed": 2**63 - 1, "global_batch_size": 2**42})
        for name in (
            "max_steps",
            "global_batch_size",
            "checkpoint_every",
            "log_every",
            "evaluate_every",
            "sample_every",
            "max_skipped_steps",
            "recompute_every",
        ):
            require_positive("train", name, getattr(self, name))
        if self.keep_checkpoints < 2:
            raise ConfigError(f"train.keep_checkpoints: {self.keep_checkpoints}; keep 2 or more: one may prove damaged")
        require_not_negative("train", "keep_every", self.keep_every)
        require_positive("train", "save_timeout_minutes", self.save_timeout_minutes)
        if self.keep_every % self.checkpoint_every:
            raise ConfigError(
                f"train.keep_every: {self.keep_every} is no multiple of train.checkpoint_every "
                f"({self.checkpoint_every}), so some of these steps would never be saved"
            )
        self._check_mask()
        if self.recompute == "none" and self.recompute_every != 1:
            raise ConfigError(
                f"train.recompute_every: {self.recompute_every} has no effect with train.recompute: none; use block or "
                "selective"
            )
        if self.micro_batch_size != "auto":
            require_positive("train", "micro_batch_size", self.micro_batch_size)
            require_divides(
                "train.micro_batch_size", self.micro_batch_size, "train.global_batch_size", self.global_batch_size
            )

    def mask_ratio_at(self, step: int) -> float:
        """Return the share of tokens left out at optimizer step `step` (from 0)."""
        is_unmasked = self.unmasked_from_step is not None and step >= self.unmasked_from_step
        return 0.0 if is_unmasked else self.mask_ratio

    def _check_mask(self) -> None:
        require_not_negative("train", "reconstruction_weight", self.reconstruction_weight)
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ConfigError(f"train.mask_ratio: {self.mask_ratio} is outside [0, 1); the paper's is 0.5")
        if self.unmasked_from_step is not None:
            require_positive("train", "unmasked_from_step", self.unmasked_from_step)
        for name, value in (
            ("unmasked_from_step", self.unmasked_from_step),
            ("reconstruction_weight", self.reconstruction_weight),
        ):
            if value and not self.mask_ratio:
                raise ConfigError(f"train.{name}: {value} has no effect with train.mask_ratio: 0.0; leave it out")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout; data parallelism takes the ranks that are left."""

    tp: int = 1
    """Tensor-parallel ranks: attention heads and feed-forward width, also inside each expert, are cut over them."""
    ep: int = 1
    """Expert-parallel ranks; a part of the data-parallel ones."""
    dispatch_chunks: int = 1
    """Parts of a micro-batch that take turns: one part's all-to-all runs while another's experts compute."""

    def __post_init__(self) -> None:
        require_in_range("parallel", self, at_most={})
        for name in ("tp", "ep", "dispatch_chunks"):
            require_positive("parallel", name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What sample grids draw, and how pictures are drawn in training and by the tools."""

    sampler: Literal["euler", "heun", "dpmpp_2m", "euler_ancestral"] = "euler"
    num_steps: int = 24
    """Intervals of the time grid."""
    eta: float = 1.0
    """Share of the noise that euler_ancestral renews; 0 is euler."""
    guidance_scale: float = 2.0
    """1 is none."""
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    """Times from and to which guidance acts; outside, the velocity under the prompt is used as it is."""
    capacity_factor: float | None = None
    """Mean number of experts per token while drawing; none for the model's own, with which it was trained."""
    prompts: tuple[str, ...] = ()
    scenes_per_kind: int = 0
    """Held-out digit scenes of each of the six kinds that are drawn and checked at every evaluation; 0 for none."""

    def __post_init__(self) -> None:
        require_in_range("sample", self, at_most={"num_steps": 2**20})
        require_not_negative("sample", "scenes_per_kind", self.scenes_per_kind)
        require_positive("sample", "num_steps", self.num_steps)
        require_not_negative("sample", "guidance_scale", self.guidance_scale)
        require_fraction("sample.eta", self.eta)
        if self.eta != 1.0 and self.sampler != "euler_ancestral":
            raise ConfigError(
                f"sample.eta: {self.eta} has no effect with sample.sampler: {self.sampler}; leave it at 1.0 or use "
                "euler_ancestral"
            )
        interval = self.guidance_interval
        if len(interval) != 2 or not 0.0 <= interval[0] < interval[1] <= 1.0:
            raise ConfigError(
                f"sample.guidance_interval: {list(interval)} are not two rising times within [0, 1]; 0 is the picture, "
                "1 is noise"
            )
        if self.guidance_scale == 1.0 and interval != (0.0, 1.0):
            raise ConfigError(
                f"sample.guidance_interval: {list(interval)} has no effect with sample.guidance_scale: 1.0; leave it "
                "at [0.0, 1.0] or guide"
            )
        if self.capacity_factor is not None:
            require_positive("sample", "capacity_factor", self.capacity_factor)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    name: str
    model: ModelConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*", self.name):
            raise ConfigError(f"name: {self.name!r} names the run's folder; use letters, digits, - _ and .")
        if self.model.is_sparse:
            require_divides("parallel.ep", self.parallel.ep, "model.num_experts", self.model.num_experts)
        elif self.parallel.ep != 1:
            raise ConfigError(f"parallel.ep: {self.parallel.ep} has no effect with model.ffn: dense; use 1")
        self._check_tensor_parallel()
        self._check_exchanges()
        self._check_mask()
        self.model.check_capacity_factor("sample.capacity_factor", self.sample.capacity_factor)

    def _check_tensor_parallel(self) -> None:
        tp, model = self.parallel.tp, self.model
        cut = {name: getattr(model, name) for name in _CUT_BY_TP}
        for name, width in cut.items():
            if width % tp:
                raise ConfigError(
                    f"parallel.tp({tp}) does not divide model.{name}({width}); with {', '.join(cut)} = "
                    f"{', '.join(map(str, cut.values()))} choose from {divisors(math.gcd(*cut.values()))}"
                )
        if tp > 1 and model.ffn == "token_choice":
            raise ConfigError(
                f"parallel.tp: {tp} with model.ffn: token_choice: DeepSpeed's layer deals each rank's tokens out over "
                "the tensor-parallel ranks, so each would drop other tokens than one process does; use tp 1"
            )

    def _check_mask(self) -> None:
        """Refuse a mask without blocks that see every position, or with too little left to choose from."""
        ratio, model = self.train.mask_ratio, self.model
        if not ratio:
            return
        if model.decoder_layers < 1:
            raise ConfigError(
                f"train.mask_ratio: {ratio} with model.decoder_layers: 0: no block would see every position; use 2, as "
                "the paper's sizes suggest"
            )
        kept, images = model.num_kept_tokens(ratio), model.routing_group
        if kept == model.num_tokens:
            raise ConfigError(
                f"train.mask_ratio: {ratio} of {model.num_tokens} tokens is less than one, so it has no effect; use "
                f"{1 / model.num_tokens:.3g} or more, or 0"
            )
        places = model.capacity_factor * kept * images / model.num_experts
        if model.ffn == "expert_choice" and places < 1:
            raise ConfigError(
                f"train.mask_ratio: {ratio} leaves {kept} of {model.num_tokens} tokens an image, of which each of "
                f"{model.num_experts} experts must take capacity_factor({model.capacity_factor}) x {kept * images} / "
                f"{model.num_experts} = {places:.3g}, less than one token; lower it, or use fewer experts or a larger "
                "model.routing_group"
            )

    def _check_exchanges(self) -> None:
        """Refuse what only an all-to-all of expert choice can use where there is none."""
        has_exchange = self.parallel.ep > 1 and self.model.ffn == "expert_choice"
        chunks = self.parallel.dispatch_chunks
        if chunks > 1 and (not has_exchange or self.model.routing_pool == "batch"):
            raise ConfigError(
                f"parallel.dispatch_chunks: {chunks} has no effect with model.ffn: {self.model.ffn}, parallel.ep: "
                f"{self.parallel.ep}, model.routing_pool: {self.model.routing_pool}; it needs expert_choice, ep 2 or "
                "more, and a pool that is not the whole batch"
            )
        every, layers = self.train.recompute_every, self.model.num_layers
        if self.train.recompute == "selective" and not (has_exchange and math.lcm(2, every) <= layers):
            raise ConfigError(
                f"train.recompute: selective keeps what all-to-alls returned, but with model.ffn: {self.model.ffn}, "
                f"parallel.ep: {self.parallel.ep} and train.recompute_every: {every} of {layers} layers no recomputed "
                "block has one of ours; use block"
            )
        if every > layers:
            raise ConfigError(
                f"train.recompute_every: {every} is more than model.num_layers({layers}), so no block would be "
                f"recomputed; choose 1 to {layers}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars, ready for YAML and JSON."""
        return dataclasses.asdict(self, dict_factory=_with_lists)

    def micro_batch_size(self, dp_size: int) -> int:
        """Return the images a rank sees in one forward.

        Raises:
            ConfigError: the global batch does not split over `dp_size` ranks, or the routing pool does not fit.
        """
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        require_divides("data-parallel ranks", dp_size, "train.global_batch_size", batch)
        if micro == "auto":
            micro = batch // dp_size
        elif batch % (micro * dp_size):
            raise ConfigError(
                f"train.global_batch_size: {batch} is not a multiple of micro_batch_size({micro}) x data-parallel "
                f"ranks({dp_size}); micro_batch_size may be {divisors(batch // dp_size)}"
            )
        if self.model.is_sparse:
            require_divides("model.routing_group", self.model.routing_group, "train.micro_batch_size", micro)
            pools = micro // self.model.pool_images(micro)
            require_divides("parallel.dispatch_chunks", self.parallel.dispatch_chunks, "pools of a micro-batch", pools)
        return micro


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


_SECTIONS: dict[str, type] = {
    name: of
    for name, of in typing.get_type_hints(Recipe).items()
    if isinstance(of, type) and dataclasses.is_dataclass(of)
}
_CUT_BY_TP = ("num_heads", "num_kv_heads", "cross_num_heads", "ffn_hidden_size")

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "train.max_steps",
        "train.micro_batch_size",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.async_save",
        "train.save_timeout_minutes",
        "train.log_every",
        "train.evaluate_every",
        "train.sample_every",
        "train.max_skipped_steps",
        "data.num_workers",
        "data.cache_dir",
        "data.path",
        "data.heldout_path",
        "data.verify",
        "data.num_heldout",
        "data.max_bad",
        "data.shift_factor",
        "data.scaling_factor",
        "parallel.tp",
        "parallel.ep",
        "parallel.dispatch_chunks",
        "train.recompute",
        "train.recompute_every",
        "train.unmasked_from_step",
        *(f"sample.{drawing.name}" for drawing in dataclasses.fields(SampleConfig)),
    }
)
"""Recipe fields that a run may change between its lives; any other change is another experiment. What a path names may
move, and factors may be written down: that the samples and latents are the same, checkpoints know
(`snapshot.check_same_data`, `check_same_encoders`)."""


def with_defaults(written: Mapping[str, Any], of: type = Recipe) -> dict[str, Any]:
    """Return a recipe's dict with the default of each field that it lacks, as one of an older release does."""
    filled = dict(written)
    for spec in dataclasses.fields(of):
        given, section = filled.get(spec.name), _SECTIONS.get(spec.name) if of is Recipe else None
        if isinstance(given, dict) and section is not None:
            filled[spec.name] = with_defaults(given, section)
        elif spec.name not in filled and spec.default is not dataclasses.MISSING:
            filled |= _with_lists([(spec.name, spec.default)])
        elif spec.name not in filled and section is not None:
            filled[spec.name] = with_defaults({}, section)
    return filled


def changed_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return `{dotted field: (old, new)}` for every leaf that differs between two recipe dicts."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes |= changed_fields(before, after, f"{prefix}{key}.")
        elif before != after:
            changes[f"{prefix}{key}"] = (before, after)
    return changes
