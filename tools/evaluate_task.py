"""An evaluation's surroundings: what is scored, by which processes, and the folder that keeps its work."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ecdit_ds.crew import Crew, join_crew
from ecdit_ds.drawing import TextToImage
from ecdit_ds.durable import replace_durably
from ecdit_ds.errors import ConfigError, DataError
from ecdit_ds.gallery import Job, Picture, fill, gallery_identity, read_gallery
from ecdit_ds.ledger import Ledger, Row, work_through
from ecdit_ds.loading import StoredModel, open_model
from tools.bench_report import describe_run
from tools.sample import brush_for, facts_of, load_for

_PACKAGES = ("torch", "numpy", "scikit-learn", "torchmetrics", "transformers")
_SETTINGS_NAME = "evaluation.json"
_RESULTS_NAME = "results.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One evaluation: whose pictures, by whom, and where its files go."""

    options: argparse.Namespace
    crew: Crew
    stored: StoredModel | None
    """None where a folder of pictures is scored."""
    folder: Path

    def bar(self, total: int, unit: str) -> "tqdm[Any]":
        """Return a progress bar, which the first process shows to a terminal."""
        return tqdm(total=total, unit=unit, disable=not (self.crew.is_first and sys.stderr.isatty()))

    def facts(self) -> dict[str, Any]:
        """Return what is scored."""
        if self.stored is None:
            return {"pictures": f"{self.options.pictures.resolve().name} {gallery_identity(self.options.pictures)}"}
        return facts_of(self.stored, self.options)

    def drawer(self) -> TextToImage:
        """Return this process's model."""
        return load_for(self.crew, self.options)

    def draw(self, jobs: Sequence[Job]) -> tuple[Path, list[Picture]]:
        """Draw pictures of `jobs`, or read the given folder's; return the folder and its pictures, in order.

        Raises:
            DataError: the given folder is none of tools/sample.py.
        """
        if self.stored is None:
            return self.options.pictures, self.crew.world.together(partial(read_gallery, self.options.pictures))
        folder = self.folder / "drawn"
        brush = brush_for(self.drawer(), self.options)
        with self.bar(len(jobs), "picture") as bar:
            return folder, fill(folder, jobs, brush, self.facts(), self.crew, bar.update)

    def finish(self, settings: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the results: those that the folder holds, or else those of `work`, which are written.

        Raises:
            DataError: the folder is of an evaluation with other settings.
        """
        settings = json.loads(json.dumps(self.facts() | settings))
        held = self.crew.world.on_first(partial(_claim, self.folder, settings))
        results = held or work()
        if self.crew.is_first:
            if held is None:
                _write(self.folder / _RESULTS_NAME, {
                    "metric": self.options.metric, "results": results, "settings": settings,
                    **describe_run(self.crew.device, _PACKAGES),
                })  # fmt: skip
            print(f"results in {self.folder / _RESULTS_NAME}")
        return results

    def judge(self, count: int, work: Callable[[Sequence[int]], Iterator[Row]]) -> dict[int, Row]:
        """Return one verdict a picture, those that are kept from before and new ones."""
        ledger = Ledger(path=self.folder / "verdicts.jsonl")
        with self.bar(count, "verdict") as bar:
            size = self.options.batch_size
            return work_through(ledger, count, work, self.crew, batch_size=size, advance=bar.update)


def task_of(options: argparse.Namespace) -> Task:
    """Return the evaluation that the command line asks for.

    Raises:
        EcditError: not exactly one thing to score, or it cannot be opened.
    """
    pictures: Any = getattr(options, "pictures", None)
    if (options.checkpoint is None) == (pictures is None):
        raise ConfigError("--checkpoint, --pictures: give one of them")
    stored = None if options.checkpoint is None else open_model(options.checkpoint, options.weights)
    name = f"{stored.recipe.name}_step_{stored.step}" if stored else Path(pictures).resolve().name
    folder = options.output or Path("evaluation") / name / options.metric
    require_counts(("--batch-size", options.batch_size))
    crew = join_crew(options.tp, options.ep)
    if stored is not None:
        options.checkpoint = crew.world.share(stored.folder)[0]  # a run that is training may save a newer one meanwhile
    return Task(options=options, crew=crew, stored=stored, folder=folder)


def _claim(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Make the folder this evaluation's, and return the results if it is finished."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _SETTINGS_NAME
        if not path.exists():
            _write(path, settings)
        held = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in held.keys() | settings.keys() if held.get(name) != settings.get(name)]
        if changed:
            name = sorted(changed)[0]
            raise DataError(
                f"{folder}: holds an evaluation with {name} {held.get(name)!r}, now it is {settings.get(name)!r}; "
                "choose another --output"
            )
        results = folder / _RESULTS_NAME
        found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: {getattr(error, 'strerror', None) or error}; choose another --output") from None
    return found.get("results")


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        replace_durably(path, (json.dumps(content, indent=2) + "\n").encode())
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
