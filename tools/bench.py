"""Measure what things cost beside what others need for the same.

`python tools/bench.py moe` times the expert-choice layer against the dense feed-forward layer of equal activated
FLOPs and against other Mixture-of-Experts layers; `python tools/bench.py dispatch` the way to experts on other ranks
against the bare collective; `python tools/bench.py checkpoint` saving, loading and converting against moving the same
bytes; `python tools/bench.py sample` drawing a picture against dense models; `python tools/bench.py loader` reading
encoded samples against reading bytes; `python tools/bench.py encode` encoding a corpus against the encoders alone.
Sides run in one process and interleaved,
so that a slow moment of the machine falls on all alike. Every figure of speed that the project publishes comes from
here.

Suffixes: B images, S tokens of an image, D hidden_size.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.validation import divisors
from ecdit_ds.config.yaml_loader import DEFAULT_RECIPE
from ecdit_ds.errors import ConfigError, EcditError
from ecdit_ds.files.provenance import describe_run
from ecdit_ds.seeding import parameter_generator
from tools.benchmarks.checkpoint import run_checkpoint
from tools.benchmarks.data import add_loader
from tools.benchmarks.dispatch import run_dispatch
from tools.benchmarks.encode import add_encode
from tools.benchmarks.flags import add_common, add_report, check_folder, positive, positive_number
from tools.benchmarks.layers import CAPACITY_FACTOR, PEERS, build_side, count_flops, forward_backward_ms
from tools.benchmarks.report import compare, rotated, times_text
from tools.benchmarks.sample import check_sample, run_sample
from tools.command_line import OneLineParser

_FULL: dict[str, Any] = {"tokens": [64, 256, 1024, 4096], "experts": [8, 16, 32, 64], "call_tokens": 8192, "rounds": 7}
_QUICK: dict[str, Any] = {"tokens": [64, 256], "experts": [8, 16], "call_tokens": 1024, "rounds": 3}

_DISPATCH_FULL: dict[str, Any] = {"tokens": [256, 1024], "chunks": [1, 2, 4], "call_tokens": 8192, "rounds": 7}
_DISPATCH_QUICK: dict[str, Any] = {"tokens": [64], "chunks": [1, 2], "call_tokens": 512, "rounds": 3}

_CHECKPOINT_FULL: dict[str, Any] = {"gigabytes": 4.0, "rounds": 5}
_CHECKPOINT_QUICK: dict[str, Any] = {"gigabytes": 0.2, "rounds": 1}

_CHECKPOINT_HELP = """\
Time a synthetic checkpoint (weights, average and both moments of many experts) on the disk of --folder:

  save     against writing the same bytes with fsync, torch.save and torch's distributed checkpoint (DCP)
  stall    what training waits for when the save runs in the background, against the whole save
  load     against reading the same bytes; from the disk, and again from the page cache
  convert  to other files, against copying the files; and the most memory it takes

Checksums are on in all of ours. "x raw" is the median over rounds of raw time / own time within the round."""

_SAMPLE_FULL: dict[str, Any] = {"batch_size": 8, "rounds": 7}
_SAMPLE_QUICK: dict[str, Any] = {"batch_size": 2, "rounds": 3, "steps": 2}

_SAMPLE_HELP = """\
Time drawing pictures (Euler's rule, from noise to latents; the text is encoded before) with an expert-choice model:

  ec       the recipe's model
  twin     the recipe with model.ffn: dense
  equal    the twin, its ffn_hidden_size changed in every layer until its forward has the FLOPs of ec's

each with the text's keys and values had once a picture (reuse), as the project draws, and at every step (again).

Weights are random: shapes do not depend on what routers choose, so a trained model takes the same time. "overhead" is
the measured ratio divided by the ratio of FLOPs, which are counted by formula, matrix products and attention: 1 is
what theory says, 1.05 the aim beside the twin. Every round draws with all sides, in rotating order; a ratio is the
median over rounds of ratios within the round. One thread; on a CPU the clock is the process's own CPU time, on a GPU
wall-clock time until the device is done.

Sizes replace the recipe's; heads and inner widths grow with --hidden-size."""

_DISPATCH_HELP = """\
Time the way to experts on other ranks and back, forward and backward, 2 experts a token: our dispatcher with experts
that give back what they get (so gathering and summing rows is in it), against four bare all-to-alls of the same
tensors. Prints the bytes that a rank sends to others in a forward beside the floor,
2 x f x tokens x hidden x bytes x (ranks - 1) / ranks.

Starts --ranks processes of one thread each, on gloo or, with as many GPUs, on NCCL; times are wall-clock times."""

_MOE_HELP = """\
Time forward and backward (gradients of the input and of every parameter) of the expert-choice layer, 2 experts a
token on average, against layers of equal activated FLOPs a token:

  dense            our feed-forward layer, inner width 2 x --ffn-hidden-size; every token passes it
  deepspeed        deepspeed.moe.layer.MoE: top-2 of the same two-matrix GELU experts; tokens beyond capacity dropped
  nucleus          diffusers' NucleusMoELayer: expert choice with three-matrix SwiGLU experts, plus one shared expert
                   that sees every token; a loop over experts. Its expert width is 4/9 of ours (to a multiple of 8),
                   so that routed and shared experts together do the work of ours: 3 x (2 + 1) w = 2 x 2 F
  nucleus_grouped  the same weights through torch's grouped matrix product

Each side is built alike, gets the same input, and starts with its gradients set to None (clearing them is not
timed). One thread; on a CPU the clock is the process's own CPU time, which other jobs disturb least; on a GPU it is
CUDA events. Every round runs all sides of all token counts, in rotating order; a ratio is the median over rounds of
ours / peer within the round."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What one side did in one case."""

    flops: int
    """FLOPs of one forward and backward, as counted by torch; matrix products only."""
    times_ms: list[float] = field(default_factory=list)
    """One a round."""


def measure(options: argparse.Namespace, num_experts: int, tick: Callable[[], object]) -> dict[int, dict[str, Samples]]:
    """Time all sides with `num_experts` experts, interleaved; return {tokens an image: {side: samples}}."""
    device, dtype = options.device, options.dtype
    # The weights do not depend on the tokens of an image, so all counts share a side.
    config = _model_config(options, num_experts, options.tokens[0])
    sides = [build_side(name, config, device, dtype) for name in ("ours", *options.peers)]
    inputs = {}
    for tokens in options.tokens:
        x_BSD, grad_BSD = (_draw(name, options, tokens) for name in ("x", "grad"))
        inputs[tokens] = (x_BSD.requires_grad_(), grad_BSD)
    samples = {
        tokens: {side.name: Samples(flops=count_flops(side, *inputs[tokens])) for side in sides}
        for tokens in options.tokens
    }
    for turn in range(options.rounds):
        for tokens in rotated(options.tokens, turn):
            for side in rotated(sides, turn):
                samples[tokens][side.name].times_ms.append(forward_backward_ms(side, *inputs[tokens]))
                tick()
    return samples


def _model_config(options: argparse.Namespace, num_experts: int, tokens: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=options.hidden_size,
        ffn_hidden_size=options.ffn_hidden_size,
        num_experts=num_experts,
        capacity_factor=CAPACITY_FACTOR,
        latent_height=tokens,
        latent_width=1,
        patch_size=1,
        # What follows is required of an architecture but is no part of this layer.
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        cross_num_heads=1,
        cross_head_dim=4,
        in_channels=1,
        text_embed_dim=1,
        max_text_tokens=1,
    )


def _draw(name: str, options: argparse.Namespace, tokens: int) -> Tensor:
    flat = torch.randn(options.call_tokens, options.hidden_size, generator=parameter_generator(0, name))
    return rearrange(flat, "(b s) d -> b s d", s=tokens).to(device=options.device, dtype=options.dtype)


def to_rows(options: argparse.Namespace, num_experts: int, tokens: int, sides: dict[str, Samples]) -> Iterator[Any]:
    """Yield one row a peer: medians, quartiles, and the median of the ratios paired within rounds."""
    ours = sides["ours"]
    capacity = _model_config(options, num_experts, tokens).expert_capacity(tokens)
    for peer in options.peers:
        theirs = sides[peer]
        yield compare(f"{tokens} tokens, {num_experts} experts", peer, ours.times_ms, theirs.times_ms) | {
            "tokens_an_image": tokens,
            "num_experts": num_experts,
            "rows_an_expert": capacity * options.call_tokens // tokens,
            "ours_flops": ours.flops,
            "peer_flops": theirs.flops,
            "ours_us_a_token": 1e3 * statistics.median(ours.times_ms) / options.call_tokens,
        }


def summarize(rows: list[dict[str, Any]]) -> str:
    """Return the summary line: worst ratio to dense, worst ratio to the fastest peer, spread of time a token."""
    parts = []
    if dense := [row["ratio"] for row in rows if row["peer"] == "dense" and row["rows_an_expert"] >= 256]:
        parts.append(f"worst ratio to dense from 256 rows an expert on {max(dense):.3f}")
    fastest: dict[str, dict[str, Any]] = {}
    for row in (row for row in rows if row["peer"] != "dense"):
        if row["case"] not in fastest or row["peer_ms"] < fastest[row["case"]]["peer_ms"]:
            fastest[row["case"]] = row
    if fastest:
        worst = max(fastest.values(), key=lambda row: float(row["ratio"]))
        parts.append(f"worst ratio to the fastest peer {worst['ratio']:.3f} ({worst['peer']}, {worst['case']})")
    times: dict[int, list[float]] = {}
    for row in rows:
        times.setdefault(row["num_experts"], []).append(row["ours_us_a_token"])
    spread = max(max(us) / min(us) for us in times.values())
    parts.append(f"time a token over tokens an image, largest / smallest {spread:.3f}")
    return "; ".join(parts)


def describe_moe(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures must be published with."""
    return describe_run(options.device, ("torch", "deepspeed", "diffusers")) | {
        "threads": torch.get_num_threads(),
        "clock": "cuda events" if options.device.type == "cuda" else "process time",
        "gradients": "input and all parameters, from None",
        "dtype": str(options.dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "hidden_size": options.hidden_size,
        "ffn_hidden_size": options.ffn_hidden_size,
        "capacity_factor": CAPACITY_FACTOR,
        "tokens_a_call": options.call_tokens,
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print one line a row, times in ms with their quartiles."""
    for row in rows:
        print(f"{row['case']:>24}  {row['rows_an_expert']:>5} rows an expert  {times_text(row)}", flush=True)


def run_moe(options: argparse.Namespace) -> None:
    """Measure every case, print the rows and the summary, and write them as JSON when asked."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    timings = options.rounds * len(options.experts) * len(options.tokens) * (1 + len(options.peers))
    with tqdm(total=timings, unit="timing", disable=None) as bar:
        for num_experts in options.experts:
            samples = measure(options, num_experts, bar.update)
            fresh = [row for tokens in samples for row in to_rows(options, num_experts, tokens, samples[tokens])]
            bar.clear()
            print_rows(fresh)
            rows += fresh
    print(summarize(rows))
    if options.json:
        options.json.write_text(json.dumps({"meta": describe_moe(options), "rows": rows}, indent=1) + "\n")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the checked options; `run` among them is the command.

    Raises:
        ConfigError: a device that is not there, sizes that do not fit one another.
    """
    parser = OneLineParser(prog="bench.py", description="Measure what things cost.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_moe(commands)
    _add_dispatch(commands)
    _add_checkpoint(commands)
    _add_sample(commands)
    add_loader(commands)
    add_encode(commands)
    options = parser.parse_args(arguments)
    for name, value in (options.quick_sizes if options.quick else options.full_sizes).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    _resolve(options)
    return options


def _add_moe(commands: Any) -> None:
    moe = commands.add_parser(
        "moe",
        help="the expert-choice layer",
        description=_MOE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(moe)
    moe.add_argument("--tokens", type=positive, nargs="+", help="tokens of an image (default 64 256 1024 4096)")
    moe.add_argument("--experts", type=positive, nargs="+", help="numbers of experts (default 8 16 32 64)")
    moe.add_argument("--call-tokens", type=positive, help="tokens a call, all images together (default 8192)")
    moe.add_argument("--hidden-size", type=positive, default=256, help="default 256")
    moe.add_argument("--ffn-hidden-size", type=positive, help="inner width of an expert (default 4 x --hidden-size)")
    moe.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="default all")
    moe.set_defaults(run=run_moe, check=_check_moe, full_sizes=_FULL, quick_sizes=_QUICK)


def _add_dispatch(commands: Any) -> None:
    dispatch = commands.add_parser(
        "dispatch",
        help="the all-to-all of its tokens",
        description=_DISPATCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(dispatch)
    dispatch.add_argument("--ranks", type=positive, default=2, help="expert-parallel processes (default 2)")
    dispatch.add_argument("--tokens", type=positive, nargs="+", help="tokens of an image (default 256 1024)")
    dispatch.add_argument("--experts", type=positive, default=8, help="default 8")
    dispatch.add_argument("--chunks", type=positive, nargs="+", help="parallel.dispatch_chunks (default 1 2 4)")
    dispatch.add_argument("--call-tokens", type=positive, help="tokens a call and rank (default 8192)")
    dispatch.add_argument("--hidden-size", type=positive, default=256, help="default 256")
    dispatch.set_defaults(
        run=run_dispatch, check=_check_dispatch, full_sizes=_DISPATCH_FULL, quick_sizes=_DISPATCH_QUICK
    )


def _add_checkpoint(commands: Any) -> None:
    checkpoint = commands.add_parser(
        "checkpoint",
        help="saving, loading, converting",
        description=_CHECKPOINT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_report(checkpoint, "of everything (default 5)")
    checkpoint.add_argument("--gigabytes", type=positive_number, help="size of the checkpoint (default 4)")
    checkpoint.add_argument("--experts", type=positive, default=32, help="default 32")
    checkpoint.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: here)")
    checkpoint.set_defaults(
        run=run_checkpoint,
        check=_check_checkpoint,
        full_sizes=_CHECKPOINT_FULL,
        quick_sizes=_CHECKPOINT_QUICK,
        tokens=[],
        device="cpu",
        dtype="fp32",
    )


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser(
        "sample",
        help="drawing pictures",
        description=_SAMPLE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(sample, "of each side (default 7)")
    sample.add_argument("--config", default=DEFAULT_RECIPE, metavar="NAME|FILE", help="recipe (default %(default)s)")
    sample.add_argument("--hidden-size", type=positive, help="default: the recipe's")
    sample.add_argument("--layers", type=positive, help="default: the recipe's")
    sample.add_argument("--experts", type=positive, help="default: the recipe's")
    sample.add_argument("--tokens-side", type=positive, metavar="N", help="N x N tokens (default: the recipe's)")
    sample.add_argument("--batch-size", type=positive, help="pictures drawn at a time (default 8)")
    sample.add_argument("--steps", type=positive, help="of a picture (default: the recipe's)")
    sample.add_argument("--guidance", type=positive_number, help="1 is none (default: the recipe's)")
    sample.set_defaults(
        run=run_sample, check=check_sample, full_sizes=_SAMPLE_FULL, quick_sizes=_SAMPLE_QUICK, tokens=[]
    )


def _resolve(options: argparse.Namespace) -> None:
    for tokens in options.tokens:
        if options.call_tokens % tokens:
            raise ConfigError(f"--tokens {tokens} does not divide --call-tokens {options.call_tokens}")
    options.check(options)
    if options.json and not os.access(options.json if options.json.is_file() else options.json.parent, os.W_OK):
        raise ConfigError(f"--json {options.json}: cannot be written; give a file in a folder that can be")
    if options.json and options.json.is_dir():
        raise ConfigError(f"--json {options.json}: is a folder; give a file")
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")
    options.device = torch.device("cuda" if options.device != "cpu" and has_cuda else "cpu")
    options.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    if options.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported


def _check_moe(options: argparse.Namespace) -> None:
    options.ffn_hidden_size = options.ffn_hidden_size or 4 * options.hidden_size
    if min(options.experts) < CAPACITY_FACTOR:
        raise ConfigError(
            f"--experts {min(options.experts)}: a token takes {CAPACITY_FACTOR} experts; use as many or more"
        )
    if options.hidden_size % 8 or options.ffn_hidden_size % 8:
        raise ConfigError(
            f"--hidden-size {options.hidden_size}, --ffn-hidden-size {options.ffn_hidden_size}: the grouped peer needs "
            "multiples of 8"
        )


def _check_dispatch(options: argparse.Namespace) -> None:
    if options.ranks < 2 or options.experts % options.ranks:
        raise ConfigError(
            f"--ranks {options.ranks}: needs 2 or more, dividing --experts {options.experts}; choose from "
            f"{divisors(options.experts)}"
        )
    for tokens in options.tokens:
        images = options.call_tokens // tokens
        for chunks in options.chunks:
            if images % chunks:
                raise ConfigError(
                    f"--chunks {chunks} does not divide the {images} images of a call (--call-tokens "
                    f"{options.call_tokens} / --tokens {tokens}); choose from {divisors(images)}"
                )
        if CAPACITY_FACTOR * tokens % options.experts:
            raise ConfigError(
                f"--tokens {tokens}: {CAPACITY_FACTOR} x {tokens} places do not divide over --experts {options.experts}"
            )


def _check_checkpoint(options: argparse.Namespace) -> None:
    check_folder(options.folder)


if __name__ == "__main__":
    try:
        options = parse_arguments(sys.argv[1:])
        options.run(options)
    except EcditError as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        sys.exit(2)
