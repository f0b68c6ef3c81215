"""The embedded encoders: words become fixed vectors, images stay what they are."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from torch import Tensor

from ecdit_ds.data.digit_scenes.scenes import draw_scene
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE
from ecdit_ds.data.encoders.pretrained import load_image_encoder, load_text_encoder
from ecdit_ds.data.encoders.spec import (
    image_encoder_spec,
    null_text_facts,
    null_text_of,
    open_image_encoder,
    open_text_encoder,
    text_encoder_spec,
)
from tests.helpers.tiny_encoders import save_t5, save_vae


@pytest.fixture
def encoder() -> HashedWordEncoder:
    """Return a small encoder, of odd width since nothing forbids it."""
    return HashedWordEncoder(embed_dim=33, max_tokens=6)


def test_encodings_have_the_shapes_and_types_that_the_model_reads(encoder: HashedWordEncoder) -> None:
    text = encoder.encode(["a red seven", "an eight"])
    assert (text.embeds_BTD.shape, text.embeds_BTD.dtype) == ((2, 6, 33), torch.float32)
    assert (text.mask_BT.shape, text.mask_BT.dtype) == ((2, 6), torch.bool)
    assert (text.pooled_BD.shape, text.pooled_BD.dtype) == ((2, 33), torch.float32)


def test_masks_mark_the_words_and_padding_is_zero(encoder: HashedWordEncoder) -> None:
    text = encoder.encode(["a red seven", "an eight"])
    assert text.mask_BT.tolist() == [[True] * 3 + [False] * 3, [True] * 2 + [False] * 4]
    assert not text.embeds_BTD[~text.mask_BT].any()
    assert text.embeds_BTD[text.mask_BT].abs().sum(dim=-1).min() > 0


def test_a_caption_is_encoded_alike_alone_and_in_any_batch(encoder: HashedWordEncoder) -> None:
    captions = ["a red seven", "two blue fives", "a six"]
    together = encoder.encode(captions)
    for i, caption in enumerate(captions):
        alone = HashedWordEncoder(embed_dim=33, max_tokens=6).encode([caption])
        assert torch.equal(alone.embeds_BTD[0], together.embeds_BTD[i])
        assert torch.equal(alone.pooled_BD[0], together.pooled_BD[i])


@pytest.mark.parametrize("variant", ["A RED Seven", "a red, seven!", "  a  red\tseven\n"])
def test_case_punctuation_and_spaces_do_not_matter(encoder: HashedWordEncoder, variant: str) -> None:
    assert torch.equal(encoder.encode([variant]).embeds_BTD, encoder.encode(["a red seven"]).embeds_BTD)


@pytest.mark.parametrize(
    "other", ["a blue seven", "a red two", "red seven", "a na\u00efve \u6570\u5b57", "a null seven"]
)
def test_other_words_give_other_encodings(encoder: HashedWordEncoder, other: str) -> None:
    one, two = encoder.encode(["a red seven"]), encoder.encode([other])
    assert not torch.allclose(one.embeds_BTD, two.embeds_BTD, atol=0.1)
    assert not torch.allclose(one.pooled_BD, two.pooled_BD, atol=0.1)


def test_word_order_shows_in_the_tokens_but_not_in_the_pooled_vector(encoder: HashedWordEncoder) -> None:
    one, two = encoder.encode(["seven above two"]), encoder.encode(["two above seven"])
    assert not torch.allclose(one.embeds_BTD, two.embeds_BTD, atol=0.1)
    torch.testing.assert_close(one.pooled_BD, two.pooled_BD)


def test_a_word_carries_its_neighbours_alike_whatever_it_is_itself(encoder: HashedWordEncoder) -> None:
    for before, after in (("red {}", "blue {}"), ("{} above", "{} below"), ("a red small {}", "a blue small {}")):
        place = before.split().index("{}")
        seven, two = (
            torch.sub(*encoder.encode([text.format(word) for text in (before, after)]).embeds_BTD[:, place])
            for word in ("seven", "two")
        )
        torch.testing.assert_close(seven, two)
        assert seven.norm() > 1.0


def test_nearer_words_weigh_more_and_lie_in_other_directions() -> None:
    encoder = HashedWordEncoder(embed_dim=512, max_tokens=6)
    near, far = (
        torch.sub(*encoder.encode([text.format(colour) for colour in ("red", "blue")]).embeds_BTD[:, place])
        for text, place in (("{} x", 1), ("{} y x", 2))
    )
    assert near.norm() > 1.1 * far.norm()
    assert abs(torch.nn.functional.cosine_similarity(near, far, dim=0)) < 0.2


def test_the_same_words_elsewhere_differ_by_their_position_alone() -> None:
    encoder = HashedWordEncoder(embed_dim=33, max_tokens=3)
    first = encoder.encode(["red"]).embeds_BTD[0, 0] - encoder.encode(["blue"]).embeds_BTD[0, 0]
    third = torch.sub(*encoder.encode(["x y red", "x y blue"]).embeds_BTD[:, 2])
    torch.testing.assert_close(first, third)


@pytest.mark.parametrize("num_words", [1, 3, 10])
def test_pooled_components_have_unit_variance_whatever_the_length(num_words: int) -> None:
    encoder = HashedWordEncoder(embed_dim=8192, max_tokens=10)
    pooled_D = encoder.encode([" ".join(f"w{i}" for i in range(num_words))]).pooled_BD[0]
    assert abs(pooled_D.var().item() - 1.0) < 0.08  # five standard deviations
    assert abs(pooled_D.mean().item()) < 0.06


@pytest.mark.parametrize("nothing", ["", "  ", "?!"])
def test_the_null_text_is_the_caption_that_says_nothing(encoder: HashedWordEncoder, nothing: str) -> None:
    null, empty = encoder.null(), encoder.encode([nothing])
    assert null.mask_BT.tolist() == [[True] + [False] * 5]
    assert torch.equal(null.embeds_BTD, empty.embeds_BTD)
    assert torch.equal(null.pooled_BD, empty.pooled_BD)


@pytest.mark.parametrize("word", ["null", "<null>", "a"])
def test_no_word_sounds_like_the_null_text(encoder: HashedWordEncoder, word: str) -> None:
    assert not torch.allclose(encoder.encode([word]).embeds_BTD, encoder.null().embeds_BTD, atol=0.1)


def test_a_caption_may_fill_every_token_but_not_one_more(
    encoder: HashedWordEncoder, refusal_of: Callable[[Callable[[], object]], str]
) -> None:
    assert encoder.encode(["a b c d e f"]).mask_BT.all()
    message = refusal_of(lambda: encoder.encode(["a six", "a b c d e f g"]))
    for part in ("a b c d e f g", "7 tokens", "6", "model.max_text_tokens"):
        assert part in message


def test_every_word_takes_a_token_and_no_word_takes_one(encoder: HashedWordEncoder) -> None:
    assert encoder.count_tokens(["", "a red seven", "?!", "eight"]) == [1, 3, 1, 1]


def test_encoders_with_different_sizes_have_different_identities() -> None:
    sizes = [(8, 6), (8, 7), (9, 6)]
    assert len({HashedWordEncoder(embed_dim=dim, max_tokens=tokens).identity for dim, tokens in sizes}) == 3


def test_latents_decode_to_the_image_they_came_from(draw: Callable[..., Tensor]) -> None:
    images = draw("images", 2, 3, 4, 5).clamp(-1, 1)
    torch.testing.assert_close(PixelVAE().decode(PixelVAE().encode(images)), images)


def test_latents_of_digit_scenes_have_about_zero_mean_and_unit_variance() -> None:
    scenes = [
        draw_scene(seed=0, split="train", index=i, canvas_height=16, canvas_width=16).image_HWC for i in range(200)
    ]
    images = torch.from_numpy(np.stack(scenes)).float() / 127.5 - 1
    latents = PixelVAE().encode(images.permute(0, 3, 1, 2))
    assert abs(float(latents.mean())) < 0.1
    assert float(latents.std()) == pytest.approx(1.0, abs=0.1)


def test_decoded_images_stay_in_range_and_in_fp32(draw: Callable[..., Tensor]) -> None:
    latents = 3 * draw("latents", 2, 3, 4, 5)
    codec = PixelVAE(shift_factor=0.0, scaling_factor=1.0)
    images = codec.decode(latents.to(torch.bfloat16))
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1.0, 1.0)
    inside = latents.abs() < 0.9
    torch.testing.assert_close(images[inside], latents[inside], atol=0.01, rtol=0)


def test_encodings_are_still_those_of_sets_that_were_stored_under_these_identities() -> None:
    words, pixels = HashedWordEncoder(embed_dim=6, max_tokens=3), PixelVAE()
    assert (words.identity, pixels.identity) == ("words-3-6x3", "pixels-2--0.83-2.2")
    said, nothing = words.encode(["a red seven"]), words.null()
    wanted_TD = torch.tensor(
        [
            [0.87795, 0.62195, 1.33498, 0.41755, 3.07982, 2.91159],
            [1.51234, 1.66232, -0.60786, 1.90835, 2.69611, 1.79896],
            [2.46161, -0.70674, 1.02454, 1.43775, 1.23323, 1.57625],
        ]
    )
    null_D = torch.tensor([0.35365, 0.22891, -1.76350, 0.13743, -1.18463, -1.47306])
    torch.testing.assert_close(said.embeds_BTD[0], wanted_TD, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        said.pooled_BD[0], torch.tensor([1.00746, 0.26768, 0.06723, 0.26134, 0.56371, 1.62557]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(nothing.pooled_BD[0], null_D, rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels.encode(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([-0.374, 1.826, 4.026]))


@pytest.mark.parametrize(
    ("facts", "flag"),
    [
        ({"kind": "AutoencoderKL", "identity": "a", "name": "somebody/vae", "precision": "fp32"}, "--vae"),
        (
            {"kind": "transformers", "identity": "a", "names": ["somebody/text"], "max_tokens": 8, "precision": "fp32"},
            "--text",
        ),
    ],
)
def test_a_set_does_not_choose_what_is_fetched_from_the_hub_and_its_user_does(
    facts: dict[str, Any],
    flag: str,
    refusal_of: Callable[[Callable[[], object]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names in an index or a checkpoint are of whoever made it."""
    sought: list[object] = []

    def seek(host: object, *_: object, **__: object) -> None:
        sought.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", seek)
    named = facts.get("name") or facts["names"][0]
    open_it = open_image_encoder if flag == "--vae" else open_text_encoder
    assert f"{named}: is neither a folder nor in the hub's cache here" in (said := refusal_of(lambda: open_it(facts)))
    assert f"give {flag} {named} to fetch it" in said and sought == []
    given = {"name": named} if flag == "--vae" else {"names": [named]}
    assert "the hub does not give it" in refusal_of(lambda: open_it(facts, **given)) and sought


COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return `move(commit)`: the branch of every repository in the hub's cache here becomes that commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for kind, save in (("vae", save_vae), ("text", save_t5)):
        for seed, commit in enumerate(COMMITS):
            folder = tmp_path / "hub" / f"models--somebody--{kind}" / "snapshots" / commit
            folder.mkdir(parents=True)
            save(folder, seed=seed)

    def move(commit: str) -> None:
        for repository in (tmp_path / "hub").iterdir():
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text(commit)

    move(COMMITS[0])
    return move


@pytest.mark.parametrize("kind", ["vae", "text"])
def test_what_came_from_the_hub_is_stored_with_its_revision_and_opened_by_it_though_the_branch_has_moved(
    hub: Callable[[str], None], tmp_path: Path, refusal_of: Callable[[Callable[[], object]], str], kind: str
) -> None:
    name = f"somebody/{kind}"

    def facts_now() -> dict[str, Any]:
        if kind == "vae":
            return image_encoder_spec(load_image_encoder(name, may_fetch=False), name)
        return text_encoder_spec(load_text_encoder([name], max_tokens=8, may_fetch=False), [name])

    def identity_of(facts: dict[str, Any]) -> str:
        return (open_image_encoder if kind == "vae" else open_text_encoder)(facts).identity

    facts = facts_now()
    assert (facts["revision"] if kind == "vae" else facts["revisions"][0]) == COMMITS[0]
    hub(COMMITS[1])
    assert facts_now()["identity"] != facts["identity"]
    assert identity_of(facts) == facts["identity"]
    repository = tmp_path / "hub" / f"models--somebody--{kind}" / "snapshots"
    shutil.rmtree(repository / COMMITS[0])
    message = refusal_of(lambda: identity_of(facts))
    assert f"revision {COMMITS[0]}; here is {COMMITS[1]}" in message.replace("[", "").replace("]", "").replace("'", "")
    (repository / COMMITS[1]).rename(tmp_path / "folder")
    name = str(tmp_path / "folder")
    assert not facts_now().keys() & {"revision", "revisions"}, "a folder has none"


@pytest.mark.parametrize("revision", ["../../evil", "main", "A" * 40, "a" * 39, "--help"])
def test_a_stored_revision_that_is_no_commit_is_not_looked_for(
    hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    asked: list[dict[str, Any]] = []
    found = huggingface_hub.snapshot_download

    def note(*names: str, **options: Any) -> str:
        asked.append(options)
        return found(*names, **options)

    facts = image_encoder_spec(load_image_encoder("somebody/vae", may_fetch=False), "somebody/vae")
    monkeypatch.setattr("huggingface_hub.snapshot_download", note)
    open_image_encoder(facts | {"revision": revision})
    assert [options.get("revision") for options in asked] == [None]


def test_sizes_that_a_file_claims_of_its_texts_are_bounded_before_memory_is_taken(
    refusal_of: Callable[[Callable[[], object]], str],
) -> None:
    words = HashedWordEncoder(embed_dim=8, max_tokens=4)
    facts = text_encoder_spec(words)
    assert open_text_encoder(facts).identity == words.identity
    for name, size in (("embed_dim", 10**9), ("max_tokens", 10**9), ("max_tokens", 0), ("embed_dim", 8.0)):
        assert f"its {name}, which is {size!r}" in refusal_of(partial(open_text_encoder, {**facts, name: size}))
    null = null_text_facts(words.null())
    assert torch.equal(null_text_of(null).embeds_BTD, words.null().embeds_BTD)
    for tokens in (10**8, -1, 4.0):
        assert f"of {tokens!r} tokens" in refusal_of(partial(null_text_of, {**null, "tokens": tokens}))
