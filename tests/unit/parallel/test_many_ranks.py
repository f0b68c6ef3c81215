"""Two or three forked ranks against one process: exchanges, sums, experts, whole models cut by tensor parallelism."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.errors import CheckpointError, EcditError, RankLostError
from ecdit_ds.model.dispatch import LocalDispatcher
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.experts import Experts
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.model.sharding import UNSHARDED, ShardIndex, shard_of
from ecdit_ds.parallel import deepspeed_moe, tensor_parallel
from ecdit_ds.parallel.collectives import all_to_all_start, all_to_all_wait, copy_to_tp_region, reduce_from_tp_region
from ecdit_ds.parallel.dispatch import AllToAllDispatcher
from ecdit_ds.parallel.tensor_parallel import TensorParallelLayers, create_tensor_groups
from ecdit_ds.parallel.world import RankInfo, World, rank_info_from_env
from tests.helpers.forked_ranks import on_ranks
from tests.helpers.random_model import random_values

Draw = Callable[..., Tensor]


def everyone() -> dist.ProcessGroup:
    """Return the group of all ranks."""
    world = dist.group.WORLD
    assert world is not None
    return world


def test_an_exchange_gives_rank_i_the_ith_chunk_of_each_and_its_gradient_goes_back_the_same_way(draw: Draw) -> None:
    sent, upstream = draw("sent", 3, 6, 2), draw("upstream", 3, 6, 2)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        x = sent[rank].t().contiguous().t().requires_grad_()  # not contiguous
        out = all_to_all_wait(all_to_all_start(x, everyone()))
        (gradient,) = torch.autograd.grad(out, x, upstream[rank])
        return out.detach(), gradient

    def exchanged(of_ranks: Tensor, rank: int) -> Tensor:
        return torch.cat([of_ranks[peer, 2 * rank : 2 * rank + 2] for peer in range(3)])

    for rank, (out, gradient) in enumerate(on_ranks(3, work)):
        assert torch.equal(out, exchanged(sent, rank))
        assert torch.equal(gradient, exchanged(upstream, rank))


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_what_is_copied_in_has_the_sum_of_all_gradients_and_what_is_summed_out_has_its_own(
    draw: Draw, is_contiguous: bool
) -> None:
    values, upstream = draw("values", 3, 4, 2), draw("upstream", 3, 4, 2)

    def work(rank: int) -> dict[str, Tensor]:
        def laid_out(data: Tensor) -> Tensor:
            return data.clone() if is_contiguous or rank == 0 else data.t().contiguous().t()

        x, into = (laid_out(values[rank]).requires_grad_() for _ in range(2))
        copied, summed, gradient = (
            copy_to_tp_region(x, everyone()),
            reduce_from_tp_region(into, everyone()),
            laid_out(upstream[rank]),
        )
        (of_copied,) = torch.autograd.grad(copied, x, gradient)
        (of_summed,) = torch.autograd.grad(summed, into, gradient)
        assert torch.equal(into, values[rank]) and torch.equal(gradient, upstream[rank]), "the input is left as it was"
        return {"copied": copied.detach(), "of_copied": of_copied, "summed": summed.detach(), "of_summed": of_summed}

    for rank, found in enumerate(on_ranks(3, work)):
        assert torch.equal(found["copied"], values[rank])
        torch.testing.assert_close(found["of_copied"], upstream.sum(dim=0))
        torch.testing.assert_close(found["summed"], values.sum(dim=0))
        assert torch.equal(found["of_summed"], upstream[rank])


@pytest.mark.parametrize("chunks", [1, 2])
def test_experts_on_two_ranks_give_outputs_and_gradients_of_one_process(draw: Draw, chunks: int) -> None:
    """Four experts, two a rank; each rank has two pools of its own, whose tokens go to all experts."""
    x_RBSD, upstream_RBSD = draw("x", 2, 2, 6, 5), draw("upstream", 2, 2, 6, 5)
    gates_RBEC = draw("gates", 2, 2, 4, 2)
    indices_RBEC = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:2] for i in range(16)])
    indices_RBEC = indices_RBEC.view(2, 2, 4, 2)
    w1_EDF, w2_EFD = draw("w1", 4, 5, 3), draw("w2", 4, 3, 5)

    def computed(ep: ShardIndex, x: Tensor, gates: Tensor, indices: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        experts = Experts(4, 5, 3, activation="gelu", ep=ep)
        mine = slice(2 * ep.index, 2 * ep.index + ep.of(4))
        experts.load_state_dict({"w1": w1_EDF[mine], "w2": w2_EFD[mine]})
        dispatcher = LocalDispatcher() if ep.count == 1 else AllToAllDispatcher(everyone(), chunks)
        x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
        y = dispatcher(x, gates, indices, experts)
        grads = torch.autograd.grad(y, (x, gates, experts.w1, experts.w2), upstream)
        return dict(zip(("y", "x", "gates", "w1", "w2"), (y.detach(), *grads), strict=True))

    here = zip(x_RBSD, gates_RBEC, indices_RBEC, upstream_RBSD, strict=True)
    parts = list(here)
    ranks = on_ranks(2, lambda rank: computed(ShardIndex(index=rank, count=2), *parts[rank]))
    whole = computed(UNSHARDED, *(torch.cat(part) for part in zip(*parts, strict=True)))
    for name, expected in whole.items():
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_model_cut_over_two_ranks_gives_outputs_and_gradients_of_one_process(
    draw: Draw, tiny_config: ModelConfig, activation: Any
) -> None:
    config = replace(tiny_config, ffn_activation=activation)
    latents, text = draw("latents", 2, 3, 8, 8), draw("text", 2, 6, 24)
    times, upstream = torch.tensor([0.25, 0.75]), draw("upstream", 2, 3, 8, 8)

    def computed(layers: Any) -> tuple[dict[str, Tensor], dict[str, list[tuple[int, int]]], set[str]]:
        model = ECDiT(config, layers)
        boxes = {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shard = shard_of(parameter)
                boxes[name] = list(zip(shard.offset, parameter.shape, strict=True))
                parameter.copy_(part_of(random_values(name, shard.global_shape), boxes[name]))
        velocity = model(latents, times, text, torch.ones(2, 6).bool(), text[:, 0]).velocity_BCHW
        (velocity * upstream).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        counted = {name for name, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
        return gradients | {"velocity": velocity.detach()}, boxes, counted

    def on_one(rank: int) -> Any:
        create_tensor_groups(2, 1)
        share = ShardIndex(index=rank, count=2)
        return computed(TensorParallelLayers(ep=UNSHARDED, ep_group=everyone(), tp=share, tp_group=everyone()))

    whole, *_ = computed(SerialLayers())
    for found, boxes, counted in on_ranks(2, on_one):
        assert found.keys() == whole.keys()
        for name, here in found.items():
            expected = part_of(whole[name], boxes[name]) if name in boxes else whole[name]
            torch.testing.assert_close(here, expected, rtol=1e-3, atol=1e-4 * float(whole[name].abs().max()), msg=name)
        cut = {name for name, box in boxes.items() if tuple(size for _, size in box) != whole[name].shape}
        assert any("experts" in name for name in cut) and any("attention.query" in name for name in cut)
        assert counted == cut, "in the norm of the gradient, DeepSpeed counts on every rank what is marked, else once"


def part_of(whole: Tensor, box: list[tuple[int, int]]) -> Tensor:
    """Return a part of a tensor: first element and length along each axis."""
    return whole[tuple(slice(start, start + length) for start, length in box)]


def told(ask: Callable[[], object]) -> Any:
    """Return the answer, or the name and the text of the error."""
    try:
        return ask()
    except (EcditError, OSError) as error:
        return [type(error).__name__, str(error)]


def test_ranks_agree_on_values_sums_and_errors() -> None:
    def fails(rank: int, error: Exception) -> Callable[[], int]:
        def fail() -> int:
            if World().rank == rank:
                raise error
            return rank

        return fail

    def work(rank: int) -> dict[str, Any]:
        world, values = World(), torch.tensor([1.0 + rank, 10.0])
        tried: list[int] = []

        def try_it() -> str:
            tried.append(rank)
            return f"rank {rank}"

        found = {
            "on_rank0": world.on_rank0(try_it),
            "together": world.run_on_all(lambda: 10 * rank),
            "share": world.share(rank + 1),
            "gather": world.gather(rank + 2),
            "broadcast": world.broadcast(rank + 3),
            "all_true": [world.all_true(True), world.all_true(rank != 2), world.all_true(rank == 2)],
            "sum": world.sum(values).tolist(),
            "mean": world.mean(values).tolist(),
            "kept": values.tolist(),
            "first_fails": told(lambda: world.on_rank0(fails(0, CheckpointError("no disk")))),
            "first_is_broken": told(lambda: world.on_rank0(fails(0, OSError("a defect")))),
            "last_fails": told(lambda: world.run_on_all(fails(2, CheckpointError("of rank 2")))),
            "place": [world.rank, world.size],
        }
        return found | {"tried": tried}

    for rank, found in enumerate(on_ranks(3, work)):
        assert found == {
            "on_rank0": "rank 0",
            "together": 10 * rank,
            "share": [1, 2, 3],
            "gather": [2, 3, 4] if rank == 0 else None,
            "broadcast": 3,
            "all_true": [True, False, False],
            "sum": [6.0, 30.0],
            "mean": [2.0, 10.0],
            "kept": [1.0 + rank, 10.0],
            "first_fails": [CheckpointError.__name__, "no disk"],
            "first_is_broken": ["OSError", "a defect"]
            if rank == 0
            else [RankLostError.__name__, "rank 0 failed: OSError: a defect"],
            "last_fails": [CheckpointError.__name__, "of rank 2"],
            "place": [rank, 3],
            "tried": [0] if rank == 0 else [],
        }


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"RANK": "5", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "WORLD_SIZE": "8"}, (5, 1, 4, 8)),
        ({"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}, (5, 1, 2, 8)),
        ({"RANK": "5", "WORLD_SIZE": "8"}, (5, 0, 8, 8)),
        ({}, (0, 0, 1, 1)),
    ],
)
def test_a_process_is_where_its_launcher_says(
    environment: dict[str, str], place: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # to be put back, also what is added below
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = rank_info_from_env()
    assert found == RankInfo(**dict(zip(("rank", "local_rank", "local_size", "world_size"), place, strict=True)))


def test_tensor_groups_are_as_large_and_as_patient_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(tensor_parallel.parallel_state, "initialize_model_parallel", asked.update)
    create_tensor_groups(2, 7)
    assert asked | {"tensor_model_parallel_size": 2, "distributed_timeout_minutes": 7} == asked


def test_a_rank_updates_its_part_of_an_expert_among_its_copies_and_of_the_rest_among_all_data_parallel_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deepspeed_moe.groups, "_get_data_parallel_rank", lambda: 5)
    monkeypatch.setattr(deepspeed_moe.groups, "_get_data_parallel_world_size", lambda: 8)
    monkeypatch.setattr(deepspeed_moe.groups, "_get_expert_data_parallel_rank", {"ep_size_4": 1}.__getitem__)
    monkeypatch.setattr(deepspeed_moe.groups, "_get_expert_data_parallel_world_size", {"ep_size_4": 2}.__getitem__)
    experts = deepspeed_moe.DeepSpeedExperts(4, 3, 2, activation="gelu", ep=ShardIndex(index=1, count=4))
    assert {deepspeed_moe.zero_shard_of(parameter) for parameter in experts.parameters()} == {
        ShardIndex(index=1, count=2)
    }
    assert deepspeed_moe.zero_shard_of(torch.nn.Parameter(torch.ones(1))) == ShardIndex(index=5, count=8)


def test_expert_groups_are_made_beside_tensor_groups_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, made = deepspeed_moe.groups, list[Any]()
    monkeypatch.setattr(groups, "mpu", "of an earlier grid")
    monkeypatch.setattr(groups, "_create_expert_and_data_parallel", lambda *asked: made.append((groups.mpu, *asked)))
    monkeypatch.setattr(
        groups, "_create_expert_data_and_model_parallel", lambda *asked: made.append((groups.mpu, *asked))
    )
    monkeypatch.setattr(groups, "_get_expert_parallel_group", lambda name: name)
    assert [deepspeed_moe.create_expert_groups(2), deepspeed_moe.create_expert_groups(4, "tensor groups")] == [
        "ep_size_2",
        "ep_size_4",
    ]
    assert made == [(None, 2), ("tensor groups", 4, "tensor groups")]
