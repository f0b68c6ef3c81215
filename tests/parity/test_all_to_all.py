"""Experts spread over ranks compute what one process computes: outputs and gradients of tokens and weights."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit_ds.config.model_config import Activation, ModelConfig
from ecdit_ds.model.dispatch import Dispatcher
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.experts import Experts
from ecdit_ds.model.init import initialize_by_name
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.model.moe import ExpertChoiceFFN
from ecdit_ds.model.sharding import ShardIndex
from ecdit_ds.parallel.activation_checkpoint import Recompute
from ecdit_ds.parallel.dispatch import AllToAllDispatcher

RANKS = 2
BATCH = 8  # of all ranks
CHUNKS = (1, 2, 4)
RECOMPUTE_MODES: tuple[Literal["none", "block", "selective"], ...] = ("none", "block", "selective")


class _Spread(SerialLayers):
    """Experts over the default group, without DeepSpeed's marks."""

    def __init__(self, rank: int, chunks: int) -> None:
        self._ep, self._chunks = ShardIndex(index=rank, count=RANKS), chunks

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, *, activation: Activation) -> Experts:
        return Experts(num_experts, hidden_size, ffn_hidden_size, activation=activation, ep=self._ep)

    def dispatcher(self) -> Dispatcher:
        world = dist.group.WORLD
        assert world is not None
        return AllToAllDispatcher(world, self._chunks)


class _Trace(TorchDispatchMode):
    """Writes down exchanges that begin, exchanges that end, and products, in the order the host issues them."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name()
        event = {"_c10d_functional::all_to_all_single": "begin", "_c10d_functional::wait_tensor": "end"}.get(name)
        self.events += [event] if event else ["product"] if name in ("aten::bmm", "aten::bmm.out") else []
        return op(*args, **(kwargs or {}))


def _config() -> ModelConfig:
    return ModelConfig(
        hidden_size=16,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        cross_num_heads=1,
        cross_head_dim=16,
        ffn_hidden_size=24,
        patch_size=2,
        in_channels=1,
        latent_height=8,
        latent_width=8,
        text_embed_dim=8,
        max_text_tokens=2,
        num_experts=4,
        capacity_factor=1.5,
    )


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCH, 16, 16, generator=generator), torch.randn(BATCH, 16, 16, generator=generator)


def _compute(layer: ExpertChoiceFFN, x_BSD: Tensor, weight_BSD: Tensor) -> dict[str, Tensor]:
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD = layer(x_BSD, x_BSD)
    (y_BSD * weight_BSD).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert x_BSD.grad is not None
    return {"y": y_BSD.detach(), "x": x_BSD.grad} | {k: v for k, v in gradients.items() if v is not None}


def _one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    share = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    x_BSD, weight_BSD = (z[share] for z in _batch())
    for chunks in CHUNKS:
        layer = ExpertChoiceFFN(_Spread(rank, chunks), _config())
        initialize_by_name(layer, seed=3)
        with _Trace() as trace:
            computed = _compute(layer, x_BSD, weight_BSD)
        torch.save(computed, f"{folder}/rank{rank}_chunks{chunks}.pt")
        Path(f"{folder}/rank{rank}_chunks{chunks}.json").write_text(json.dumps(trace.events))
    for mode in RECOMPUTE_MODES:
        model = ECDiT(_config(), _Spread(rank, 1), Recompute(mode=mode))
        initialize_by_name(model, seed=3)
        with _Trace() as trace:
            model(*_flow_inputs()).velocity_BCHW.square().sum().backward()
        Path(f"{folder}/rank{rank}_{mode}.json").write_text(json.dumps(trace.events))
    dist.destroy_process_group()


def _flow_inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(6)
    text, mask = torch.randn(2, 2, 8, generator=generator), torch.ones(2, 2, dtype=torch.bool)
    return torch.randn(2, 1, 8, 8, generator=generator), torch.rand(2, generator=generator), text, mask, text[:, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where each rank left what it computed on its share of the batch."""
    folder = tmp_path_factory.mktemp("all_to_all")
    mp.spawn(_one_rank, args=(str(folder),), nprocs=RANKS)
    return folder


@pytest.fixture(params=CHUNKS)
def ranks(folder: Path, request: pytest.FixtureRequest) -> list[dict[str, Tensor]]:
    """Return what each rank computed, its images in so many chunks."""
    return [torch.load(folder / f"rank{r}_chunks{request.param}.pt", weights_only=True) for r in range(RANKS)]


@pytest.fixture(scope="module")
def serial() -> dict[str, Tensor]:
    """Return what one process computes on the whole batch."""
    layer = ExpertChoiceFFN(SerialLayers(), _config())
    initialize_by_name(layer, seed=3)
    return _compute(layer, *_batch())


@pytest.mark.parametrize("name", ["y", "x"])
def test_outputs_and_token_gradients_equal_the_serial_ones(
    ranks: list[dict[str, Tensor]], serial: dict[str, Tensor], name: str
) -> None:
    assert serial[name].abs().max() > 0
    torch.testing.assert_close(torch.cat([r[name] for r in ranks]), serial[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["experts.w1", "experts.w2"])
def test_each_rank_holds_the_whole_gradient_of_its_own_experts(
    ranks: list[dict[str, Tensor]], serial: dict[str, Tensor], name: str
) -> None:
    assert all(r[name].shape[0] == 2 for r in ranks)
    torch.testing.assert_close(torch.cat([r[name] for r in ranks]), serial[name], rtol=1e-5, atol=1e-6)


def test_router_gradients_of_the_ranks_add_up_to_the_serial_one(
    ranks: list[dict[str, Tensor]], serial: dict[str, Tensor]
) -> None:
    total = ranks[0]["router.weight"] + ranks[1]["router.weight"]
    torch.testing.assert_close(total, serial["router.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_exchanges_are_under_way_while_experts_compute_exactly_if_there_are_chunks(folder: Path, chunks: int) -> None:
    for rank in range(RANKS):
        events = json.loads((folder / f"rank{rank}_chunks{chunks}.json").read_text())
        assert events.count("begin") == events.count("end") == 4 * chunks  # there and back, forward and backward
        under_way = [
            events[:i].count("begin") - events[:i].count("end") for i, e in enumerate(events) if e == "product"
        ]
        forward = 2 * chunks  # products, two matrices an expert
        for products in (under_way[:forward], under_way[forward:]):
            assert (max(products) > 0) == (chunks > 1)


def test_a_layer_exchanges_twice_forward_and_twice_backward_and_selective_recomputation_adds_nothing(
    folder: Path,
) -> None:
    for rank in range(RANKS):
        begun = {
            mode: json.loads((folder / f"rank{rank}_{mode}.json").read_text()).count("begin")
            for mode in RECOMPUTE_MODES
        }
        assert begun == {"none": 4, "block": 6, "selective": 4}  # the model has one layer of experts
        products = {m: json.loads((folder / f"rank{rank}_{m}.json").read_text()).count("product") for m in begun}
        assert products["none"] < products["block"] == products["selective"]
