"""Draw pictures from a checkpoint:  python tools/sample.py --checkpoint runs/demo --prompt "a red seven"

Leaves in the output folder samples.png (a captioned grid), pictures/ (one PNG a prompt) and, for expert choice,
routing.png: how many experts each patch of the first picture got, by layer, early, in the middle and late.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor
from tqdm import tqdm

from ecdit_ds.config import Recipe, SampleConfig
from ecdit_ds.errors import ConfigError, EcditError
from ecdit_ds.interpret.heatmaps import compute_maps, save_compute_maps
from ecdit_ds.pictures import name_for_file, save_grid, save_picture, to_uint8
from ecdit_ds.pipeline import load_pipeline

_COLUMNS = 4


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="tools/sample.py", description="Draw pictures from a checkpoint.",
        epilog="Steps, guidance, sampler and prompts not given are the recipe's (its section `sample`).",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a checkpoint, or a run's folder for its newest"
    )
    parser.add_argument("--prompt", action="append", nargs="+", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument("--steps", type=int, metavar="N", help="intervals of the time grid")
    parser.add_argument("--guidance", type=float, metavar="S", help="1 is none")
    parser.add_argument("--sampler", metavar="NAME", help="euler or heun")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the starting noise (default: %(default)s)")
    parser.add_argument("--weights", choices=("ema", "weight"), default="ema", help="averaged or last (default: ema)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("samples"),
        metavar="DIR",
        help="pictures of the same name are replaced (default: samples)",
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Draw, and turn what a user can get wrong into one line; return the exit code."""
    options = parse_arguments()
    try:
        draw(options)
    except EcditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.output}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def draw(options: argparse.Namespace) -> None:
    """Draw what the command line asks for."""
    pipeline = load_pipeline(options.checkpoint, weights=options.weights)
    sample = _sample_config(pipeline.recipe, options)
    prompts = [text for group in options.prompt for text in group] or list(sample.prompts)
    if not prompts:
        raise ConfigError("--prompt: none given, and the recipe's sample.prompts is empty; give one")
    with tqdm(total=sample.num_steps, unit="step", desc="drawing", disable=not sys.stderr.isatty()) as bar:

        def advance(_step: int, _time: float, _latents: Tensor) -> None:
            bar.update()

        images = to_uint8(pipeline.draw(prompts, seed=options.seed, sample=sample, callback=advance))
    save_grid(images, prompts, min(_COLUMNS, len(prompts)), options.output / "samples.png")
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        save_picture(image, options.output / "pictures" / f"{i:03d}_{name_for_file(prompt)}.png")
    print(f"{len(prompts)} pictures in {options.output}/pictures, grid in {options.output / 'samples.png'}")
    if pipeline.recipe.model.ffn == "expert_choice":
        maps = compute_maps(pipeline, prompts[0], seed=options.seed, sample=sample)
        save_compute_maps(maps, prompts[0], options.output / "routing.png")
        print(f"experts per patch in {options.output / 'routing.png'}")


def _sample_config(recipe: Recipe, options: argparse.Namespace) -> SampleConfig:
    if options.sampler not in (None, "euler", "heun"):
        raise ConfigError(f"--sampler {options.sampler}: is not known; choose from euler, heun")
    given = {"num_steps": options.steps, "guidance_scale": options.guidance, "sampler": options.sampler}
    return dataclasses.replace(recipe.sample, **{k: v for k, v in given.items() if v is not None})


if __name__ == "__main__":
    sys.exit(main())
