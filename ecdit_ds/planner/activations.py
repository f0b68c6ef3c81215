"""Bytes of activations: what autograd keeps of a forward, and the most that lives at one time of a step.

Letters: B images of a micro-batch, N tokens of an image in a block, n = B N, T text tokens, D hidden_size, A and K
query and key-value width of self-attention, X width of cross-attention, F ffn_hidden_size, E experts, R = rows that
all experts take. Tensor parallelism cuts A, K, X, F and heads; expert parallelism leaves R as it is, since each rank
gets as many rows as it sends. w is 2 bytes for bf16 and 4 for fp32.
"""

import math
from dataclasses import dataclass

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.flops import is_recomputed
from ecdit_ds.planner.parameters import NUMBER_BYTES

_FP32 = 4
_INT64 = 8
_SLICES = 8
"""Into which the backward of experts cuts them (parallel/experts.py)."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Everything that sizes depend on."""

    model: ModelConfig
    images: int
    """Images of a micro-batch, B."""
    kept_tokens: int
    """Tokens of an image that the main blocks see."""
    width: int
    """Bytes of a number, w."""
    tp: int
    ep: int
    is_gpu: bool
    """GPU kernels keep less: a norm its input only, and attention writes its output where the next product reads."""

    def tokens(self, layer: int) -> int:
        """Return N of block `layer` (from 0, decoder blocks last)."""
        return self.kept_tokens if layer < self.model.num_layers else self.model.num_tokens

    def stream(self, layer: int) -> int:
        """Return n D w: the bytes of the tokens themselves."""
        return self.images * self.tokens(layer) * self.model.hidden_size * self.width

    def expert_rows(self, layer: int) -> int:
        """Return R: each expert takes C of the tokens of each pool."""
        # DeepSpeed's token choice has places for the whole micro-batch at once.
        is_ours = self.model.ffn == "expert_choice"
        pool = self.model.pool_images(self.images) if is_ours else self.images
        capacity = self.model.expert_capacity(self.tokens(layer) * pool)
        return self.images // pool * self.model.num_experts * capacity


def shapes_of(recipe: Recipe, topology: Topology, mask_ratio: float, *, is_gpu: bool) -> Shapes:
    """Return the shapes of a recipe's forward on one rank."""
    return Shapes(
        model=recipe.model,
        images=recipe.micro_batch_size(topology.dp),
        kept_tokens=recipe.model.num_kept_tokens(mask_ratio),
        width=NUMBER_BYTES[recipe.train.precision],
        tp=topology.tp,
        ep=topology.ep,
        is_gpu=is_gpu,
    )


def peak_activations(recipe: Recipe, shapes: Shapes) -> int:
    """Return the most bytes of activations that live at one time of a forward and backward."""
    return max(live_activations(recipe, shapes))


def live_activations(recipe: Recipe, shapes: Shapes) -> list[int]:
    """Return the bytes of activations that live in the backward of each block, and at last in that of the final layer.

    Backward goes through the blocks from the last to the first. At block l there live what blocks 0 to l keep, its own
    transients and, if it is recomputed, all that its forward keeps once more. What the blocks after l kept is gone.
    """
    model, kept, live = recipe.model, ends_bytes(shapes), []
    for layer in range(model.num_layers + model.decoder_layers):
        whole = block_bytes(shapes, layer)
        if is_recomputed(recipe, layer):
            kept += shapes.stream(layer) + _exchanged(recipe, shapes, layer)
            live.append(kept + whole - shapes.stream(layer) + backward_bytes(shapes, layer))
        else:
            kept += whole
            live.append(kept + backward_bytes(shapes, layer))
    return [*live, kept + last_bytes(shapes, len(live) - 1)]


def ends_bytes(shapes: Shapes) -> int:
    """Return what is kept outside the blocks until backward reaches it: patches, text, condition and their maps.

    The latents' patches, the text as bf16, about ten vectors of D an image for the condition, and 6 D for adaLN.
    """
    model, b = shapes.model, shapes.images
    latents = b * model.in_channels * model.latent_height * model.latent_width
    text = b * model.max_text_tokens * model.text_embed_dim * shapes.width if shapes.width < _FP32 else 0
    return latents * shapes.width + text + b * 16 * model.hidden_size * shapes.width


def last_bytes(shapes: Shapes, layer: int) -> int:
    """Return what the final layer and the loss keep: its input, normalised, modulated; the fp32 velocity and error."""
    model = shapes.model
    latents = shapes.images * model.in_channels * model.latent_height * model.latent_width
    return 3 * shapes.stream(layer) + latents * (2 * shapes.width + 3 * _FP32)


def block_bytes(shapes: Shapes, layer: int) -> int:
    """Return what autograd keeps of block `layer`: its input, and what its three parts keep.

    adaLN: the 6 D of an image's modulation, and 1 + scale twice.
    """
    modulation = shapes.images * 8 * shapes.model.hidden_size * shapes.width
    attention = attention_bytes(shapes, layer) + cross_attention_bytes(shapes, layer)
    is_moe = shapes.model.is_moe_layer(layer)
    return modulation + attention + (expert_bytes(shapes, layer) if is_moe else dense_bytes(shapes, layer))


def attention_bytes(shapes: Shapes, layer: int) -> int:
    """Return what self-attention keeps.

    n D w four times: its input, normalised, modulated, and its output, which the gate multiplies. Of queries and keys
    what the RMS norm keeps (see `_normed`) and the turned ones, n (A + K) w; values, n K w; the sum, n A w; the fp32
    logarithm of each head's sum of exponentials; and sines and cosines, n K_head w for queries and keys each (once for
    all images where nothing is masked, for then all have the same places).
    """
    model, w = shapes.model, shapes.width
    n = shapes.images * shapes.tokens(layer)
    heads, kv_heads = model.num_heads // shapes.tp, model.num_kv_heads // shapes.tp
    a, k = heads * model.head_dim, kv_heads * model.head_dim
    turned_rows = n if shapes.tokens(layer) < model.num_tokens else model.num_tokens
    angles = 2 * turned_rows * model.head_dim * w
    return (
        4 * shapes.stream(layer)
        + _normed(shapes, n, heads + kv_heads, model.head_dim)
        + n * (a + 2 * k) * w
        + _attended(shapes, n, heads, model.head_dim)
        + angles
    )


def cross_attention_bytes(shapes: Shapes, layer: int) -> int:
    """Return what cross-attention keeps: its input and that normalised, 2 n D w; queries, keys of the text, values."""
    model, w = shapes.model, shapes.width
    n, t = shapes.images * shapes.tokens(layer), shapes.images * model.max_text_tokens
    heads = model.cross_num_heads // shapes.tp
    x = heads * model.cross_head_dim
    return (
        2 * shapes.stream(layer)
        + _normed(shapes, n + t, heads, model.cross_head_dim)
        + (n + 2 * t) * x * w
        + _attended(shapes, n, heads, model.cross_head_dim)
    )


def dense_bytes(shapes: Shapes, layer: int) -> int:
    """Return what a dense FFN keeps: its input, normalised, modulated, its output, and what is between."""
    rows = shapes.images * shapes.tokens(layer)
    return 4 * shapes.stream(layer) + _inner(shapes, rows, is_plain=True)


def expert_bytes(shapes: Shapes, layer: int) -> int:
    """Return what a layer of experts keeps.

    Three times n D w: its input, normalised, and its output, which the gate multiplies. The modulated input only where
    the router, in the model's own precision, or shared experts multiply it; else the router's input in fp32. fp32
    scores, n E. For each of R rows the tokens that were gathered and the experts' output, 2 D w, what is between, the
    gate, and the row's number three times (chosen, gathered, given back).
    """
    model, w = shapes.model, shapes.width
    n, rows = shapes.images * shapes.tokens(layer), shapes.expert_rows(layer)
    router = n * model.num_experts * _FP32 + (n * model.hidden_size * _FP32 if w < _FP32 else 0)
    if model.gate_normalization == "token":
        router += n * model.num_experts * _FP32
    moved = rows * (2 * model.hidden_size * w + w + _FP32 + 3 * _INT64)
    shared = _inner(shapes, n * model.num_shared_experts, is_plain=True)
    is_routed_by_it = w == _FP32 and model.router_input == "modulated"
    streams = 3 + (is_routed_by_it or model.num_shared_experts > 0)
    return streams * shapes.stream(layer) + router + moved + _inner(shapes, rows, is_plain=False) + shared


def backward_bytes(shapes: Shapes, layer: int) -> int:
    """Return the transients of block `layer` in backward, where they are most: in its feed-forward part.

    Beyond what the block keeps there live, dense: where the gate is applied, three times n D w; in the last product
    the gradients of the block's output, n D w, of the activated inner width, n F w, and of the matrix itself, D F w
    (swiglu: 2 n F w). Experts: the gradients of their rows and outputs, 2 R D w, while the output, R D w, is not
    needed any more (an exchange holds the rows once more); and the gradient of one matrix with three slices' inner
    width, or of both.
    """
    model, stream = shapes.model, shapes.stream(layer)
    if not model.is_moe_layer(layer):
        return _dense_backward(shapes, layer, copies=1)
    rows = shapes.expert_rows(layer)
    row_bytes = rows * model.hidden_size * shapes.width
    in_experts = row_bytes + _expert_matrices(shapes, rows)
    exchanged = (2 if shapes.ep > 1 else 1) * row_bytes
    if not model.num_shared_experts:
        return max(stream + row_bytes, in_experts, exchanged)
    # Shared experts come last in forward, so they are through when the others begin.
    tokens = shapes.images * shapes.tokens(layer)
    gone = _inner(shapes, tokens * model.num_shared_experts, is_plain=True)
    first = _dense_backward(shapes, layer, copies=model.num_shared_experts)
    return max(first, stream + max(stream + row_bytes, in_experts, exchanged) - gone)


def _dense_backward(shapes: Shapes, layer: int, copies: int) -> int:
    stream, f = shapes.stream(layer), copies * shapes.model.ffn_hidden_size // shapes.tp
    widths = 2 if shapes.model.ffn_activation == "swiglu" else 1
    inner = widths * shapes.images * shapes.tokens(layer) * f * shapes.width
    return max(3 * stream, stream + inner + shapes.model.hidden_size * f * shapes.width)


def _expert_matrices(shapes: Shapes, rows: int) -> int:
    """Return the gradient of the experts' first matrix with the widths of three slices, or of both matrices."""
    f = shapes.model.ffn_hidden_size // shapes.tp
    widths = 2 if shapes.model.ffn_activation == "swiglu" else 1
    local = shapes.model.num_experts // shapes.ep
    matrices = local * shapes.model.hidden_size * f * shapes.width
    slices = 3 * widths * rows * f * shapes.width * math.ceil(local / _SLICES) // local
    return widths * matrices + max(slices, matrices)


def _normed(shapes: Shapes, rows: int, heads: int, head_dim: int) -> int:
    """Return what the RMS norm of so many heads keeps: its input and, on a CPU, in fp32, twice; a number a head."""
    numbers = rows * heads * head_dim
    return numbers * (shapes.width if shapes.is_gpu else 2 * _FP32) + rows * heads * _FP32


def _attended(shapes: Shapes, rows: int, heads: int, head_dim: int) -> int:
    """Return what attention's output takes: on a CPU twice, for there heads stand outside tokens; a number a head."""
    return rows * heads * (head_dim * shapes.width * (1 if shapes.is_gpu else 2) + _FP32)


def _inner(shapes: Shapes, rows: int, *, is_plain: bool) -> int:
    """Return what the inner width keeps.

    gelu: before and after it, 2 F. swiglu: before it 2 F, after it F and, in plain autograd, SiLU of the gate, F.
    """
    f = shapes.model.ffn_hidden_size // shapes.tp
    widths = 2 if shapes.model.ffn_activation == "gelu" else 3 + is_plain
    return rows * widths * f * shapes.width


def _exchanged(recipe: Recipe, shapes: Shapes, layer: int) -> int:
    """Return what `selective` keeps besides a block's input: the rows that two all-to-alls brought, R D w each."""
    is_kept = recipe.train.recompute == "selective" and recipe.model.is_moe_layer(layer)
    return 2 * shapes.expert_rows(layer) * recipe.model.hidden_size * shapes.width if is_kept else 0
