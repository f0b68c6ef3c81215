"""Serial is the specification: whatever the layout, the same losses, gradient norms and weights.

Every layout trains on real processes over gloo, through train.py's own `main`.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.config.yaml_loader import load_recipe
from tests.helpers.launch import Planned, metrics_of, train_many
from tests.helpers.random_model import save_random_model
from tests.helpers.recipes import SMALL_MODEL, arguments
from tests.helpers.witness import SOURCES
from tools import convert_ckpt

RELATIVE = 1e-5
RELATIVE_BF16 = 0.02
"""Losses of bf16 runs among one another: 8 bits of mantissa, rounded in another order."""

DEMO_STEPS = 20
DEMO_LAYOUTS = {"serial": (1, 1), "dp2": (2, 1), "ep2": (2, 2), "ep2xdp2": (4, 2)}
"""Name -> (ranks, ep)."""
DEMO_CASES = [(name, stage) for name in DEMO_LAYOUTS for stage in (1, 2) if (name, stage) != ("serial", 2)]

STEPS = 6
HALFWAY = 3
LAYOUTS = {
    "serial": (1, 1, 1),
    "tp2": (2, 2, 1),
    "ep2": (2, 1, 2),
    "dp2": (2, 1, 1),
    "tp2xep2": (4, 2, 2),
    "ep4": (4, 1, 4),
    "tp2xep2xdp2": (8, 2, 2),
}
"""Name -> (ranks, tp, ep); the rest is data parallel."""
CASES = [
    (name, stage) for name in LAYOUTS for stage in (1, 2, 3) if (name, stage) not in (("serial", 2), ("tp2xep2xdp2", 1))
]
# The norm, and Adam's step count, which is on the host where Adam is not fused. ZeRO-3 compares its record of the order
# of modules once after that has changed, which it does where the mask goes.
LOOKS_OF_DEEPSPEED = {
    "deepspeed: runtime/zero/utils.py:assert_lst_len_same_as_other_ranks",
    "deepspeed: runtime/utils.py:is_invalid_grad_norm",
    "deepspeed: runtime/zero/stage_1_and_2.py:_optimizer_step",
    "deepspeed: runtime/zero/stage3.py:step_with_gradscaler",
}
BF16_CASES = [("tp2", 1), ("ep2", 2), ("tp2xep2", 2), ("tp2xep2", 3), ("dp2", 3)]
CLIPPED = (
    *SMALL_MODEL,
    f"train.max_steps={STEPS}",
    f"train.checkpoint_every={HALFWAY}",
    "optimizer.gradient_clipping=0.2",
    "optimizer.learning_rate=3e-3",
    "data.num_heldout=8",
    "model.decoder_layers=1",
    "train.mask_ratio=0.5",
    "train.unmasked_from_step=4",
    "train.reconstruction_weight=0.5",
)
"""Every gradient norm is above 0.2, so clipping acts in each step; the first four are masked, the others are not."""

WRITTEN_UNDER = {"serial": 1, "tp2": 3, "ep2": 2, "dp2": 1, "tp2xep2": 3, "ep4": 2, "tp2xep2xdp2": 2}
CONTINUED_UNDER = {"serial": 3, "tp2": 1, "ep2": 3, "dp2": 2, "tp2xep2": 2, "ep4": 1, "tp2xep2xdp2": 3}
"""Name -> ZeRO stage, when a checkpoint goes from one layout to another."""
MOVES = list(itertools.permutations(LAYOUTS, 2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the demo recipe, at a quarter of its batch, and a small one under every layout; return their folder.

    The small runs go on from step 1 of a random model. A fresh one would prove little: all its gates are zero, so for
    some steps what happens inside its blocks does not matter.
    """
    root = tmp_path_factory.mktemp("layouts")
    for precision in ("fp32", "bf16"):
        recipe = load_recipe("demo", [*CLIPPED, f"train.precision={precision}"])
        save_random_model(root / f"start_{precision}", recipe, kinds=("weight", "ema", "exp_avg", "exp_avg_sq"))
    small = [_small(root, name, stage) for name, stage in [("serial", 2), *CASES]]
    small += [_small(root, name, stage, "bf16") for name, stage in [("serial", 2), *BF16_CASES]]
    demos = [_demo(root, name, stage) for name, stage in [("serial", 2), *DEMO_CASES]]
    train_many(root, demos + small)
    for source, to in MOVES:
        _, tp, ep = LAYOUTS[to]
        written = _written(root, source)
        cut = ("--to", "ecdit", "--tp", str(tp), "--ep", str(ep))
        assert convert_ckpt.main(["convert", str(written), str(_converted(root, source, to)), *cut]) == 0
    train_many(root, [_moved(root, to) for to in LAYOUTS])
    return root


def _written(root: Path, source: str) -> Path:
    return root / _folder(source, WRITTEN_UNDER[source]) / "checkpoints" / f"step_{HALFWAY}"


def _converted(root: Path, source: str, to: str) -> Path:
    return root / "converted" / f"{source}_for_{to}"


def _moved(root: Path, to: str) -> Planned:
    """Return a run of layout `to` that goes on from the converted checkpoint of every other layout."""
    sources = [(source, str(_converted(root, source, to))) for source in LAYOUTS if source != to]
    ranks, arguments = _small(root, to, CONTINUED_UNDER[to], "fp32", Path(sources[0][1]))
    return Planned(ranks, arguments, {SOURCES: json.dumps(sources)})


def _demo(root: Path, name: str, stage: int) -> tuple[int, list[str]]:
    ranks, ep = DEMO_LAYOUTS[name]
    return ranks, arguments(
        root / f"demo_{name}_{stage}",
        root / "cache",
        f"train.max_steps={DEMO_STEPS}",
        "train.global_batch_size=16",
        f"parallel.ep={ep}",
        "data.num_train=1024",
        "data.num_heldout=16",
        "data.num_workers=0",
        "sample.prompts=[]",
        zero=stage,
    )


def _small(
    root: Path, name: str, stage: int, precision: str = "fp32", source: Path | None = None
) -> tuple[int, list[str]]:
    ranks, tp, ep = LAYOUTS[name]
    output = root / (f"{name}_moved" if source else _folder(name, stage, precision))
    start = source or root / f"start_{precision}" / "step_1"
    overrides = (*CLIPPED, f"parallel.tp={tp}", f"parallel.ep={ep}", f"train.precision={precision}")
    return ranks, arguments(output, root / "cache", *overrides, zero=stage, resume=str(start))


def _folder(name: str, stage: int, precision: str = "fp32") -> str:
    return f"{name}_{stage}_{precision}"


@pytest.mark.parametrize(("name", "stage"), DEMO_CASES)
def test_the_demo_trains_the_same_under_every_layout(runs: Path, name: str, stage: int) -> None:
    serial, other = metrics_of(runs / "demo_serial_2"), metrics_of(runs / f"demo_{name}_{stage}")
    assert [m["step"] for m in other] == list(range(1, DEMO_STEPS + 1))
    _assert_same_course(other, serial)
    assert {m["experts_per_token"] for m in other} == {2.0}


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_losses_norms_on_every_rank_and_weights_are_the_same_under_every_layout(
    runs: Path, name: str, stage: int
) -> None:
    serial, other = runs / _folder("serial", 2), runs / _folder(name, stage)
    _assert_same_course(metrics_of(other), metrics_of(serial))
    norms = [m["grad_norm"] for m in metrics_of(serial)]
    assert min(norms) > 0.2
    assert [m["auxiliary_loss"] > 0 for m in metrics_of(other)] == [True, True, True, False, False]
    for seen in _seen(other):
        assert len(seen["grad_norms"]) == STEPS - 1
        assert seen["grad_norms"] == pytest.approx(norms, rel=RELATIVE)
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        _assert_same_tensors(other, serial, kind)


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_all_ranks_report_the_same_norm_to_the_last_bit(runs: Path, name: str, stage: int) -> None:
    assert len({tuple(seen["grad_norms"]) for seen in _seen(runs / _folder(name, stage))}) == 1


@pytest.mark.parametrize(
    ("name", "stage", "precision"),
    [(name, stage, "fp32") for name, stage in CASES if LAYOUTS[name][1] > 1]
    + [(name, stage, "bf16") for name, stage in BF16_CASES if LAYOUTS[name][1] > 1],
)
def test_weights_that_are_not_cut_stay_bitwise_equal_over_tensor_parallel_ranks(
    runs: Path, name: str, stage: int, precision: str
) -> None:
    ranks = [seen["uncut_weights"] for seen in _seen(runs / _folder(name, stage, precision))]
    for part in ("query_norm", "router", "modulation"):
        assert any(part in name for uncut in ranks for name in uncut)
    for first, second in zip(ranks[::2], ranks[1::2], strict=True):
        assert first == second


@pytest.mark.parametrize(("name", "stage"), BF16_CASES)
def test_bf16_runs_stay_close_to_one_another_under_every_layout(runs: Path, name: str, stage: int) -> None:
    serial, other = (metrics_of(runs / _folder(*case, "bf16")) for case in (("serial", 2), (name, stage)))
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in other] == pytest.approx([m[key] for m in serial], rel=RELATIVE_BF16), key
    assert [m["loss"] for m in serial] != [m["loss"] for m in metrics_of(runs / _folder("serial", 2))]


@pytest.mark.parametrize(("source", "to"), MOVES)
def test_a_checkpoint_converted_for_any_other_layout_goes_on_there_with_the_losses_of_the_uninterrupted_run(
    runs: Path, source: str, to: str
) -> None:
    uninterrupted = metrics_of(runs / _folder("serial", 2))[HALFWAY - 1 :]
    for seen in _seen(runs / f"{to}_moved"):
        for name in ("loss", "grad_norm"):
            wanted = [m[name] for m in uninterrupted]
            assert seen["courses"][source][name] == pytest.approx(wanted, rel=RELATIVE), name


@pytest.mark.parametrize(("source", "to"), MOVES)
def test_what_another_layout_loads_is_bitwise_what_was_saved(runs: Path, source: str, to: str) -> None:
    written = Reader(_written(runs, source))
    loaded = Reader(runs / f"{to}_moved" / "loaded" / source / f"step_{HALFWAY}")
    assert written.manifest.tensors.keys() == loaded.manifest.tensors.keys()
    for name in written.manifest.tensors:
        assert torch.equal(_read(written, name), _read(loaded, name)), name


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_saving_moves_no_weights_between_ranks(runs: Path, name: str, stage: int) -> None:
    for seen in _seen(runs / _folder(name, stage)):
        assert set(seen["save_dtypes"]) == {"torch.uint8", "torch.int64"}  # file names, checksums, counts


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_step_never_waits_for_the_device_but_for_deepspeeds_own_looks_at_the_norm(
    runs: Path, name: str, stage: int
) -> None:
    for seen in _seen(runs / _folder(name, stage)):
        assert len(seen["host_waits"]) == 2  # of the last two steps
        for waits in seen["host_waits"]:
            assert waits and set(waits) <= LOOKS_OF_DEEPSPEED


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_experts_on_different_ranks_keep_different_weights(runs: Path, stage: int) -> None:
    reader = Reader(runs / _folder("ep4", stage) / "checkpoints" / f"step_{STEPS}")
    w1 = _read(reader, "weight/blocks.1.ffn.experts.w1")
    for first, second in itertools.combinations(w1, 2):
        assert not torch.allclose(first, second, atol=1e-3)


def _assert_same_course(other: list[dict[str, Any]], serial: list[dict[str, Any]]) -> None:
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in other] == pytest.approx([m[name] for m in serial], rel=RELATIVE), name


def _assert_same_tensors(other: Path, serial: Path, kind: str) -> None:
    readers = [Reader(run / "checkpoints" / f"step_{STEPS}") for run in (other, serial)]
    assert readers[0].manifest.tensors.keys() == readers[1].manifest.tensors.keys()
    for name in (name for name in readers[1].manifest.tensors if name.startswith(f"{kind}/")):
        ours, wanted = (_read(reader, name) for reader in readers)
        assert wanted.norm() > 0, name
        assert (ours - wanted).norm() <= RELATIVE * wanted.norm(), name


def _seen(run: Path) -> list[dict[str, Any]]:
    """Return what each rank wrote, by rank."""
    return [json.loads((run / f"rank_{rank}.json").read_text()) for rank in range(len(list(run.glob("rank_*.json"))))]


def _read(reader: Reader, name: str) -> torch.Tensor:
    shape = reader.manifest.tensors[name].shape
    tensor = torch.empty(shape)
    reader.read_into(name, Box((0,) * len(shape), shape), tensor)
    return tensor
