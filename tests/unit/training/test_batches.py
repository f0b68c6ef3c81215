"""What is drawn for a sample: each thing from a stream of its own, and the same in any micro-batch of a batch."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ecdit_ds import seeding
from ecdit_ds.config.recipe import FlowConfig, Recipe
from ecdit_ds.data.encoders.base import HashedWordEncoder, TextEmbeddings
from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.evaluation import heldout as heldout_module
from ecdit_ds.evaluation.geneval.prompts import draw_prompts
from ecdit_ds.evaluation.heldout import heldout_loss
from ecdit_ds.flow.objective import FlowBatch, draw_text_kept, sample_noise, sample_timesteps, sample_visible_tokens
from ecdit_ds.inference.text_to_image import noise_from_seeds
from ecdit_ds.model.ecdit import Prediction
from ecdit_ds.training.batches import MakeBatch, with_text

SEED = 0
ONE = torch.tensor([3])


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Return a recipe that leaves out half of the tokens in steps 0 and 1 only, and half of the texts."""
    train = replace(tiny_recipe.train, mask_ratio=0.5, unmasked_from_step=2)
    model = replace(tiny_recipe.model, decoder_layers=1)
    return replace(tiny_recipe, model=model, train=train, flow=FlowConfig(text_dropout_prob=0.5))


@pytest.fixture
def null_text() -> TextEmbeddings:
    """Return the text of no text: numbers that no sample has."""
    mask_BT = torch.arange(6) < 1
    return TextEmbeddings(embeds_BTD=torch.full((6, 24), 7.0), mask_BT=mask_BT, pooled_BD=torch.full((24,), 8.0))


def samples_at(*stream_index: int) -> Samples:
    """Return samples whose content says which they are."""
    index_B = torch.tensor(stream_index)
    numbers = index_B.float()
    return Samples(
        latents_BCHW=numbers.view(-1, 1, 1, 1).repeat(1, 3, 8, 8),
        text_embeds_BTD=-numbers.view(-1, 1, 1).repeat(1, 6, 24),
        text_mask_BT=torch.ones(len(index_B), 6).bool(),
        text_pooled_BD=-numbers.view(-1, 1).repeat(1, 24),
        captions=("",) * len(index_B),
        stream_index_B=index_B,
    )


def test_what_is_drawn_for_one_purpose_says_nothing_of_what_is_drawn_for_another() -> None:
    count = 4000
    index = torch.arange(count)
    kept = sample_visible_tokens(index, SEED, 16, 8)
    assert kept is not None
    noise = sample_noise((2,), index, SEED).double()
    drawn = {
        "time": sample_timesteps(index, SEED, 1, FlowConfig(timestep_density="uniform")).double(),
        "text": draw_text_kept(index, SEED, FlowConfig(text_dropout_prob=0.5)).double(),
        "mask": (kept == 0).any(dim=1).double(),
        "noise": noise[:, 0],
        "more noise": noise[:, 1],
    }
    correlation = np.corrcoef(torch.stack(list(drawn.values())).numpy()) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(count)
    # A sign, or the largest of a few, may follow a number without a linear trace.
    for name, numbers in drawn.items():
        for text in (0.0, 1.0):
            own = numbers[drawn["text"] == text]
            assert name == "text" or abs(own.abs().mean() - numbers.abs().mean()) < 4.5 / np.sqrt(count / 2)


def test_no_two_purposes_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: set[int] = set()
    real = seeding.stable_seed

    def noting(*parts: object) -> int:
        seeds.add(real(*parts))
        return real(*parts)

    def heldout() -> object:
        return heldout_loss(
            lambda noisy, *_: Prediction(noisy, torch.zeros(())),
            None,  # type: ignore[arg-type]
            batch_size=1,
            dp_rank=0,
            dp_size=1,
            device=torch.device("cpu"),
            total=lambda sums: sums,
        )

    uses: dict[str, Callable[[], object]] = {
        "noise": lambda: sample_noise((1,), ONE, SEED),
        "times": lambda: sample_timesteps(ONE, SEED, 8, FlowConfig()),
        "texts kept": lambda: draw_text_kept(ONE, SEED, FlowConfig()),
        "tokens kept": lambda: sample_visible_tokens(ONE, SEED, 4, 2),
        "pictures": lambda: noise_from_seeds([SEED], (1,))(),
        "held-out noise": heldout,
        "words": lambda: HashedWordEncoder(embed_dim=4, max_tokens=3).encode(["red"]),
        "prompts": lambda: draw_prompts(seed=SEED, numbers={"counting": 1}),
        "weights": lambda: seeding.parameter_generator(SEED, "noise"),
    }
    monkeypatch.setattr(seeding, "stable_seed", noting)
    monkeypatch.setattr(heldout_module, "evaluation_batches", lambda *_, **__: [(samples_at(3), torch.ones(1))])
    taken: dict[int, str] = {}
    for name, use in uses.items():
        seeds.clear()
        use()
        assert seeds, name
        assert not {taken[seed] for seed in seeds & taken.keys()}, name
        taken |= dict.fromkeys(seeds, name)


def parts_of(batch: FlowBatch) -> Iterator[tuple[str, Tensor]]:
    """Yield what a batch holds."""
    return ((name, part) for name, part in vars(batch).items() if isinstance(part, Tensor))


def test_a_micro_batch_is_a_part_of_its_global_batch(recipe: Recipe, null_text: TextEmbeddings) -> None:
    draw = MakeBatch(recipe, null_text)
    whole, part = draw(samples_at(*range(8, 16))), draw(samples_at(10, 11))
    assert isinstance(whole, FlowBatch) and isinstance(part, FlowBatch)
    for (name, of_whole), (_, of_part) in zip(parts_of(whole), parts_of(part), strict=True):
        assert torch.equal(of_whole[2:4], of_part), name
    strata = (torch.logit(whole.timesteps_B.double()) / 2**0.5).erf().add(1).mul(4).floor().int().tolist()
    assert strata == list(range(8))


def test_a_dropped_text_is_dropped_in_all_its_parts_and_the_picture_stays(
    recipe: Recipe, null_text: TextEmbeddings
) -> None:
    batch, samples = MakeBatch(recipe, null_text)(samples_at(*range(64))), samples_at(*range(64))
    assert isinstance(batch, FlowBatch)
    kept = draw_text_kept(samples.stream_index_B, recipe.train.seed, recipe.flow)
    assert 16 < kept.sum() < 48
    assert torch.equal(batch.latents_BCHW, samples.latents_BCHW)
    for name, null in (
        ("embeds_BTD", null_text.embeds_BTD),
        ("mask_BT", null_text.mask_BT),
        ("pooled_BD", null_text.pooled_BD),
    ):
        found, own = getattr(batch, f"text_{name}"), getattr(samples, f"text_{name}")
        assert torch.equal(found[kept], own[kept]) and torch.equal(found[~kept], null.expand_as(found[~kept])), name
    assert torch.equal(
        with_text(batch, samples_at(0, 1), torch.tensor([True, True]), null_text).text_pooled_BD,
        samples.text_pooled_BD[:2],
    )


@pytest.mark.parametrize(("first", "num_kept"), [(0, 8), (8, 8), (14, 8), (16, None), (24, None)])
def test_tokens_are_left_out_in_the_steps_that_the_recipe_says(
    first: int, num_kept: int | None, recipe: Recipe, null_text: TextEmbeddings
) -> None:
    batch = MakeBatch(recipe, null_text)(samples_at(first, first + 1))
    assert isinstance(batch, FlowBatch)
    assert (None if batch.visible_BN is None else batch.visible_BN.shape) == (
        None if num_kept is None else (2, num_kept)
    )
