"""Score a checkpoint, or pictures:  python tools/evaluate.py scenes --checkpoint runs/demo

    loss      held-out flow loss at fixed, equidistant times
    scenes    digit scenes: do pictures show what their captions say, by GenEval's six kinds
    fid       Frechet distance to real pictures, by the features of a given model
    clip      CLIP score of pictures and their prompts, by a given CLIP
    geneval   GenEval (arXiv 2310.11513), by a given detector and a given CLIP

Each leaves one results.json with the numbers, what they are of, device, versions, commit and command; pictures and
verdicts beside it are kept, so that a run that was killed goes on. On several processes: deepspeed --num_gpus 4
tools/evaluate.py scenes ... (--tp and --ep as in tools/sample.py).
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ecdit_ds.errors import EcditError, exit_code_of
from ecdit_ds.inference.ranks import exit_process
from ecdit_ds.slurm.completion import ARRAY_TASK, mark_complete, mark_ended
from tools.command_line import OneLineParser
from tools.sample import add_drawing_arguments, add_model_arguments

_PICTURES_HELP = "score this folder of tools/sample.py instead of drawing from a checkpoint"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = OneLineParser(
        prog="tools/evaluate.py",
        description="Score a checkpoint, or pictures.",
        epilog="`tools/evaluate.py METRIC --help` tells the flags of each.",
    )
    metrics = parser.add_subparsers(dest="metric", required=True, metavar="METRIC")

    loss = metrics.add_parser("loss", help="held-out flow loss at fixed, equidistant times")
    add_model_arguments(loss, with_device_map=False)
    loss.add_argument("--times", type=int, default=8, metavar="N", help="how many (default: %(default)s)")
    loss.add_argument("--samples", type=int, metavar="N", help="held-out samples (default: data.num_heldout)")
    loss.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="samples at a time (default: %(default)s)"
    )
    loss.add_argument("--cache-dir", metavar="DIR", help="of encoded sets (default: the recipe's)")
    _add_output(loss)

    scenes = metrics.add_parser("scenes", help="digit scenes: do pictures show what their captions say")
    _add_source(scenes)
    scenes.add_argument("--per-kind", type=int, metavar="N", help="held-out scenes of each kind to draw (default: 50)")

    fid = metrics.add_parser("fid", help="Frechet distance to real pictures")
    _add_source(fid)
    fid.add_argument("--features", required=True, metavar="DIR|NAME", help="a transformers vision model")
    fid.add_argument(
        "--real",
        required=True,
        metavar="DIR|FILE|heldout",
        help="real pictures: a folder, statistics that an earlier run saved, or the recipe's held-out scenes",
    )
    fid.add_argument(
        "--save-real", type=Path, metavar="FILE", help="keep the real pictures' statistics, as safetensors"
    )
    _add_prompts(fid)

    clip = metrics.add_parser("clip", help="CLIP score of pictures and their prompts")
    _add_source(clip)
    clip.add_argument("--clip", required=True, metavar="DIR|NAME", help="a transformers CLIP")
    _add_prompts(clip)

    geneval = metrics.add_parser("geneval", help="GenEval, by a given detector and a given CLIP")
    _add_source(geneval)
    geneval.add_argument("--detector", required=True, metavar="DIR|NAME", help="a transformers detector or Mask2Former")
    geneval.add_argument("--clip", required=True, metavar="DIR|NAME", help="a transformers CLIP, which names colours")
    geneval.add_argument(
        "--metadata", type=Path, metavar="FILE", help="the official evaluation_metadata.jsonl (default: drawn prompts)"
    )
    geneval.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    geneval.add_argument(
        "--images-per-prompt", type=int, default=4, metavar="N", help="as published (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Score, and turn what a user can get wrong into one line; return the exit code."""
    try:
        options = parse_arguments()
        from ecdit_ds.evaluation.metrics import METRICS  # takes seconds, which --help need not

        METRICS[options.metric](options)
    except EcditError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        mark_ended(exit_code_of(error))
        return 2
    mark_complete(ARRAY_TASK)
    return 0


def _add_source(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, required=False)
    parser.add_argument("--pictures", type=Path, metavar="DIR", help=_PICTURES_HELP)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first picture (default: %(default)s)")
    add_drawing_arguments(parser)
    _add_output(parser)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="to draw from (default: held-out captions)")
    parser.add_argument("--limit", type=int, metavar="N", help="pictures to draw (default: 256)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="for results, pictures and verdicts (default: evaluation/RECIPE_step_N/METRIC)",
    )


if __name__ == "__main__":
    exit_process(main())
