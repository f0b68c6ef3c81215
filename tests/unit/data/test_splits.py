"""Several sets and sizes of a recipe: what they hold together, and what cannot be mixed or trained on."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe, SampleConfig
from ecdit_ds.data.digit_scenes.scenes import Split
from ecdit_ds.data.mixture import Bucket, Mixture
from ecdit_ds.data.splits import open_split, validate_split
from ecdit_ds.flow.objective import FlowBatch
from ecdit_ds.training.batches import MakeBatch
from tests.helpers.made_sets import write_set

SQUARE, WIDE, TALL = (3, 8, 8), (3, 4, 12), (3, 12, 4)
Refusal = Callable[[Callable[[], object]], str]
MakeSets = Callable[..., Recipe]


@pytest.fixture
def make_sets(tiny_recipe: Recipe, tiny_config: ModelConfig, tmp_path: Path) -> MakeSets:
    """Return `make_sets(a=[(shape, count), ...], b=..., **of_recipe)`: a recipe whose `path` names sets of these."""

    def make(weights: tuple[float, ...] = (), b_differs: Any = None, **sets: list[tuple[Bucket, int]]) -> Recipe:
        paths = [
            str(write_set(tmp_path / name, runs, **(b_differs or {} if name == "b" else {})))
            for name, runs in sets.items()
        ]
        data = DataConfig(dataset="encoded", path=tuple(paths), weights=weights, heldout_path=paths[0])
        return replace(tiny_recipe, model=replace(tiny_config, text_embed_dim=6, max_text_tokens=4), data=data)

    return make


def test_a_split_tells_the_shares_of_its_sets_and_sizes(make_sets: MakeSets, tmp_path: Path) -> None:
    recipe = make_sets(a=[(SQUARE, 6), (WIDE, 2)], b=[(WIDE, 3), (TALL, 1)])
    facts = validate_split(recipe, "train")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert facts.count == 12
    assert facts.sets == {a: Fraction(2, 3), b: Fraction(1, 3)}
    assert facts.buckets == {SQUARE: Fraction(6, 12), WIDE: Fraction(5, 12), TALL: Fraction(1, 12)}
    by_weight = replace(recipe, data=replace(recipe.data, weights=(0.1, 0.3)))
    weighted = validate_split(by_weight, "train")
    assert weighted.sets == {a: Fraction(1, 4), b: Fraction(3, 4)}
    assert weighted.buckets == {SQUARE: Fraction(3, 16), WIDE: Fraction(10, 16), TALL: Fraction(3, 16)}
    assert weighted.count == 12
    assert validate_split(by_weight, "heldout").sets == {a: 1}, "weights are of the training sets"


def test_every_named_set_is_opened(make_sets: MakeSets) -> None:
    recipe = make_sets(a=[(SQUARE, 6), (WIDE, 2)], b=[(WIDE, 3)])
    assert [len(of_set) for of_set in open_split(recipe, "train", None)] == [8, 3]
    assert [len(of_set) for of_set in open_split(recipe, "heldout", None)] == [8]


@pytest.mark.parametrize(
    ("differs", "parts"),
    [
        ({"image": "other pictures"}, ["image encoder made pictures in the former", "other pictures in the latter"]),
        ({"text": "other words"}, ["text encoder made words in the former, other words in the latter"]),
        ({"tokens": 5}, ["texts (tokens, width) (4, 6) in the former, (5, 6) in the latter"]),
        ({"pooled": 7}, ["width of pooled texts 6 in the former, 7 in the latter"]),
    ],
)
def test_sets_of_other_encoders_are_not_mixed(
    make_sets: MakeSets, refusal_of: Refusal, tmp_path: Path, differs: dict[str, Any], parts: list[str]
) -> None:
    recipe = make_sets(a=[(SQUARE, 6)], b=[(SQUARE, 3)], b_differs=differs)
    message = refusal_of(lambda: open_split(recipe, "train", None))
    assert message.startswith(f"data.path: {tmp_path / 'a'} and {tmp_path / 'b'} cannot be mixed: ")
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("differs", "what"), [({"image": "other"}, "image encoder"), ({"text": "other"}, "text encoder")]
)
def test_a_held_out_set_of_another_encoder_is_refused(
    make_sets: MakeSets, refusal_of: Refusal, tmp_path: Path, differs: dict[str, Any], what: str
) -> None:
    recipe = make_sets(a=[(SQUARE, 6)], b=[(SQUARE, 3)], b_differs=differs)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    recipe = replace(recipe, data=replace(recipe.data, path=a, heldout_path=b))
    validate_split(recipe, "train")
    message = refusal_of(lambda: validate_split(recipe, "heldout"))
    assert message.startswith(
        f"data.heldout_path: {b} was encoded by {what} other, but {a}, which is trained on, by made"
    )


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        ({"tokens": 5}, ["holds texts (5, 6), but the model's are (4, 6)", "model.max_text_tokens"]),
        ({"width": 7}, ["holds texts (4, 7), but the model's are (4, 6)", "text_embed_dim"]),
        ({"pooled": 9}, ["holds pooled texts of width 9", "6 wide"]),
    ],
)
def test_texts_of_other_lengths_or_widths_than_the_models_are_refused(
    make_sets: MakeSets, refusal_of: Refusal, tmp_path: Path, split: Split, texts: dict[str, Any], parts: list[str]
) -> None:
    recipe = make_sets(a=[(SQUARE, 4)])
    validate_split(recipe, split)
    other = str(write_set(tmp_path / "other", [(SQUARE, 4)], **texts))
    given: dict[str, Any] = {"path" if split == "train" else "heldout_path": other}
    recipe = replace(recipe, data=replace(recipe.data, **given))
    for action in (lambda: validate_split(recipe, split), lambda: open_split(recipe, split, None)):
        message = refusal_of(action)
        assert other in message and all(part in message for part in parts), message


def test_sets_of_other_channels_are_not_mixed(make_sets: MakeSets, refusal_of: Refusal) -> None:
    recipe = make_sets(a=[(SQUARE, 6)], b=[((4, 8, 8), 3)])
    assert "channels [3] in the former, [4] in the latter" in refusal_of(lambda: validate_split(recipe, "train"))


@pytest.mark.parametrize(
    ("runs", "model", "train", "parts"),
    [
        ([(WIDE, 3)], {}, {}, ["holds latents (3, 4, 12), but the model's are (3, 8, 8)", "set model.in_channels"]),
        ([(SQUARE, 3), ((3, 8, 10), 1)], {}, {}, ["(3, 8, 10), 20 tokens", "(3, 8, 8), 16 tokens", "latent_height"]),
        ([(SQUARE, 3), ((3, 4, 7), 1)], {}, {}, ["(3, 4, 7), which the model cannot take", "patch_size(2)"]),
        (
            [(SQUARE, 3), ((3, 2, 2), 1)],
            {"capacity_rounding": "floor"},
            {},
            ["(3, 2, 2), which the model cannot take", "0 tokens an expert"],
        ),
        (
            [(SQUARE, 3), ((3, 2, 4), 1)],
            {"decoder_layers": 1},
            {"mask_ratio": 0.5},
            ["(3, 2, 4), which the model cannot take", "train.mask_ratio: 0.5 leaves 1 of 2 tokens"],
        ),
        (
            [(SQUARE, 3), ((3, 2, 6), 1)],
            {"decoder_layers": 1, "capacity_factor": 4.0},
            {"mask_ratio": 0.25},
            ["(3, 2, 6), which the model cannot take", "train.mask_ratio: 0.25 of 3 tokens is less than one"],
        ),
        ([((4, 8, 8), 3), ((4, 4, 12), 1)], {}, {}, ["4 channels", "the model's have 3"]),
    ],
)
def test_a_size_that_the_model_cannot_take_or_that_memory_was_not_planned_for_is_refused(
    make_sets: MakeSets,
    refusal_of: Refusal,
    tmp_path: Path,
    runs: list[tuple[Bucket, int]],
    model: dict[str, Any],
    train: dict[str, Any],
    parts: list[str],
) -> None:
    recipe = make_sets(a=runs)
    capacity = {} if "capacity_factor" in model else {"capacity_factor": 2.0 if train else 1.0}
    recipe = replace(recipe, model=replace(recipe.model, **(capacity | model)), train=replace(recipe.train, **train))
    message = refusal_of(lambda: validate_split(recipe, "train"))
    assert message.startswith(f"data.path: {tmp_path / 'a'}: holds latents")
    assert [part for part in parts if part not in message] == []
    assert refusal_of(lambda: validate_split(recipe, "heldout")).startswith("data.heldout_path: ")


def test_a_size_that_pictures_are_not_drawn_in_need_not_suit_drawing(make_sets: MakeSets) -> None:
    recipe = make_sets(a=[(SQUARE, 3), ((3, 2, 4), 1)])
    model = replace(recipe.model, capacity_factor=2.0, capacity_rounding="floor")
    # Drawn squares give each of four experts 0.5 x 16 / 4 tokens, a picture of two tokens would give it none.
    recipe = replace(recipe, model=model, sample=SampleConfig(capacity_factor=0.5))
    assert validate_split(recipe, "train").buckets.keys() == {SQUARE, (3, 2, 4)}


def test_a_batch_of_each_size_keeps_its_own_share_of_its_own_tokens(make_sets: MakeSets) -> None:
    recipe = make_sets(a=[(SQUARE, 6), (WIDE, 5)])
    recipe = replace(recipe, model=replace(recipe.model, decoder_layers=1), train=replace(recipe.train, mask_ratio=0.5))
    mixture = Mixture(open_split(recipe, "train", None), seed=0, global_batch_size=8)
    transform, kept = MakeBatch(recipe, mixture.null_text), {}
    for step in range(8):
        batch = transform(mixture.read(torch.arange(step * 8, step * 8 + 8).numpy()))
        assert isinstance(batch, FlowBatch) and batch.visible_BN is not None
        assert batch.noise_BCHW.shape == batch.latents_BCHW.shape
        kept[mixture.bucket_at(step)] = (batch.visible_BN.shape[1], int(batch.visible_BN.max()))
    assert kept[SQUARE] == (8, 15) and kept[WIDE] == (6, 11)


def test_what_is_stored_as_bf16_becomes_on_its_device_what_it_would_have_been_before(make_sets: MakeSets) -> None:
    recipe = make_sets(a=[(SQUARE, 12)])
    recipe = replace(recipe, flow=replace(recipe.flow, text_dropout_prob=0.5))
    mixture = Mixture(open_split(recipe, "train", None), seed=0, global_batch_size=8)
    positions = np.arange(8)
    whole = mixture.read(positions).float()
    stored = replace(
        mixture.read(positions),
        latents_BCHW=whole.latents_BCHW.bfloat16(),
        text_embeds_BTD=whole.text_embeds_BTD.bfloat16(),
        text_pooled_BD=whole.text_pooled_BD.bfloat16(),
    )
    draw, device = MakeBatch(recipe, mixture.null_text), torch.device("cpu")
    wide, narrow = draw(stored.float()), draw(stored)
    assert isinstance(wide, FlowBatch) and isinstance(narrow, FlowBatch)
    assert narrow.latents_BCHW.dtype == narrow.text_embeds_BTD.dtype == torch.bfloat16
    for name, values in vars(wide.to(device)).items():
        if isinstance(values, torch.Tensor):
            there = getattr(narrow.to(device), name)
            assert there.dtype == values.dtype and torch.equal(there, values), name


def test_fewer_channels_and_narrower_pooled_texts_than_the_models_are_refused_too(
    make_sets: MakeSets, refusal_of: Refusal, tmp_path: Path
) -> None:
    recipe = make_sets(a=[((2, 8, 8), 3), ((2, 4, 12), 1)])
    assert "2 channels, but the model's have 3" in refusal_of(lambda: validate_split(recipe, "train"))
    narrow = str(write_set(tmp_path / "narrow", [(SQUARE, 3)], pooled=5))
    of_narrow = replace(recipe, data=replace(recipe.data, path=narrow))
    assert "pooled texts of width 5" in refusal_of(lambda: validate_split(of_narrow, "train"))


def test_of_one_size_it_must_be_the_models_height_and_width_in_this_order(
    make_sets: MakeSets, refusal_of: Refusal
) -> None:
    recipe = make_sets(a=[(WIDE, 3)])
    validate_split(replace(recipe, model=replace(recipe.model, latent_height=4, latent_width=12)), "train")
    turned = replace(recipe, model=replace(recipe.model, latent_height=12, latent_width=4))
    assert "latents (3, 4, 12), but the model's are (3, 12, 4)" in refusal_of(lambda: validate_split(turned, "train"))


def test_what_is_held_of_a_size_is_counted_over_all_sets(make_sets: MakeSets) -> None:
    recipe = make_sets(a=[(SQUARE, 6), (WIDE, 2)], b=[(WIDE, 3), (TALL, 1)])
    assert validate_split(recipe, "train").held == {SQUARE: 6, WIDE: 5, TALL: 1}
