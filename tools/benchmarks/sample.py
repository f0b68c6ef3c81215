"""`bench.py sample`: what drawing a picture costs with experts, beside dense models, in time and in FLOPs.

EC-DiT-M took 23 % more time than its dense peer, where theory said about 3 % (reviews of arXiv 2410.02098). What is
timed is the project's own way from noise to latents, `TextToImage.denoise`; encoding the text and decoding the picture
are no part of it.

Suffixes: B pictures, C channels, H W latent height and width, T text tokens, D text_embed_dim.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe, SampleConfig
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.data.encoders.base import PixelVAE, TextEmbeddings
from ecdit_ds.errors import ConfigError
from ecdit_ds.files.provenance import describe_run
from ecdit_ds.flow.samplers import VelocityFn
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.model.ecdit import Prediction
from ecdit_ds.model.init import empty_model
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.seeding import parameter_generator
from tools.benchmarks.report import compare, rotated, times_text
from tools.benchmarks.twins import dense_twin, equal_flops_dense, image_flops, picture_flops

AIM = 1.05
"""Largest overhead beside the dense twin."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every side draws."""

    recipe: Recipe
    batch_size: int
    sample: SampleConfig
    device: torch.device
    dtype: torch.dtype

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The expert-choice model and its two dense peers, by name."""
        config = self.recipe.model
        equal = equal_flops_dense(config, config.pool_images(self.batch_size))
        return {"ec": config, "twin": dense_twin(config), "equal": equal}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One model, drawing in one of two ways."""

    model: str
    reuses_text: bool
    drawer: TextToImage
    flops: float
    """FLOPs per image."""
    times_ms: list[float] = field(default_factory=list)
    """Time per image, one value per round."""


class RepeatingTextToImage(TextToImage):
    """Draws the same pictures and reads the text again at every step."""

    def velocity(self, text: TextEmbeddings) -> VelocityFn:
        """Return the velocity under `text`, whose keys and values each call computes."""
        embeds, mask, pooled = (t.to(self.device) for t in (text.embeds_BTD, text.mask_BT, text.pooled_BD))

        def velocity(latents: Tensor, time: float) -> Tensor:
            count = len(latents)
            times = torch.full((count,), time, device=self.device)
            texts = embeds.expand(count, -1, -1), mask.expand(count, -1), pooled.expand(count, -1)
            prediction: Prediction = self.model(latents, times, *texts)
            return prediction.velocity_BCHW

        return velocity


@dataclass(frozen=True, kw_only=True)
class NumbersForText:
    """A text encoder that takes no time: random numbers for every caption, none of them padding."""

    embed_dim: int
    max_tokens: int
    identity: str = "numbers"

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return that every caption is full."""
        return [self.max_tokens] * len(captions)

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        """Return the numbers of so many captions."""
        shape = (len(captions), self.max_tokens, self.embed_dim)
        embeds_BTD = torch.randn(shape, generator=parameter_generator(0, "text"))
        return TextEmbeddings(
            embeds_BTD=embeds_BTD,
            mask_BT=torch.ones(shape[:2], dtype=torch.bool),
            pooled_BD=embeds_BTD.mean(dim=1),
        )

    def null(self) -> TextEmbeddings:
        """Return the numbers of one more."""
        return self.encode([""])


def run_sample(options: argparse.Namespace) -> None:
    """Draw with all sides in turns, print the rows, and write them as JSON when asked."""
    torch.set_num_threads(1)
    case = _case_of(options)
    sides = _build_sides(case)
    draws = {(side.model, side.reuses_text): _drawing(side.drawer, case) for side in sides}
    for draw in draws.values():
        draw(1)  # warm up
    with tqdm(total=options.rounds * len(sides), unit="timing", disable=None) as bar:
        for turn in range(options.rounds):
            for side in rotated(sides, turn):
                elapsed_ms = _time_ms(draws[side.model, side.reuses_text], case)
                side.times_ms.append(elapsed_ms / case.batch_size)
                bar.update()
    rows = to_rows(sides)
    print(describe_models(case))
    for row in rows:
        print(f"{row['case']:>12}  {times_text(row)}  FLOPs {row['flops_ratio']:.3f}  overhead {row['overhead']:.3f}")
    print(summarize(rows))
    if options.json:
        options.json.write_text(json.dumps({"meta": _describe(case, options.rounds), "rows": rows}, indent=1) + "\n")


def to_rows(sides: list[Contender]) -> list[dict[str, Any]]:
    """Return a row for the expert-choice model beside each dense one, both ways, and for reuse beside none in each."""
    found = {(side.model, side.reuses_text): side for side in sides}
    rows = []
    for reuses_text, way in ((True, "reuse"), (False, "again")):
        for peer in ("twin", "equal"):
            rows.append(_row(f"ec, {way}", peer, found["ec", reuses_text], found[peer, reuses_text]))
    for model in ("ec", "twin", "equal"):
        rows.append(_row(f"{model}, reuse", "again", found[model, True], found[model, False]))
    return rows


def _row(case: str, peer: str, ours: Contender, theirs: Contender) -> dict[str, Any]:
    row = compare(case, peer, ours.times_ms, theirs.times_ms)
    flops_ratio = ours.flops / theirs.flops
    return row | {
        "ours_flops": ours.flops,
        "peer_flops": theirs.flops,
        "flops_ratio": flops_ratio,
        "overhead": row["ratio"] / flops_ratio,
        "overhead_quartiles": [ratio / flops_ratio for ratio in row["ratio_quartiles"]],
    }


def summarize(rows: list[dict[str, Any]]) -> str:
    """Return the summary line: what experts cost beyond their FLOPs, as the project draws, and what reuse saves."""
    (twin,) = (row for row in rows if (row["case"], row["peer"]) == ("ec, reuse", "twin"))
    (saved,) = (row for row in rows if (row["case"], row["peer"]) == ("ec, reuse", "again"))
    low, high = twin["overhead_quartiles"]
    return (
        f"overhead beside the dense twin {twin['overhead']:.3f} [{low:.3f}, {high:.3f}] (aim {AIM}): "
        f"time x {twin['ratio']:.3f}, FLOPs x {twin['flops_ratio']:.3f}; "
        f"reusing the text takes {saved['ratio']:.3f} of its time"
    )


def describe_models(case: Case) -> str:
    """Return a line: inner widths of the dense models, and how far from equal their FLOPs remain."""
    models, pool = case.models, case.recipe.model.pool_images(case.batch_size)
    flops = {name: image_flops(config, pool) for name, config in models.items()}
    return (
        f"a forward of an image: ec {flops['ec'] / 1e9:.4g} GFLOP, twin {flops['twin'] / 1e9:.4g} (inner width "
        f"{models['twin'].ffn_hidden_size}), equal {flops['equal'] / 1e9:.4g} (inner width "
        f"{models['equal'].ffn_hidden_size} in every layer; {flops['equal'] / flops['ec'] - 1:+.2%})"
    )


def _case_of(options: argparse.Namespace) -> Case:
    recipe: Recipe = options.recipe
    given = {"num_steps": options.steps, "guidance_scale": options.guidance}
    sample = SampleConfig(
        **{"num_steps": recipe.sample.num_steps, "guidance_scale": recipe.sample.guidance_scale}
        | {name: value for name, value in given.items() if value is not None}
    )
    return Case(recipe=recipe, batch_size=options.batch_size, sample=sample, device=options.device, dtype=options.dtype)


def _build_sides(case: Case) -> list[Contender]:
    sides = []
    for name, config in case.models.items():
        model = empty_model(config, SerialLayers(), case.device, dtype=case.dtype)
        _randomize(model)
        text_encoder = NumbersForText(embed_dim=config.text_embed_dim, max_tokens=config.max_text_tokens)
        for reuses_text, kind in ((True, TextToImage), (False, RepeatingTextToImage)):
            drawer = kind(
                model=model,
                recipe=replace(case.recipe, model=config),
                image_encoder=PixelVAE(),
                text_encoder=text_encoder,
                device=case.device,
            )
            flops = picture_flops(
                config,
                batch_size=case.batch_size,
                num_steps=case.sample.num_steps,
                is_guided=case.sample.guidance_scale != 1.0,
                reuses_text=reuses_text,
            )
            sides.append(Contender(model=name, reuses_text=reuses_text, drawer=drawer, flops=flops))
    return sides


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Fill with numbers that no kernel could take for special; drawn where they are used, for there may be billions."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)


def _drawing(drawer: TextToImage, case: Case) -> Callable[[int], Tensor]:
    """Return what draws a batch in so many steps."""
    shape = (case.batch_size, *drawer.latent_shape())
    noise_BCHW = torch.randn(shape, generator=parameter_generator(0, "noise")).to(case.device)
    prompts = [""] * case.batch_size

    def draw(num_steps: int) -> Tensor:
        return drawer.denoise(prompts, noise=lambda: noise_BCHW, sample=replace(case.sample, num_steps=num_steps))

    return draw


def _time_ms(draw: Callable[[int], Tensor], case: Case) -> float:
    if case.device.type == "cpu":
        start_s = time.process_time()
        draw(case.sample.num_steps)
        return 1e3 * (time.process_time() - start_s)
    torch.cuda.synchronize(case.device)
    start_s = time.perf_counter()
    draw(case.sample.num_steps)
    torch.cuda.synchronize(case.device)
    return 1e3 * (time.perf_counter() - start_s)


def _describe(case: Case, rounds: int) -> dict[str, Any]:
    """Return what the figures must be published with."""
    return describe_run(case.device, ("torch",)) | {
        "threads": torch.get_num_threads(),
        "clock": "wall, synchronised" if case.device.type == "cuda" else "process time",
        "dtype": str(case.dtype).removeprefix("torch."),
        "rounds": rounds,
        "batch_size": case.batch_size,
        "steps": case.sample.num_steps,
        "guidance_scale": case.sample.guidance_scale,
        "sampler": case.sample.sampler,
        "models": {name: vars(config) for name, config in case.models.items()},
    }


def check_sample(options: argparse.Namespace) -> None:
    """Put the recipe with the sizes asked for into `options.recipe`.

    Raises:
        ConfigError: no such recipe, not one of expert choice, or sizes that do not fit it.
    """
    recipe = load_recipe(options.config)
    if recipe.model.ffn != "expert_choice":
        raise ConfigError(f"--config {options.config}: has model.ffn: {recipe.model.ffn}; give one of expert_choice")
    model = _resized(recipe.model, options)
    pool = model.routing_group
    if options.batch_size % pool:
        raise ConfigError(
            f"--batch-size {options.batch_size}: experts of --config {options.config} choose among {pool} images; "
            f"give a multiple of {pool}"
        )
    # The layout that the recipe trains on is not this process's.
    options.recipe = Recipe(name=recipe.name, model=model, train=recipe.train, flow=recipe.flow, sample=recipe.sample)


def _resized(config: ModelConfig, options: argparse.Namespace) -> ModelConfig:
    width = options.hidden_size or config.hidden_size
    grown = {name: getattr(config, name) for name in _GROWING}
    unit = config.hidden_size // math.gcd(config.hidden_size, *grown.values())
    if width % unit:
        raise ConfigError(
            f"--hidden-size {width}: heads and inner width of --config {options.config} grow with it, and are whole at "
            f"multiples of {unit}; the nearest is {max(1, round(width / unit)) * unit}"
        )
    sizes = {name: value * width // config.hidden_size for name, value in grown.items()}
    if options.tokens_side:
        sizes |= dict.fromkeys(("latent_height", "latent_width"), options.tokens_side * config.patch_size)
    sizes |= {"num_layers": options.layers or config.num_layers, "num_experts": options.experts or config.num_experts}
    return replace(config, hidden_size=width, **sizes)


_GROWING = ("num_heads", "num_kv_heads", "cross_num_heads", "ffn_hidden_size")
