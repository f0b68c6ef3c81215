"""The parameters of a model, by closed form: names and global shapes, without torch and without the model.

With D hidden_size, F ffn_hidden_size, E experts, a block has 6 D modulation numbers, attention matrices of heads x
head_dim columns, and a dense FFN of 2 D F (swiglu: 3 D F) or a router of E D and experts of E times as much. A test
compares every name and shape with the model's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ecdit_ds.config.model_config import ModelConfig

NUMBER_BYTES = {"fp32": 4, "bf16": 2}
"""Bytes per element of weights, activations and gradients, by train.precision."""
TIMESTEP_WAVES = 256
"""Sines and cosines that a time becomes."""
TEXT_ENCODER_PARAMETERS = 670_000_000
"""The paper's text encoder (arXiv 2410.02098 sec. 3.2, "670 M"), frozen; its totals match only if it is counted."""
AUTOENCODER_PARAMETERS = 84_000_000
"""Stable Diffusion's image autoencoder, frozen; with it the paper's totals match within 0.2 %, so it counts it."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]
    """Global: what all ranks hold together."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to routed experts: (experts, in, out)."""
        return len(self.shape) == 3


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """How large a model is."""

    dit: int
    """All that is trained."""
    in_experts: int
    """Those in routed experts."""
    activated: int
    """What a token meets on average, encoders included, as the paper's 8.27 B counts: all, but of the experts f of E,
    where f is the capacity factor."""

    @property
    def with_encoders(self) -> int:
        """What the paper prints: `dit`, the text encoder and the autoencoder."""
        return self.dit + TEXT_ENCODER_PARAMETERS + AUTOENCODER_PARAMETERS


@lru_cache(maxsize=64)
def parameters(config: ModelConfig) -> list[Parameter]:
    """Return every parameter in the model's own order."""
    d, patch, text = config.hidden_size, config.in_channels * config.patch_size**2, config.text_embed_dim
    found = [Parameter(name="mask_token", shape=(d,))] if config.decoder_layers else []
    found += _linear("patches.linear", patch, d)
    for name, width in (("time_in", TIMESTEP_WAVES), ("time_out", d), ("text_in", text), ("text_out", d)):
        found += _linear(f"condition.{name}", width, d)
    found += _linear("modulation", d, 6 * d)
    for layer in range(config.num_layers):
        found += _block(config, f"blocks.{layer}", config.is_moe_layer(layer))
    for layer in range(config.decoder_layers):
        found += _block(config, f"decoder.{layer}", has_experts=False)
    found += _linear("final.modulation", d, 2 * d)
    found += _linear("final.linear", d, patch)
    return found


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Return the totals.

    Of E experts with P numbers in all a token meets f on average, hence f / E * P; all other parameters once.
    """
    dit = sum(parameter.size for parameter in parameters(config))
    in_experts = sum(parameter.size for parameter in parameters(config) if parameter.is_expert)
    met = in_experts * config.capacity_factor / config.num_experts
    encoders = TEXT_ENCODER_PARAMETERS + AUTOENCODER_PARAMETERS
    return ParameterCount(dit=dit, in_experts=in_experts, activated=dit - in_experts + round(met) + encoders)


def _linear(name: str, width_in: int, width_out: int) -> list[Parameter]:
    return [
        Parameter(name=f"{name}.weight", shape=(width_out, width_in)),
        Parameter(name=f"{name}.bias", shape=(width_out,)),
    ]


def _block(config: ModelConfig, name: str, has_experts: bool) -> Iterator[Parameter]:
    d, width, kv_width = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    cross_width = config.cross_num_heads * config.cross_head_dim
    yield Parameter(name=f"{name}.modulation_table", shape=(6, d))
    yield from _attention(f"{name}.self_attention", (d, width), (d, kv_width), config.head_dim)
    yield from _attention(
        f"{name}.cross_attention", (d, cross_width), (config.text_embed_dim, cross_width), config.cross_head_dim
    )
    if has_experts:
        yield from _experts(config, f"{name}.ffn")
    else:
        yield from _dense_ffn(config, f"{name}.ffn", copies=1)


def _attention(name: str, query: tuple[int, int], key: tuple[int, int], head_dim: int) -> Iterator[Parameter]:
    """Yield an attention's matrices; `query` and `key` are (in, out), and the last matrix is the query's turned."""
    for part, (width_in, width_out) in (("query", query), ("key", key), ("value", key), ("out", query[::-1])):
        yield Parameter(name=f"{name}.{part}.weight", shape=(width_out, width_in))
    for part in ("query_norm", "key_norm"):
        yield Parameter(name=f"{name}.{part}.weight", shape=(head_dim,))


def _dense_ffn(config: ModelConfig, name: str, copies: int) -> Iterator[Parameter]:
    d, width = config.hidden_size, config.ffn_hidden_size * copies
    yield Parameter(name=f"{name}.up.weight", shape=(width * (2 if config.ffn_activation == "swiglu" else 1), d))
    yield Parameter(name=f"{name}.down.weight", shape=(d, width))


def _experts(config: ModelConfig, name: str) -> Iterator[Parameter]:
    d, width, count = config.hidden_size, config.ffn_hidden_size, config.num_experts
    is_ours = config.ffn == "expert_choice"
    router = "router.weight" if is_ours else "moe.deepspeed_moe.gate.wg.weight"
    bank = "experts" if is_ours else "moe.deepspeed_moe.experts.bank"
    yield Parameter(name=f"{name}.{router}", shape=(count, d))
    inner = width * (2 if config.ffn_activation == "swiglu" else 1)
    yield Parameter(name=f"{name}.{bank}.w1", shape=(count, d, inner))
    yield Parameter(name=f"{name}.{bank}.w2", shape=(count, width, d))
    if config.num_shared_experts:
        yield from _dense_ffn(config, f"{name}.shared", copies=config.num_shared_experts)
