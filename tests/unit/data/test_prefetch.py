"""Encoders beside training: one step ahead, in order, in a thread that ends, and to what would have been stored."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE, TextEmbeddings
from ecdit_ds.data.encoders.online import CAPTIONS_AT_ONCE, IMAGES_AT_ONCE, OnlineEncoders
from ecdit_ds.data.encoders.pretrained import load_image_encoder, load_text_encoder
from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.data.mixture import Mixture
from ecdit_ds.data.prefetch import THREAD_NAME, prefetch
from ecdit_ds.data.sources.bad_sample import ReplacedSample
from ecdit_ds.data.sources.images import from_pixels
from ecdit_ds.errors import DataError
from ecdit_ds.flow.objective import FlowBatch, draw_text_kept
from ecdit_ds.training.batches import EncodeBatch, MakeBatch, PendingBatch
from tests.helpers.tiny_encoders import save_clip_text, save_t5, save_vae

SECONDS = 20.0


def threads() -> list[str]:
    """Return the threads that work ahead now."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def numbers(stop: int, closed: list[bool] | None = None) -> Iterator[int]:
    """Yield 0 to stop - 1, and note that nobody wants more."""
    try:
        yield from range(stop)
    finally:
        if closed is not None:
            closed.append(True)


@pytest.mark.parametrize("stop", [0, 1, 2, 7])
def test_steps_come_finished_and_in_order(stop: int) -> None:
    assert list(prefetch(numbers(stop), lambda step: step * step)) == [i * i for i in range(stop)]
    assert threads() == []


def test_the_next_step_is_finished_while_this_one_is_used() -> None:
    begun = [threading.Event() for _ in range(3)]

    def finish(step: int) -> int:
        begun[step].set()
        return step

    steps = prefetch(numbers(3), finish)
    for i in range(2):
        assert next(steps) == i
        assert begun[i + 1].wait(SECONDS), "nobody works on the next step"
    steps.close()  # type: ignore[attr-defined]


def test_steps_are_read_where_they_are_asked_for_and_finished_elsewhere() -> None:
    read_in, finished_in = set[int](), set[int]()

    def read() -> Iterator[int]:
        for i in range(4):
            read_in.add(threading.get_ident())
            yield i

    list(prefetch(read(), lambda step: finished_in.add(threading.get_ident())))
    assert read_in == {threading.get_ident()}
    assert len(finished_in) == 1 and finished_in.isdisjoint(read_in)


@pytest.mark.parametrize("kind", [DataError, RuntimeError])  # the second is what a lost worker of torch raises
@pytest.mark.parametrize("where", ["read", "finish"])
def test_a_failure_belongs_to_its_step(where: str, kind: type[Exception]) -> None:
    def read() -> Iterator[int]:
        yield from range(3)
        if where == "read":
            raise kind("no step 3")
        yield 3

    def finish(step: int) -> int:
        if step == 3:
            raise kind("no step 3")
        return step

    steps = prefetch(read(), finish)
    assert [next(steps) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(kind, match=r"^no step 3$"):
        next(steps)
    assert threads() == []
    assert list(steps) == []


def test_the_thread_ends_and_reading_stops_when_nobody_wants_more() -> None:
    closed: list[bool] = []
    source = numbers(100, closed)
    steps = prefetch(source, lambda step: step)
    assert next(steps) == 0 and len(threads()) == 1
    del steps  # as a loop does that is left
    assert threads() == [] and closed == [True]


@dataclass
class Counting:
    """An encoder of both kinds that notes how much it is given at a time."""

    image: PixelVAE = field(default_factory=PixelVAE)
    text: HashedWordEncoder = field(default_factory=lambda: HashedWordEncoder(embed_dim=24, max_tokens=6))
    images: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    identity: str = "counting"
    downsampling: int = 1
    embed_dim: int = 24
    max_tokens: int = 6

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Return the image."""
        return self.image.decode(latents_BCHW)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the number of words."""
        return self.text.count_tokens(captions)

    def null(self) -> TextEmbeddings:
        """Return the text of no text."""
        return self.text.null()

    def encode(self, given: object) -> object:
        """Encode images or captions, and note how many."""
        if isinstance(given, Tensor):
            self.images.append(len(given))
            return self.image.encode(given)
        assert isinstance(given, list)
        self.captions.append(len(given))
        return self.text.encode(given)


def raw(count: int, first: int = 0) -> Samples:
    """Return samples that are pictures and captions alone."""
    pixels = np.random.default_rng(first).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return Samples(
        latents_BCHW=torch.empty(count, 0, 0, 0),
        text_embeds_BTD=torch.empty(count, 0, 0),
        text_mask_BT=torch.empty(count, 0, dtype=torch.bool),
        text_pooled_BD=torch.empty(count, 0),
        captions=tuple(f"number {first + i}" for i in range(count)),
        stream_index_B=torch.arange(first, first + count),
        pixels_BHW3=torch.from_numpy(pixels),
    )


def beside(encoder: Counting | None = None) -> OnlineEncoders:
    """Return the embedded encoders, or others."""
    if encoder is None:
        return OnlineEncoders(image_encoder=PixelVAE(), text_encoder=HashedWordEncoder(embed_dim=24, max_tokens=6))
    return OnlineEncoders(image_encoder=encoder, text_encoder=encoder)  # type: ignore[arg-type]


def test_all_micro_batches_of_a_step_are_encoded_at_once() -> None:
    encoder = Counting()
    finished = beside(encoder).finish([raw(3), raw(3, 3)])
    assert (encoder.images, encoder.captions) == ([6], [6])
    for i, samples in enumerate(finished):
        given = raw(3, 3 * i)
        assert torch.equal(samples.latents_BCHW, PixelVAE().encode(from_pixels(given.pixels_BHW3)))
        assert torch.equal(samples.text_embeds_BTD, encoder.text.encode(given.captions).embeds_BTD)
        assert samples.pixels_BHW3.shape == (3, 0, 0, 3)
        assert not (samples.lacks_latents or samples.lacks_text)


def test_a_step_of_many_goes_through_the_encoders_in_parts() -> None:
    encoder, count = Counting(), CAPTIONS_AT_ONCE + 1
    (finished,) = beside(encoder).finish([raw(count)])
    assert max(encoder.images) == IMAGES_AT_ONCE and sum(encoder.images) == count
    assert encoder.captions == [CAPTIONS_AT_ONCE, 1]
    assert torch.equal(finished.latents_BCHW, PixelVAE().encode(from_pixels(raw(count).pixels_BHW3)))


def test_only_what_is_missing_is_encoded() -> None:
    encoder = Counting()
    stored = replace(raw(2), latents_BCHW=torch.ones(2, 3, 8, 8), pixels_BHW3=torch.empty(2, 0, 0, 3))
    (finished,) = beside(encoder).finish([stored])
    assert (encoder.images, encoder.captions) == ([], [2])
    assert torch.equal(finished.latents_BCHW, stored.latents_BCHW)
    (again,) = beside(encoder).finish([finished])
    assert again is finished and encoder.captions == [2]


@dataclass(frozen=True)
class Pictures:
    """A set of pictures named by their number, all of one size."""

    name: str = "pictures"
    fingerprint: str = "pictures"
    buckets: tuple[tuple[int, int, int], ...] = ((3, 8, 8),)
    runs: tuple[tuple[int, int], ...] = ((0, 64),)
    is_whole: bool = False
    null_text: TextEmbeddings = field(default_factory=lambda: HashedWordEncoder(embed_dim=24, max_tokens=6).null())

    def __len__(self) -> int:
        return 64

    def name_of(self, sample: int) -> str:
        """Return its number."""
        return str(sample)

    def gather(self, indices: object, stream_indices: object) -> Samples:
        """Nobody asks for any."""
        raise AssertionError


def pictures() -> Mixture:
    """Return a mixture that only names samples."""
    return Mixture([Pictures()], seed=0, global_batch_size=16)


class Broken(PixelVAE):
    """An image encoder that has no numbers for some of what it is given."""

    def __init__(self, bad: dict[int, float]) -> None:
        self.bad = bad

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return latents, of which one number of each bad image is not finite."""
        latents_BCHW = super().encode(images_B3HW)
        for place, number in self.bad.items():
            latents_BCHW[place, -1, -1, -1] = number
        return latents_BCHW


@dataclass(frozen=True)
class BrokenWords:
    """A text encoder that has no pooled vector for some captions."""

    bad: set[int]
    inner: HashedWordEncoder = field(default_factory=lambda: HashedWordEncoder(embed_dim=24, max_tokens=6))

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Return vectors, of which one number of each bad caption is not finite."""
        made = self.inner.encode(captions)
        pooled_BD = made.pooled_BD.clone()
        pooled_BD[sorted(self.bad), 0] = float("nan")
        return replace(made, pooled_BD=pooled_BD)


def finished_of(recipe: Recipe, samples: Samples, latents: dict[int, float], texts: set[int]) -> FlowBatch:
    """Return a micro-batch finished by encoders that fail at some places."""
    encoders = OnlineEncoders(image_encoder=Broken(latents), text_encoder=BrokenWords(texts))  # type: ignore[arg-type]
    unfinished = MakeBatch(recipe, pictures().null_text)(samples)
    (batch,) = EncodeBatch(encoders=encoders, mixture=pictures())([unfinished])
    return batch


def test_the_next_finite_sample_of_a_micro_batch_stands_in_for_what_encoders_have_no_numbers_for(
    tiny_recipe: Recipe,
) -> None:
    recipe = replace(tiny_recipe, flow=replace(tiny_recipe.flow, text_dropout_prob=0.0))
    whole, nan = finished_of(recipe, raw(6, 16), {}, set()), float("nan")
    batch = finished_of(recipe, raw(6, 16), {1: nan, 5: float("-inf")}, {2})
    # After place 5 comes place 0.
    stands_in = [0, 3, 3, 3, 4, 0]
    for name in ("latents_BCHW", "text_embeds_BTD", "text_mask_BT", "text_pooled_BD"):
        assert torch.equal(getattr(batch, name), getattr(whole, name)[stands_in]), name
    assert torch.equal(batch.noise_BCHW, whole.noise_BCHW) and torch.equal(batch.timesteps_B, whole.timesteps_B)
    keys = pictures().ids_at(np.array([17, 18, 21])).samples_B
    assert whole.replaced == () and batch.replaced == tuple(
        ReplacedSample(position=position, set="pictures", key=str(key), cause="not finite")
        for position, key in zip((17, 18, 21), keys, strict=True)
    )


def test_what_stood_in_for_a_bad_sample_and_proves_bad_itself_is_named_after_it(tiny_recipe: Recipe) -> None:
    first = ReplacedSample(position=1, set="pictures", key="first", cause="no image")
    samples = replace(raw(4), replaced={1: (first,)})
    batch = finished_of(tiny_recipe, samples, {}, {1})
    key = str(pictures().ids_at(np.array([1]), 1).samples_B[0])
    assert batch.replaced == (first, replace(first, key=key, cause="not finite"))
    assert finished_of(tiny_recipe, samples, {}, set()).replaced == (first,)


def test_a_micro_batch_that_encoders_have_no_numbers_for_at_all_is_answered_with_one_line(tiny_recipe: Recipe) -> None:
    with pytest.raises(DataError) as caught:
        finished_of(tiny_recipe, raw(3), {1: float("nan")}, {0, 2})
    said, key = str(caught.value), pictures().ids_at(np.array([0])).samples_B[0]
    assert "\n" not in said and said.startswith("pictures: ") and "any of 3 samples from position 0" in said
    assert f"the first is {key} (not finite)" in said


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Return a recipe that drops half of all texts and masks nothing."""
    return replace(tiny_recipe, flow=replace(tiny_recipe.flow, text_dropout_prob=0.5))


def test_a_micro_batch_finished_beside_training_is_the_one_that_a_stored_sample_makes(recipe: Recipe) -> None:
    encoders = beside()
    null = encoders.text_encoder.null()
    draw, samples = MakeBatch(recipe, null), raw(16)
    unfinished = draw(samples)
    assert isinstance(unfinished, PendingBatch)
    whole = draw(encoders.finish([samples])[0])
    assert isinstance(whole, FlowBatch)
    (finished, untouched) = EncodeBatch(encoders=encoders, mixture=pictures())([unfinished, whole])
    assert untouched is whole
    for name, values in vars(whole).items():
        there = getattr(finished, name)
        assert torch.equal(there, values) if isinstance(values, torch.Tensor) else there == values, name


def test_dropped_texts_are_the_text_of_no_text(recipe: Recipe) -> None:
    encoders = beside()
    null = encoders.text_encoder.null()
    samples = raw(16)
    unfinished = MakeBatch(recipe, null)(samples)
    (batch,) = EncodeBatch(encoders=encoders, mixture=pictures())([unfinished])
    kept_B = draw_text_kept(samples.stream_index_B, recipe.train.seed, recipe.flow)
    assert 0 < kept_B.sum() < 16
    own = encoders.text_encoder.encode(samples.captions)
    for got, text, nothing in (
        (batch.text_embeds_BTD, own.embeds_BTD, null.embeds_BTD),
        (batch.text_mask_BT, own.mask_BT, null.mask_BT),
        (batch.text_pooled_BD, own.pooled_BD, null.pooled_BD),
    ):
        assert torch.equal(got[kept_B], text[kept_B])
        assert torch.equal(got[~kept_B], nothing.expand_as(got)[~kept_B])


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the folders of a T5, a CLIP and an autoencoder."""
    root = tmp_path_factory.mktemp("encoders")
    return [str(save_t5(root / "t5")), str(save_clip_text(root / "clip")), str(save_vae(root / "vae"))]


def test_loading_and_running_encoders_moves_no_generator(joined: list[str]) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    text = load_text_encoder(joined[:2], max_tokens=24)
    encoders = OnlineEncoders(image_encoder=load_image_encoder(joined[2]), text_encoder=text)
    list(prefetch(iter([[raw(2)], [raw(2)]]), encoders.finish))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]


class Trainable(PixelVAE):
    """An encoder with a weight that could be trained."""

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Return latents that depend on the weight."""
        return super().encode(images_B3HW) * torch.ones((), requires_grad=True)


def test_nothing_beside_training_asks_for_gradients_but_all_of_it_can_be_trained_on() -> None:
    words = HashedWordEncoder(embed_dim=24, max_tokens=6)
    encoders = OnlineEncoders(image_encoder=Trainable(), text_encoder=words)
    (finished,) = next(prefetch(iter([[raw(2)]]), encoders.finish))
    assert not finished.latents_BCHW.requires_grad
    weight = torch.ones((), requires_grad=True)
    (finished.latents_BCHW * weight).sum().backward()
    assert weight.grad is not None


def test_one_encoder_serves_several_threads_at_once(joined: list[str]) -> None:
    text = load_text_encoder(joined[:2], max_tokens=24)
    captions, long = ["a", "a bridge over a river"], ["a bridge over a river and a river under a bridge"] * 4
    alone, counts = text.encode(captions).embeds_BTD, text.count_tokens(long)
    failures: list[Exception] = []

    def ask(work: Callable[[], object]) -> None:
        try:
            for _ in range(40):
                work()
        except Exception as error:
            failures.append(error)

    def encode() -> None:
        assert torch.equal(text.encode(captions).embeds_BTD, alone)

    def count() -> None:
        assert text.count_tokens(long) == counts

    asking = [threading.Thread(target=ask, args=(work,)) for work in (encode, count) * 2]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
