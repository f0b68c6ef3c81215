"""The recipe: every fact about a model and its training, as frozen dataclasses.

One home per fact: architecture and training here and in `configs/*.yaml`, DeepSpeed's mechanics in `ds_configs/*.json`.
This module knows no torch: a recipe is checked on a laptop before a cluster sees it.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from ecdit_ds.errors import ConfigError

Activation = Literal["gelu", "swiglu"]
"""Of a feed-forward network: GELU(x w1) w2, or (SiLU(x wg) * (x wu)) w2 with one matrix more."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of the diffusion transformer (arXiv 2410.02098 sec. 3; DiT-Air, 2503.10618, where it is silent)."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Key-value heads of self-attention; several query heads share one (grouped-query attention)."""
    head_dim: int
    """Width of a self-attention head; a multiple of 4, for 2-D rotary angles."""
    cross_num_heads: int
    cross_head_dim: int
    ffn_hidden_size: int
    """Inner width of the dense FFN and of each expert; 4 x hidden_size in the paper."""
    patch_size: int
    """In latent pixels."""
    in_channels: int
    latent_height: int
    latent_width: int
    text_embed_dim: int
    max_text_tokens: int
    positions: Literal["rotary", "rotary_and_absolute"] = "rotary"
    """2-D rotary angles say how far tokens are apart; fixed sines and cosines on the patches (DiT) also say where."""

    ffn: Literal["dense", "expert_choice", "token_choice"] = "expert_choice"
    """What every second layer uses, starting from the second; the others are dense."""
    ffn_activation: Activation = "gelu"
    """Of the dense FFN, the experts and the shared experts alike."""
    num_experts: int = 8
    capacity_factor: float = 2.0
    """Mean number of experts per token, f."""
    capacity_rounding: Literal["floor", "nearest", "ceil"] = "ceil"
    """How the expert capacity f * S / E becomes a whole number of tokens."""
    routing_pool: Literal["image", "group", "batch"] = "image"
    """Among whose tokens an expert chooses: one image's, `routing_group` images', or the micro-batch's."""
    routing_group: int = 1
    """Images of a pool when routing_pool is `group`."""
    router_scores: Literal["softmax", "sigmoid"] = "softmax"
    router_input: Literal["modulated", "unmodulated"] = "modulated"
    """Whether the router sees the normalised token after or before adaLN; experts always see it after."""
    gate_normalization: Literal["none", "token"] = "none"
    """`none`: raw scores weigh the experts (the paper). `token`: they sum to one over the experts that took a token."""
    num_shared_experts: int = 0
    """Experts that see every token, beside the routed ones."""
    top_k: int = 2
    """Experts per token of the token-choice baseline."""
    load_balance_weight: float = 0.01
    """Weight of the token-choice baseline's auxiliary loss; expert choice has none."""

    @property
    def num_tokens(self) -> int:
        """Image tokens, S."""
        return (self.latent_height // self.patch_size) * (self.latent_width // self.patch_size)

    @property
    def is_sparse(self) -> bool:
        return self.ffn != "dense"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) holds experts: every second one, starting from the second (paper sec. 3.1)."""
        return self.is_sparse and layer % 2 == 1

    def pool_images(self, micro_batch_size: int) -> int:
        """Images whose tokens compete for one expert's places."""
        return {"image": 1, "group": self.routing_group, "batch": micro_batch_size}[self.routing_pool]

    def __post_init__(self) -> None:
        for name in _POSITIVE_MODEL_FIELDS:
            _require_positive("model", name, getattr(self, name))
        _require_multiple_of_4("model.head_dim", self.head_dim, "2-D rotary angles need")
        if self.positions == "rotary_and_absolute":
            _require_multiple_of_4("model.hidden_size", self.hidden_size, "model.positions: rotary_and_absolute needs")
        _require_divides("model.num_kv_heads", self.num_kv_heads, "model.num_heads", self.num_heads)
        _require_divides(
            "model.patch_size", self.patch_size,
            f"gcd of model.latent_height({self.latent_height}) and model.latent_width({self.latent_width}), ",
            math.gcd(self.latent_height, self.latent_width),
        )  # fmt: skip
        if self.is_sparse and self.num_experts < 2:
            raise ConfigError(
                f"model.num_experts: {self.num_experts} leaves nothing to route; use 2 or more, or model.ffn: dense"
            )
        if self.is_sparse and not 0.0 < self.capacity_factor <= self.num_experts:
            raise ConfigError(
                f"model.capacity_factor: {self.capacity_factor} is outside (0, num_experts={self.num_experts}]; "
                "it is the mean number of experts per token"
            )
        if self.is_sparse and self.num_layers < 2:
            raise ConfigError(
                f"model.num_layers: {self.num_layers} has no second layer, which would hold the experts; "
                "use 2 or more, or model.ffn: dense"
            )
        self._refuse_switches_without_effect()
        if self.top_k not in (1, 2):
            raise ConfigError(f"model.top_k: {self.top_k}; the token-choice baseline knows 1 and 2")
        if self.routing_pool != "group" and self.routing_group != 1:
            raise ConfigError(
                f"model.routing_group: {self.routing_group} has no effect with model.routing_pool: "
                f"{self.routing_pool}; set routing_pool: group or routing_group: 1"
            )
        _require_not_negative("model", "num_shared_experts", self.num_shared_experts)
        _require_not_negative("model", "load_balance_weight", self.load_balance_weight)
        if self.ffn == "expert_choice" and self.expert_capacity(self.num_tokens * self.routing_group) < 1:
            raise ConfigError(
                f"model.capacity_rounding: {self.capacity_rounding} of capacity_factor({self.capacity_factor}) x "
                f"tokens({self.num_tokens * self.routing_group}) / num_experts({self.num_experts}) is 0 tokens an "
                "expert; use ceil or fewer experts"
            )

    def _refuse_switches_without_effect(self) -> None:
        used_by_others = {"token_choice": ("top_k", "load_balance_weight"), "expert_choice": _EXPERT_CHOICE_SWITCHES}
        for kind, switches in used_by_others.items():
            for name in switches:
                default = type(self).__dataclass_fields__[name].default
                if self.ffn != kind and getattr(self, name) != default:
                    raise ConfigError(
                        f"model.{name}: {getattr(self, name)!r} has no effect with model.ffn: {self.ffn}; "
                        f"leave it at {default!r} or use model.ffn: {kind}"
                    )

    def expert_capacity(self, pool_tokens: int) -> int:
        """Return C, the tokens each expert takes from a pool: f * S / E, rounded, at most S (paper eq. 6)."""
        exact = Fraction(str(self.capacity_factor)) * pool_tokens / self.num_experts  # 1.1 x 100 / 10 is 11, not more
        rounded = {"floor": math.floor(exact), "ceil": math.ceil(exact), "nearest": round(exact)}
        return min(rounded[self.capacity_rounding], pool_tokens)


_EXPERT_CHOICE_SWITCHES = (
    "capacity_rounding", "routing_pool", "routing_group", "router_scores", "router_input", "gate_normalization",
    "num_shared_experts",
)  # fmt: skip

_POSITIVE_MODEL_FIELDS = (
    "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "cross_num_heads", "cross_head_dim",
    "ffn_hidden_size", "patch_size", "in_channels", "latent_height", "latent_width", "text_embed_dim",
    "max_text_tokens", "num_experts", "routing_group", "top_k",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The corpus and how it is read."""

    dataset: Literal["digit_scenes"] = "digit_scenes"
    seed: int = 0
    """Which scenes; not the training seed, so that runs of several seeds share one set."""
    num_train: int = 16384
    """Scenes in the training set."""
    num_heldout: int = 256
    """Scenes, of other digit images and other captions, for the held-out loss."""
    cache_dir: str = "runs/cache"
    """Where encoded sets are kept, memory-mapped, one folder per setting."""
    num_workers: int = 1
    """Loader processes a rank; 0 reads in the training process."""

    def __post_init__(self) -> None:
        _require_positive("data", "num_train", self.num_train)
        _require_positive("data", "num_heldout", self.num_heldout)
        _require_not_negative("data", "num_workers", self.num_workers)


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
        _require_positive("flow", "logit_std", self.logit_std)
        _require_positive("flow", "timestep_shift", self.timestep_shift)
        if not math.isfinite(self.logit_mean):
            raise ConfigError(f"flow.logit_mean: {self.logit_mean} is not a finite number")
        _require_fraction("flow.text_dropout_prob", self.text_dropout_prob)


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
    """Of rmsprop."""
    smoothing: float = 0.99
    """Of rmsprop's running mean of squares."""
    eps: float = 1e-8
    weight_decay: float = 0.0
    """On matrices only; biases, norms and tables are never decayed."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 for none."""
    ema_decay: float = 0.999
    """Of the average of the fp32 weights; early steps use less, so that the average forgets its start."""

    def __post_init__(self) -> None:
        _require_positive("optimizer", "learning_rate", self.learning_rate)
        _require_positive("optimizer", "eps", self.eps)
        for name in ("final_lr_fraction", "beta1", "beta2", "momentum", "smoothing", "ema_decay"):
            _require_fraction(f"optimizer.{name}", getattr(self, name))
        for name in ("beta1", "beta2", "momentum", "smoothing"):
            if getattr(self, name) == 1.0:
                raise ConfigError(f"optimizer.{name}: 1.0 would never take in a new gradient; choose below 1")
        for name in ("warmup_steps", "weight_decay", "gradient_clipping"):
            _require_not_negative("optimizer", name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large, how often."""

    max_steps: int
    global_batch_size: int
    micro_batch_size: int | Literal["auto"] = "auto"
    """Images a rank sees in one forward; `auto` is global_batch_size / data-parallel ranks. The rest is accumulated."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of parameters and activations; the optimizer always keeps fp32 weights."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    """Steps between reports and between writes of metrics.jsonl."""
    evaluate_every: int = 500
    sample_every: int = 500
    max_skipped_steps: int = 10
    """Steps in a row with a non-finite gradient that end the run."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_size", "checkpoint_every", "log_every", "evaluate_every",
                     "sample_every", "max_skipped_steps"):  # fmt: skip
            _require_positive("train", name, getattr(self, name))
        if self.keep_checkpoints < 2:
            raise ConfigError(f"train.keep_checkpoints: {self.keep_checkpoints}; keep 2 or more: one may prove damaged")
        if self.micro_batch_size != "auto":
            _require_positive("train", "micro_batch_size", self.micro_batch_size)
            _require_divides(
                "train.micro_batch_size", self.micro_batch_size, "train.global_batch_size", self.global_batch_size
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout; data parallelism takes the ranks that are left."""

    tp: int = 1
    """Tensor-parallel ranks."""
    ep: int = 1
    """Expert-parallel ranks; a part of the data-parallel ones."""

    def __post_init__(self) -> None:
        _require_positive("parallel", "ep", self.ep)
        if self.tp != 1:
            raise ConfigError(f"parallel.tp: {self.tp}; this version trains with tp 1; spread experts by parallel.ep")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What sample grids draw, in training and in tools/sample.py."""

    sampler: Literal["euler", "heun"] = "euler"
    num_steps: int = 24
    """Intervals of the time grid."""
    guidance_scale: float = 2.0
    """1 is none."""
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_positive("sample", "num_steps", self.num_steps)
        _require_not_negative("sample", "guidance_scale", self.guidance_scale)


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
            _require_divides("parallel.ep", self.parallel.ep, "model.num_experts", self.model.num_experts)
        elif self.parallel.ep != 1:
            raise ConfigError(f"parallel.ep: {self.parallel.ep} has no effect with model.ffn: dense; use 1")

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars, ready for YAML and JSON."""
        sample = dataclasses.asdict(self.sample) | {"prompts": list(self.sample.prompts)}
        return dataclasses.asdict(self) | {"sample": sample}

    def micro_batch_size(self, dp_size: int) -> int:
        """Return the images a rank sees in one forward.

        Raises:
            ConfigError: the global batch does not split over `dp_size` ranks, or the routing pool does not fit.
        """
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        _require_divides("data-parallel ranks", dp_size, "train.global_batch_size", batch)
        if micro == "auto":
            micro = batch // dp_size
        elif batch % (micro * dp_size):
            raise ConfigError(
                f"train.global_batch_size: {batch} is not a multiple of micro_batch_size({micro}) x data-parallel "
                f"ranks({dp_size}); micro_batch_size may be {divisors(batch // dp_size)}"
            )
        if self.model.is_sparse:
            _require_divides("model.routing_group", self.model.routing_group, "train.micro_batch_size", micro)
        return micro


MAY_CHANGE_ON_RESUME = frozenset({
    "train.max_steps", "train.micro_batch_size", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every",
    "train.evaluate_every", "train.sample_every", "train.max_skipped_steps", "data.num_workers", "data.cache_dir",
    "data.num_heldout", "parallel.tp", "parallel.ep", "sample.sampler", "sample.num_steps", "sample.guidance_scale",
    "sample.prompts",
})  # fmt: skip
"""Recipe fields that a run may change between its lives; any other change is another experiment."""


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


def divisors(n: int) -> str:
    """Return the divisors of `n`, for messages."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _require_multiple_of_4(name: str, value: int, who_needs_it: str) -> None:
    if value % 4:
        nearest = f"{value // 4 * 4} or {value // 4 * 4 + 4}" if value >= 4 else "4"
        raise ConfigError(f"{name}: {value} is not a multiple of 4, which {who_needs_it}; choose {nearest}")


def _require_positive(section: str, name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{section}.{name}: {value} is not a positive, finite number")


def _require_not_negative(section: str, name: str, value: float) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"{section}.{name}: {value} is negative or not finite; use 0 or more")


def _require_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name}: {value} is outside [0, 1]")


def _require_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise ConfigError(f"{divisor_name}({divisor}) does not divide {name}({value}); choose from {divisors(value)}")
