"""Show where the experts went:  python tools/heatmaps.py --checkpoint runs/demo --prompt "a red seven"

Draws each prompt once, watches every router at every step, and leaves in the output folder (with several prompts, in a
folder a prompt)

    heatmaps.html      all of it, to move through by step and layer; one file that needs nothing but a browser
    heatmaps.json      all of it as numbers
    heatmaps.png       experts per patch by layer, early, in the middle and late
    experts.png        what each expert took, by layer, late
    concentration.png  how uneven it is, by time and by layer

With --scenes N also scenes.json and scenes.png: the same measures over N real held-out scenes, of which it is known
where their objects are, beside those of models of random weights.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor
from tqdm import tqdm

from ecdit_ds.config.recipe import SampleConfig
from ecdit_ds.data.digit_scenes.dataset import require_digit_scenes
from ecdit_ds.errors import ConfigError, EcditError
from ecdit_ds.inference.images import name_for_file, save_text
from ecdit_ds.inference.load import WEIGHT_KINDS, load_generator, open_model
from ecdit_ds.inference.options import encoder_folders
from ecdit_ds.inference.prompts import require_words
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.interpret.heatmap_page import Drawing, trace_numbers, trace_page
from ecdit_ds.interpret.heatmaps import maps_of, save_compute_maps, save_concentration, save_expert_maps
from ecdit_ds.interpret.routing_trace import require_expert_choice, trace_routing
from ecdit_ds.interpret.scene_report import report_scenes, save_scene_chart, scene_numbers, scene_summary
from tools.command_line import OneLineParser
from tools.sample import add_encoder_arguments


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = OneLineParser(
        prog="tools/heatmaps.py",
        description="Show which experts take which patches while a picture is drawn.",
        epilog="Steps and guidance not given are the recipe's (its section `sample`).",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a checkpoint, or a run's folder for its newest"
    )
    parser.add_argument("--prompt", action="append", nargs="+", default=[], metavar="TEXT", help="may be repeated")
    parser.add_argument(
        "--scenes", type=int, metavar="N", help="also route N real held-out scenes, beside models of random weights"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="intervals of the time grid")
    parser.add_argument("--guidance", type=float, metavar="S", help="1 is none")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the starting noise (default: %(default)s)")
    parser.add_argument(
        "--weights", choices=WEIGHT_KINDS, help="averaged or last (default: ema, or what an export holds)"
    )
    add_encoder_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("heatmaps"),
        metavar="DIR",
        help="files of the same name are replaced (default: heatmaps)",
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Draw, and turn what a user can get wrong into one line; return the exit code."""
    try:
        show(parse_arguments())
    except EcditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(options: argparse.Namespace) -> None:
    """Do what the command line asks for, a prompt after the other: what is finished stays."""
    prompts = [text for group in options.prompt for text in group]
    if not prompts and options.scenes is None:
        raise ConfigError("--prompt: none given, so there is nothing to draw; give one, or --scenes N")
    require_words(prompts)
    stored = open_model(options.checkpoint, options.weights)
    recipe = stored.recipe
    require_expert_choice(recipe.model)
    if options.scenes is not None:
        what = f"--scenes {options.scenes}"
        require_digit_scenes(recipe.data, recipe.model, stored.encoders, what, "give --prompt")
    pipeline = load_generator(stored.folder, kind=options.weights, folders=encoder_folders(options))
    sample = pipeline.settings(num_steps=options.steps, guidance_scale=options.guidance)
    try:
        for i, prompt in enumerate(prompts):
            name = f"{i:03d}_{name_for_file(prompt)}".rstrip("_") if len(prompts) > 1 else ""
            _show_prompt(pipeline, prompt, sample, options.seed, options.output / name)
        if options.scenes is not None:
            _show_scenes(pipeline, options.scenes, options.seed, options.output)
    except OSError as error:
        raise ConfigError(f"--output {options.output}: cannot be written: {error.strerror or error}") from None


def _show_prompt(pipeline: TextToImage, prompt: str, sample: SampleConfig, seed: int, folder: Path) -> None:
    with tqdm(total=sample.num_steps, unit="step", desc="drawing", disable=not sys.stderr.isatty()) as bar:

        def advance(_step: int, _time: float, _latents: Tensor, /) -> None:
            bar.update()

        trace = trace_routing(pipeline, prompt, seed=seed, sample=sample, callback=advance)
    drawing = Drawing(
        prompt=prompt,
        seed=seed,
        sampler=sample.sampler,
        num_steps=sample.num_steps,
        guidance_scale=sample.guidance_scale,
        recipe=pipeline.recipe.name,
    )
    patch_pixels = pipeline.recipe.model.patch_size * pipeline.image_encoder.downsampling
    maps = maps_of(trace, sample.num_steps)
    save_text(trace_page(trace, drawing, patch_pixels), folder / "heatmaps.html")
    _save_json(trace_numbers(trace, drawing, patch_pixels), folder / "heatmaps.json")
    save_compute_maps(maps, prompt, folder / "heatmaps.png")
    save_expert_maps(trace, trace.times.index(maps.moments[-1][1]), prompt, folder / "experts.png")
    save_concentration(trace, sample.num_steps, prompt, folder / "concentration.png")
    print(f"open {folder / 'heatmaps.html'}; pictures and numbers beside it")


def _show_scenes(pipeline: TextToImage, num_scenes: int, seed: int, folder: Path) -> None:
    report = report_scenes(pipeline, num_scenes, seed=seed)
    _save_json(scene_numbers(report), folder / "scenes.json")
    save_scene_chart(report, folder / "scenes.png")
    print("\n".join(scene_summary(report)))
    print(f"chart in {folder / 'scenes.png'}, numbers in {folder / 'scenes.json'}")


def _save_json(numbers: dict[str, Any], path: Path) -> None:
    save_text(json.dumps(numbers, allow_nan=False), path)


if __name__ == "__main__":
    sys.exit(main())
