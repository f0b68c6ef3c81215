"""Encode pictures with captions into a training set, once:  python tools/encode_data.py COMMAND ...

    encode SRC DST    SRC through both encoders into DST
    inspect DIR       what is in a set, whether it is whole, and a sheet of its pictures

SRC is a folder of pictures with captions beside them (a.jpg, a.txt) or in its metadata.csv or metadata.jsonl; a .csv,
.tsv or .jsonl that names pictures; a .parquet file or a folder of them; a WebDataset .tar or a folder of them; a
dataset that save_to_disk wrote; or a dataset's name on the Hugging Face hub.

Work is done in DST.partial and renamed when the last unit is done. Interrupted or killed, the same command goes on
where it was. Several tasks share the work: --task 0/4 to 3/4, or a Slurm array, or the ranks of a launcher, or both.
What is left out is counted by its cause; more than --max-bad of all samples, and nothing is published.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from ecdit_ds.data.encoders.base import RAW_PIXELS, HashedWordEncoder, ImageEncoder, TextEncoder
from ecdit_ds.data.encoders.from_recipe import place_of
from ecdit_ds.data.encoders.pretrained import DEFAULT_TOKENS, PRECISIONS, load_image_encoder, load_text_encoder
from ecdit_ds.data.encoders.spec import image_encoder_spec, open_image_encoder, text_encoder_spec
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.data.latents.index import LatentIndex, read_index
from ecdit_ds.data.normalization import warning_of
from ecdit_ds.data.precompute.job import PrecomputeJob, encode_corpus
from ecdit_ds.data.precompute.unit import EncodeSettings
from ecdit_ds.data.sources.base import CHOICES, Captions, Columns
from ecdit_ds.data.sources.images import Size, buckets_of
from ecdit_ds.data.sources.open import open_source
from ecdit_ds.errors import ConfigError, DataError, EcditError, ExitCode, escape_unprintable, exit_code_of
from ecdit_ds.inference.figures import save_grid
from ecdit_ds.inference.images import to_uint8
from ecdit_ds.inference.text_to_image import require_finite
from ecdit_ds.slurm.array_task import task_of
from ecdit_ds.slurm.completion import ARRAY_TASK, mark_complete, mark_ended
from tools.command_line import OneLineParser

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
WORD_WIDTH, WORD_TOKENS = 128, 64
SHEET_COLUMNS = 6
MAX_SIZE = 8192
"""Pixels of a side; a batch of such pictures is gigabytes already."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = OneLineParser(
        prog="tools/encode_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    encode = commands.add_parser("encode", help="make a set")
    encode.add_argument("source", metavar="SRC")
    encode.add_argument("destination", type=Path, metavar="DST", help="must not exist; DST.partial until it is whole")
    add = encode.add_argument
    add("--vae", metavar="DIR", help="AutoencoderKL of diffusers: folder or hub name (default: pixels are latents)")
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="DIR",
        help="T5, CLIP or other text model of transformers; several are joined (default: embedded words)",
    )
    add(
        "--text-tokens",
        type=_positive,
        metavar="N",
        help=f"longest caption (default: {DEFAULT_TOKENS}, embedded: {WORD_TOKENS})",
    )
    add("--text-width", type=_positive, metavar="N", help=f"of embedded words (default: {WORD_WIDTH})")
    for flag in ("--vae-precision", "--text-precision"):
        add(flag, choices=PRECISIONS, default="fp32", help="what the encoder computes in (default: fp32)")
    add(
        "--captions-only",
        action="store_true",
        help="store no text vectors: training encodes captions itself, beside each step",
    )
    add("--image-column", metavar="NAME", help="of a table, or the suffix in a tar, such as depth.png")
    add("--caption-column", metavar="NAME", help="of a table, or the suffix or else the JSON field in a tar")
    add(
        "--captions",
        choices=CHOICES,
        help="which of several: in a list, on lines of a text file, in rows of one picture in a list "
        "(default: the first of a list, all lines as one)",
    )
    add("--caption-seed", type=int, metavar="N", help="of --captions random (default: 0)")
    add("--split", help="of a Hugging Face dataset (default: train)")
    add("--images", type=Path, metavar="DIR", help="what paths in a list are relative to (default: its folder)")
    add("--size", type=_positive, default=256, metavar="PIXELS", help="side of the square (default: 256)")
    add(
        "--min-size",
        type=_positive,
        metavar="PIXELS",
        help="leave out pictures with a side shorter than this (default: enlarge them)",
    )
    add("--buckets", action="store_true", help="keep proportions: several sizes of the square's area")
    add(
        "--patch",
        type=_positive,
        default=2,
        metavar="N",
        help="the model's patch_size, which sides are multiples of (default: 2)",
    )
    add("--dtype", choices=DTYPES, default="bf16", help="on disk (default: bf16)")
    add("--max-bad", type=float, default=0.05, metavar="SHARE", help="of samples left out (default: 0.05)")
    add(
        "--accept-cut-archives",
        action="store_true",
        help="publish although tars end early or cannot be read: how much is lost is not known",
    )
    add("--shard-samples", type=_positive, default=4096, metavar="N", help="of a unit of work (default: 4096)")
    add("--batch-size", type=_positive, default=32, metavar="N", help="of the encoders (default: 32)")
    add("--task", metavar="I/N", help="do every N-th unit from the I-th, from 0 (default: Slurm's array, or the rank)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    encode.set_defaults(run=_encode)
    inspect = commands.add_parser("inspect", help="look into a set")
    inspect.add_argument("folder", type=Path, metavar="DIR")
    inspect.add_argument("--vae", metavar="DIR", help="where its autoencoder is now, if not where it was")
    inspect.add_argument("--sheet", type=Path, metavar="PNG", help="of its pictures (default: DIR.png)")
    inspect.add_argument("--count", type=_positive, default=24, metavar="N", help="of pictures (default: 24)")
    inspect.set_defaults(run=_inspect)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and turn what a user can get wrong into one line; return the exit code."""
    try:
        options = parse_arguments(arguments)
        return int(options.run(options))
    except EcditError as error:
        print(f"error: {error}", file=sys.stderr)
        mark_ended(exit_code_of(error))
        return ExitCode.USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        return ExitCode.INTERRUPTED


def _encode(options: argparse.Namespace) -> int:
    task, tasks = task_of(options.task, os.environ, are_ranks_tasks=True)
    if not 0 <= options.max_bad <= 1:
        raise ConfigError(f"--max-bad {options.max_bad}: is a share, from 0 to 1")
    _check_places(options.source, options.destination)
    device = _device(options.device)
    if options.caption_seed is not None and options.captions != "random":
        raise ConfigError(f"--caption-seed {options.caption_seed}: has no effect without --captions random")
    captions = Captions(choice=options.captions, seed=options.caption_seed or 0)
    source = open_source(
        options.source,
        unit_samples=options.shard_samples,
        split=options.split,
        images=options.images,
        columns=Columns(image=options.image_column, caption=options.caption_column, captions=captions),
    )
    image_encoder, text_encoder = _encoders(options, device)
    job = PrecomputeJob(
        source=source,
        destination=options.destination.absolute(),
        encoding=EncodeSettings(
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            sizes=_sizes(options, image_encoder),
            dtype=DTYPES[options.dtype],
            batch_size=options.batch_size,
            threads=len(os.sched_getaffinity(0)),
            has_text=not options.captions_only,
            min_size=options.min_size or 0,
        ),
        image_facts=image_encoder_spec(image_encoder, options.vae and place_of(options.vae)),
        text_facts=text_encoder_spec(text_encoder, [place_of(name) for name in options.text]),
        settings={
            "shard_samples": options.shard_samples,
            "image_column": options.image_column,
            "caption_column": options.caption_column,
            "min_size": options.min_size,
            "captions": options.captions,
            "caption_seed": captions.seed or None,
        },
        task=task,
        tasks=tasks,
        max_bad=options.max_bad,
        accepts_cut=options.accept_cut_archives,
    )
    report = encode_corpus(job)
    if report is None:
        print(f"task {task}/{tasks} is done; other tasks have units left, and the last one publishes {job.destination}")
    else:
        _tell(report, job.destination)
        _warn(job.destination, read_index(job.destination))
    mark_complete(ARRAY_TASK)
    return ExitCode.DONE


def _check_places(source: str, destination: Path) -> None:
    """Refuse a set within its own source, where it would be read as a part of it the next time."""
    place = Path(source).resolve()
    if place.is_dir() and destination.resolve().is_relative_to(place):
        raise ConfigError(f"{destination}: is within the source {source}; name a place outside it")


def _device(name: str) -> torch.device:
    """Return a device that is there; of several GPUs the launcher's, where none is named.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"--device {name}: cannot be used ({cause}); choose cpu, or cuda where there is one"
        ) from None
    return device


def _encoders(options: argparse.Namespace, device: torch.device) -> tuple[ImageEncoder, TextEncoder]:
    if options.text and options.text_width:
        raise ConfigError(f"--text-width {options.text_width}: is of embedded words, and --text has a width of its own")
    for flag, precision, name in (
        ("--vae", options.vae_precision, options.vae),
        ("--text", options.text_precision, options.text),
    ):
        if precision != "fp32" and not name:
            raise ConfigError(f"{flag}-precision {precision}: has no effect without {flag}; leave it out")
    image: ImageEncoder = RAW_PIXELS
    if options.vae:
        image = load_image_encoder(options.vae, device=device, precision=options.vae_precision)
    if options.text:
        return image, load_text_encoder(
            options.text,
            max_tokens=options.text_tokens or DEFAULT_TOKENS,
            device=device,
            precision=options.text_precision,
        )
    words = HashedWordEncoder(embed_dim=options.text_width or WORD_WIDTH, max_tokens=options.text_tokens or WORD_TOKENS)
    return image, words


def _sizes(options: argparse.Namespace, encoder: ImageEncoder) -> tuple[Size, ...]:
    if options.size > MAX_SIZE:
        raise ConfigError(f"--size {options.size}: is more than {MAX_SIZE} pixels a side; choose a smaller one")
    unit = options.patch * encoder.downsampling
    if options.size % unit:
        raise ConfigError(
            f"--size {options.size}: is not a multiple of {unit}, which a patch covers (--patch {options.patch} x "
            f"{encoder.downsampling} pixels a latent); the nearest is {max(1, round(options.size / unit)) * unit}"
        )
    if options.buckets:
        return buckets_of(options.size**2, options.patch, encoder.downsampling)
    return ((options.size, options.size),)


def _tell(report: Mapping[str, Any], destination: Path) -> None:
    print(f"{destination}: {report['samples']} samples, {report['left_out']} left out")
    for cause, facts in report["causes"].items():
        shown = ", ".join(facts["names"][:3]) + (", ..." if facts["count"] > 3 else "")
        print(escape_unprintable(f"  {facts['count']:>8}  {cause}: {shown}"))
    for name, count in report["converted"].items():
        size = " x ".join(map(str, report["smallest_enlarged"])) if name == "enlarged" else ""
        print(f"  {count:>8}  converted: {name}" + (f", the smallest from {size} (--min-size)" if size else ""))
    for suffix, count in report["ignored_files"].items():
        print(escape_unprintable(f"  {count:>8}  files not looked at: {suffix}"))


def _warn(folder: Path, index: LatentIndex) -> None:
    """Say whether latents are far from what noise is; pixels are normalised by those who read them."""
    is_of_pixels = index.image_encoder.get("kind") == "pixels"
    warning = None if index.holds_pixels else warning_of(index.moments, is_of_pixels=is_of_pixels)
    if warning:
        print(f"warning: {folder}: {warning}", file=sys.stderr)


def _inspect(options: argparse.Namespace) -> int:
    """Print what a set holds, verify it whole, and draw some of its pictures."""
    index = read_index(options.folder)
    print(
        f"{options.folder}: {index.count} samples, {sum(shard.bytes for shard in index.shards) / 2**20:.1f} MiB in "
        f"{len(index.shards)} shards, {index.latents_dtype}"
    )
    print(escape_unprintable(f"images  {index.image_encoder['identity']}"))
    stored = "" if index.has_text else ", not stored: captions are encoded beside training"
    texts = f"texts   {index.text_encoder['identity']}: {index.text_shape[0]} tokens x {index.text_shape[1]}{stored}"
    print(escape_unprintable(texts))
    for i, bucket in enumerate(index.buckets):
        count = sum(shard.count for shard in index.shards if shard.bucket == i)
        print(f"bucket  {' x '.join(map(str, bucket))}: {count} samples")
    what = "pixels" if index.holds_pixels else "latents"
    for name, values in (("mean", index.latents_mean), ("std", index.latents_std)):
        print(f"{what:<7} {name:<5} {' '.join(f'{value:.3f}' for value in values)}")
    if index.holds_pixels:
        print("        training normalises them by the training sets' mean and deviation")
    _warn(options.folder, index)
    dataset = LatentDataset(options.folder)
    print("checks  every size and checksum holds")
    sheet = options.sheet or options.folder.with_name(options.folder.name + ".png")
    encoder = open_image_encoder(index.image_encoder, name=options.vae)
    images, captions = [], []
    for i in np.unique(np.linspace(0, index.count - 1, options.count).round().astype(np.int64)):
        sample = dataset[int(i)]
        image_13HW = encoder.decode(sample.latents_CHW[None])
        require_finite("pictures", image_13HW, [sample.caption], "latents or the decoder are damaged, or it overflows")
        images.append(to_uint8(image_13HW)[0])
        captions.append(sample.caption)
    try:
        save_grid(images, captions, min(SHEET_COLUMNS, len(images)), sheet)
    except OSError as error:
        raise DataError(f"{sheet}: cannot be written ({error.strerror}); name another place by --sheet") from None
    print(f"sheet   {sheet}")
    return ExitCode.DONE


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
