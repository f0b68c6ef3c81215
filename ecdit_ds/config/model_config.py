"""The architecture: what a checkpoint's weights mean. `recipe.py` holds the rest of a recipe."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from ecdit_ds.config.validation import (
    require_divides,
    require_in_range,
    require_multiple_of_4,
    require_not_negative,
    require_positive,
)
from ecdit_ds.errors import ConfigError

Activation = Literal["gelu", "swiglu"]
"""Activation of a feed-forward network: GELU(x w1) w2, or (SiLU(x wg) * (x wu)) w2 with one more matrix."""


_KINDS = "kinds of ffn"


def _of(*kinds: str, default: Any) -> Any:
    """Return a field that only models whose `ffn` is one of `kinds` use: the one place that says so."""
    return field(default=default, metadata={_KINDS: kinds})


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
    decoder_layers: int = 0
    """Dense blocks after the others, which see every position also where those see a share (masked training)."""
    positions: Literal["rotary", "rotary_and_absolute"] = "rotary"
    """2-D rotary angles say how far tokens are apart; fixed sines and cosines on the patches (DiT) also say where."""

    ffn: Literal["dense", "expert_choice", "token_choice"] = "expert_choice"
    """What every second layer uses, starting from the second; the others are dense."""
    ffn_activation: Activation = "gelu"
    """Activation of the dense FFN, the experts and the shared experts."""
    num_experts: int = _of("expert_choice", "token_choice", default=8)
    capacity_factor: float = _of("expert_choice", "token_choice", default=2.0)
    """Mean number of experts per token, f."""
    capacity_rounding: Literal["floor", "nearest", "ceil"] = _of("expert_choice", default="ceil")
    """How the expert capacity f * S / E becomes a whole number of tokens."""
    routing_pool: Literal["image", "group", "batch"] = _of("expert_choice", default="image")
    """Among whose tokens an expert chooses: one image's, `routing_group` images', or the micro-batch's."""
    routing_group: int = _of("expert_choice", default=1)
    """Images of a pool when routing_pool is `group`."""
    router_scores: Literal["softmax", "sigmoid"] = _of("expert_choice", default="softmax")
    router_input: Literal["modulated", "unmodulated"] = _of("expert_choice", default="modulated")
    """Whether the router sees the normalised token after or before adaLN; experts always see it after."""
    gate_normalization: Literal["none", "token"] = _of("expert_choice", default="none")
    """`none`: raw scores weigh the experts (the paper). `token`: they sum to one over the experts that took a token."""
    num_shared_experts: int = _of("expert_choice", default=0)
    """Experts that see every token, beside the routed ones."""
    top_k: int = _of("token_choice", default=2)
    """Experts per token of the token-choice baseline."""
    load_balance_weight: float = _of("token_choice", default=0.01)
    """Weight of the token-choice baseline's auxiliary loss; expert choice has none."""

    @property
    def num_tokens(self) -> int:
        """Image tokens, S."""
        return (self.latent_height // self.patch_size) * (self.latent_width // self.patch_size)

    @property
    def is_sparse(self) -> bool:
        return self.ffn != "dense"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) holds experts: every second one, starting from the second (paper sec. 3.1).

        Decoder blocks, from `num_layers` on, never do.
        """
        return self.is_sparse and layer % 2 == 1 and layer < self.num_layers

    def resized(self, latent_height: int, latent_width: int) -> "ModelConfig":
        """Return the same model as it sees latents of another size.

        Raises:
            ConfigError: it cannot take them.
        """
        return replace(self, latent_height=latent_height, latent_width=latent_width)

    def num_kept_tokens(self, mask_ratio: float) -> int:
        """Return how many tokens of an image the main blocks see when they are not shown a share of `mask_ratio`."""
        return self.num_tokens - math.floor(Fraction(str(mask_ratio)) * self.num_tokens)

    def pool_images(self, micro_batch_size: int) -> int:
        """Images whose tokens compete for one expert's places."""
        return {"image": 1, "group": self.routing_group, "batch": micro_batch_size}[self.routing_pool]

    def __post_init__(self) -> None:
        require_in_range("model", self, at_most=_LARGEST)
        for name in _POSITIVE_MODEL_FIELDS:
            require_positive("model", name, getattr(self, name))
        require_multiple_of_4("model.head_dim", self.head_dim, "2-D rotary angles need")
        if self.positions == "rotary_and_absolute":
            require_multiple_of_4("model.hidden_size", self.hidden_size, "model.positions: rotary_and_absolute needs")
        require_divides("model.num_kv_heads", self.num_kv_heads, "model.num_heads", self.num_heads)
        require_divides(
            "model.patch_size",
            self.patch_size,
            f"gcd of model.latent_height({self.latent_height}) and model.latent_width({self.latent_width}), ",
            math.gcd(self.latent_height, self.latent_width),
        )
        numbers = self.in_channels * self.latent_height * self.latent_width
        if numbers > _MOST_NUMBERS_OF_AN_IMAGE:
            raise ConfigError(
                f"model.in_channels({self.in_channels}) x model.latent_height({self.latent_height}) x "
                f"model.latent_width({self.latent_width}): {numbers:,} numbers an image, the most is "
                f"{_MOST_NUMBERS_OF_AN_IMAGE:,}"
            )
        if self.is_sparse and self.num_experts < 2:
            raise ConfigError(
                f"model.num_experts: {self.num_experts} leaves nothing to route; use 2 or more, or model.ffn: dense"
            )
        self._check_factor("model.capacity_factor", self.capacity_factor)
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
        require_not_negative("model", "num_shared_experts", self.num_shared_experts)
        require_not_negative("model", "decoder_layers", self.decoder_layers)
        require_not_negative("model", "load_balance_weight", self.load_balance_weight)
        if self.ffn == "expert_choice" and self.expert_capacity(self.num_tokens * self.routing_group) < 1:
            raise ConfigError(
                f"model.capacity_rounding: {self.capacity_rounding} of capacity_factor({self.capacity_factor}) x "
                f"tokens({self.num_tokens * self.routing_group}) / num_experts({self.num_experts}) is 0 tokens an "
                "expert; use ceil or fewer experts"
            )

    def _refuse_switches_without_effect(self) -> None:
        """Refuse switches of another kind of network; sizes that both kinds with experts have may stay."""
        for name, kinds in EXPERT_FIELDS.items():
            default = type(self).__dataclass_fields__[name].default
            if len(kinds) == 1 and self.ffn not in kinds and getattr(self, name) != default:
                raise ConfigError(
                    f"model.{name}: {getattr(self, name)!r} has no effect with model.ffn: {self.ffn}; "
                    f"leave it at {default!r} or use model.ffn: {kinds[0]}"
                )

    def check_capacity_factor(self, key: str, factor: float | None) -> None:
        """Refuse a factor for drawing that this model cannot use; None is its own.

        Raises:
            ConfigError: naming `key`.
        """
        if factor is None:
            return
        if self.ffn != "expert_choice":
            raise ConfigError(f"{key}: {factor} has no effect with model.ffn: {self.ffn}; leave it out")
        self._check_factor(key, factor)
        if self.expert_capacity(self.num_tokens * self.routing_group, factor) < 1:
            raise ConfigError(
                f"{key}: {factor} x tokens({self.num_tokens * self.routing_group}) / num_experts({self.num_experts}), "
                f"rounded by {self.capacity_rounding}, is 0 tokens an expert; raise it"
            )

    def _check_factor(self, key: str, factor: float) -> None:
        if self.is_sparse and not 0.0 < factor <= self.num_experts:
            raise ConfigError(
                f"{key}: {factor} is outside (0, num_experts={self.num_experts}]; it is the mean number of experts per "
                "token"
            )

    def expert_capacity(self, pool_tokens: int, factor: float | None = None) -> int:
        """Return C, the tokens each expert takes from a pool: f * S / E, rounded, at most S (paper eq. 6).

        Args:
            pool_tokens: S.
            factor: f, where it shall not be the model's own.
        """
        return _capacity(factor or self.capacity_factor, pool_tokens, self.num_experts, self.capacity_rounding)


@lru_cache(maxsize=1024)
def _capacity(factor: float, pool_tokens: int, num_experts: int, rounding: str) -> int:
    exact = Fraction(str(factor)) * pool_tokens / num_experts  # 1.1 x 100 / 10 is 11
    rounded = {"floor": math.floor(exact), "ceil": math.ceil(exact), "nearest": round(exact)}
    return min(rounded[rounding], pool_tokens)


EXPERT_FIELDS: Mapping[str, tuple[str, ...]] = {
    spec.name: spec.metadata[_KINDS] for spec in fields(ModelConfig) if _KINDS in spec.metadata
}
"""Field that a dense model does not use -> the kinds of `ffn` that do. With `ffn`, all that changes as experts come."""
EXPERT_CHOICE_SWITCHES = tuple(name for name, kinds in EXPERT_FIELDS.items() if kinds == ("expert_choice",))
"""Fields that a model without expert choice leaves at their defaults."""

_POSITIVE_MODEL_FIELDS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "cross_num_heads",
    "cross_head_dim",
    "ffn_hidden_size",
    "patch_size",
    "in_channels",
    "latent_height",
    "latent_width",
    "text_embed_dim",
    "max_text_tokens",
    "num_experts",
    "routing_group",
    "top_k",
)
_MOST_NUMBERS_OF_AN_IMAGE = 2**28
_LARGEST = dict.fromkeys(_POSITIVE_MODEL_FIELDS, 2**20) | {
    "num_layers": 2**12,
    "decoder_layers": 2**12,
    "ffn_hidden_size": 2**22,
    "num_shared_experts": 2**10,
}
"""Largest size of each kind: far beyond any model there is, and small enough to plan and refuse at once."""
