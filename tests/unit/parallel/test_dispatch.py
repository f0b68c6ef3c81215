"""Dispatch, experts and combine on one process, against loops that a reader can check.

Suffixes: B pools, S tokens of a pool, D hidden_size, E experts, C expert capacity, R rows of one expert (B * C).
"""

from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from torch import Tensor

from ecdit_ds.config.model_config import Activation
from ecdit_ds.model.dispatch import combine, gather
from ecdit_ds.model.experts import Experts, activate

POOLS, TOKENS, HIDDEN, EXPERTS, CAPACITY = 2, 6, 5, 3, 2
Draw = Callable[..., Tensor]


@pytest.fixture
def indices_BEC() -> Tensor:
    """In pool 0 token 4 is taken by all three experts; in pool 1 token 0 by two. Most tokens are taken by none."""
    return torch.tensor([[[4, 1], [0, 4], [4, 2]], [[0, 5], [3, 0], [5, 1]]])


@pytest.fixture
def x_BSD(draw: Draw) -> Tensor:
    return draw("x", POOLS, TOKENS, HIDDEN).double().requires_grad_()


@pytest.fixture
def y_ERD(draw: Draw) -> Tensor:
    return draw("y", EXPERTS, POOLS * CAPACITY, HIDDEN).double().requires_grad_()


@pytest.fixture
def gates_BEC(draw: Draw) -> Tensor:
    return draw("gates", POOLS, EXPERTS, CAPACITY).double().abs().requires_grad_()


def dispatch_by_loop(x_BSD: Tensor, indices_BEC: Tensor) -> Tensor:
    """Return x_ERD; an expert's rows are ordered by pool, then by place."""
    pools, experts, capacity = indices_BEC.shape
    return torch.stack(
        [
            torch.stack([x_BSD[b, indices_BEC[b, e, c]] for b in range(pools) for c in range(capacity)])
            for e in range(experts)
        ]
    )


def combine_by_loop(y_ERD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, num_tokens: int) -> Tensor:
    pools, experts, capacity = indices_BEC.shape
    tokens = [[y_ERD.new_zeros(y_ERD.shape[-1]) for _ in range(num_tokens)] for _ in range(pools)]
    for b in range(pools):
        for e in range(experts):
            for c in range(capacity):
                token = int(indices_BEC[b, e, c])
                tokens[b][token] = tokens[b][token] + gates_BEC[b, e, c] * y_ERD[e, b * capacity + c]
    return torch.stack([torch.stack(pool) for pool in tokens])


def gradients_of(result: Tensor, inputs: tuple[Tensor, ...], draw: Draw) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result, inputs, draw("upstream", *result.shape).to(result.dtype))


def test_dispatch_gives_each_expert_the_rows_it_took_and_each_token_the_sum_of_their_gradients(
    x_BSD: Tensor, indices_BEC: Tensor, draw: Draw
) -> None:
    ours, loop = gather(x_BSD, indices_BEC), dispatch_by_loop(x_BSD, indices_BEC)
    torch.testing.assert_close(ours, loop, rtol=0, atol=0)
    torch.testing.assert_close(gradients_of(ours, (x_BSD,), draw), gradients_of(loop, (x_BSD,), draw))


def test_combine_is_the_gated_sum_of_a_plain_loop_with_the_same_gradients_of_outputs_and_gates(
    y_ERD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, draw: Draw
) -> None:
    ours = combine(y_ERD, gates_BEC, indices_BEC, TOKENS)
    loop = combine_by_loop(y_ERD, gates_BEC, indices_BEC, TOKENS)
    torch.testing.assert_close(ours, loop)
    inputs = (y_ERD, gates_BEC)
    torch.testing.assert_close(gradients_of(ours, inputs, draw), gradients_of(loop, inputs, draw))


def test_combine_has_the_gradients_of_finite_differences(y_ERD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor) -> None:
    def combined(y_ERD: Tensor, gates_BEC: Tensor) -> Tensor:
        return combine(y_ERD, gates_BEC, indices_BEC, TOKENS)

    assert torch.autograd.gradcheck(combined, (y_ERD, gates_BEC))


def test_a_token_that_no_expert_took_is_exactly_zero_and_gets_no_gradient(
    x_BSD: Tensor, y_ERD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor
) -> None:
    taken = torch.zeros(POOLS, TOKENS, dtype=torch.bool)
    for b in range(POOLS):
        taken[b, indices_BEC[b].flatten()] = True
    assert taken.any() and not taken.all()
    y_BSD = combine(y_ERD, gates_BEC, indices_BEC, TOKENS)
    assert (y_BSD[~taken] == 0).all() and (y_BSD[taken] != 0).all()
    (grad_x_BSD,) = torch.autograd.grad(gather(x_BSD, indices_BEC).square().sum(), x_BSD)
    assert (grad_x_BSD[~taken] == 0).all() and (grad_x_BSD[taken] != 0).all()


def test_a_second_backward_through_the_same_graph_gives_the_same_gradients(
    y_ERD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor
) -> None:
    total = combine(y_ERD, gates_BEC, indices_BEC, TOKENS).square().sum()
    first = torch.autograd.grad(total, (y_ERD, gates_BEC), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, (y_ERD, gates_BEC)), first, rtol=0, atol=0)


def test_bf16_rows_with_fp32_gates_stay_bf16_and_agree_with_fp32(
    y_ERD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, draw: Draw
) -> None:
    # Rounded before, so that both sides start from the same numbers.
    y, gates = (z.detach().bfloat16().requires_grad_() for z in (y_ERD, gates_BEC))
    gates_fp32 = gates.detach().float().requires_grad_()
    ours = combine(y, gates_fp32, indices_BEC, TOKENS)
    assert ours.dtype == torch.bfloat16
    exact = combine_by_loop(y.double(), gates_fp32.double(), indices_BEC, TOKENS)
    # 8 bits of mantissa, at most five roundings of numbers below 8.
    torch.testing.assert_close(ours.double(), exact, rtol=0.02, atol=0.05)
    grads, exact_grads = (gradients_of(z, (y, gates_fp32), draw) for z in (ours, exact))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(grads, exact_grads, rtol=0.02, atol=0.05)


@pytest.fixture
def make_experts(randomize: Callable[[Experts], None]) -> Callable[[int, Activation], Experts]:
    def make(num_experts: int, activation: Activation) -> Experts:
        experts = Experts(num_experts, HIDDEN, 8, activation=activation)
        randomize(experts)
        return experts.double()

    return make


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("num_experts", [1, 3, 19])  # fewer than the slices the layer works in, and not a multiple
def test_each_expert_is_its_own_two_products_with_the_same_gradients(
    make_experts: Callable[[int, Activation], Experts], activation: Activation, num_experts: int, draw: Draw
) -> None:
    experts = make_experts(num_experts, activation)
    x_ERD = draw("rows", num_experts, 4, HIDDEN).double().requires_grad_()
    loop = torch.stack(
        [activate(x @ w1, activation) @ w2 for x, w1, w2 in zip(x_ERD, experts.w1, experts.w2, strict=True)]
    )
    ours = experts(x_ERD)
    torch.testing.assert_close(ours, loop)
    inputs = (x_ERD, experts.w1, experts.w2)
    torch.testing.assert_close(gradients_of(ours, inputs, draw), gradients_of(loop, inputs, draw))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_experts_have_the_gradients_of_finite_differences(
    make_experts: Callable[[int, Activation], Experts], activation: Activation, draw: Draw
) -> None:
    experts = make_experts(2, activation)

    def apply(x_ERD: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(experts, {"w1": w1, "w2": w2}, (x_ERD,))
        return result

    inputs = (draw("rows", 2, 3, HIDDEN).double().requires_grad_(), experts.w1, experts.w2)
    assert torch.autograd.gradcheck(apply, inputs)


def test_experts_take_rows_that_are_not_contiguous(
    make_experts: Callable[[int, Activation], Experts], draw: Draw
) -> None:
    experts = make_experts(3, "gelu")
    x_RED = draw("rows", 4, 3, HIDDEN).double()
    strided, whole = (z.requires_grad_() for z in (rearrange(x_RED, "r e d -> e r d"), x_RED.transpose(0, 1).clone()))
    assert not strided.is_contiguous()
    torch.testing.assert_close(experts(strided), experts(whole), rtol=0, atol=0)
    torch.testing.assert_close(
        gradients_of(experts(strided), (strided, experts.w1), draw),
        gradients_of(experts(whole), (whole, experts.w1), draw),
    )
