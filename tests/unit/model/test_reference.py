"""The transformer against a plain forward of it in float64, outputs and gradients, at random weights.

The reference is written from the paper (arXiv 2410.02098 sec. 3) and from what the recipe's switches say, and takes
from the model its weights only: image by image, head by head, expert by expert, in the most obvious way.

Suffixes: B images, S tokens of an image, T text tokens, D hidden_size, K head_dim, M modulation vectors.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.moe import with_capacity_factor
from ecdit_ds.parallel.expert_parallel import serial_layers

Draw = Callable[..., Tensor]
Weights = dict[str, Tensor]
Place = tuple[int, int]
"""Row and column of a token."""

HEIGHT, WIDTH = 6, 10
"""Of the latents, in pixels: 3 x 5 tokens; the architecture is made for 8 x 8."""
IMAGES, TEXT_LENGTHS = 4, (4, 6, 1, 6)
KEPT = ((0, 2, 3, 7, 8, 11, 14), (1, 2, 3, 4, 9, 10, 13), (0, 5, 6, 7, 8, 9, 12), (3, 4, 5, 6, 10, 13, 14))
AUXILIARY_WEIGHT = 3.0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one forward reads."""

    latents_BCHW: Tensor
    timesteps_B: Tensor
    text_embeds_BTD: Tensor
    text_mask_BT: Tensor
    text_pooled_BD: Tensor
    visible_BN: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The architecture, written out; `w` are its weights in float64."""

    config: ModelConfig
    w: Weights

    def forward(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """Return the velocity and the auxiliary loss."""
        c, p = self.config, self.config.patch_size
        images, _, height, width = given.latents_BCHW.shape
        places = [(row, column) for row in range(height // p) for column in range(width // p)]
        kept = [list(range(len(places)))] * images if given.visible_BN is None else given.visible_BN.tolist()

        tokens = [
            self.tokens_of(latents, places)[of_image]
            for latents, of_image in zip(given.latents_BCHW, kept, strict=True)
        ]
        conditions = [self.condition(t, text) for t, text in zip(given.timesteps_B, given.text_pooled_BD, strict=True)]
        texts = [text[mask] for text, mask in zip(given.text_embeds_BTD, given.text_mask_BT, strict=True)]
        auxiliary_loss = torch.zeros((), dtype=torch.float64)
        for layer in range(c.num_layers):
            seen = [[places[token] for token in of_image] for of_image in kept]
            tokens, loss = self.block(f"blocks.{layer}", layer % 2 == 1, tokens, conditions, seen, texts)
            auxiliary_loss = auxiliary_loss + loss
        if given.visible_BN is not None:
            tokens = [self.everywhere(x, of_image, places) for x, of_image in zip(tokens, kept, strict=True)]
        for layer in range(c.decoder_layers):
            tokens, _ = self.block(f"decoder.{layer}", False, tokens, conditions, [places] * images, texts)

        velocity_BCHW = torch.zeros_like(given.latents_BCHW)
        for image, (x_SD, condition) in enumerate(zip(tokens, conditions, strict=True)):
            shift, scale = self.affine("final.modulation", silu(condition)).chunk(2)
            patches = self.affine("final.linear", layer_norm(x_SD) * (1 + scale) + shift)
            for (row, column), patch in zip(places, patches, strict=True):
                for channel in range(c.in_channels):
                    pixels = patch.view(p, p, c.in_channels)[:, :, channel]
                    velocity_BCHW[image, channel, row * p : row * p + p, column * p : column * p + p] = pixels
        return velocity_BCHW, auxiliary_loss

    def affine(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def matrix(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T

    def tokens_of(self, latents_CHW: Tensor, places: Sequence[Place]) -> Tensor:
        """Return x_SD: each patch pixel by pixel, row by row, the channels of a pixel together, through a matrix."""
        p = self.config.patch_size
        patches = [latents_CHW[:, row * p : row * p + p, column * p : column * p + p] for row, column in places]
        x_SD = self.affine("patches.linear", torch.stack([patch.permute(1, 2, 0).flatten() for patch in patches]))
        return x_SD if self.config.positions == "rotary" else x_SD + absolute(places, self.config.hidden_size)

    def condition(self, time: Tensor, text_pooled_D: Tensor) -> Tensor:
        """Return c_D = MLP(sinusoids of the time) + MLP(pooled text)."""
        # In fp32 as in the model, since at 1000 radians its rounding alone is 3e-5.
        angles = time.float() * 1000 * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        waves = torch.cat([angles.cos(), angles.sin()]).double()
        of_time = self.affine("condition.time_out", silu(self.affine("condition.time_in", waves)))
        return of_time + self.affine("condition.text_out", silu(self.affine("condition.text_in", text_pooled_D)))

    def everywhere(self, x_ND: Tensor, kept: Sequence[int], places: Sequence[Place]) -> Tensor:
        """Return x_SD: the tokens that were kept, and the mask token, told its place, where one was left out."""
        filler = self.w["mask_token"].expand(len(places), -1)
        if self.config.positions == "rotary_and_absolute":
            filler = filler + absolute(places, self.config.hidden_size)
        return torch.stack([x_ND[kept.index(s)] if s in kept else filler[s] for s in range(len(places))])

    def block(
        self,
        name: str,
        is_sparse: bool,
        tokens: Sequence[Tensor],
        conditions: Sequence[Tensor],
        places: Sequence[Sequence[Place]],
        texts: Sequence[Tensor],
    ) -> tuple[list[Tensor], Tensor]:
        """Return every image's tokens after self-attention, cross-attention and feed-forward, each residual."""
        before, normed, modulated, gates = [], [], [], []
        for x, condition, where, text in zip(tokens, conditions, places, texts, strict=True):
            shared_MD = self.affine("modulation", silu(condition)).view(6, -1)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = shared_MD + self.w[f"{name}.modulation_table"]
            x = x + gate_1 * self.self_attention(name, layer_norm(x) * (1 + scale_1) + shift_1, where)
            x = x + self.cross_attention(name, layer_norm(x), text)
            before.append(x)
            normed.append(layer_norm(x))
            modulated.append(layer_norm(x) * (1 + scale_2) + shift_2)
            gates.append(gate_2)
        updates, loss = self.feed_forward(f"{name}.ffn", is_sparse and self.config.ffn, modulated, normed)
        return [x + gate * update for x, gate, update in zip(before, gates, updates, strict=True)], loss

    def self_attention(self, name: str, x_SD: Tensor, places: Sequence[Place]) -> Tensor:
        """Attend; neighbouring query heads share a key and a value head."""
        name, c = f"{name}.self_attention", self.config
        query, key, value = (self.matrix(f"{name}.{part}", x_SD) for part in ("query", "key", "value"))
        heads = []
        for head in range(c.num_heads):
            own, shared = head * c.head_dim, head // (c.num_heads // c.num_kv_heads) * c.head_dim
            q = rms_norm(query[:, own : own + c.head_dim], self.w[f"{name}.query_norm.weight"])
            k = rms_norm(key[:, shared : shared + c.head_dim], self.w[f"{name}.key_norm.weight"])
            heads.append(attend(turned(q, places), turned(k, places), value[:, shared : shared + c.head_dim]))
        return self.matrix(f"{name}.out", torch.cat(heads, dim=1))

    def cross_attention(self, name: str, x_SD: Tensor, text_TD: Tensor) -> Tensor:
        """Read the text's real tokens."""
        name, width = f"{name}.cross_attention", self.config.cross_head_dim
        query = self.matrix(f"{name}.query", x_SD)
        key, value = self.matrix(f"{name}.key", text_TD), self.matrix(f"{name}.value", text_TD)
        heads = []
        for own in range(0, self.config.cross_num_heads * width, width):
            q = rms_norm(query[:, own : own + width], self.w[f"{name}.query_norm.weight"])
            k = rms_norm(key[:, own : own + width], self.w[f"{name}.key_norm.weight"])
            heads.append(attend(q, k, value[:, own : own + width]))
        return self.matrix(f"{name}.out", torch.cat(heads, dim=1))

    def feed_forward(
        self, name: str, kind: str | bool, x: list[Tensor], normed: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Return every image's update, and the loss that balances token choice."""
        no_loss = torch.zeros((), dtype=torch.float64)
        if not kind or kind == "dense":
            up, down = self.w[f"{name}.up.weight"].T, self.w[f"{name}.down.weight"].T
            return [self.expert(tokens, up, down) for tokens in x], no_loss
        if kind == "token_choice":
            update, loss = self.token_choice(f"{name}.moe.deepspeed_moe", torch.cat(x))
            return list(update.split(len(x[0]))), loss
        pool = {"image": 1, "group": self.config.routing_group, "batch": len(x)}[self.config.routing_pool]
        router_input, updates = (x if self.config.router_input == "modulated" else normed), []
        for first in range(0, len(x), pool):
            of_pool = slice(first, first + pool)
            update = self.expert_choice(name, torch.cat(x[of_pool]), torch.cat(router_input[of_pool]))
            updates += list(update.split(len(x[0])))
        return updates, no_loss

    def expert(self, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        """Return GELU(x w1) w2, or (SiLU(x wg) * (x wu)) w2 where columns of wg and wu take turns."""
        inner = x @ w_in
        if self.config.ffn_activation == "swiglu":
            return (silu(inner[:, 0::2]) * inner[:, 1::2]) @ w_out
        return (0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))) @ w_out

    def expert_choice(self, name: str, x_SD: Tensor, router_input_SD: Tensor) -> Tensor:
        """Let each expert take its C best tokens of a pool."""
        c, logits = self.config, self.matrix(f"{name}.router", router_input_SD)
        scores = logits.softmax(dim=1) if c.router_scores == "softmax" else 1 / (1 + (-logits).exp())
        places = Fraction(str(c.capacity_factor)) * len(x_SD) / c.num_experts
        capacity = {"floor": math.floor(places), "nearest": round(places), "ceil": math.ceil(places)}[
            c.capacity_rounding
        ]
        taken = [sorted(range(len(x_SD)), key=lambda s: -scores[s, e].item())[:capacity] for e in range(c.num_experts)]
        update = torch.zeros_like(x_SD)
        if c.num_shared_experts:  # side by side they are one that is as many times as wide
            up, down = (self.w[f"{name}.shared.{part}.weight"].T for part in ("up", "down"))
            assert len(down) == c.num_shared_experts * c.ffn_hidden_size
            update = self.expert(x_SD, up, down)
        for e, tokens in enumerate(taken):
            gates = scores[tokens, e]
            if c.gate_normalization == "token":
                takers = [[other for other in range(c.num_experts) if s in taken[other]] for s in tokens]
                gates = gates / torch.stack([scores[s, others].sum() for s, others in zip(tokens, takers, strict=True)])
            y = self.expert(x_SD[tokens], self.w[f"{name}.experts.w1"][e], self.w[f"{name}.experts.w2"][e])
            update = update.index_add(0, torch.tensor(tokens), gates[:, None] * y)
        return update

    def token_choice(self, name: str, x_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Let each token take its best experts (GShard), where all have a place; two share a weight of one."""
        c, scores = self.config, self.matrix(f"{name}.gate.wg", x_SD).softmax(dim=1)
        w1, w2 = self.w[f"{name}.experts.bank.w1"], self.w[f"{name}.experts.bank.w2"]
        updates = []
        for x, of_token in zip(x_SD, scores, strict=True):
            best = sorted(range(c.num_experts), key=lambda e: -of_token[e].item())[: c.top_k]
            total = 1 if c.top_k == 1 else of_token[best].sum()
            updates.append(sum(of_token[e] / total * self.expert(x[None], w1[e], w2[e])[0] for e in best))
        first = nn.functional.one_hot(scores.argmax(dim=1), c.num_experts).double()
        return torch.stack(updates), c.num_experts * (scores.mean(dim=0) * first.mean(dim=0)).sum()


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    return scale * x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def attend(query_SK: Tensor, key_TK: Tensor, value_TK: Tensor) -> Tensor:
    return (query_SK @ key_TK.T / math.sqrt(query_SK.shape[1])).softmax(dim=1) @ value_TK


def angles_of(places: Sequence[Place], count: int) -> Tensor:
    """Return angles (S, count): half turn with the row, half with the column, ever slower by powers of 100."""
    half = count // 2
    slower = [100 ** -(i / half) for i in range(half)]
    rows = [[row * s for s in slower] + [column * s for s in slower] for row, column in places]
    return torch.tensor(rows, dtype=torch.float64)


def turned(x_SK: Tensor, places: Sequence[Place]) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]), as a complex number, by its angle."""
    real, imaginary = x_SK.chunk(2, dim=1)
    angles = angles_of(places, real.shape[1])
    pairs = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=1)


def absolute(places: Sequence[Place], width: int) -> Tensor:
    angles = angles_of(places, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@pytest.fixture
def inputs(draw: Draw) -> Inputs:
    """Return pictures that are wider than high, with captions of several lengths, one of which is the longest."""
    return Inputs(
        latents_BCHW=draw("latents", IMAGES, 3, HEIGHT, WIDTH),
        timesteps_B=torch.tensor([0.0, 0.3, 0.75, 1.0]),
        text_embeds_BTD=draw("text", IMAGES, 6, 24),
        text_mask_BT=torch.arange(6) < torch.tensor(TEXT_LENGTHS)[:, None],
        text_pooled_BD=draw("pooled", IMAGES, 24),
    )


@pytest.fixture
def awake(tiny_config: ModelConfig, draw: Draw) -> Callable[..., ECDiT]:
    """Return a function that builds a model of random weights, none of which is special."""

    def build(**fields: Any) -> ECDiT:
        model = ECDiT(replace(tiny_config, **fields), serial_layers())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre, spread = float("norm" in name), 0.2 if "modulation" in name else 0.1
                parameter.copy_(centre + spread * draw(name, *parameter.shape))
        return model

    return build


def outcome(
    forward: Callable[[Inputs], tuple[Tensor, Tensor]], inputs: Inputs, weights: Iterable[Tensor]
) -> list[Tensor]:
    """Return velocity and auxiliary loss, and gradients of what is read and of all weights, for one fixed cotangent."""
    names = ("latents_BCHW", "text_embeds_BTD", "text_pooled_BD")
    read = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    velocity, auxiliary_loss = forward(replace(inputs, **read))
    cotangent = torch.linspace(-1, 1, velocity.numel()).cos().view(velocity.shape) * torch.linspace(1, 2, WIDTH)
    total = (velocity * cotangent).sum() + AUXILIARY_WEIGHT * auxiliary_loss
    return [velocity.detach(), auxiliary_loss.detach(), *torch.autograd.grad(total, [*read.values(), *weights])]


def by_reference(model: ECDiT, inputs: Inputs) -> list[Tensor]:
    """Return the outcome of the plain forward."""
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    unread = set() if inputs.visible_BN is not None else {"mask_token"}
    wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in vars(inputs).items()}
    reference = Reference(config=model.config, w=weights)
    found = outcome(reference.forward, Inputs(**wide), [w for name, w in weights.items() if name not in unread])
    if "mask_token" in weights and unread:
        found.insert(5 + list(weights).index("mask_token"), torch.zeros_like(weights["mask_token"]))
    return found


def by_model(model: ECDiT, inputs: Inputs, *, remembers: bool = False) -> list[Tensor]:
    """Return the outcome of the model; `remembers` lets it make the text's keys and values first."""

    def forward(given: Inputs) -> tuple[Tensor, Tensor]:
        text = model.text_kv(given.text_embeds_BTD) if remembers else given.text_embeds_BTD
        return model(
            given.latents_BCHW, given.timesteps_B, text, given.text_mask_BT, given.text_pooled_BD, given.visible_BN
        )

    return outcome(forward, inputs, model.parameters())


MASKED = {"decoder_layers": 2}
NEAREST_UP = {"capacity_rounding": "nearest", "capacity_factor": 1.25}  # 18.75 of a batch's 60 tokens
NEAREST_DOWN = {"capacity_rounding": "nearest", "capacity_factor": 1.1, "router_scores": "sigmoid"}  # 4.125 of 15
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"ffn": "dense"},
    "dense swiglu": {"ffn": "dense", "ffn_activation": "swiglu", "positions": "rotary_and_absolute"},
    "full attention": {"num_kv_heads": 4, "capacity_factor": 1.2, "capacity_rounding": "floor"},
    "expert choice": {},
    "expert choice swiglu": {"ffn_activation": "swiglu", "num_shared_experts": 2},
    "group": {"routing_pool": "group", "routing_group": 2, "gate_normalization": "token"},
    "batch": {"routing_pool": "batch", "router_scores": "sigmoid"} | NEAREST_UP,
    "unmodulated": {"router_input": "unmodulated", "num_shared_experts": 1, "gate_normalization": "token"}
    | NEAREST_DOWN,
    "shared": {"num_shared_experts": 1, "positions": "rotary_and_absolute", "capacity_factor": 1.5},
    "token choice 1": {"ffn": "token_choice", "top_k": 1, "capacity_factor": 4.0},
    "token choice 2": {"ffn": "token_choice", "top_k": 2, "capacity_factor": 4.0},
    "decoder": MASKED,
    "masked": MASKED,
    "masked dense": MASKED | {"ffn": "dense"},
    "masked absolute": MASKED | {"positions": "rotary_and_absolute", "routing_pool": "batch"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_is_its_plain_forward_in_outputs_and_all_gradients(
    variant: str, awake: Callable[..., ECDiT], inputs: Inputs
) -> None:
    model = awake(**VARIANTS[variant])
    if variant.startswith("masked"):
        inputs = replace(inputs, visible_BN=torch.tensor(KEPT))
    names = ["velocity", "auxiliary loss", "latents", "text", "pooled text", *dict(model.named_parameters())]
    silent = {"mask_token"} if variant == "decoder" else set()
    silent |= set() if "token choice" in variant else {"auxiliary loss"}
    for name, actual, wanted in zip(names, by_model(model, inputs), by_reference(model, inputs), strict=True):
        assert wanted.abs().max() > 1e-3 or name in silent, name
        # Rounding grows with the largest number of a tensor, and through six blocks.
        tolerance = 1e-5 * wanted.abs().max().item()
        far = (actual - wanted).abs().max().item()
        assert far <= tolerance, f"{name}: {far / tolerance:g} times as far away as may be"


def test_what_is_added_to_a_variance_is_a_millionth(awake: Callable[..., ECDiT], inputs: Inputs) -> None:
    """Tokens, queries and keys are small here; where they are not, no other test would see it."""
    model = awake(ffn="dense")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("patches") or name.endswith(("query.weight", "key.weight")):
                parameter.mul_(0.01)
    actual, wanted = by_model(model, inputs)[0], by_reference(model, inputs)[0]
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_a_remembered_text_is_the_text_in_outputs_and_all_gradients(
    awake: Callable[..., ECDiT], inputs: Inputs
) -> None:
    model, masked = awake(**MASKED), replace(inputs, visible_BN=torch.tensor(KEPT))
    for once, again in zip(by_model(model, masked), by_model(model, masked, remembers=True), strict=True):
        assert torch.equal(once, again)


def test_another_capacity_factor_for_drawing_is_that_of_a_model_made_with_it(
    awake: Callable[..., ECDiT], inputs: Inputs
) -> None:
    model, other = awake(capacity_factor=2.0), awake(capacity_factor=3.0)
    expected = [by_model(other, inputs), by_model(model, inputs)]
    with with_capacity_factor(model, 3.0):
        found = [by_model(model, inputs)]
    found.append(by_model(model, inputs))
    assert not torch.equal(expected[0][0], expected[1][0])
    assert all(
        torch.equal(one, same) for pair in zip(found, expected, strict=True) for one, same in zip(*pair, strict=True)
    )
