"""A dense checkpoint made into experts computes what it computed, where routing gives every token to every expert."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ecdit_ds.checkpoint.boxes import Box
from ecdit_ds.checkpoint.convert.sources import EcditSource
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.config.recipe import STATE_NAMES, Recipe
from ecdit_ds.config.yaml_loader import dump_recipe, load_recipe
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.init import initialize_by_name
from ecdit_ds.model.moe import DenseFFN, ExpertChoiceFFN
from ecdit_ds.parallel.expert_parallel import serial_layers
from tests.helpers.random_model import random_values, save_random_model
from tools import convert_ckpt

ALL_TO_ALL = ["model.ffn=expert_choice", "model.num_experts=4", "model.capacity_factor=4"]
"""Every expert takes every token."""
KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(params=["gelu", "swiglu"])
def dense(request: pytest.FixtureRequest, make_recipe: MakeRecipe) -> Recipe:
    return make_recipe("model.ffn=dense", f"model.ffn_activation={request.param}")


def upcycle(source: Path, destination: Path, recipe: Path, *overrides: str) -> int:
    """Run the converter."""
    sets = [part for override in overrides for part in ("--set", override)]
    command = ["convert", str(source), str(destination), "--to", "ecdit", "--upcycle", str(recipe), *sets]
    return convert_ckpt.main(command)


@pytest.fixture
def start(dense: Recipe, tmp_path: Path) -> tuple[Path, Path]:
    """Return a dense checkpoint and its recipe's file."""
    path = tmp_path / "dense.yaml"
    path.write_text(dump_recipe(dense))
    return save_random_model(tmp_path / "dense", dense, step=7, kinds=KINDS), path


def loaded(folder: Path, recipe: Recipe, kind: str) -> ECDiT:
    """Return the model with a checkpoint's weights, by the reader that training uses."""
    model, reader = ECDiT(recipe.model, serial_layers()), Reader(folder)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        reader.expect(f"{kind}/{name}", shape)
        reader.read_into(f"{kind}/{name}", Box((0,) * len(shape), shape), parameter.data)
    return model


@pytest.mark.parametrize("kind", ["weight", "ema"])
def test_with_all_experts_on_all_tokens_the_output_is_the_dense_models(
    start: tuple[Path, Path], dense: Recipe, tmp_path: Path, kind: str
) -> None:
    overrides = [*ALL_TO_ALL, "model.gate_normalization=token"]
    assert upcycle(start[0], tmp_path / "new", start[1], *overrides) == 0
    sparse = load_recipe(str(start[1]), overrides)
    config = dense.model
    inputs = (
        random_values("latents", (2, config.in_channels, config.latent_height, config.latent_width)),
        random_values("times", (2,)).sigmoid(),
        random_values("text", (2, config.max_text_tokens, config.text_embed_dim)),
        torch.ones(2, config.max_text_tokens, dtype=torch.bool),
        random_values("pooled", (2, config.text_embed_dim)),
    )
    with torch.no_grad():
        expected = loaded(start[0], dense, kind)(*inputs).velocity_BCHW
        actual = loaded(tmp_path / "new", sparse, kind)(*inputs).velocity_BCHW
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_one_expert_with_gate_one_is_the_dense_network(start: tuple[Path, Path], dense: Recipe, tmp_path: Path) -> None:
    assert upcycle(start[0], tmp_path / "new", start[1], *ALL_TO_ALL) == 0
    sparse = load_recipe(str(start[1]), ALL_TO_ALL)
    ffn = loaded(start[0], dense, "weight").blocks[1].ffn
    layer = loaded(tmp_path / "new", sparse, "weight").blocks[1].ffn
    assert isinstance(ffn, DenseFFN) and isinstance(layer, ExpertChoiceFFN)
    x_BSD = random_values("x", (3, 16, dense.model.hidden_size))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1e4 * x_BSD[0, 0]  # softmax gives this token to expert 2, and wholly
        y_BSD = layer(x_BSD, x_BSD)
        torch.testing.assert_close(y_BSD[0, 0], ffn(x_BSD)[0, 0], rtol=1e-6, atol=1e-6)
        each = layer.experts(x_BSD[:1].expand(4, -1, -1))
        for expert in each:  # the layer's own arithmetic, bmm: the same sums in another order
            torch.testing.assert_close(expert, ffn(x_BSD)[0], rtol=1e-6, atol=1e-6)


def test_what_is_new_is_the_seeds_and_what_was_learned_begins_anew(
    start: tuple[Path, Path], dense: Recipe, tmp_path: Path
) -> None:
    sets = [*ALL_TO_ALL, "train.seed=3"]
    sets += ["optimizer.name=rmsprop"] if dense.model.ffn_activation == "gelu" else []
    assert upcycle(start[0], tmp_path / "new", start[1], *sets) == 0
    made, source = EcditSource(tmp_path / "new"), EcditSource(start[0])
    sparse = load_recipe(str(start[1]), sets)
    kept = STATE_NAMES[sparse.optimizer.name]
    assert {name.split("/")[0] for name in made.tensors} == {"weight", "ema", *kept}
    assert (made.step, made.meta["samples_seen"], made.meta["num_updates"]) == (0, 0, 0)
    assert made.meta["recipe"] == sparse.to_dict()
    fresh = ECDiT(sparse.model, serial_layers())
    initialize_by_name(fresh, sparse.train.seed)
    for name, parameter in fresh.named_parameters():
        whole = Box((0,) * parameter.dim(), tuple(parameter.shape))
        for kind in kept:
            assert not made.read(f"{kind}/{name}", whole).any()
        for kind in ("weight", "ema"):
            held = made.read(f"{kind}/{name}", whole)
            if "router" in name:
                assert torch.equal(held, parameter)
            elif "experts" in name:
                dense_name = name.replace("experts.w1", "up.weight").replace("experts.w2", "down.weight")
                turned = source.read(f"{kind}/{dense_name}", Box((0, 0), whole.shape[:0:-1]))
                assert all(torch.equal(expert, turned.T) for expert in held)
            else:
                assert torch.equal(held, source.read(f"{kind}/{name}", whole))


def test_the_cut_of_files_and_of_reads_does_not_matter(start: tuple[Path, Path], tmp_path: Path) -> None:
    assert upcycle(start[0], tmp_path / "one", start[1], *ALL_TO_ALL) == 0
    more = ["--tp", "2", "--ep", "2", "--set", ALL_TO_ALL[0], "--set", ALL_TO_ALL[1], "--set", ALL_TO_ALL[2]]
    command = ["convert", start[0], tmp_path / "many", "--to", "ecdit", "--upcycle", start[1], *more]
    assert convert_ckpt.main([str(part) for part in command]) == 0
    assert convert_ckpt.main(["diff", str(tmp_path / "one"), str(tmp_path / "many")]) == 0
    assert convert_ckpt.main(["verify", str(tmp_path / "many")]) == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.hidden_size=64", "model.num_heads=4"], "model.hidden_size: 32 there, 64 now"),
        (["model.num_shared_experts=1"], "without shared experts"),
        (["model.ffn=token_choice", "parallel.tp=1"], "becomes expert_choice"),
        (["model.ffn=dense", "model.capacity_factor=2"], "becomes expert_choice"),
    ],
)
def test_another_model_is_refused_with_the_fields(
    start: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert upcycle(start[0], tmp_path / "new", start[1], *ALL_TO_ALL, *overrides) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1 and not (tmp_path / "new").exists()


def test_experts_are_not_upcycled_again(
    start: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upcycle(start[0], tmp_path / "new", start[1], *ALL_TO_ALL) == 0
    assert upcycle(tmp_path / "new", tmp_path / "newer", start[1], *ALL_TO_ALL) == 2
    assert "only a dense one" in capsys.readouterr().err
