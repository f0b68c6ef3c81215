"""Expert choice: each expert takes the tokens that want it most.

    scores  = softmax over experts of x W_r                       (paper eq. 5)
    gates   = each expert's top C scores within its pool          (eq. 6), C = f * S / E
    y       = sum over the experts i that took a token of gate_i * E_i(x)   (eq. 8)

Every expert takes exactly C tokens of each pool, so shapes are known before the router runs. A token may be taken by
several experts or by none; one that none takes keeps its residual only. Between tied scores the choice is
unspecified.

Pools and layouts: under `image` and `group` the choice does not depend on the layout, as long as groups are not
split (a micro-batch is a multiple of the group). Under `batch` a pool is one rank's micro-batch, so the result
depends on its size and on the data-parallel split.

Suffixes: B pools, S tokens of a pool, D hidden_size, E experts, C expert capacity.
Source: arXiv 2410.02098 sec. 3 and alg. 1; Zhou et al. 2022 (2202.09368) sec. 3.2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.model.experts import activate
from ecdit_ds.model.layers import LayerFactory


class Routing(NamedTuple):
    """What a router decided; layers return it to hooks and keep nothing. ZeRO-3 looks for tensors in tuples only."""

    indices_BEC: Tensor
    """int64 in [0, S): the tokens each expert took."""
    gates_BEC: Tensor
    """fp32 weights of those tokens' expert outputs."""
    scores_BSE: Tensor
    """fp32 affinities of every token to every expert."""


def choose_tokens(
    router_logits_BSE: Tensor,
    expert_capacity: int,
    *,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    gate_normalization: Literal["none", "token"] = "none",
) -> Routing:
    """Let each expert choose its tokens within each pool.

    Args:
        router_logits_BSE: any float dtype; scores are computed in fp32.
        expert_capacity: C, tokens each expert takes from each pool, in [1, S].
        scores: `softmax` over experts, or an independent `sigmoid` each.
        gate_normalization: `token` divides the gates of a token by their sum over the experts that took it.
    """
    logits = router_logits_BSE.float()
    scores_BSE = logits.softmax(dim=-1) if scores == "softmax" else logits.sigmoid()
    scores_BES = rearrange(scores_BSE, "b s e -> b e s").contiguous()
    gates_BEC, indices_BEC = scores_BES.topk(expert_capacity, dim=-1, sorted=False)
    if gate_normalization == "token":
        # An expert takes a token once, so no two gates meet in a place, and a GPU sums them in a fixed order.
        kept_BES = torch.zeros_like(scores_BES).scatter(-1, indices_BEC, gates_BEC)
        gates_BEC = (kept_BES / (kept_BES.sum(dim=1, keepdim=True) + 1e-12)).gather(-1, indices_BEC)
    return Routing(indices_BEC=indices_BEC, gates_BEC=gates_BEC, scores_BSE=scores_BSE)


def experts_per_token(routing: Routing) -> Tensor:
    """Return (B, S) int64: how many experts took each token; its mean is E * C / S."""
    places = rearrange(routing.indices_BEC, "b e c -> b (e c)")
    return places.new_zeros(routing.scores_BSE.shape[:2]).scatter_add(1, places, torch.ones_like(places))


class ExpertChoiceRouter(nn.Module):
    """A linear map without bias, and the choice."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.capacity_factor = config.capacity_factor
        """What `with_capacity_factor` turns."""
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_BSD: Tensor) -> Routing:
        logits_BSE = torch.nn.functional.linear(x_BSD.float(), self.weight.float())
        return choose_tokens(
            logits_BSE,
            self.config.expert_capacity(x_BSD.shape[1], self.capacity_factor),
            scores=self.config.router_scores,
            gate_normalization=self.config.gate_normalization,
        )


@contextmanager
def with_capacity_factor(model: nn.Module, factor: float | None) -> Iterator[None]:
    """Let every expert of `model` take f = `factor` instead of the model's own; None changes nothing."""
    routers = [module for module in model.modules() if isinstance(module, ExpertChoiceRouter)]
    before = [router.capacity_factor for router in routers]
    for router in routers:
        router.capacity_factor = router.capacity_factor if factor is None else factor
    try:
        yield
    finally:
        for router, own in zip(routers, before, strict=True):
            router.capacity_factor = own


class ExpertChoiceFFN(nn.Module):
    """A feed-forward layer of experts that choose their tokens."""

    def __init__(self, layers: LayerFactory, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = ExpertChoiceRouter(config)
        self.experts = layers.experts(
            config.num_experts, config.hidden_size, config.ffn_hidden_size, activation=config.ffn_activation
        )
        self.dispatcher = layers.dispatcher()
        self.shared = DenseFFN(layers, config, copies=config.num_shared_experts) if config.num_shared_experts else None

    def forward(self, x_BSD: Tensor, router_input_BSD: Tensor) -> Tensor:
        """Return y_BSD for tokens x_BSD of images; the router reads router_input_BSD."""
        pool = self.config.pool_images(x_BSD.shape[0])
        x, router_input = (rearrange(z, "(b n) s d -> b (n s) d", n=pool) for z in (x_BSD, router_input_BSD))
        routing: Routing = self.router(router_input)
        y = self.dispatcher(x, routing.gates_BEC, routing.indices_BEC, self.experts)
        y_BSD = rearrange(y, "b (n s) d -> (b n) s d", n=pool)
        return y_BSD if self.shared is None else y_BSD + self.shared(x_BSD)


class DenseFFN(nn.Module):
    """The feed-forward layer every token passes; `copies` of it side by side make the shared experts."""

    def __init__(self, layers: LayerFactory, config: ModelConfig, *, copies: int = 1) -> None:
        super().__init__()
        width, self.activation = config.ffn_hidden_size * copies, config.ffn_activation
        self.copy_to_tp = layers.copy_to_tp()
        self.up = layers.column_linear(config.hidden_size, width * (2 if config.ffn_activation == "swiglu" else 1))
        self.down = layers.row_linear(width, config.hidden_size)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(activate(self.up(self.copy_to_tp(x_BSD)), self.activation))
