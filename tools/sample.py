"""Draw pictures from a checkpoint:  python tools/sample.py --checkpoint runs/demo --prompt "a red seven"

Leaves in the output folder pictures/ (PNGs), pictures.jsonl (a line a picture: index, file, prompt, seed),
settings.json, samples.png (a captioned grid of the first ones) and, for expert choice without --height, --width and
--negative-prompt, routing.png: how many experts each patch of the first picture got, by layer, early, in the middle and
late. Killed and run again, it goes on.

On several processes:  deepspeed --num_gpus 4 tools/sample.py --tp 2 --checkpoint ... (pictures are shared out over what
--tp leaves; --ep spreads the experts over these).

In several jobs that know nothing of one another:  --task 0/4 to 3/4, or a Slurm array. Each draws every fourth batch of
the pictures, as it would be drawn without sharing, in OUTPUT/task_I_of_4.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from ecdit_ds.config.recipe import Recipe, SampleConfig
from ecdit_ds.errors import ConfigError, DataError, EcditError, exit_code_of
from ecdit_ds.inference.figures import save_grid
from ecdit_ds.inference.image_folder import (
    GeneratedImage,
    ImageRequest,
    generate_to_folder,
    read_picture,
    split_batches,
)
from ecdit_ds.inference.load import (
    WEIGHT_KINDS,
    open_model,
)
from ecdit_ds.inference.options import DTYPES, brush_for, generation_metadata, load_for, origin_of, require_batch
from ecdit_ds.inference.prompts import read_dataset_prompts, read_prompt_file
from ecdit_ds.inference.ranks import exit_process, init_ranks
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.interpret.heatmaps import compute_maps, save_compute_maps
from ecdit_ds.model.sharding import ShardIndex
from ecdit_ds.slurm.array_task import task_of
from ecdit_ds.slurm.completion import ARRAY_TASK, mark_complete, mark_ended
from tools.command_line import OneLineParser

_COLUMNS = 4


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = OneLineParser(
        prog="tools/sample.py",
        description="Draw pictures from a checkpoint.",
        epilog="Prompts and settings that are not given are the recipe's (its section `sample`). "
        "Picture i has seed S + i, unless a prompt file says otherwise. Run again to go on after an interruption.",
    )
    add_model_arguments(parser)
    what = parser.add_argument_group("what to draw (one of the first three)")
    what.add_argument("--prompt", action="append", nargs="+", default=[], metavar="TEXT", help="may be repeated")
    what.add_argument(
        "--prompts", type=Path, metavar="FILE", help='a prompt a line, or .jsonl lines {"prompt": ..., "seed": ...}'
    )
    what.add_argument(
        "--dataset", metavar="DIR|FILE|NAME", help="prompts from a column: a datasets folder, parquet, csv or json file"
    )
    what.add_argument("--column", default="caption", metavar="NAME", help="of --dataset (default: %(default)s)")
    what.add_argument("--split", default="train", metavar="NAME", help="of --dataset (default: %(default)s)")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    what.add_argument("--seed", type=int, default=0, metavar="S", help="of the first picture (default: %(default)s)")
    what.add_argument(
        "--images-per-prompt", type=int, default=1, metavar="N", help="of successive seeds (default: %(default)s)"
    )
    add_drawing_arguments(parser)
    out = parser.add_argument_group("where to")
    out.add_argument("--output", type=Path, default=Path("samples"), metavar="DIR", help="(default: samples)")
    out.add_argument(
        "--task",
        metavar="I/N",
        help="draw every N-th batch from the I-th, from 0, in DIR/task_I_of_N (default: Slurm's array, or all of them)",
    )
    out.add_argument("--overwrite", action="store_true", help="remove the pictures that --output holds, and draw anew")
    out.add_argument("--grid", type=int, default=32, metavar="N", help="pictures in samples.png (default: %(default)s)")
    return parser.parse_args(arguments)


def add_model_arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, with_device_map: bool = True
) -> None:
    """Add what says which model draws, on what."""
    model = parser.add_argument_group("which model")
    model.add_argument(
        "--checkpoint",
        type=Path,
        required=required,
        metavar="DIR",
        help="a checkpoint, a run's folder for its newest, or exported safetensors",
    )
    model.add_argument(
        "--weights", choices=WEIGHT_KINDS, help="averaged or last (default: ema, or what an export holds)"
    )
    model.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (default: %(default)s)")
    model.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (default: %(default)s)")
    model.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks (default: %(default)s)")
    add_encoder_arguments(model)
    model.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher appends it
    if not with_device_map:
        parser.set_defaults(device_map=None, max_memory=[], offload_folder=None)
        return
    model.add_argument(
        "--device-map",
        choices=("auto",),
        help="let accelerate spread a model that is larger than one device; 1 process",
    )
    model.add_argument(
        "--max-memory",
        action="append",
        default=[],
        metavar="DEVICE=SIZE",
        help="with --device-map, such as 0=70GiB or cpu=100GiB; may be repeated",
    )
    model.add_argument("--offload-folder", type=Path, metavar="DIR", help="with --device-map, for what fits nowhere")


def add_encoder_arguments(group: argparse._ActionsContainer) -> None:
    """Add where the frozen encoders of a checkpoint are now; others than it was trained through are refused."""
    group.add_argument("--vae", metavar="DIR", help="where the image autoencoder is now, if not where it was")
    group.add_argument("--text", nargs="+", metavar="DIR", help="the same of the text encoders, all of them")


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how pictures are drawn."""
    how = parser.add_argument_group("how to draw")
    how.add_argument("--steps", type=int, metavar="N", help="intervals of the time grid")
    how.add_argument("--sampler", metavar="NAME", help="euler, heun, dpmpp_2m or euler_ancestral (stochastic)")
    how.add_argument("--eta", type=float, metavar="X", help="share of noise that euler_ancestral renews")
    how.add_argument("--guidance", type=float, metavar="S", help="1 is none")
    how.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("T", "T"), help="times within which guidance acts, 0 to 1"
    )
    how.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: no text)")
    how.add_argument(
        "--capacity-factor", type=float, metavar="F", help="mean experts per token (default: as it was trained)"
    )
    how.add_argument("--height", type=int, metavar="PIXELS", help="of the picture (default: the recipe's)")
    how.add_argument("--width", type=int, metavar="PIXELS", help="of the picture (default: the recipe's)")
    how.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="pictures at a time (default: %(default)s)"
    )


def main() -> int:
    """Draw, and turn what a user can get wrong into one line; return the exit code."""
    try:
        draw(parse_arguments())
    except EcditError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        mark_ended(exit_code_of(error))
        return 2
    mark_complete(ARRAY_TASK)
    return 0


def draw(options: argparse.Namespace) -> None:
    """Draw what the command line asks for."""
    share = _share(options)
    stored = open_model(options.checkpoint, options.weights)
    jobs = _jobs(options, stored.recipe)
    count = sum(map(len, split_batches(len(jobs), options.batch_size, share)))
    crew = init_ranks(options.tp, options.ep)
    if not count:
        if crew.is_rank0:
            _tell_idle(len(jobs), options.batch_size, share)
        return
    options.checkpoint = crew.world.share(stored.folder)[0]  # a run that is training may save a newer one meanwhile
    drawer = load_for(crew, options)
    brush = brush_for(drawer, options)
    facts = generation_metadata(stored, options) | origin_of(stored)
    if crew.is_rank0:
        print(f"drawing {count} pictures in {options.output}", flush=True)
    with tqdm(total=count, unit="picture", disable=not (crew.is_rank0 and sys.stderr.isatty())) as bar:
        pictures = generate_to_folder(
            options.output, jobs, brush, facts, crew, bar.update, overwrite=options.overwrite, share=share
        )
    if crew.is_rank0:
        _show(options, pictures, drawer, brush.sample)


def _share(options: argparse.Namespace) -> ShardIndex:
    """Return which share of the pictures is drawn here, and give it a folder of its own if others draw the rest."""
    require_batch(options)
    task, tasks = task_of(options.task, os.environ, are_ranks_tasks=False)
    if tasks > 1:
        options.output = options.output / f"task_{task}_of_{tasks}"
    return ShardIndex(index=task, count=tasks)


def _tell_idle(count: int, batch_size: int, share: ShardIndex) -> None:
    batches = len(split_batches(count, batch_size))
    print(
        f"task {share.index}/{share.count} has nothing to draw: {count} pictures are {batches} batches of --batch-size "
        f"{batch_size}; a smaller one shares them out further"
    )


def _jobs(options: argparse.Namespace, recipe: Recipe) -> list[ImageRequest]:
    typed = [text for group in options.prompt for text in group]
    if sum(map(bool, (typed, options.prompts, options.dataset))) > 1:
        raise ConfigError("--prompt, --prompts and --dataset exclude one another; give one")
    if options.prompts is not None:
        prompts: Sequence[tuple[str, int | None]] = read_prompt_file(options.prompts)
    elif options.dataset is not None:
        prompts = [(text, None) for text in read_dataset_prompts(options.dataset, options.column, options.split)]
    else:
        prompts = [(text, None) for text in typed or recipe.sample.prompts]
    count = options.images_per_prompt
    if count < 1 or (options.limit is not None and options.limit < 1):
        raise ConfigError(f"--images-per-prompt {count}, --limit {options.limit}: draw nothing; give 1 or more")
    if options.grid < 1:
        raise ConfigError(f"--grid: {options.grid} pictures are none; give 1 or more")
    if not prompts:
        raise ConfigError("--prompt: none given, and the recipe's sample.prompts is empty; give one")
    for prompt, _ in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise DataError(f"prompt {prompt!a}: has halves of characters, so it is not UTF-8 text; correct it")
    jobs = []
    for i, (prompt, seed) in enumerate(prompts[: options.limit]):
        first = options.seed + i * count if seed is None else seed
        jobs += [ImageRequest(prompt=prompt, seed=first + n) for n in range(count)]
    return jobs


def _show(
    options: argparse.Namespace, pictures: Sequence[GeneratedImage], drawer: TextToImage, sample: SampleConfig
) -> None:
    """Write what people look at."""
    if options.overwrite:
        (options.output / "routing.png").unlink(missing_ok=True)
    shown = pictures[: options.grid]
    images = [np.asarray(read_picture(options.output, picture)) for picture in shown]
    save_grid(images, [picture.prompt for picture in shown], min(_COLUMNS, len(shown)), options.output / "samples.png")
    print(f"{len(pictures)} pictures in {options.output}/pictures, grid in {options.output / 'samples.png'}")
    # Maps are of a drawing in the recipe's size and away from no text.
    is_mapped = options.height is options.width is options.negative_prompt is None
    if drawer.recipe.model.ffn == "expert_choice" and options.tp == options.ep == 1 and is_mapped:
        maps = compute_maps(drawer, pictures[0].prompt, seed=pictures[0].seed, sample=sample)
        save_compute_maps(maps, pictures[0].prompt, options.output / "routing.png")
        print(f"experts per patch in {options.output / 'routing.png'}")


if __name__ == "__main__":
    exit_process(main())
