"""Detectors and the namer of colours, tiny and random, from their folders to a summary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ecdit_ds.evaluation.clip import Clip, load_clip
from ecdit_ds.evaluation.features import load_feature_model
from ecdit_ds.evaluation.geneval.models import (
    ColourNamer,
    Detector,
    box_of,
    crop_of,
    judge_pictures,
    load_detector,
)
from ecdit_ds.evaluation.geneval.rules import (
    COLOURS,
    DetectedObject,
    GenevalPrompt,
    GenevalRules,
    Requirement,
    summarize,
)
from tests.helpers.tiny_judges import pictures, save_clip, save_mask2former, save_vit, save_yolos

Refusal = Callable[[Callable[[], object]], str]
CPU = torch.device("cpu")
MIXED = [
    *pictures(3),
    *pictures(2, "tall", height=90),
    pictures(1, "grey")[0].convert("L"),
    *pictures(2, "wide", width=99),
]


@pytest.fixture(scope="module", params=[save_yolos, save_mask2former], ids=["boxes", "masks"])
def detector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Return a detector of each kind."""
    return load_detector(str(request.param(tmp_path_factory.mktemp("detector"))), device=CPU)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """Return a tiny CLIP."""
    return load_clip(str(save_clip(tmp_path_factory.mktemp("clip"))), device=CPU)


def found_in(detector: Detector, shown: list[Image.Image], batch_size: int = 8) -> list[list[DetectedObject]]:
    """Return all objects of each picture, however unsure."""
    return [objects for batch in detector.detect(shown, batch_size=batch_size, confidence=0.0) for objects in batch]


def test_objects_have_names_scores_and_boxes_in_their_pictures(detector: Detector) -> None:
    assert detector.class_names == ("computer mouse", "cat", "tv")
    found = found_in(detector, MIXED)
    assert len(found) == len(MIXED)
    assert sum(map(len, found)) > 8
    assert {"computer mouse", "tv"} & {one.class_name for objects in found for one in objects}
    for picture, objects in zip(MIXED, found, strict=True):
        for one in objects:
            assert 0.0 <= one.score <= 1.0
            assert one.class_name in (*detector.class_names, "N/A")
            left, top, right, bottom = one.box
            assert left <= right
            assert top <= bottom
            assert (one.mask is not None) == detector.has_masks
            if one.mask is not None:
                assert (one.mask.shape, one.mask.dtype) == ((picture.height, picture.width), np.bool_)
                assert one.box == box_of(one.mask)


def test_boxes_are_in_pixels_of_the_picture_not_of_the_models_input(tmp_path: Path) -> None:
    detector = load_detector(str(save_yolos(tmp_path)), device=CPU)
    (picture,) = pictures(1)
    (objects,) = found_in(detector, [picture])
    with torch.no_grad():
        centres = detector.model(**detector.processor(images=picture, return_tensors="pt")).pred_boxes[0, :, :2]
    middles = torch.tensor([[(one.box[0] + one.box[2]) / 80, (one.box[1] + one.box[3]) / 60] for one in objects])
    torch.testing.assert_close(middles, centres)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_found_does_not_depend_on_the_other_pictures(detector: Detector, batch_size: int) -> None:
    together, cut = found_in(detector, MIXED), found_in(detector, MIXED, batch_size)
    assert [len(objects) for objects in cut] == [len(objects) for objects in together]
    for alone, other in zip(sum(cut, []), sum(together, []), strict=True):  # noqa: RUF017
        assert alone.class_name == other.class_name
        assert alone.score == pytest.approx(other.score, abs=1e-4)
        assert alone.box == pytest.approx(other.box, abs=1e-2)


def test_confidence_leaves_out_the_unsure(detector: Detector) -> None:
    everything = sorted(one.score for one in found_in(detector, MIXED[:1])[0])
    ((sure,),) = detector.detect(MIXED[:1], batch_size=1, confidence=(everything[-1] + everything[-2]) / 2)
    assert [one.score for one in sure] == everything[-1:]
    ((none,),) = [detector.detect(MIXED[:1], batch_size=1, confidence=1.0)]
    assert none == [[]]


def test_a_crop_shows_the_box_and_grey_around_the_mask() -> None:
    picture = Image.new("RGB", (8, 6), "#f00")
    mask = np.zeros((6, 8), dtype=bool)
    mask[2, 3:6] = mask[4, 3] = True
    assert box_of(mask) == (3.0, 2.0, 6.0, 5.0)
    masked = crop_of(picture, DetectedObject(class_name="cat", score=1.0, box=box_of(mask), mask=mask))
    red, grey = (255, 0, 0), (153, 153, 153)
    assert np.array(masked).tolist() == [
        [list(red)] * 3,
        [list(grey)] * 3,
        [list(red), list(grey), list(grey)],
    ]
    plain = crop_of(picture, DetectedObject(class_name="cat", score=1.0, box=(1.6, 0.4, 4.4, 3.6)))
    assert plain.size == (2, 4)
    assert plain.getpixel((0, 0)) == red
    thin = crop_of(picture, DetectedObject(class_name="cat", score=1.0, box=(2.1, 3.0, 2.2, 3.0)))
    assert thin.size == (1, 1)


def test_a_colour_is_that_of_the_closest_mean_of_three_captions(clip: Clip) -> None:
    shown = pictures(20, "coloured")
    objects = [DetectedObject(class_name="cat", score=1.0, box=(4, 4, 30, 28))] * 2
    names = []
    for picture in shown:
        found = ColourNamer(clip=clip).colours_of(picture, objects)
        assert found[0] == found[1]
        names.append(found[0])
    means = []
    for colour in COLOURS:
        vectors = clip.embed_texts(
            [f"a photo of a {colour} cat", f"a photo of a {colour}-colored cat", f"a photo of a {colour} object"]
        )
        means.append(vectors.mean(dim=0) / vectors.mean(dim=0).norm())
    crops = [picture.crop((4, 4, 30, 28)) for picture in shown]
    vectors = next(clip.embed_pictures(crops, batch_size=20))
    assert names == [COLOURS[i] for i in (vectors @ torch.stack(means).T).argmax(dim=1).tolist()]
    assert len(set(names)) > 1


def test_the_name_of_the_class_is_part_of_the_captions(clip: Clip) -> None:
    (picture,) = pictures(1)
    names = ["cat", "zebra", "tv", "a0", "wine glass", "Q~~~"]
    objects = [DetectedObject(class_name=name, score=1.0, box=(0, 0, 40, 30)) for name in names]
    one_by_one = [ColourNamer(clip=clip).colours_of(picture, [one])[0] for one in objects]
    assert ColourNamer(clip=clip).colours_of(picture, objects) == one_by_one
    assert len(set(one_by_one)) > 1


def test_more_objects_than_fit_a_batch_get_their_own_colours(clip: Clip) -> None:
    (picture,) = pictures(1)
    objects = [DetectedObject(class_name="cat", score=1.0, box=(i, i, i + 12, i + 9)) for i in range(18)]
    namer = ColourNamer(clip=clip)
    assert namer.colours_of(picture, objects) == [namer.colours_of(picture, [one])[0] for one in objects]
    assert namer.colours_of(picture, []) == []


def test_pictures_are_judged_from_end_to_end_and_alike_in_any_batches(detector: Detector, clip: Clip) -> None:
    namer = ColourNamer(clip=clip)
    seen = [{one.class_name for one in objects} for objects in found_in(detector, MIXED)]
    (first,) = pictures(1)
    name = sorted(seen[0])[0]
    (objects,) = found_in(detector, [first])
    surest = max((one for one in objects if one.class_name == name), key=lambda one: one.score)
    colour = namer.colours_of(first, [surest])[0]
    prompts = [
        GenevalPrompt(tag=tag, prompt=tag, include=(Requirement(class_name=name, count=count, colour=wanted),))
        for tag, count, wanted in (
            ("single_object", 1, None),
            ("counting", 17, None),
            ("colors", 1, colour),
            ("color_attr", 1, next(other for other in COLOURS if other != colour)),
        )
    ]
    rules = GenevalRules(confidence=0.0, counting_confidence=0.99)
    judged = list(judge_pictures([(first, p) for p in prompts], detector, namer, batch_size=3, rules=rules))
    assert [one.verdict.is_correct for one in judged] == [True, False, True, False]
    assert summarize(judged).score == 0.5
    pairs = [(picture, prompts[i % 4]) for i, picture in enumerate(MIXED)]
    together = list(judge_pictures(pairs, detector, namer, batch_size=8, rules=rules))
    parts = [list(judge_pictures(part, detector, namer, batch_size=2, rules=rules)) for part in (pairs[:5], pairs[5:])]
    assert parts[0] + parts[1] == together


def test_what_is_not_finite_is_no_picture_without_objects(
    detector: Detector, monkeypatch: pytest.MonkeyPatch, refusal_of: Refusal
) -> None:
    forward = detector.model.forward
    read = ("class_queries_logits", "masks_queries_logits") if detector.has_masks else ("logits", "pred_boxes")
    for name in read:

        def spoiled(*given: Any, name: str = name, **named: Any) -> Any:
            outputs = forward(*given, **named)
            outputs[name][-1, ..., -1] = torch.nan
            return outputs

        monkeypatch.setattr(detector.model, "forward", spoiled)
        assert "not finite" in refusal_of(lambda: found_in(detector, pictures(2)))


@pytest.mark.parametrize(("confidence", "counting", "asked"), [(0.3, 0.9, 0.3), (0.9, 0.2, 0.2)])
def test_a_detector_is_asked_for_all_that_any_rule_may_count(
    clip: Clip, confidence: float, counting: float, asked: float
) -> None:
    told: list[float] = []

    class Asked:
        def detect(self, shown: list[Image.Image], *, batch_size: int, confidence: float) -> object:
            told.append(confidence)
            yield [[] for _ in shown]

    prompt = GenevalPrompt(tag="counting", prompt="cats", include=(Requirement(class_name="cat", count=2),))
    rules = GenevalRules(confidence=confidence, counting_confidence=counting)
    pairs = [(picture, prompt) for picture in pictures(2)]
    list(judge_pictures(pairs, Asked(), ColourNamer(clip=clip), batch_size=2, rules=rules))  # type: ignore[arg-type]
    assert told == [asked]


def test_what_finds_no_objects_is_refused(tmp_path: Path, refusal_of: Refusal) -> None:
    vit = save_vit(tmp_path / "vit")
    headless = save_yolos(tmp_path / "headless")
    (headless / "model.safetensors").write_bytes((vit / "model.safetensors").read_bytes())
    reasons = {"": "none given", str(vit): "ViTModel finds no objects", str(headless): "they would be random"}
    for name, reason in reasons.items():
        message = refusal_of(lambda name=name: load_detector(name, device=CPU))  # type: ignore[misc]
        assert message.startswith("object detector")
        assert reason in message


EVIL = {
    "config.json": {
        "model_type": "novelty",
        "auto_map": {f"Auto{kind}": f"evil.{kind}" for kind in ("Config", "Model", "ModelForObjectDetection")},
    },
    "preprocessor_config.json": {
        "image_processor_type": "Novelty",
        "auto_map": {"AutoImageProcessor": "evil.ImageProcessor"},
    },
    "tokenizer_config.json": {
        "tokenizer_class": "Novelty",
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    },
}
"""File -> what makes transformers ask whether it may run the folder's code."""


@pytest.mark.parametrize("file", EVIL)
@pytest.mark.parametrize("judge", ["detector", "clip", "features"])
def test_no_code_of_a_judges_folder_is_run_whatever_standard_input_says(
    judge: str, file: str, tmp_path: Path, refusal_of: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, load = {
        "detector": (save_yolos, load_detector),
        "clip": (save_clip, load_clip),
        "features": (save_vit, load_feature_model),
    }[judge]
    folder = save(tmp_path / "judge")
    told = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(told | EVIL[file]))
    for stale in ("processor_config.json", "tokenizer.json") if file != "config.json" else ():
        (folder / stale).unlink(missing_ok=True)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    asked: list[str] = []

    def answer(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    reads_words = judge == "clip"
    if file == "tokenizer_config.json" and not reads_words:
        load(str(folder), device=CPU)
    else:
        assert str(folder) in refusal_of(lambda: load(str(folder), device=CPU))
    assert (asked, (tmp_path / "ran").exists()) == ([], False)


@pytest.mark.parametrize(
    ("file", "field", "value", "told"),
    [
        ("config.json", "num_hidden_layers", 10**7, "tells of 10000000 layers"),
        ("config.json", "intermediate_size", 4 * 10**8, "numbers, and its files hold"),
        ("preprocessor_config.json", "size", {"height": 60_000, "width": 60_000}, "pictures of 60000 pixels a side"),
        ("preprocessor_config.json", "image_mean", [1.0, 2.0], "has no image processor"),
    ],
)
def test_a_judge_that_would_take_all_memory_or_sees_no_picture_is_refused_in_one_line(
    file: str, field: str, value: object, told: str, tmp_path: Path, refusal_of: Refusal
) -> None:
    path = save_vit(tmp_path / "judge") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    message = refusal_of(lambda: load_feature_model(str(path.parent), device=CPU))
    assert str(path.parent) in message and told in message


def test_a_detectors_files_do_not_choose_what_is_fetched(
    tmp_path: Path, refusal_of: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of such a configuration transformers asks the hub whether it has the backbone, and reads it there."""
    folder = save_yolos(tmp_path / "detector")
    told = json.loads((folder / "config.json").read_text())
    changes = {
        "model_type": "detr",
        "architectures": ["DetrForObjectDetection"],
        "backbone": "somebody/backbone",
        "use_timm_backbone": False,
        "backbone_config": None,
    }
    (folder / "config.json").write_text(json.dumps(told | changes))
    sought: list[object] = []

    def seek(host: object, *_: object, **__: object) -> None:
        sought.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", seek)
    assert "somebody/backbone" in refusal_of(lambda: load_detector(str(folder), device=CPU))
    assert sought == []
