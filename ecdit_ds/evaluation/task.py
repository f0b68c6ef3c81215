"""An evaluation's surroundings: what is scored, by which processes, and the folder that keeps its work."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from ecdit_ds.data.encoders.base import ImageEncoder, TextEncoder
from ecdit_ds.errors import ConfigError, DataError, NonFiniteError
from ecdit_ds.files.durable import replace_durably
from ecdit_ds.files.provenance import describe_run
from ecdit_ds.inference.image_folder import (
    GeneratedImage,
    ImageRequest,
    generate_to_folder,
    image_folder_digest,
    read_gallery,
    shares_routing_pool,
)
from ecdit_ds.inference.jsonl_shards import ResultTable, Row, map_resumable
from ecdit_ds.inference.load import ModelCheckpoint, open_encoders, open_model
from ecdit_ds.inference.options import brush_for, encoder_folders, generation_metadata, load_for, origin_of
from ecdit_ds.inference.ranks import DistributedContext, init_ranks
from ecdit_ds.inference.text_to_image import TextToImage

_PACKAGES = ("torch", "numpy", "scikit-learn", "torchmetrics", "transformers")
DRAWING = (
    "steps",
    "sampler",
    "eta",
    "guidance",
    "guidance_interval",
    "negative_prompt",
    "capacity_factor",
    "height",
    "width",
)
"""Flags that change pictures."""
_OF_MODEL = ("weights", "vae", "text", "device_map", "offload_folder")
_SETTINGS_NAME = "evaluation.json"
_RESULTS_NAME = "results.json"
_VERDICTS_NAME = "verdicts.jsonl"
_DRAWN_NAME = "drawn"
_WORK = (_RESULTS_NAME, "verdicts.", _DRAWN_NAME)
"""How names of what is worth keeping begin."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """One evaluation: whose pictures, by whom, and where its files go."""

    options: argparse.Namespace
    crew: DistributedContext
    stored: ModelCheckpoint | None
    """None where a folder of pictures is scored."""
    folder: Path

    def bar(self, total: int, unit: str) -> "tqdm[Any]":
        """Return a progress bar, which the first process shows to a terminal."""
        return tqdm(total=total, unit=unit, disable=not (self.crew.is_rank0 and sys.stderr.isatty()))

    def facts(self) -> dict[str, Any]:
        """Return what is scored, pictures with a digest of what they are of.

        Raises:
            DataError: the given folder is none of tools/sample.py.
        """
        if self.stored is None:
            folder = self.options.pictures
            read_gallery(folder)
            return {"pictures": f"{folder.resolve().name} {image_folder_digest(folder)}"}
        facts = generation_metadata(self.stored, self.options)
        return facts | (
            {"batch_size": self.options.batch_size} if shares_routing_pool(self.stored.recipe.model) else {}
        )

    def drawer(self) -> TextToImage:
        """Return this process's model."""
        return load_for(self.crew, self.options)

    def encoders(self, drawer: TextToImage) -> tuple[ImageEncoder, TextEncoder]:
        """Return the drawer's encoders on this process's device."""
        if self.stored is None or self.crew.device.type == "cpu":
            return drawer.image_encoder, drawer.text_encoder
        image_encoder, text_encoder, _ = open_encoders(
            self.stored, encoder_folders(self.options), device=self.crew.device
        )
        return image_encoder, text_encoder

    def draw(self, jobs: Sequence[ImageRequest]) -> tuple[Path, list[GeneratedImage]]:
        """Draw pictures of `jobs`, or read the given folder's; return the folder and its pictures, in order.

        Raises:
            DataError: the given folder is none of tools/sample.py.
        """
        if self.stored is None:
            return self.options.pictures, self.crew.world.run_on_all(partial(read_gallery, self.options.pictures))
        folder = self.folder / _DRAWN_NAME
        brush = brush_for(self.drawer(), self.options)
        if self.crew.is_rank0:
            print(f"drawing {len(jobs)} pictures in {folder}", flush=True)
        with self.bar(len(jobs), "picture") as bar:
            return folder, generate_to_folder(
                folder, jobs, brush, self.facts() | origin_of(self.stored), self.crew, bar.update
            )

    def finish(self, settings: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the results: those that the folder holds, or else those of `work`, which are written.

        Args:
            settings: all that the results depend on, besides what is scored; JSON values.
            work: gives the results.

        Raises:
            DataError: the folder is of an evaluation with other settings.
            NonFiniteError: a result is not finite; it is not written.
        """
        world, metric = self.crew.world, self.options.metric
        settings = json.loads(json.dumps({"metric": metric} | world.run_on_all(self.facts) | settings))
        results = world.on_rank0(partial(_claim, self.folder, settings))
        if results is not None:
            _require_finite(results, f"{self.folder / _RESULTS_NAME}: delete it, and it is worked out again")
        else:
            results = work()
            _require_finite(results, "nothing is written; the model overflows or is damaged")
            told = {"metric": metric, "results": results, "settings": settings}
            world.on_rank0(
                lambda: _write(self.folder / _RESULTS_NAME, told | describe_run(self.crew.device, _PACKAGES))
            )
        if self.crew.is_rank0:
            print(f"results in {self.folder / _RESULTS_NAME}")
        return results

    def judge(
        self, count: int, work: Callable[[Sequence[int]], Iterator[Row]], is_whole: Callable[[Row], bool]
    ) -> dict[int, Row]:
        """Return one verdict a picture, those that are kept from before and new ones; `is_whole` as `ResultTable`'s."""
        ledger = ResultTable(path=self.folder / _VERDICTS_NAME, is_whole=is_whole)
        with self.bar(count, "verdict") as bar:
            size = self.options.batch_size
            return map_resumable(ledger, count, work, self.crew, batch_size=size, advance=bar.update)


def evaluation_run(options: argparse.Namespace, *for_drawing: str) -> EvaluationRun:
    """Return the evaluation that the command line asks for.

    Args:
        options: the command line.
        for_drawing: names of this metric's flags that have no effect on pictures that are there.

    Raises:
        EcditError: not exactly one thing to score, it cannot be opened, or a flag has no effect on it.
    """
    pictures: Any = getattr(options, "pictures", None)
    if (options.checkpoint is None) == (pictures is None):
        raise ConfigError("--checkpoint, --pictures: give one of them")
    for name in (*DRAWING, *_OF_MODEL, *for_drawing) if pictures is not None else ():
        if getattr(options, name) is not None:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag}: has no effect on --pictures, which are drawn already; leave it out")
    stored = None if options.checkpoint is None else open_model(options.checkpoint, options.weights)
    name = f"{stored.recipe.name}_step_{stored.step}" if stored else Path(pictures).resolve().name
    folder = options.output or Path("evaluation") / name / options.metric
    require_counts(("--batch-size", options.batch_size))
    crew = init_ranks(options.tp, options.ep)
    if stored is not None:
        options.checkpoint = crew.world.share(stored.folder)[0]  # a run that is training may save a newer one meanwhile
    return EvaluationRun(options=options, crew=crew, stored=stored, folder=folder)


def digest_of(jobs: Sequence[ImageRequest | GeneratedImage]) -> str:
    """Return a name of prompts with their seeds, in order."""
    told = json.dumps([[job.prompt, job.seed] for job in jobs])
    return xxhash.xxh3_64_hexdigest(told.encode())


def _claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder this evaluation's, and return the results if it is finished."""
    path = folder / _SETTINGS_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Settings alone are of an evaluation that ended before it had begun, as with a flag that cannot work.
        if not any(found.name.startswith(_WORK) for found in folder.iterdir()):
            _write(path, settings)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}; choose another --output") from None
    held = _read(path)
    for name in (*settings, *held):
        if held.get(name) != settings.get(name):
            raise DataError(
                f"{folder}: holds an evaluation with {name} {held.get(name)!r}, now it is {settings.get(name)!r}; "
                "choose another --output"
            )
    results = folder / _RESULTS_NAME
    if not results.exists():
        return None
    found = _read(results).get("results")
    if not isinstance(found, dict):
        raise DataError(f"{results}: holds no results; delete it, and they are worked out again")
    return found


def _require_finite(results: dict[str, Any], way_out: str) -> None:
    if bad := [place for place, value in _numbers(results, "") if not math.isfinite(value)]:
        raise NonFiniteError(f"results: {', '.join(bad)} not finite; {way_out}")


def _numbers(found: Any, place: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested JSON, with their places."""
    if isinstance(found, dict | list):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from _numbers(value, f"{place}.{key}" if place else str(key))
    elif isinstance(found, int | float):
        yield place, found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        told = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({told}); choose another --output") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds {type(content).__name__}, not an object; choose another --output")
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    with writing(path):
        replace_durably(path, (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell in one line what cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None


def told(indices: Iterable[int], advance: Callable[[int], object]) -> Iterator[int]:
    """Yield the indices, and tell of each."""
    for index in indices:
        advance(1)
        yield index


def require_counts(*given: tuple[str, int | None]) -> None:
    """Refuse flags that ask for none of something; None is a flag that was left out."""
    for name, value in given:
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is none; give 1 or more")
