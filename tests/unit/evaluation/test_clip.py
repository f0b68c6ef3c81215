"""CLIP scores against torchmetrics' own on one tiny model, and their indifference to batches and ranks."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from transformers import CLIPProcessor

from ecdit_ds.evaluation.clip import Clip, load_clip
from ecdit_ds.evaluation.clip_score import clip_scores, mean_clip_score
from tests.helpers.tiny_judges import pictures, save_clip, save_vit

Refusal = Callable[[Callable[[], object]], str]
CPU = torch.device("cpu")
CAPTIONS = ("a red cat", "two", "a dog", "blue", "a photo of a very long sentence that has no end")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """Return a tiny CLIP with random weights."""
    return load_clip(str(save_clip(tmp_path_factory.mktemp("clip"))), device=CPU)


class TensorsOfClip:
    """What torchmetrics 1.9.0 takes a CLIP for: its embeddings are tensors, as before transformers 5."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = SimpleNamespace()

    def to(self, _device: torch.device) -> "TensorsOfClip":
        """Stay where the model is."""
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """Return vectors_BD of pictures."""
        return self._model.get_image_features(pixel_values=pixels).pooler_output

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return vectors_BD of texts."""
        return self._model.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output


def test_scores_are_those_of_torchmetrics(clip: Clip) -> None:
    shown = [*pictures(4), *pictures(8, "more")]
    captions = ["a red cat", "x", "a dog", "blue"] * 3
    processor = CLIPProcessor(clip.processor, clip.tokenizer)
    theirs = [
        torchmetrics_clip_score(
            torch.from_numpy(np.array(picture)).permute(2, 0, 1),
            caption,
            model_name_or_path=lambda: (TensorsOfClip(clip.model), processor),
        ).item()
        for picture, caption in zip(shown, captions, strict=True)
    ]
    ours = list(clip_scores(zip(shown, captions, strict=True), clip, batch_size=12))
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert 0.0 in ours  # where torchmetrics' cosine is negative, too
    assert max(ours) > 5.0
    assert len({round(score, 2) for score in ours if score}) > 3
    assert mean_clip_score(ours) == pytest.approx(sum(theirs) / 12, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_do_not_change_a_score(clip: Clip, batch_size: int) -> None:
    shown = [*pictures(3), *pictures(2, "tall", height=77)]
    pairs = list(zip(shown, CAPTIONS, strict=True))
    alone = [next(clip_scores([pair], clip, batch_size=1)) for pair in pairs]
    assert list(clip_scores(iter(pairs), clip, batch_size=batch_size)) == pytest.approx(alone, abs=1e-4)


def test_the_mean_over_ranks_is_that_of_one_process_to_the_last_bit() -> None:
    scores = [100.0, *[8e-15] * 40]  # each rounds up to 1.4e-14 when it is added to 100
    shares = [scores[rank::3] for rank in range(3)]
    assert mean_clip_score(shares[2] + shares[0] + shares[1]) == mean_clip_score(scores)
    assert mean_clip_score([0.0, 30.0]) == 15.0


def test_a_long_caption_is_cut_and_keeps_its_end_mark(clip: Clip) -> None:
    assert clip.max_tokens == 24
    spelled = "x" * 22  # with both marks, 24 tokens
    full, longer = clip.embed_texts([spelled, spelled + " and more"])
    torch.testing.assert_close(full, longer)
    with torch.no_grad():
        tokens = torch.tensor([clip.tokenizer(spelled)["input_ids"]])
        assert (tokens.shape, int(tokens[0, -1])) == ((1, 24), 1)
        unpadded = clip.model.get_text_features(input_ids=tokens).pooler_output[0]
    torch.testing.assert_close(full, unpadded / unpadded.norm())


def test_pictures_and_texts_are_vectors_of_length_one(clip: Clip) -> None:
    (pictures_BD,) = clip.embed_pictures(pictures(3), batch_size=3)
    for vectors_BD in (pictures_BD, clip.embed_texts(CAPTIONS)):
        torch.testing.assert_close(vectors_BD.norm(dim=-1), torch.ones(len(vectors_BD)))


def test_a_mean_of_nothing_is_refused(refusal_of: Refusal) -> None:
    assert "no pictures" in refusal_of(lambda: mean_clip_score([]))


def test_what_is_no_clip_is_refused(tmp_path: Path, refusal_of: Refusal) -> None:
    dumb = save_clip(tmp_path / "dumb")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dumb / name).unlink()
    reasons = {"": "none given", str(save_vit(tmp_path / "vit")): "of type vit", str(dumb): "no tokenizer"}
    for name, reason in reasons.items():
        message = refusal_of(lambda name=name: load_clip(name, device=CPU))  # type: ignore[misc]
        assert message.startswith("CLIP model")
        assert reason in message
