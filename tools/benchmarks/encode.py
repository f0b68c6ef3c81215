"""`bench.py encode`: what share of encoding a corpus is spent outside the encoders.

Photographs that come with scikit-learn are cut, turned and written as JPEG files; a random AutoencoderKL and a random
T5 are made on the spot and saved as their makers' are. `encode_corpus` then does all it does for a user. The share is
the wall-clock time in which neither encoder runs: what is done beside them costs nothing.
"""

import argparse
import json
import os
import shutil
import statistics
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from tqdm import tqdm

from ecdit_ds.data.encoders.base import ImageEncoder, TextEmbeddings, TextEncoder
from ecdit_ds.data.encoders.spec import image_encoder_spec, text_encoder_spec
from ecdit_ds.data.latents.columns import DTYPES, LatentStats, to_table
from ecdit_ds.data.latents.shard_writer import write_arrow_shard
from ecdit_ds.data.precompute.job import PrecomputeJob, encode_corpus
from ecdit_ds.data.precompute.unit import EncodeSettings
from ecdit_ds.data.sources.images import decode_image, fit_image, to_tensor
from ecdit_ds.data.sources.open import open_source
from ecdit_ds.errors import ConfigError
from ecdit_ds.files.durable import put_on_disk
from ecdit_ds.files.provenance import describe_run
from tools.benchmarks.flags import add_report, check_folder, positive

AIM = 0.1
SIDE, QUALITY = (512, 640), 90
"""Height and width of the JPEG files, and their quality."""
TOKENS, TEXT_WIDTH, TEXT_LAYERS = 77, 512, 6
"""Size of the T5, between T5-small and T5-base."""
_LETTERS = string.ascii_lowercase + string.digits + ".,"
_FULL: dict[str, Any] = {"images": 128, "rounds": 3, "size": 256, "width": 32}
_QUICK: dict[str, Any] = {"images": 8, "rounds": 1, "size": 64, "width": 8}

HELP = """\
Encode --images photographs of 640 x 512 pixels (JPEG, quality 90, captions beside them) at --size x --size, with a
random AutoencoderKL (8 pixels a latent pixel, 4 channels, the first of four widths is --width; Stable Diffusion's is
128) and a random T5 encoder (6 layers of width 512, 77 tokens), in bf16 on disk, through encode_corpus.

"outside" is the share of the wall-clock time in which no encoder runs; the aim is less than 10 %. What is done
outside is also timed by itself, image by image and in one thread: what the share would be without doing it beside."""


@dataclass
class Clock:
    """Seconds that encoders took."""

    seconds: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work; add its time."""
        began = time.perf_counter()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return result


@dataclass(frozen=True, kw_only=True)
class TimedImages:
    """An `ImageEncoder` under a clock."""

    inner: ImageEncoder
    clock: Clock

    @property
    def identity(self) -> str:
        """Name of the encoder's weights."""
        return self.inner.identity

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along a side."""
        return self.inner.downsampling

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode, and add the time."""
        latents_BCHW: Tensor = self.clock.time("image encoder", lambda: self.inner.encode(images_B3HW))
        return latents_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Decode."""
        return self.inner.decode(latents_BCHW)


@dataclass(frozen=True, kw_only=True)
class TimedTexts:
    """A `TextEncoder` under a clock; its tokenizer counts as outside."""

    inner: TextEncoder
    clock: Clock

    @property
    def identity(self) -> str:
        """Name of the encoder's weights."""
        return self.inner.identity

    @property
    def embed_dim(self) -> int:
        """Width of its vectors."""
        return self.inner.embed_dim

    @property
    def max_tokens(self) -> int:
        """Longest text, in tokens."""
        return self.inner.max_tokens

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Count; no part of encoding."""
        return self.inner.count_tokens(captions)

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Encode, and add the time."""
        text: TextEmbeddings = self.clock.time("text encoder", lambda: self.inner.encode(captions))
        return text

    def null(self) -> TextEmbeddings:
        """Return the text of no text."""
        return self.inner.null()


def add_encode(commands: Any) -> None:
    """Add the command's flags."""
    encode = commands.add_parser(
        "encode", help="encoding a corpus", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_report(encode, "of the whole corpus (default 3)")
    encode.add_argument("--images", type=positive, help="default 128")
    encode.add_argument("--size", type=positive, help="side of the encoded square, a multiple of 8 (default 256)")
    encode.add_argument("--width", type=positive, help="of the autoencoder's first layer (default 32)")
    encode.add_argument("--batch-size", type=positive, default=16, help="images encoded at a time (default 16)")
    encode.add_argument("--threads", type=positive, help="that decode images (default: as many as cores)")
    encode.add_argument("--folder", type=Path, default=Path(), help="where all is written (default: here)")
    encode.set_defaults(
        run=run_encode,
        check=_check,
        full_sizes=_FULL,
        quick_sizes=_QUICK,
        tokens=[],
        device="cpu",
        dtype="fp32",
    )


def _check(options: argparse.Namespace) -> None:
    check_folder(options.folder)
    for name in ("size", "width"):
        if getattr(options, name) % 8:
            raise ConfigError(f"--{name} {getattr(options, name)}: is no multiple of 8")


def run_encode(options: argparse.Namespace) -> None:
    """Measure, print, and write the rows as JSON when asked."""
    folder = Path(options.folder) / f"bench-encode-{os.getpid()}"
    threads = options.threads or len(os.sched_getaffinity(0))
    folder.mkdir()
    try:
        write_photographs(folder / "photographs", options.images)
        encoders = make_encoders(folder, options.width)
        rounds = []
        for turn in tqdm(range(options.rounds), unit="round", disable=None, leave=False):
            rounds.append(measure(folder, f"set{turn}", encoders, options, threads))
        parts = parts_outside(folder, encoders, options)
    finally:
        shutil.rmtree(folder)
    row = to_row(rounds, options.images) | {"parts_ms_an_image": parts}
    print("\n".join(row_lines(row, threads)))
    if options.json:
        meta = describe_run(torch.device("cpu"), ("torch", "diffusers", "transformers", "pillow", "datasets"))
        meta |= {name: getattr(options, name) for name in ("images", "size", "width", "batch_size", "rounds")}
        meta |= {"threads": threads, "torch_threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({"meta": meta, "rows": [row]}, indent=1) + "\n")


def write_photographs(folder: Path, count: int) -> None:
    """Write different cuts of two photographs, turned a little, with captions beside them."""
    folder.mkdir()
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = np.random.default_rng(0)
    for i in range(count):
        picture = photographs[i % len(photographs)].rotate(float(draw.uniform(-5, 5)), Image.Resampling.BICUBIC)
        left, top = (int(draw.integers(0, side // 8)) for side in picture.size)
        cut = picture.crop((left, top, left + picture.width * 7 // 8, top + picture.height * 7 // 8))
        cut.resize(SIDE[::-1], Image.Resampling.BICUBIC).save(folder / f"{i:05d}.jpg", quality=QUALITY)
        (folder / f"{i:05d}.txt").write_text(f"cut {i} of a photograph, turned a little", encoding="ascii")


def make_encoders(folder: Path, width: int) -> tuple[ImageEncoder, TextEncoder]:
    """Make and save an autoencoder and a T5 with random weights, and load them as a user's."""
    from diffusers import AutoencoderKL  # which takes seconds, as the others do
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    from ecdit_ds.data.encoders.pretrained import load_image_encoder, load_text_encoder

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        norm_num_groups=8,
        layers_per_block=2,
    ).save_pretrained(folder / "vae")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in _LETTERS)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "t5")
    T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=TEXT_WIDTH,
            d_kv=64,
            num_heads=TEXT_WIDTH // 64,
            d_ff=4 * TEXT_WIDTH,
            num_layers=TEXT_LAYERS,
            decoder_start_token_id=0,
        )
    ).save_pretrained(folder / "t5")
    return load_image_encoder(str(folder / "vae")), load_text_encoder([str(folder / "t5")], max_tokens=TOKENS)


def measure(
    folder: Path, name: str, encoders: tuple[ImageEncoder, TextEncoder], options: argparse.Namespace, threads: int
) -> dict[str, float]:
    """Encode the corpus once; return the seconds of each encoder, and of all."""
    clock = Clock()
    images, texts = TimedImages(inner=encoders[0], clock=clock), TimedTexts(inner=encoders[1], clock=clock)
    job = PrecomputeJob(
        source=open_source(str(folder / "photographs"), unit_samples=options.images),
        destination=folder / name,
        encoding=EncodeSettings(
            image_encoder=images,
            text_encoder=texts,
            sizes=((options.size, options.size),),
            dtype="bfloat16",
            batch_size=options.batch_size,
            threads=threads,
        ),
        image_facts=image_encoder_spec(encoders[0], str(folder / "vae")),
        text_facts=text_encoder_spec(encoders[1], [str(folder / "t5")]),
        settings={},
    )
    began = time.perf_counter()
    report = encode_corpus(job)
    whole = time.perf_counter() - began
    assert report is not None and report["samples"] == options.images and not report["left_out"], report
    return clock.seconds | {"all": whole}


def parts_outside(
    folder: Path, encoders: tuple[ImageEncoder, TextEncoder], options: argparse.Namespace
) -> dict[str, float]:
    """Return what is done outside the encoders, in ms an image, one after the other in one thread."""
    clock, count = Clock(), min(options.batch_size, options.images)
    files = sorted((folder / "photographs").glob("*.jpg"))[:count]
    captions = [path.with_suffix(".txt").read_text() for path in files]
    contents = clock.time("read", lambda: [path.read_bytes() for path in files])
    decoded = clock.time("decode", lambda: [decode_image(content, "") for content in contents])
    size = (options.size, options.size)
    cut = clock.time("cut and resample", lambda: [fit_image(image, size) for image in decoded])
    clock.time("count tokens", lambda: [encoders[1].count_tokens([caption]) for caption in captions])
    images_B3HW = clock.time("to tensor", lambda: to_tensor(cut))
    with torch.no_grad():
        latents_BCHW, text = encoders[0].encode(images_B3HW), encoders[1].encode(captions)

    def rows() -> Any:
        LatentStats.of(latents_BCHW)
        return to_table(
            keys=captions,
            captions=captions,
            kinds=[""] * count,
            latents_BCHW=latents_BCHW,
            text=text,
            dtype=DTYPES["bfloat16"],
        )

    table = clock.time("to rows", rows)
    clock.time("write, checksum, fsync", lambda: write_arrow_shard(folder / "shard.arrow", [table]))
    clock.time("fsync again", lambda: put_on_disk(folder / "shard.arrow"))
    return {name: 1e3 * seconds / count for name, seconds in clock.seconds.items()}


def to_row(rounds: list[dict[str, float]], images: int) -> dict[str, Any]:
    """Return medians over rounds, and the share of each round's time in which no encoder ran."""
    shares = [1 - (one["image encoder"] + one["text encoder"]) / one["all"] for one in rounds]
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {
        "case": "encode",
        "images": images,
        "seconds": median["all"],
        "images_per_second": images / median["all"],
        "image_encoder_ms_an_image": 1e3 * median["image encoder"] / images,
        "text_encoder_ms_an_image": 1e3 * median["text encoder"] / images,
        "outside": statistics.median(shares),
        "outside_spread": [min(shares), max(shares)],
    }


def row_lines(row: dict[str, Any], threads: int) -> list[str]:
    """Return what a person reads."""
    low, high = row["outside_spread"]
    parts = row["parts_ms_an_image"]
    return [
        f"{row['images']} images in {row['seconds']:.1f} s, {row['images_per_second']:.1f} a second; encoders "
        f"{row['image_encoder_ms_an_image']:.1f} + {row['text_encoder_ms_an_image']:.1f} ms an image",
        f"outside the encoders {row['outside']:.1%} of the time [{low:.1%}, {high:.1%}] (aim {AIM:.0%}), with "
        f"{threads} threads that decode",
        f"ms an image, one after the other: {', '.join(f'{name} {ms:.2f}' for name, ms in parts.items())}",
    ]
