"""Experts spread over ranks compute what one process computes: outputs and gradients of tokens and weights."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ecdit_ds.config import ModelConfig
from ecdit_ds.model.init import initialize_by_name
from ecdit_ds.model.moe import ExpertChoiceFFN
from ecdit_ds.parallel.dispatch import AllToAllDispatcher, Dispatcher
from ecdit_ds.parallel.experts import Experts
from ecdit_ds.parallel.layers import SerialLayers

RANKS = 2
BATCH = 4  # of all ranks


class _Spread(SerialLayers):
    """Experts over the default group, without DeepSpeed's marks."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def experts(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, **settings: str) -> Experts:
        return Experts(num_experts, hidden_size, ffn_hidden_size, activation="gelu", ep_rank=self._rank, ep_size=RANKS)

    def dispatcher(self) -> Dispatcher:
        world = dist.group.WORLD
        assert world is not None
        return AllToAllDispatcher(world)


def _config() -> ModelConfig:
    return ModelConfig(
        hidden_size=16, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=16, cross_num_heads=1, cross_head_dim=16,
        ffn_hidden_size=24, patch_size=2, in_channels=1, latent_height=8, latent_width=8, text_embed_dim=8,
        max_text_tokens=2, num_experts=4, capacity_factor=1.5,
    )  # fmt: skip


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
    layer = ExpertChoiceFFN(_Spread(rank), _config())
    initialize_by_name(layer, seed=3)
    share = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    x_BSD, weight_BSD = _batch()
    torch.save(_compute(layer, x_BSD[share], weight_BSD[share]), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Return what each rank computed on its share of the batch."""
    folder = tmp_path_factory.mktemp("all_to_all")
    mp.spawn(_one_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


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
