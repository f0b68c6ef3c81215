"""A folder of pictures: each drawn once, whoever is killed on the way, and told in one JSON line.

    settings.json       what all its pictures were drawn with
    pictures.jsonl      one line a picture: index, file, prompt, seed
    pictures/           the PNGs, in the size they were drawn

Pictures are drawn in fixed parts of the list, and a part that lacks one is drawn again as a whole, so neither the
number of processes nor an interruption changes a picture. Nor does sharing the parts out over folders, each of which
then holds some of the list's indices.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import SampleConfig
from ecdit_ds.data.sources.images import read_image
from ecdit_ds.errors import DataError
from ecdit_ds.files.durable import make_folders, plain_file, replace_durably
from ecdit_ds.inference.images import name_for_file, save_png, to_uint8
from ecdit_ds.inference.jsonl_shards import ResultTable, Row
from ecdit_ds.inference.prompts import require_words
from ecdit_ds.inference.ranks import DistributedContext
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.model.sharding import UNSHARDED, ShardIndex

SETTINGS_NAME = "settings.json"
LINES_NAME = "pictures.jsonl"
PICTURES_NAME = "pictures"
_PICTURE_FILES = "[0-9]" * 6 + "*_*.png*"
"""Also those that a kill left half written."""
_NO_SETTINGS = ("prompts", "scenes_per_kind")
"""Fields of a recipe's section `sample` that say what is drawn, not how."""
_ABSENT = "not set"
OF_SCENES = "trained_on_digit_scenes"
"""A note among the settings that changes no picture, so it is not compared; galleries of earlier releases lack it."""


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """A picture to draw."""

    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """A picture that was drawn; a line of pictures.jsonl."""

    index: int
    """Its job's place in the list."""
    file: str
    """Relative to the folder."""
    prompt: str
    seed: int

    def job(self) -> ImageRequest:
        """Return what it was drawn for."""
        return ImageRequest(prompt=self.prompt, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How a gallery is drawn."""

    drawer: TextToImage
    sample: SampleConfig
    batch_size: int
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None

    def draw(self, jobs: Sequence[ImageRequest]) -> np.ndarray:
        """Return (B, H, W, 3) uint8 pictures."""
        images = self.drawer.draw(
            [job.prompt for job in jobs],
            seeds=[job.seed for job in jobs],
            sample=self.sample,
            negative_prompts=None if self.negative_prompt is None else [self.negative_prompt] * len(jobs),
            height=self.height,
            width=self.width,
        )
        return to_uint8(images)


def generate_to_folder(
    folder: Path,
    jobs: Sequence[ImageRequest],
    brush: GenerationSettings,
    facts: dict[str, Any],
    crew: DistributedContext,
    advance: Callable[[int], object] = lambda _count: None,
    *,
    overwrite: bool = False,
    share: ShardIndex = UNSHARDED,
) -> list[GeneratedImage]:
    """Draw what the folder lacks, and return all its pictures in the order of `jobs`; every process calls this.

    Args:
        folder: made where missing; may hold an earlier, interrupted or finished part of the same work.
        jobs: what shall be in it, and in other shares' folders.
        brush: how to draw.
        facts: what else decides how a picture looks, such as which weights; JSON values.
        crew: the processes that share the work.
        advance: told how many of its pictures are there, at the start and after each part.
        overwrite: remove what the folder holds, once the prompts are known to be usable.
        share: which of the parts that `jobs` are drawn in are this folder's.

    Raises:
        DataError: the folder holds pictures of other prompts, seeds or settings, or cannot be written.
        NonFiniteError: of any process's pictures, on all; those of its part are not written.
    """
    told = _settings(brush, facts)
    parts = split_batches(len(jobs), brush.batch_size, share)
    wanted = {index: jobs[index] for part in parts for index in part}
    require_words([job.prompt for job in jobs])
    _check_prompts([*wanted.values()], brush, crew)
    if overwrite:
        crew.world.on_rank0(lambda: _writing(folder, lambda: remove_images(folder)))
    done = crew.world.on_rank0(lambda: _writing(folder, lambda: _open(folder, wanted, told)))
    missing = [part for part in parts if any(index not in done for index in part)]
    advance(len(wanted) - sum(map(len, missing)))
    for start in range(0, len(missing), crew.dp.count):
        # All draw each round, also who has nothing left: experts on other ranks wait for everybody's tokens.
        turn = missing[min(start + crew.dp.index, len(missing) - 1)]
        chosen = [jobs[index] for index in turn]
        chosen += [chosen[-1]] * (min(brush.batch_size, len(jobs)) - len(chosen))
        images = crew.world.run_on_all(partial(brush.draw, chosen))
        is_mine = crew.is_tp_leader and start + crew.dp.index < len(missing)
        # Together: who left alone would leave the others waiting.
        write = partial(_write, folder, crew.world.rank, turn if is_mine else range(0), jobs, images)
        crew.world.run_on_all(partial(_writing, folder, write))
        advance(sum(map(len, missing[start : start + crew.dp.count])))
    crew.world.on_rank0(_ledger(folder).merge)
    pictures = read_gallery(folder)
    if len(pictures) != len(wanted):
        raise DataError(
            f"{folder}: has {len(pictures)} of {len(wanted)} pictures, so another command drew into it at the same "
            "time; run this one again"
        )
    return pictures


def split_batches(count: int, batch_size: int, share: ShardIndex = UNSHARDED) -> list[range]:
    """Return the parts that `count` pictures are drawn in, of which a share has every `share.count`-th."""
    starts = range(0, count, batch_size)
    return [range(start, min(start + batch_size, count)) for start in starts[share.index :: share.count]]


def image_folder_digest(folder: Path) -> str:
    """Return a digest of the folder's list of images, independent of its path."""
    digest = xxhash.xxh3_64()
    for name in (SETTINGS_NAME, LINES_NAME):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def read_gallery(folder: Path) -> list[GeneratedImage]:
    """Return the pictures of a folder in their order.

    Raises:
        DataError: it is no such folder, a line is no picture's, or a picture is not there.
    """
    path = folder / LINES_NAME
    pictures = _pictures(_ledger(folder).rows())
    if not pictures:
        raise DataError(f"{path}: holds no pictures; draw some with tools/sample.py --output {folder}")
    for picture in pictures:
        if not (folder / picture.file).is_file():
            raise DataError(f"{path}: picture {picture.index} is not there ({picture.file}); draw the folder again")
    return pictures


def is_of_other_pictures(folder: Path) -> bool:
    """Return whether a folder says that its pictures are by a model that was trained on others than digit scenes.

    Raises:
        DataError: its settings cannot be read.
    """
    path = folder / SETTINGS_NAME
    if not path.exists():
        return False
    return _writing(folder, lambda: _json(plain_file(path).read_text(encoding="utf-8"), path)).get(OF_SCENES) is False


def read_picture(folder: Path, picture: GeneratedImage) -> Image.Image:
    """Return a picture of the folder, RGB.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_image(folder / picture.file)
    except DataError as error:
        raise DataError(f"{error}; delete it and draw the folder again") from None


def remove_images(folder: Path) -> None:
    """Remove what `generate_to_folder` made, the settings last, so that nothing passes for a newer drawing's."""
    _ledger(folder).clear()
    for pattern in (f"{PICTURES_NAME}/{_PICTURE_FILES}", SETTINGS_NAME):
        for path in folder.glob(pattern):
            path.unlink()


def shares_routing_pool(model: ModelConfig) -> bool:
    """Return whether pictures that are drawn together compete for experts, so that each depends on the others."""
    return model.ffn == "token_choice" or model.routing_pool != "image"


def _settings(brush: GenerationSettings, facts: dict[str, Any]) -> dict[str, Any]:
    """Return all that decides how a picture looks, as JSON gives it back."""
    told = (
        facts
        | asdict(brush.sample)
        | {
            "negative_prompt": brush.negative_prompt,
            "height": brush.height,
            "width": brush.width,
        }
    )
    if shares_routing_pool(brush.drawer.recipe.model):
        told["batch_size"] = brush.batch_size
    settings: dict[str, Any] = json.loads(json.dumps({name: told[name] for name in told if name not in _NO_SETTINGS}))
    return settings


def _check_prompts(jobs: Sequence[ImageRequest], brush: GenerationSettings, crew: DistributedContext) -> None:
    """Refuse on all ranks what one of them could not encode."""
    encoder = brush.drawer.text_encoder

    def check() -> None:
        own = [job.prompt for job in jobs[crew.dp.index :: crew.dp.count]]
        for start in range(0, len(own), brush.batch_size):
            encoder.encode(own[start : start + brush.batch_size])
        if brush.negative_prompt is not None:
            encoder.encode([brush.negative_prompt])

    crew.world.run_on_all(check)


def _open(folder: Path, wanted: Mapping[int, ImageRequest], told: dict[str, Any]) -> set[int]:
    """Return the indices that are drawn already, after checking that the folder is of the same work."""
    path = folder / SETTINGS_NAME
    if not path.exists():
        if _ledger(folder).is_there():
            raise DataError(
                f"{folder}: holds pictures, but no {SETTINGS_NAME} that says how they were drawn; choose another "
                "--output, or replace them with --overwrite"
            )
        make_folders(folder)
        replace_durably(path, (json.dumps(told, indent=2) + "\n").encode())
    held = _json(plain_file(path).read_text(encoding="utf-8"), path)
    compared = [name for name in (*told, *held) if name != OF_SCENES]
    if changed := [name for name in compared if held.get(name, _ABSENT) != told.get(name, _ABSENT)]:
        before, now = (settings.get(changed[0], _ABSENT) for settings in (held, told))
        raise DataError(
            f"{folder}: its pictures have {changed[0]} {before!r}, now it is {now!r}; "
            "choose another --output, or replace them with --overwrite"
        )
    pictures = _pictures(_ledger(folder).merge())
    for picture in pictures:
        if picture.job() != (job := wanted.get(picture.index)):
            raise DataError(
                f"{folder}: picture {picture.index} is of {picture.job()}, now {job or 'none'} is asked for; choose "
                "another --output, or replace them with --overwrite"
            )
    return {picture.index for picture in pictures if (folder / picture.file).is_file()}


def _write(folder: Path, rank: int, turn: range, jobs: Sequence[ImageRequest], images: np.ndarray) -> None:
    rows = []
    for index, image in zip(turn, images, strict=False):
        name = f"{PICTURES_NAME}/{index:06d}_{name_for_file(jobs[index].prompt)}.png"
        save_png(image, folder / name)
        rows.append({"index": index, "file": name, **asdict(jobs[index])})
    _ledger(folder).append(rank, rows)


def _ledger(folder: Path) -> ResultTable:
    return ResultTable(path=folder / LINES_NAME, is_whole=_is_picture)


def _is_picture(row: Row) -> bool:
    types = {field.name: int if field.name in ("index", "seed") else str for field in fields(GeneratedImage)}
    is_typed = all(type(row.get(name)) is kind for name, kind in types.items())
    return is_typed and not Path(row["file"]).is_absolute() and ".." not in Path(row["file"]).parts


def _pictures(rows: dict[int, Row]) -> list[GeneratedImage]:
    return [
        GeneratedImage(**{field.name: row[field.name] for field in fields(GeneratedImage)}) for row in rows.values()
    ]


def _json(text: str, where: object) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{where}: holds {type(data).__name__}, not an object")
    return data


def _writing(folder: Path, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (OSError, UnicodeDecodeError) as error:
        where = getattr(error, "filename", None) or folder
        raise DataError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
