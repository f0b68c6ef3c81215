"""Serial is the specification: whatever the layout, the same losses, gradient norms and weights.

Every layout trains on real processes over gloo, through train.py's own `main`.
"""

from pathlib import Path

import pytest
import torch

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.reader import Reader
from tests.helpers.launch import metrics_of, train_many
from tests.helpers.recipes import arguments

STEPS = 20
RELATIVE = 1e-5
LAYOUTS = {1: ("ep1",), 2: ("ep1", "ep2"), 4: ("ep2",)}
"""World size -> expert-parallel sizes; the rest is data parallel."""
REFERENCE = (1, "ep1", 2)
CASES = [(world, ep, stage) for world, sizes in LAYOUTS.items() for ep in sizes for stage in (1, 2)]
CASES.remove(REFERENCE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the demo recipe, at a quarter of its batch, under every layout; return the folder of their outputs."""
    root = tmp_path_factory.mktemp("layouts")
    runs = [
        (
            world,
            arguments(
                root / f"world{world}_{ep}_zero{stage}", root / "cache", f"train.max_steps={STEPS}",
                "train.global_batch_size=16", f"parallel.ep={ep[2:]}", "data.num_train=1024", "data.num_heldout=16",
                "data.num_workers=0", "sample.prompts=[]", zero=stage,
            ),
        )
        for world, sizes in LAYOUTS.items() for ep in sizes for stage in (1, 2)
    ]  # fmt: skip
    train_many(root, runs)
    return root


@pytest.mark.parametrize(("world", "ep", "stage"), CASES)
def test_losses_and_gradient_norms_are_the_same_under_every_layout(runs: Path, world: int, ep: str, stage: int) -> None:
    serial = metrics_of(runs / "world1_ep1_zero2")
    other = metrics_of(runs / f"world{world}_{ep}_zero{stage}")
    assert [m["step"] for m in other] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in other] == pytest.approx([m[name] for m in serial], rel=RELATIVE), name
    assert {m["experts_per_token"] for m in other} == {2.0}


@pytest.mark.parametrize("stage", [1, 2])
def test_experts_on_different_ranks_keep_different_weights(runs: Path, stage: int) -> None:
    parallel = _read(runs / f"world2_ep2_zero{stage}", "weight/blocks.1.ffn.experts.w1")
    serial = _read(runs / "world1_ep1_zero2", "weight/blocks.1.ffn.experts.w1")
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(parallel[first], parallel[second], atol=1e-3), (first, second)
    torch.testing.assert_close(parallel, serial, rtol=1e-3, atol=1e-5)


def test_optimizer_state_and_average_are_the_same_under_expert_parallelism(runs: Path) -> None:
    for kind in ("exp_avg", "ema"):
        name = f"{kind}/blocks.3.ffn.experts.w2"
        parallel, serial = _read(runs / "world4_ep2_zero2", name), _read(runs / "world1_ep1_zero2", name)
        assert serial.abs().max() > 0
        torch.testing.assert_close(parallel, serial, rtol=1e-3, atol=1e-3 * float(serial.abs().max()))


def _read(run: Path, name: str) -> torch.Tensor:
    reader = Reader(run / "checkpoints" / f"step_{STEPS}")
    shape = reader.manifest.tensors[name].shape
    tensor = torch.empty(shape)
    reader.read_into(name, Box((0,) * len(shape), shape), tensor)
    return tensor
