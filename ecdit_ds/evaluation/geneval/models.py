"""The two models that GenEval asks: an object detector, and a CLIP that names colours (Ghosh et al. 2310.11513).

The paper's detector is a Mask2Former, which draws masks: only the object is shown to CLIP, the rest is grey. Any
detector of `transformers` does; one that gives boxes alone shows CLIP the box with its background.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
)

from ecdit_ds.errors import EvaluationError
from ecdit_ds.evaluation.clip import Clip
from ecdit_ds.evaluation.geneval.prompts import canonical_class
from ecdit_ds.evaluation.geneval.rules import (
    COLOURS,
    PUBLISHED,
    DetectedObject,
    GenevalPrompt,
    GenevalRules,
    JudgedPicture,
    judge_geneval,
)
from ecdit_ds.evaluation.pretrained import chunks, in_batches, load_image_processor, load_model, read_config

_PURPOSE = "object detector"
_BACKGROUND = "#999"
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
_CROPS_AT_ONCE = 16
_READ = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
"""Outputs that objects are read from."""


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A frozen object detector or instance segmentation model."""

    model: Any
    processor: Any
    class_names: tuple[str, ...]
    """What it can find, in GenEval's words."""
    has_masks: bool
    device: torch.device

    def detect(
        self, pictures: Iterable[Image.Image], *, batch_size: int, confidence: float
    ) -> Iterator[list[list[DetectedObject]]]:
        """Yield, `batch_size` pictures at a time, in order, each one's objects that are surer than `confidence`."""
        find = self._find_masks if self.has_masks else self._find_boxes
        return in_batches(
            pictures,
            self.processor,
            lambda inputs, shown: find(inputs, [(one.height, one.width) for one in shown], confidence),
            batch_size=batch_size,
            device=self.device,
        )

    def _find_boxes(
        self, inputs: dict[str, Tensor], sizes: list[tuple[int, int]], confidence: float
    ) -> list[list[DetectedObject]]:
        outputs = self._ask(inputs)
        results = self.processor.post_process_object_detection(outputs, threshold=confidence, target_sizes=sizes)
        return [
            [
                DetectedObject(class_name=self._name(label), score=score, box=tuple(box))
                for score, label, box in zip(
                    one["scores"].tolist(), one["labels"].tolist(), one["boxes"].tolist(), strict=True
                )
            ]
            for one in results
        ]

    def _find_masks(
        self, inputs: dict[str, Tensor], sizes: list[tuple[int, int]], confidence: float
    ) -> list[list[DetectedObject]]:
        outputs = self._ask(inputs)
        results = self.processor.post_process_instance_segmentation(
            outputs, threshold=confidence, target_sizes=sizes, return_binary_maps=True
        )
        found = []
        for one in results:
            infos = one["segments_info"]
            masks = one["segmentation"].cpu().numpy().astype(bool) if infos else []  # a map of -1 where there are none
            found.append(
                [
                    DetectedObject(
                        class_name=self._name(info["label_id"]), score=info["score"], box=box_of(mask), mask=mask
                    )
                    for info, mask in zip(infos, masks, strict=True)
                ]
            )
        return found

    def _ask(self, inputs: dict[str, Tensor]) -> Any:
        """Return the model's output; of NaN it would be read that there is no object."""
        outputs = self.model(**inputs)
        read = [found for name in _READ if (found := getattr(outputs, name, None)) is not None]
        if not all(bool(found.isfinite().all()) for found in read):
            raise EvaluationError(f"{_PURPOSE}: what it finds is not finite; it overflows or is damaged")
        return outputs

    def _name(self, label: int) -> str:
        return canonical_class(self.model.config.id2label[label])


def load_detector(name: str, *, device: torch.device) -> Detector:
    """Load a detector of `transformers` from a folder, or by the hub name of a model in the local cache.

    Raises:
        EvaluationError: no name, no such model, no image processor, weights missing, or a model that finds no objects.
    """
    config = read_config(name, purpose=_PURPOSE)
    architecture = (config.architectures or ["a model of unknown architecture"])[0]
    processor = load_image_processor(name, purpose=_PURPOSE)
    if architecture.endswith("ForObjectDetection"):
        auto_class, post_process = AutoModelForObjectDetection, "post_process_object_detection"
    elif architecture.endswith("ForUniversalSegmentation"):
        auto_class, post_process = AutoModelForUniversalSegmentation, "post_process_instance_segmentation"
    elif architecture.endswith("ForInstanceSegmentation"):
        auto_class, post_process = AutoModelForInstanceSegmentation, "post_process_instance_segmentation"
    else:
        raise EvaluationError(f"{_PURPOSE} {name}: {architecture} finds no objects; give a detector or Mask2Former")
    has_masks = post_process == "post_process_instance_segmentation"
    does = getattr(processor, post_process, None)
    if does is None or (has_masks and "return_binary_maps" not in inspect.signature(does).parameters):
        raise EvaluationError(
            f"{_PURPOSE} {name}: {type(processor).__name__} does not turn {architecture}'s output into single objects; "
            "give another detector, such as Mask2Former"
        )
    model, _ = load_model(auto_class, name, purpose=_PURPOSE, device=device)
    names = dict.fromkeys(canonical_class(label) for label in config.id2label.values() if label != "N/A")
    return Detector(model=model, processor=processor, class_names=tuple(names), has_masks=has_masks, device=device)


@dataclass(frozen=True, kw_only=True)
class ColourNamer:
    """Names the colour of an object as the closest of ten captions' means, by CLIP."""

    clip: Clip
    _captions: dict[str, Tensor] = field(default_factory=dict)
    """By class, (colours, D): encoded once."""

    def colours_of(self, picture: Image.Image, objects: Sequence[DetectedObject]) -> list[str]:
        """Return one of COLOURS for each object of the picture."""
        names: list[str] = []
        shown = picture.convert("RGB")
        crops = (crop_of(shown, one) for one in objects)
        for vectors_BD, chunk in zip(
            self.clip.embed_pictures(crops, batch_size=_CROPS_AT_ONCE), chunks(objects, _CROPS_AT_ONCE), strict=True
        ):
            captions = torch.stack([self._captions_of(one.class_name) for one in chunk])
            closest_B = torch.einsum("bd,bcd->bc", vectors_BD, captions).argmax(dim=1)
            names += [COLOURS[i] for i in closest_B.tolist()]
        return names

    def _captions_of(self, class_name: str) -> Tensor:
        """Return (colours, D): for each colour the mean of its templates' unit vectors, of unit length again."""
        if class_name not in self._captions:
            texts = [template.format(colour=colour, name=class_name) for colour in COLOURS for template in _TEMPLATES]
            vectors = self.clip.embed_texts(texts).unflatten(0, (len(COLOURS), len(_TEMPLATES)))
            self._captions[class_name] = normalize(vectors.mean(dim=1), dim=-1)
        return self._captions[class_name]


def crop_of(picture: Image.Image, one: DetectedObject) -> Image.Image:
    """Return the object's box of a picture in RGB, at least one pixel each way; grey around the mask, if it has one."""
    if one.mask is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, _BACKGROUND), Image.fromarray(one.mask))
    left, top, right, bottom = (round(edge) for edge in one.box)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of a mask that is not empty; right and bottom are the first pixels outside."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def judge_pictures(
    pictures: Iterable[tuple[Image.Image, GenevalPrompt]],
    detector: Detector,
    namer: ColourNamer,
    *,
    batch_size: int,
    rules: GenevalRules = PUBLISHED,
) -> Iterator[JudgedPicture]:
    """Yield the verdict on each picture, in order; what ranks find in their parts is put together by chaining."""
    confidence = min(rules.confidence, rules.counting_confidence)
    for chunk in chunks(pictures, batch_size):
        shown = [picture for picture, _ in chunk]
        (found,) = detector.detect(shown, batch_size=batch_size, confidence=confidence)
        for (picture, prompt), objects in zip(chunk, found, strict=True):
            yield JudgedPicture(
                prompt=prompt, verdict=judge_geneval(objects, _colours_in(picture, namer), prompt, rules)
            )


def _colours_in(picture: Image.Image, namer: ColourNamer) -> Callable[[Sequence[DetectedObject]], list[str]]:
    return lambda objects: namer.colours_of(picture, objects)
