"""What each sub-command of tools/evaluate.py does."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from ecdit_ds.data.digit_scenes.dataset import require_digit_scenes
from ecdit_ds.data.digit_scenes.scenes import KINDS, Scene, SceneSpec, draw_scene, parse_caption
from ecdit_ds.data.encoders.online import online_encoders
from ecdit_ds.data.sources.base import kind_of_ignored
from ecdit_ds.data.sources.images import read_image
from ecdit_ds.data.splits import open_split, validate_split
from ecdit_ds.errors import ConfigError, DataError, EvaluationError
from ecdit_ds.evaluation.digit_scenes.checker import judge_scene as judge_scene
from ecdit_ds.evaluation.digit_scenes.detector import find_objects
from ecdit_ds.evaluation.digit_scenes.score import SceneScores, heldout_prompts, mismatched_specs, scores_of
from ecdit_ds.evaluation.heldout import heldout_loss, heldout_times
from ecdit_ds.evaluation.task import DRAWING, EvaluationRun, digest_of, evaluation_run, require_counts, told, writing
from ecdit_ds.inference.figures import save_grid
from ecdit_ds.inference.image_folder import (
    LINES_NAME,
    SETTINGS_NAME,
    GeneratedImage,
    ImageRequest,
    is_of_other_pictures,
    read_gallery,
    read_picture,
)
from ecdit_ds.inference.jsonl_shards import Row
from ecdit_ds.inference.load import ModelCheckpoint, open_encoders
from ecdit_ds.inference.prompts import read_prompt_file

_COLUMNS = 6
_SCENES_PER_KIND = 50
_PICTURES_TO_DRAW = 256
_WITHOUT_SCENES = "score it by fid, clip or geneval, with --prompts FILE and a folder of --real pictures"
_PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def loss(options: argparse.Namespace) -> None:
    """Held-out flow loss by time."""
    task = evaluation_run(options)
    assert task.stored is not None
    recipe = task.stored.recipe
    require_counts(("--times", options.times), ("--batch-size", options.batch_size), ("--samples", options.samples))
    if options.batch_size % recipe.model.routing_group:
        raise ConfigError(
            f"--batch-size: {options.batch_size} is no multiple of model.routing_group({recipe.model.routing_group})"
        )
    is_encoded = recipe.data.dataset == "encoded"
    if is_encoded and options.samples:
        raise ConfigError("--samples: has no effect with data.dataset: encoded, whose loss is over all held out")
    samples = validate_split(recipe, "heldout").count if is_encoded else options.samples or recipe.data.num_heldout
    data = dataclasses.replace(recipe.data, num_heldout=samples, cache_dir=options.cache_dir or recipe.data.cache_dir)

    def work() -> dict[str, Any]:
        drawer = task.drawer()
        open_set = partial(
            open_split, dataclasses.replace(recipe, data=data), "heldout", (drawer.image_encoder, drawer.text_encoder)
        )
        task.crew.world.on_rank0(lambda: open_set() and None)  # makes the set, where it is missing
        (held_out,), device = task.crew.world.run_on_all(open_set), task.crew.device
        beside = None if held_out.is_whole else online_encoders(*task.encoders(drawer), device)
        losses = heldout_loss(
            drawer.model,
            held_out,
            batch_size=options.batch_size,
            dp_rank=task.crew.dp.index,
            dp_size=task.crew.dp.count,
            device=device,
            total=task.crew.world.sum,
            num_times=options.times,
            finish=beside.finish if beside else None,
        )
        times = heldout_times(options.times).tolist()
        return {"mean": sum(losses) / len(losses), "by_time": [list(pair) for pair in zip(times, losses, strict=True)]}

    results = task.finish({"times": options.times, "samples": samples, "data_seed": data.seed}, work)
    if task.crew.is_rank0:
        print(f"{'t':>8}  loss")
        for time, value in results["by_time"]:
            print(f"{time:8.4f}  {value:.5f}")
        print(f"{'mean':>8}  {results['mean']:.5f}   ({samples} held-out samples)")


def scenes(options: argparse.Namespace) -> None:
    """Whether digit scenes show what their captions say."""
    require_counts(("--per-kind", options.per_kind))
    task = evaluation_run(options, "per_kind")
    per_kind = options.per_kind or _SCENES_PER_KIND
    real: list[Scene] = []
    if task.stored is None and is_of_other_pictures(options.pictures):
        by = f"only models of digit scenes draw them, and {SETTINGS_NAME} says that these are by another"
        raise DataError(f"--pictures {options.pictures}: {by}; {_WITHOUT_SCENES}")
    if task.stored is not None:
        height, width = _canvas(task.stored, options)
        seed = task.stored.recipe.data.seed
        real = heldout_prompts(seed=seed, canvas_height=height, canvas_width=width, per_kind=per_kind)
    jobs = [ImageRequest(prompt=scene.caption, seed=options.seed + i) for i, scene in enumerate(real)]

    def work() -> dict[str, Any]:
        folder, pictures = task.draw(jobs)
        claims = [_claim_of(folder, picture) for picture in pictures]
        others = mismatched_specs(claims)

        def verdicts(indices: Sequence[int]) -> Iterator[Row]:
            images = (np.asarray(read_picture(folder, pictures[i])) for i in indices)
            alike = groupby(images, key=np.shape)
            found = [objects for _, group in alike for objects in find_objects(np.stack(list(group)))]
            ideals = find_objects(np.stack([real[i].image_HWC for i in indices])) if real else None
            for place, i in enumerate(indices):
                own = judge_scene(claims[i], found[place])
                of = {"model": own, "chance": judge_scene(others[i], found[place])}
                of |= {"ceiling": judge_scene(claims[i], ideals[place])} if ideals else {}
                scores = {name: [verdict.is_correct, verdict.is_exact] for name, verdict in of.items()}
                yield {
                    "index": i,
                    "kind": claims[i].kind,
                    "prompt": pictures[i].prompt,
                    "file": pictures[i].file,
                    "reason": own.reason,
                    "scores": scores,
                }

        names = ("model", "ceiling", "chance") if real else ("model", "chance")
        rows = task.judge(len(pictures), verdicts, partial(_is_scene_verdict, names)).values()
        task.crew.world.on_rank0(lambda: _show_scenes(folder, pictures, rows, task.folder / "scenes.png"))
        return {name: _counted(rows, name).summary() for name in names}

    results = task.finish(({"per_kind": per_kind} if real else {}) | _drawing(task, jobs), work)
    if task.crew.is_rank0:
        print(scenes_table(results))


def scenes_table(results: Mapping[str, Any]) -> str:
    """Return scores by kind as text: model, exact, ceiling, chance, in per cent."""
    beside = [name for name in ("ceiling", "chance") if name in results]
    columns = [("model", "correct"), ("model", "exact"), *((name, "correct") for name in beside)]
    lines = [f"{'kind':>12}  {'shown':>6}  {'exact':>6}" + "".join(f"  {name:>7}" for name in beside)]
    for kind, score in results["model"]["kinds"].items():
        counts = [(results[name]["kinds"][kind], what) for name, what in columns]
        shares = [each[what] / each["count"] for each, what in counts]
        lines.append(
            f"{kind:>12}"
            + "".join(f"  {100 * x:6.1f}" for x in shares[:2])
            + "".join(f"  {100 * x:7.1f}" for x in shares[2:])
            + f"   of {score['count']}"
        )
    overall = [results["model"]["overall"], results["model"]["exact"], *(results[name]["overall"] for name in beside)]
    lines.append(
        f"{'mean':>12}"
        + "".join(f"  {100 * x:6.1f}" for x in overall[:2])
        + "".join(f"  {100 * x:7.1f}" for x in overall[2:])
        + f"   +- {100 * results['model']['standard_error']:.1f} (standard error of shown)"
    )
    return "\n".join(lines)


def _is_scene_verdict(names: Sequence[str], row: Row) -> bool:
    scores = row.get("scores")
    pairs = [scores.get(name) for name in names] if isinstance(scores, dict) else [None]
    are_pairs = all(isinstance(pair, list) and list(map(type, pair)) == [bool, bool] for pair in pairs)
    return row.get("kind") in KINDS and are_pairs


def _show_scenes(folder: Path, pictures: Sequence[GeneratedImage], rows: Iterable[Row], path: Path) -> None:
    """Write a grid of the first pictures of each kind, a row a kind, with verdicts; nothing is picked."""
    by_kind = [[row for row in rows if row["kind"] == kind] for kind in KINDS]
    marks = {True: "\u2713", False: "\u2717"}
    images, captions = [], []
    for of_kind in filter(None, by_kind):
        shown = of_kind[:_COLUMNS]
        images += [np.asarray(read_picture(folder, pictures[row["index"]])) for row in shown]
        captions += [f"{marks[row['scores']['model'][0]]} {pictures[row['index']].prompt}" for row in shown]
        images += [np.full_like(images[-1], 255)] * (_COLUMNS - len(shown))
        captions += [""] * (_COLUMNS - len(shown))
    with writing(path):
        save_grid(images, captions, _COLUMNS, path)


def _counted(rows: Iterable[Row], name: str) -> SceneScores:
    counts_K3 = np.zeros((len(KINDS), 3), dtype=np.int64)
    for row in rows:
        counts_K3[KINDS.index(row["kind"])] += (1, *row["scores"][name])
    return scores_of(counts_K3)


def _canvas(stored: ModelCheckpoint, options: argparse.Namespace) -> tuple[int, int]:
    recipe, what = stored.recipe, f"{options.metric}: held-out digit scenes"
    require_digit_scenes(recipe.data, recipe.model, stored.encoders, what, _WITHOUT_SCENES)
    pixels = open_encoders(stored)[0].downsampling
    return options.height or recipe.model.latent_height * pixels, options.width or recipe.model.latent_width * pixels


def fid(options: argparse.Namespace) -> None:
    """Frechet distance of pictures to real ones."""
    from ecdit_ds.evaluation.features import load_feature_model
    from ecdit_ds.evaluation.fid import frechet_distance, load_statistics, picture_statistics, save_statistics, shortage
    from ecdit_ds.evaluation.pretrained import revisions

    task = evaluation_run(options, "prompts", "limit")
    jobs = _caption_jobs(task)
    model = task.crew.world.run_on_all(partial(load_feature_model, options.features, device=task.crew.device))

    def statistics(count: int, read: Callable[[int], Image.Image]) -> Any:
        own = range(task.crew.dp.index, count, task.crew.dp.count) if task.crew.is_tp_leader else range(0)
        with task.bar(len(own), "picture") as bar:
            shown = (read(i) for i in told(own, bar.update))
            of_own = task.crew.world.run_on_all(lambda: picture_statistics(shown, model, batch_size=options.batch_size))
        return of_own.over_ranks(task.crew.world.sum)

    @cache
    def of_real() -> Any:
        if Path(options.real).suffix == ".safetensors":
            return task.crew.world.run_on_all(lambda: load_statistics(Path(options.real)))
        return statistics(*_real_pictures(task))

    def save_real() -> None:
        with writing(options.save_real):
            save_statistics(of_real(), options.save_real)

    if options.save_real is not None:
        of_real()  # by all
        task.crew.world.on_rank0(save_real)

    def work() -> dict[str, Any]:
        real = of_real()
        folder, pictures = task.draw(jobs)
        generated = statistics(len(pictures), lambda i: read_picture(folder, pictures[i]))
        for name, each in (("real pictures", real), ("generated pictures", generated)):
            if task.crew.is_rank0 and (warning := shortage(name, each)):
                print(f"warning: {warning}", file=sys.stderr)
        distance = frechet_distance(real, generated)
        return {
            "fid": distance,
            "pictures": generated.count,
            "real_pictures": real.count,
            "features": real.features,
            **revisions(features=options.features),
        }

    real = task.crew.world.on_rank0(partial(_real_identity, options.real))
    results = task.finish({"features": model.identity, "real": real} | _drawing(task, jobs), work)
    if task.crew.is_rank0:
        print(f"FID {results['fid']:.4f}   ({results['pictures']} pictures, {results['real_pictures']} real ones)")


def clip(options: argparse.Namespace) -> None:
    """CLIP score of pictures and their prompts."""
    from ecdit_ds.evaluation.clip import load_clip
    from ecdit_ds.evaluation.clip_score import clip_scores, is_score, mean_clip_score
    from ecdit_ds.evaluation.pretrained import model_fingerprint, revisions

    task = evaluation_run(options, "prompts", "limit")
    jobs = _caption_jobs(task)
    judge_scene = task.crew.world.run_on_all(partial(load_clip, options.clip, device=task.crew.device))

    def work() -> dict[str, Any]:
        folder, pictures = task.draw(jobs)

        def verdicts(indices: Sequence[int]) -> Iterator[Row]:
            pairs = ((read_picture(folder, pictures[i]), pictures[i].prompt) for i in indices)
            for i, score in zip(indices, clip_scores(pairs, judge_scene, batch_size=options.batch_size), strict=True):
                yield {"index": i, "prompt": pictures[i].prompt, "file": pictures[i].file, "score": score}

        rows = task.judge(len(pictures), verdicts, lambda row: is_score(row.get("score")))
        score = mean_clip_score([row["score"] for row in rows.values()])
        return {"clip_score": score, "pictures": len(rows), **revisions(clip=options.clip)}

    judges = {"clip": options.clip, "clip_identity": model_fingerprint(judge_scene.model, judge_scene.processor)}
    results = task.finish(judges | _drawing(task, jobs), work)
    if task.crew.is_rank0:
        print(f"CLIP score {results['clip_score']:.4f}   ({results['pictures']} pictures)")


def geneval(options: argparse.Namespace) -> None:
    """GenEval by its published rules."""
    from ecdit_ds.evaluation.clip import load_clip
    from ecdit_ds.evaluation.geneval.models import ColourNamer, judge_pictures, load_detector
    from ecdit_ds.evaluation.geneval.prompts import as_metadata, draw_prompts, read_prompts
    from ecdit_ds.evaluation.geneval.rules import TASKS, GenEvalVerdict, JudgedPicture, summarize
    from ecdit_ds.evaluation.pretrained import model_fingerprint, revisions

    count = options.images_per_prompt
    require_counts(("--images-per-prompt", count), ("--limit", options.limit))
    task = evaluation_run(options)
    detector = task.crew.world.run_on_all(partial(load_detector, options.detector, device=task.crew.device))
    namer = ColourNamer(clip=task.crew.world.run_on_all(partial(load_clip, options.clip, device=task.crew.device)))
    if options.metadata is not None:
        prompts = read_prompts(options.metadata, detector.class_names)
    else:
        prompts = draw_prompts(detector.class_names, seed=options.seed)
    wanted = [prompt for prompt in prompts[: options.limit] for _ in range(count)]
    jobs = [ImageRequest(prompt=prompt.prompt, seed=options.seed + i) for i, prompt in enumerate(wanted)]

    def work() -> dict[str, Any]:
        folder, pictures = task.draw(jobs)
        _require_match(folder, pictures, [job.prompt for job in jobs])

        def verdicts(indices: Sequence[int]) -> Iterator[Row]:
            shown = ((read_picture(folder, pictures[i]), wanted[i]) for i in indices)
            judged = judge_pictures(shown, detector, namer, batch_size=options.batch_size)
            for i, one in zip(indices, judged, strict=True):
                yield {
                    "index": i,
                    "tag": wanted[i].tag,
                    "prompt": wanted[i].prompt,
                    "file": pictures[i].file,
                    "correct": one.verdict.is_correct,
                    "reason": one.verdict.reason,
                }

        rows = task.judge(
            len(jobs), verdicts, lambda row: type(row.get("correct")) is bool and type(row.get("reason")) is str
        )
        summary = summarize(
            [
                JudgedPicture(prompt=wanted[i], verdict=GenEvalVerdict(is_correct=row["correct"], reason=row["reason"]))
                for i, row in rows.items()
            ]
        )
        return dataclasses.asdict(summary) | revisions(detector=options.detector, clip=options.clip)

    settings = {
        "detector": options.detector,
        "detector_identity": model_fingerprint(detector.model, detector.processor),
        "clip": options.clip,
        "clip_identity": model_fingerprint(namer.clip.model, namer.clip.processor),
        "metadata": xxhash.xxh3_64_hexdigest("\n".join(map(as_metadata, prompts)).encode()),
        "images_per_prompt": count,
        "limit": options.limit,
        "seed": options.seed,
        **_drawing(task, jobs),
    }
    results = task.finish(settings, work)
    if task.crew.is_rank0:
        for tag, score in results["tasks"].items():
            print(f"{tag:>14}  {100 * score['correct'] / score['pictures']:6.2f} %  of {score['pictures']}")
        print(f"{'GenEval':>14}  {100 * results['score']:6.2f} %  mean of the tasks")
        if lacking := [tag for tag in TASKS if tag not in results["tasks"]]:
            print(f"no picture was of {', '.join(lacking)}: this is not the score of all six tasks")


METRICS: dict[str, Callable[[argparse.Namespace], None]] = {
    "loss": loss,
    "scenes": scenes,
    "fid": fid,
    "clip": clip,
    "geneval": geneval,
}


def _drawing(task: EvaluationRun, jobs: Sequence[ImageRequest]) -> dict[str, Any]:
    """Return the settings that change pictures; none where pictures are given."""
    if task.stored is None:
        return {}
    flags = {name: getattr(task.options, name) for name in ("seed", *DRAWING)}
    return flags | {"prompts_digest": digest_of(jobs)}


def _claim_of(folder: Path, picture: GeneratedImage) -> SceneSpec:
    try:
        return parse_caption(picture.prompt)
    except DataError as error:
        raise DataError(f"{folder}: picture {picture.index} is of no digit scene: {error}") from None


def _caption_jobs(task: EvaluationRun) -> list[ImageRequest]:
    """Return what to draw for metrics that take any pictures."""
    if task.stored is None:
        return []
    options = task.options
    require_counts(("--limit", options.limit))
    limit = options.limit or _PICTURES_TO_DRAW
    if options.prompts is not None:
        prompts = read_prompt_file(options.prompts)[:limit]
    else:
        prompts = [(_heldout(task, i).caption, None) for i in range(limit)]
    return [ImageRequest(prompt=p, seed=options.seed + i if s is None else s) for i, (p, s) in enumerate(prompts)]


def _heldout(task: EvaluationRun, index: int) -> Scene:
    assert task.stored is not None
    height, width = _canvas(task.stored, task.options)
    return draw_scene(
        seed=task.stored.recipe.data.seed, split="heldout", index=index, canvas_height=height, canvas_width=width
    )


def _real_identity(real: str) -> str:
    """Return what changes with the real pictures: a file's content, or names, sizes and times of a folder's files."""
    path, digest = Path(real), xxhash.xxh3_64()
    if real == "heldout":
        return real
    try:
        if path.is_file():
            digest.update(path.read_bytes())
        for file in sorted(path.rglob("*")):
            found = file.stat()
            digest.update(f"{file.relative_to(path)} {found.st_size} {found.st_mtime_ns}\n".encode())
    except OSError as error:
        raise EvaluationError(f"--real {real}: cannot be read: {error.strerror or error}") from None
    return f"{path.resolve().name} {digest.hexdigest()}"


def _real_pictures(task: EvaluationRun) -> tuple[int, Callable[[int], Image.Image]]:
    """Return how many real pictures there are, and what reads one."""
    if task.options.real == "heldout":
        if task.stored is None:
            raise ConfigError("--real heldout: needs the recipe of a --checkpoint; give a folder of real pictures")
        count = task.stored.recipe.data.num_heldout
        return count, lambda i: Image.fromarray(_heldout(task, i).image_HWC)
    root = Path(task.options.real)
    if (root / LINES_NAME).is_file():  # and not the grids beside them
        pictures = read_gallery(root)
        return len(pictures), lambda i: read_picture(root, pictures[i])
    files = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in _PICTURE_ENDINGS and not kind_of_ignored(path.relative_to(root))
    )
    if not files:
        raise EvaluationError(f"--real {root}: holds no pictures ({', '.join(_PICTURE_ENDINGS)})")
    return len(files), lambda i: read_image(files[i])


def _require_match(folder: Path, pictures: Sequence[GeneratedImage], prompts: Sequence[str]) -> None:
    if len(pictures) != len(prompts):
        raise EvaluationError(
            f"{folder}: holds {len(pictures)} pictures, but the prompts ask for {len(prompts)}; draw it again, or set "
            "--images-per-prompt and --limit to what was drawn"
        )
    for picture, prompt in zip(pictures, prompts, strict=True):
        if picture.prompt != prompt:
            raise EvaluationError(
                f"{folder}: picture {picture.index} is of {picture.prompt!r}, the prompts say {prompt!r}; give the "
                "prompts that it was drawn from"
            )
