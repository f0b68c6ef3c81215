"""Expert choice against a loop that reads like the paper, and against another library's layer.

Suffixes: B pools, S tokens of a pool, D hidden_size, E experts, C expert capacity.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoELayer
from einops import rearrange
from torch import Tensor, nn

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.model.block import DiTBlock
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.model.moe import ExpertChoiceFFN, Routing, choose_tokens, experts_per_token

Draw = Callable[..., Tensor]
Randomize = Callable[[nn.Module], None]
BuildLayer = Callable[[ModelConfig], ExpertChoiceFFN]
Pool = Literal["image", "group", "batch"]

IMAGES, TOKENS = 4, 9


@pytest.fixture
def x_BSD(draw: Draw) -> Tensor:
    """Return the tokens that experts see."""
    return draw("x", IMAGES, TOKENS, 16)


@pytest.fixture
def build_layer(randomize: Randomize) -> BuildLayer:
    """Return a function that builds a layer of random weights."""

    def build(config: ModelConfig) -> ExpertChoiceFFN:
        layer = ExpertChoiceFFN(SerialLayers(), config)
        randomize(layer)
        return layer

    return build


def routing_of(layer: ExpertChoiceFFN, x_BSD: Tensor) -> Routing:
    """Return what the router decided in one forward."""
    seen: list[Routing] = []
    handle = layer.router.register_forward_hook(lambda module, args, output: seen.append(output))
    layer(x_BSD, x_BSD)
    handle.remove()
    return seen[0]


def feed_forward(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    """Write out both activations."""
    hidden = x @ w_in
    if activation == "gelu":
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        return (0.5 * hidden * (1 + inner.tanh())) @ w_out
    gate, up = hidden[:, 0::2], hidden[:, 1::2]
    return (gate * gate.sigmoid() * up) @ w_out


def shared_feed_forward(layer: ExpertChoiceFFN, x: Tensor) -> Tensor:
    """Return the sum of the shared experts, each applied alone."""
    copies, width = layer.config.num_shared_experts, layer.config.ffn_hidden_size
    if copies == 0:
        return torch.zeros_like(x)
    w_in = rearrange(layer.get_parameter("shared.up.weight"), "(n f m) d -> n d (f m)", n=copies, f=width)
    w_out = rearrange(layer.get_parameter("shared.down.weight"), "d (n f) -> n f d", n=copies)
    return torch.stack([feed_forward(x, *w, layer.config.ffn_activation) for w in zip(w_in, w_out, strict=True)]).sum(0)


def loop_over_experts(layer: ExpertChoiceFFN, x_BSD: Tensor, router_input_BSD: Tensor) -> Tensor:
    """Let each expert of each pool take its best tokens, one expert after the other (paper eq. 5, 6, 8)."""
    c, outputs = layer.config, []
    images_of_a_pool = {"image": 1, "group": c.routing_group, "batch": len(x_BSD)}[c.routing_pool]
    pools = zip(x_BSD.split(images_of_a_pool), router_input_BSD.split(images_of_a_pool), strict=True)
    for x, router_input in ((x.flatten(0, 1), r.flatten(0, 1)) for x, r in pools):
        logits = router_input @ layer.router.weight.T
        scores = logits.exp() / logits.exp().sum(-1, keepdim=True) if c.router_scores == "softmax" else logits.sigmoid()
        exact = Fraction(c.capacity_factor) * len(x) / c.num_experts
        capacity = {"floor": math.floor(exact), "ceil": math.ceil(exact), "nearest": round(exact)}[c.capacity_rounding]
        taken = [scores[:, e].argsort(descending=True)[:capacity] for e in range(c.num_experts)]
        mask = torch.stack([torch.isin(torch.arange(len(x)), tokens) for tokens in taken], dim=1)
        total = (scores * mask).sum(-1) if c.gate_normalization == "token" else torch.ones(len(x))
        y = shared_feed_forward(layer, x)
        for e, tokens in enumerate(taken):
            update = feed_forward(x[tokens], layer.experts.w1[e], layer.experts.w2[e], c.ffn_activation)
            y = y.index_add(0, tokens, (scores[tokens, e] / total[tokens])[:, None] * update)
        outputs.append(rearrange(y, "(n s) d -> n s d", n=images_of_a_pool))
    return torch.cat(outputs)


def gradients(
    function: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Return the output and the gradients of inputs and weights, for one fixed cotangent."""
    inputs = [value.detach().requires_grad_() for value in inputs]
    y = function(*inputs)
    cotangent = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * cotangent).sum(), [*inputs, *weights])]


@pytest.mark.parametrize("num_shared_experts", [0, 1, 2])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("rounding", ["floor", "nearest", "ceil"])
@pytest.mark.parametrize("gate_normalization", ["none", "token"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("pool", "group"), [("image", 1), ("group", 2), ("batch", 1)])
def test_the_layer_is_the_loop_over_experts_in_outputs_and_gradients(
    pool: Pool,
    group: int,
    scores: Literal["softmax", "sigmoid"],
    gate_normalization: Literal["none", "token"],
    rounding: Literal["floor", "nearest", "ceil"],
    activation: Literal["gelu", "swiglu"],
    num_shared_experts: int,
    moe_config: ModelConfig,
    draw: Draw,
    build_layer: BuildLayer,
) -> None:
    layer = build_layer(
        replace(
            moe_config,
            routing_pool=pool,
            routing_group=group,
            router_scores=scores,
            capacity_rounding=rounding,
            gate_normalization=gate_normalization,
            ffn_activation=activation,
            num_shared_experts=num_shared_experts,
        )
    )
    weights = list(layer.parameters())
    # The router reads other numbers than the experts, so that a mix-up of the two shows.
    inputs = [draw("x", IMAGES, TOKENS, 16), draw("router input", IMAGES, TOKENS, 16)]
    expected = gradients(lambda x, r: loop_over_experts(layer, x, r), inputs, weights)
    for actual, wanted in zip(gradients(layer, inputs, weights), expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"capacity_factor": 2.5}),
        ({}, {"capacity_rounding": "floor"}),
        ({"capacity_rounding": "nearest"}, {"capacity_rounding": "ceil"}),
        ({}, {"routing_pool": "batch"}),
        ({"routing_pool": "group", "routing_group": 2}, {"routing_pool": "group", "routing_group": 4}),
        ({}, {"gate_normalization": "token"}),
        ({}, {"router_scores": "sigmoid"}),
        ({}, {"num_shared_experts": 1}),
        ({"num_shared_experts": 1}, {"num_shared_experts": 2}),
        ({}, {"ffn_activation": "swiglu"}),
    ],
)
def test_each_switch_changes_the_output_for_the_same_weights(
    before: dict[str, Any], after: dict[str, Any], moe_config: ModelConfig, x_BSD: Tensor, build_layer: BuildLayer
) -> None:
    one, other = build_layer(replace(moe_config, **before)), build_layer(replace(moe_config, **after))
    with torch.no_grad():
        for name, parameter in one.named_parameters():  # of which it may have fewer
            parameter.copy_(other.get_parameter(name)[tuple(slice(size) for size in parameter.shape)])
    assert (one(x_BSD, x_BSD) - other(x_BSD, x_BSD)).abs().max() > 1e-3


def test_the_router_input_switch_changes_the_output_of_the_model_for_the_same_weights(
    tiny_config: ModelConfig, draw: Draw, randomize: Randomize
) -> None:
    outputs = []
    for router_input in ("modulated", "unmodulated"):
        model = ECDiT(replace(tiny_config, router_input=router_input), SerialLayers())
        randomize(model)
        mask = torch.ones(2, 6, dtype=torch.bool)
        inputs = draw("latents", 2, 3, 8, 8), torch.tensor([0.2, 0.8]), draw("text", 2, 6, 24), mask, draw("p", 2, 24)
        outputs.append(model(*inputs).velocity_BCHW)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("router_input", "is_same"), [("modulated", False), ("unmodulated", True)])
def test_an_unmodulated_router_does_not_see_the_ffn_modulation_but_experts_do(
    router_input: Literal["modulated", "unmodulated"],
    is_same: bool,
    tiny_config: ModelConfig,
    draw: Draw,
    randomize: Randomize,
) -> None:
    block = DiTBlock(SerialLayers(), replace(tiny_config, router_input=router_input), layer=1)
    randomize(block)
    scores, expert_rows = [], []
    block.get_submodule("ffn.router").register_forward_hook(lambda m, args, out: scores.append(out.scores_BSE))
    block.get_submodule("ffn.experts").register_forward_hook(lambda m, args, out: expert_rows.append(args[0]))
    modulation_BMD = draw("modulation", 2, 6, 32)
    other_BMD = modulation_BMD + torch.tensor([0, 0, 0, 1, 1, 0])[:, None]  # shift and scale of the second branch
    text, mask = draw("text", 2, 6, 24), torch.ones(2, 6, dtype=torch.bool)
    for vectors in (modulation_BMD, other_BMD):
        block(draw("x", 2, 16, 32), vectors, torch.zeros(16, 4), text, mask)
    assert torch.equal(scores[0], scores[1]) == is_same
    assert not torch.equal(expert_rows[0], expert_rows[1])


@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize(
    ("images", "tokens", "num_experts", "capacity_factor"),
    [(1, 16, 4, 2.0), (3, 10, 4, 1.5), (2, 64, 8, 2.0), (4, 7, 3, 3.0), (2, 12, 8, 0.5)],
)
def test_the_layer_equals_that_of_nucleus_image_in_diffusers(
    images: int,
    tokens: int,
    num_experts: int,
    capacity_factor: float,
    use_sigmoid: bool,
    moe_config: ModelConfig,
    draw: Draw,
    build_layer: BuildLayer,
) -> None:
    layer = build_layer(
        replace(
            moe_config,
            num_experts=num_experts,
            capacity_factor=capacity_factor,
            ffn_activation="swiglu",
            gate_normalization="token",
            router_input="unmodulated",
            num_shared_experts=1,
            router_scores="sigmoid" if use_sigmoid else "softmax",
        )
    )
    peer = NucleusMoELayer(16, 24, num_experts, capacity_factor, use_sigmoid=use_sigmoid, route_scale=1.0)
    with torch.no_grad():
        peer.gate.weight.copy_(torch.cat([draw("timestep part", num_experts, 16), layer.router.weight], dim=1))
        # Ours lets columns of gate and up take turns.
        peer.experts.gate_up_proj.copy_(rearrange(layer.experts.w1, "e d (f two) -> e d (two f)", two=2))
        peer.experts.down_proj.copy_(layer.experts.w2)
        # Its shared expert keeps (up, gate), its routed ones (gate, up).
        gate, up = rearrange(layer.get_parameter("shared.up.weight"), "(f two) d -> two f d", two=2)
        peer.shared_expert.net[0].proj.weight.copy_(torch.cat([up, gate]))
        peer.shared_expert.net[2].weight.copy_(layer.get_parameter("shared.down.weight"))
    inputs = [draw("x", images, tokens, 16), draw("router input", images, tokens, 16)]
    no_timestep = torch.zeros(images, 16)
    ours = gradients(layer, inputs, [layer.router.weight, layer.experts.w1, layer.experts.w2])
    theirs = gradients(
        lambda x, r: peer(x, r, no_timestep),
        inputs,
        [peer.gate.weight, peer.experts.gate_up_proj, peer.experts.down_proj],
    )
    theirs[3], theirs[4] = theirs[3][:, 16:], rearrange(theirs[4], "e d (two f) -> e d (f two)", two=2)
    for actual, wanted in zip(ours, theirs, strict=True):
        assert (actual - wanted).abs().max() <= 1e-6 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize(
    ("pool", "group", "reach"), [("image", 1, [0]), ("group", 2, [0, 1]), ("batch", 1, [0, 1, 2, 3])]
)
def test_an_image_reaches_those_of_its_pool_and_no_other(
    pool: Pool,
    group: int,
    reach: list[int],
    moe_config: ModelConfig,
    x_BSD: Tensor,
    build_layer: BuildLayer,
    draw: Draw,
) -> None:
    layer = build_layer(replace(moe_config, routing_pool=pool, routing_group=group))
    changed_BSD = x_BSD.clone()
    changed_BSD[0] = 5 * draw("other image", TOKENS, 16)
    difference_B = (layer(x_BSD, x_BSD) - layer(changed_BSD, changed_BSD)).abs().amax(dim=(1, 2))
    reached = (difference_B > 0).nonzero().flatten().tolist()
    assert set(reached) <= set(reach)
    assert len(reached) >= min(2, len(reach))


def test_an_image_alone_fares_as_in_a_batch_under_image_pools(
    moe_config: ModelConfig, x_BSD: Tensor, build_layer: BuildLayer
) -> None:
    layer = build_layer(moe_config)
    alone_BSD = torch.cat([layer(image, image) for image in x_BSD.split(1)])
    torch.testing.assert_close(alone_BSD, layer(x_BSD, x_BSD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("pool", "pools", "capacity"), [("image", IMAGES, 4), ("batch", 1, 14)])
def test_every_expert_takes_its_best_tokens_each_once_at_their_raw_scores(
    pool: Pool, pools: int, capacity: int, moe_config: ModelConfig, x_BSD: Tensor, build_layer: BuildLayer
) -> None:
    routing = routing_of(build_layer(replace(moe_config, routing_pool=pool)), x_BSD)
    scores_BES = rearrange(routing.scores_BSE, "b s e -> b e s")
    assert routing.indices_BEC.shape == routing.gates_BEC.shape == (pools, 4, capacity)
    assert routing.indices_BEC.dtype == torch.int64
    assert routing.gates_BEC.dtype == torch.float32
    assert all(len(set(tokens)) == capacity for tokens in routing.indices_BEC.flatten(0, 1).tolist())
    assert torch.equal(routing.gates_BEC, scores_BES.gather(-1, routing.indices_BEC))
    passed_over = scores_BES.scatter(-1, routing.indices_BEC, -1.0)
    assert bool((passed_over.amax(-1) <= routing.gates_BEC.amin(-1)).all())


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 2.0, 4.0])
def test_a_token_has_exactly_f_experts_on_average(capacity_factor: float, draw: Draw) -> None:
    routing = choose_tokens(draw("logits", 3, 16, 4), int(capacity_factor * 16 / 4))
    assert experts_per_token(routing).shape == (3, 16)
    assert experts_per_token(routing).sum(dim=1).tolist() == [capacity_factor * 16] * 3


def test_a_token_that_no_expert_took_has_an_update_of_exactly_zero(
    moe_config: ModelConfig, x_BSD: Tensor, build_layer: BuildLayer
) -> None:
    layer = build_layer(replace(moe_config, capacity_factor=0.5))
    is_taken_BS = experts_per_token(routing_of(layer, x_BSD)) > 0
    assert not is_taken_BS.all(dim=1).any()  # eight places for nine tokens
    assert torch.equal((layer(x_BSD, x_BSD) != 0).any(dim=-1), is_taken_BS)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_normalised_gates_of_a_token_sum_to_one(scores: Literal["softmax", "sigmoid"], draw: Draw) -> None:
    routing = choose_tokens(draw("logits", 3, 16, 4), 6, scores=scores, gate_normalization="token")
    places, gates = routing.indices_BEC.flatten(1), routing.gates_BEC.flatten(1)
    total_BS = torch.zeros(3, 16).scatter_add(1, places, gates)
    torch.testing.assert_close(total_BS, (experts_per_token(routing) > 0).float())


def test_scores_are_fp32_for_a_bf16_model(moe_config: ModelConfig, x_BSD: Tensor, build_layer: BuildLayer) -> None:
    layer = build_layer(moe_config).bfloat16()
    routing = routing_of(layer, x_BSD.bfloat16())
    assert layer(x_BSD.bfloat16(), x_BSD.bfloat16()).dtype == torch.bfloat16
    expected_BSE = (x_BSD.bfloat16().float() @ layer.router.weight.float().T).softmax(-1)
    torch.testing.assert_close(routing.scores_BSE, expected_BSE, rtol=1e-6, atol=1e-7)
