"""What a micro-batch is made of: numbers of the training seed, the size of its bucket, and what encoders add to it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ecdit_ds.config.recipe import FlowConfig, Recipe
from ecdit_ds.data.encoders.base import TextEmbeddings
from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.data.sources.bad_sample import ReplacedSample
from ecdit_ds.flow.objective import FlowBatch
from ecdit_ds.training import batches
from ecdit_ds.training.batches import EncodeBatch, MakeBatch, PendingBatch


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Return a recipe that leaves out half of the tokens and half of the texts; its two seeds differ."""
    train = replace(tiny_recipe.train, mask_ratio=0.5, unmasked_from_step=4, seed=3)
    model, data = replace(tiny_recipe.model, decoder_layers=1), replace(tiny_recipe.data, seed=5)
    return replace(tiny_recipe, model=model, train=train, data=data, flow=FlowConfig(text_dropout_prob=0.5))


NULL = TextEmbeddings(
    embeds_BTD=torch.full((6, 24), 7.0), mask_BT=torch.arange(6) < 1, pooled_BD=torch.full((24,), 8.0)
)


def samples_at(*stream_index: int, latents: tuple[int, ...] = (3, 8, 8), **changes: Any) -> Samples:
    """Return samples whose content says which they are."""
    index_B = torch.tensor(stream_index)
    numbers = index_B.float().view(-1, 1, 1)
    return replace(
        Samples(
            latents_BCHW=numbers.view(-1, 1, 1, 1).repeat(1, *latents),
            text_embeds_BTD=-numbers.repeat(1, 6, 24),
            text_mask_BT=torch.ones(len(index_B), 6).bool(),
            text_pooled_BD=-numbers[:, 0].repeat(1, 24),
            captions=("",) * len(index_B),
            stream_index_B=index_B,
        ),
        **changes,
    )


def drawn(recipe: Recipe, samples: Samples) -> dict[str, Tensor]:
    """Return the tensors of the micro-batch that is drawn for samples."""
    batch = MakeBatch(recipe, NULL)(samples)
    assert isinstance(batch, FlowBatch)
    return {name: part for name, part in vars(batch).items() if isinstance(part, Tensor)}


def test_all_that_is_drawn_is_of_the_training_seed_alone(recipe: Recipe) -> None:
    first = drawn(recipe, samples_at(*range(8)))  # anew each time: texts are dropped in place
    other_data = drawn(replace(recipe, data=replace(recipe.data, seed=6)), samples_at(*range(8)))
    assert all(torch.equal(part, other_data[name]) for name, part in first.items())
    other = drawn(replace(recipe, train=replace(recipe.train, seed=4)), samples_at(*range(8)))
    same = {name for name, part in first.items() if torch.equal(part, other[name])}
    assert same == {"latents_BCHW"}


def test_the_tokens_left_out_are_those_of_the_buckets_own_size(recipe: Recipe) -> None:
    parts = drawn(recipe, samples_at(0, 1, latents=(3, 4, 8)))
    assert parts["noise_BCHW"].shape == (2, 3, 4, 8)
    assert parts["visible_BN"].shape == (2, 4) and parts["visible_BN"].max() < 8, "half of 2 x 4 patches"


def test_all_that_stood_in_for_bad_samples_is_told_in_the_order_of_the_batch(recipe: Recipe) -> None:
    bad = [ReplacedSample(position=p, set="s", key=str(p), cause="not finite") for p in range(3)]
    batch = MakeBatch(recipe, NULL)(samples_at(0, 1, 2, replaced={2: (bad[2],), 0: (bad[0], bad[1])}))
    assert batch.replaced == tuple(bad) if isinstance(batch, FlowBatch) else False


def test_each_micro_batch_gets_its_own_latents_and_texts_of_the_encoders(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three micro-batches two need the encoders, which are asked once and answer in the order they are asked in."""
    monkeypatch.setattr(batches, "replace_nonfinite", lambda mixture, samples: samples)
    asked: list[int] = []

    def encoded(raw: Sequence[Samples]) -> list[Samples]:
        asked.append(len(raw))
        return [samples_at(*of.stream_index_B.tolist()) for of in raw]

    draw, empty = MakeBatch(recipe, NULL), torch.empty(0)
    step: list[Any] = [
        draw(samples_at(0, 1, latents_BCHW=empty)),
        draw(samples_at(2, 3)),
        draw(samples_at(4, 5, latents_BCHW=empty)),
    ]
    assert [isinstance(part, PendingBatch) for part in step] == [True, False, True]
    encoders: Any = SimpleNamespace(stream=None, on_stream=nullcontext, finish=encoded)
    mixture: Any = SimpleNamespace(null_text=NULL)
    finished = EncodeBatch(encoders=encoders, mixture=mixture)(step)
    assert asked == [2]
    for first, batch in zip((0, 2, 4), finished, strict=True):
        whole = drawn(recipe, samples_at(first, first + 1))
        for name, part in whole.items():
            assert torch.equal(getattr(batch, name), part), name
