"""`bench.py loader`: reading encoded samples, beside the same bytes raw and `datasets` with its torch formatter.

A set of random numbers is written three times: as the project stores it, as one flat file whose rows are a sample's
bytes, and as an Arrow file of array columns that `datasets` reads. Every side reads the same samples in the same random
order, from the page cache (so the clock is the process's CPU time), into memory that is new for each batch, as that of
a batch handed to training must be.

Suffixes: B batch, C channels, H, W latent height and width, T text tokens, D text_embed_dim.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.errors import ConfigError
from ecdit_ds.files.provenance import describe_run
from tools.benchmarks.corpus import Corpus, Indices, write_corpus
from tools.benchmarks.flags import add_report, check_folder, positive, positive_number
from tools.benchmarks.report import rotated
from tools.benchmarks.step import step_time, way_lines, way_to_a_step, worker_row

RAW, ONE_CALL, SEQUENTIAL, OURS, OURS_FP32, FORMATTER = (
    "raw, a copy a row",
    "raw, one call",
    "raw, sequential",
    "ours",
    "ours, as fp32",
    "datasets, torch",
)
CHUNK_BYTES = 2**20
"""Bytes per call of sequential reading."""

HELP = """\
Time reading encoded samples of a recipe's shapes in random order (fp32 as digit scenes are, bf16 for recipes that
read encoded sets), all of it in the page cache, in one process of one thread,
by its CPU time:

  raw, a copy a row   one slice assignment a row, from a memory map of a flat file of the same bytes
  raw, one call       the same by one numpy.take a batch
  raw, sequential     the flat file from its start, in reads of 1 MiB
  ours                LatentDataset.gather, which is what a loader's worker does: tensors of their own, and captions
  ours, as fp32       and cast
  datasets, torch     the same numbers as Array3D and Array2D columns (float16 for bf16, which datasets does not have),
                      with_format("torch"), a batch of rows at a time; it gives fp32

Then with worker processes through the training loader, and the whole way to a training batch (noise, times, kept
tokens) against the time of a step: the demo's measured here (forward and backward alone), any other from the planner's
FLOPs at --utilization of an H100's peak, which is an estimate. "waits" is what training waits for a batch when it asks
for one every step: the loader's share of a step."""

_FULL: dict[str, Any] = {"gigabytes": 0.4, "rounds": 7}
_QUICK: dict[str, Any] = {"gigabytes": 0.04, "rounds": 2}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Seconds of every side, one a round; of a recipe."""

    samples: int
    """Read in each."""
    bytes_a_sample: int
    seconds: dict[str, list[float]] = field(default_factory=dict)


def add_loader(commands: Any) -> None:
    """Add the command's flags."""
    loader = commands.add_parser(
        "loader", help="reading encoded samples", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_report(loader, "of each side (default 7)")
    loader.add_argument(
        "--configs",
        nargs="+",
        default=["demo", "ecdit_xl_8e"],
        metavar="NAME|FILE",
        help="recipes whose shapes are read (default demo ecdit_xl_8e)",
    )
    loader.add_argument(
        "--micro-batch",
        type=positive,
        default=32,
        help="samples a batch, unless a recipe says so; of recipes that are measured here, the recipe's (default 32)",
    )
    loader.add_argument("--gigabytes", type=positive_number, help="size of each set (default 0.4)")
    loader.add_argument("--workers", type=positive, nargs="+", default=[1, 2], help="worker processes (default 1 2)")
    loader.add_argument("--utilization", type=positive_number, default=0.4, help="of the estimate's H100 (default 0.4)")
    loader.add_argument("--folder", type=Path, default=Path(), help="where sets are written (default: here)")
    loader.set_defaults(
        run=run_loader, check=_check, full_sizes=_FULL, quick_sizes=_QUICK, tokens=[], device="cpu", dtype="fp32"
    )


def _check(options: argparse.Namespace) -> None:
    """Check what can be checked before anything is written.

    Raises:
        ConfigError: a folder that cannot be written, no recipe, or a share above 1.
    """
    check_folder(options.folder)
    for name in options.configs:
        load_recipe(name)
    if options.utilization > 1:
        raise ConfigError(f"--utilization {options.utilization}: is a share of the peak, up to 1")


def run_loader(options: argparse.Namespace) -> None:
    """Measure every recipe, print, and write the rows as JSON when asked."""
    threads = torch.get_num_threads()
    rows, ways = [], []
    for name in options.configs:
        recipe = load_recipe(name)
        step = step_time(recipe, options.micro_batch, options.utilization)
        folder = Path(options.folder) / f"bench-loader-{os.getpid()}"
        folder.mkdir()
        torch.set_num_threads(1)
        try:
            corpus = write_corpus(folder, recipe, step.micro_batch_size, options.gigabytes)
            check_alike(corpus)
            fresh = to_rows(name, measure(corpus, options.rounds))
            fresh += [worker_row(name, corpus, workers, fresh) for workers in options.workers]
            print(
                f"{name}: {len(corpus.ours)} samples of {corpus.flat.shape[1]:,} bytes, {corpus.dtype}, batches of "
                f"{corpus.batch_size}"
            )
            print("\n".join(map(row_text, fresh)), flush=True)
            way = way_to_a_step(corpus, step, options.workers, options.rounds, threads) | {"case": name}
            print("\n".join(way_lines(way)), flush=True)
        finally:
            shutil.rmtree(folder)
            torch.set_num_threads(threads)
        rows += fresh
        ways.append(way)
    if options.json:
        meta = describe_run(torch.device("cpu"), ("torch", "numpy", "pyarrow", "datasets"))
        meta |= {"rounds": options.rounds, "threads": 1, "gigabytes": options.gigabytes}
        options.json.write_text(json.dumps({"meta": meta, "rows": rows, "steps": ways}, indent=1) + "\n")


def sides_of(corpus: Corpus) -> dict[str, Callable[[Indices], object]]:
    """Return how each side reads a batch; `raw, sequential` reads as many bytes, from where it was."""
    size = corpus.batch_size * corpus.flat.shape[1]

    def raw(indices: Indices) -> npt.NDArray[np.uint8]:
        batch = np.empty((len(indices), corpus.flat.shape[1]), dtype=np.uint8)
        for place, row in enumerate(indices.tolist()):
            batch[place] = corpus.flat[row]
        return batch

    def one_call(indices: Indices) -> npt.NDArray[np.uint8]:
        batch = np.empty((len(indices), corpus.flat.shape[1]), dtype=np.uint8)
        return np.take(corpus.flat, indices, axis=0, out=batch, mode="clip")  # any other mode copies twice

    def sequential(_: Indices) -> object:
        batch = np.empty(size, dtype=np.uint8).data
        for start in range(0, size, CHUNK_BYTES):
            file.readinto(batch[start : start + CHUNK_BYTES])
        if file.tell() + size > corpus.flat.size:
            file.seek(0)
        return batch

    file = corpus.flat_file.open("rb", buffering=0)
    return {
        RAW: raw,
        ONE_CALL: one_call,
        SEQUENTIAL: sequential,
        OURS: lambda indices: corpus.ours.gather(indices, indices),
        OURS_FP32: lambda indices: corpus.ours.gather(indices, indices).float(),
        FORMATTER: lambda indices: corpus.formatted[indices.tolist()],
    }


def check_alike(corpus: Corpus) -> None:
    """Check that all sides read the same samples."""
    sides, indices = sides_of(corpus), corpus.order()[0]
    ours: Any = sides[OURS](indices)
    for raw in (sides[RAW](indices), sides[ONE_CALL](indices)):
        columns = [ours.latents_BCHW, ours.text_embeds_BTD, ours.text_mask_BT, ours.text_pooled_BD]
        own = torch.cat([column.reshape(len(indices), -1).view(torch.uint8) for column in columns], dim=1)
        assert (own.numpy() == raw).all()
    as_fp32, formatted = ours.float(), sides[FORMATTER](indices)
    torch.testing.assert_close(as_fp32.latents_BCHW, formatted["latents"], rtol=0, atol=1e-6)  # type: ignore[index]
    torch.testing.assert_close(as_fp32.text_embeds_BTD, formatted["text_embeds"], rtol=0, atol=1e-6)  # type: ignore[index]
    assert list(ours.captions) == list(formatted["caption"])  # type: ignore[index]


def measure(corpus: Corpus, rounds: int) -> Result:
    """Time all sides, interleaved in rotating order; a first reading is thrown away."""
    sides, batches = sides_of(corpus), corpus.order()
    result = Result(samples=len(batches) * corpus.batch_size, bytes_a_sample=corpus.flat.shape[1])
    with tqdm(total=(rounds + 1) * len(sides), unit="reading", disable=None, leave=False) as bar:
        for turn in range(-1, rounds):
            for name in rotated(list(sides), max(turn, 0)):
                began = time.process_time()
                for indices in batches:
                    sides[name](indices)
                if turn >= 0:
                    result.seconds.setdefault(name, []).append(time.process_time() - began)
                bar.update()
    return result


def to_rows(case: str, result: Result) -> list[dict[str, Any]]:
    """Return a row a side; shares of the raw reading and ratios to the formatter are paired within rounds."""
    rows = []
    for side, seconds in result.seconds.items():
        of_raw = [raw / own for raw, own in zip(result.seconds[RAW], seconds, strict=True)]
        over = [peer / own for peer, own in zip(result.seconds[FORMATTER], seconds, strict=True)]
        rows.append(
            {
                "case": case,
                "side": side,
                "workers": 0,
                "samples_per_second": result.samples / statistics.median(seconds),
                "samples_per_second_per_core": result.samples / statistics.median(seconds),
                "samples_per_second_spread": [result.samples / max(seconds), result.samples / min(seconds)],
                "bytes_per_second": result.samples * result.bytes_a_sample / statistics.median(seconds),
                "of_raw": statistics.median(of_raw),
                "of_raw_spread": [min(of_raw), max(of_raw)],
                "over_formatter": statistics.median(over),
                "over_formatter_spread": [min(over), max(over)],
            }
        )
    return rows


def row_text(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    low, high = row["samples_per_second_spread"]
    text = f"  {row['side']:<18} {row['samples_per_second']:>10,.0f} samples/s [{low:,.0f}, {high:,.0f}]"
    text += f" {row['samples_per_second_per_core']:>10,.0f} a core  {row['bytes_per_second'] / 1e9:6.2f} GB/s"
    if row["of_raw"] is None:
        return text
    (raw_low, raw_high), (low, high) = row["of_raw_spread"], row["over_formatter_spread"]
    text += f"  {row['of_raw']:5.2f} x raw [{raw_low:.2f}, {raw_high:.2f}]"
    return text + f"  {row['over_formatter']:6.1f} x formatter [{low:.1f}, {high:.1f}]"
