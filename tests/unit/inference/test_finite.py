"""No picture, score or map is made of numbers that are not finite: they are named, and nothing is left behind."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.encoders.base import PixelVAE, TextEmbeddings
from ecdit_ds.errors import EvaluationError, NonFiniteError
from ecdit_ds.evaluation.clip import Clip, load_clip
from ecdit_ds.evaluation.clip_score import clip_scores
from ecdit_ds.evaluation.digit_scenes.alignment import drawn_alignment
from ecdit_ds.evaluation.digit_scenes.score import heldout_prompts
from ecdit_ds.evaluation.fid import FeatureStatistics, frechet_distance, save_statistics
from ecdit_ds.evaluation.geneval.models import load_detector
from ecdit_ds.evaluation.task import _require_finite
from ecdit_ds.flow.objective import FlowBatch
from ecdit_ds.inference import image_folder as gallery
from ecdit_ds.inference.image_folder import GenerationSettings, ImageRequest, generate_to_folder
from ecdit_ds.inference.ranks import DistributedContext, SingleProcess
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.interpret.routing_trace import trace_routing
from ecdit_ds.interpret.scene_study import count_scenes
from ecdit_ds.model.layers import SerialLayers
from ecdit_ds.model.sharding import UNSHARDED, ShardIndex
from ecdit_ds.pipeline import TextToImagePipeline
from tests.helpers.evaluate_tool import EvaluateTool
from tests.helpers.random_model import random_pipeline, save_random_model
from tests.helpers.tiny_judges import pictures, save_clip, save_mask2former, save_yolos

MakeRecipe = Callable[..., Recipe]
RefusalOf = Callable[[Callable[[], object]], str]
CPU = torch.device("cpu")
PROMPTS = ["a red seven", "two green fives", "a blue three"]


@pytest.fixture
def drawer(make_recipe: MakeRecipe) -> TextToImage:
    """Return a random model that draws in two steps."""
    return random_pipeline(make_recipe())


class SpoiltText:
    """The encoder of words, but for one prompt's vectors."""

    def __init__(self, drawer: TextToImage, field: str) -> None:
        self._encoder, self._field = drawer.text_encoder, field

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, captions: Sequence[str]) -> TextEmbeddings:
        found = self._encoder.encode(captions)
        vectors = getattr(found, self._field).clone()
        vectors[[caption == PROMPTS[1] for caption in captions]] = math.nan
        return replace(found, **{self._field: vectors})


class SpoiltCodec(PixelVAE):
    """A decoder that overflows."""

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return super().decode(latents_BCHW) * math.nan


def spoilt(drawer: TextToImage, where: str) -> TextToImage:
    """Return a drawer whose numbers break at one place."""
    if where in ("embeds_BTD", "pooled_BD"):
        return replace(drawer, text_encoder=SpoiltText(drawer, where))
    if where == "decoder":
        return replace(drawer, image_encoder=SpoiltCodec())
    with torch.no_grad():
        next(iter(drawer.model.parameters())).view(-1)[0] = math.inf
    return drawer


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("embeds_BTD", "1 of 3 latents are not finite, such as of 'two green fives': the text encoder's vectors are"),
        ("pooled_BD", "1 of 3 latents are not finite, such as of 'two green fives': the text encoder's vectors are"),
        ("model", "3 of 3 latents are not finite, such as of 'a red seven': the model overflows"),
        ("decoder", "3 of 3 pictures are not finite, such as of 'a red seven': the decoder of latents"),
    ],
)
def test_a_drawing_that_is_not_finite_is_refused_with_its_prompt_and_its_cause(
    drawer: TextToImage, refusal_of: RefusalOf, where: str, told: str
) -> None:
    broken = spoilt(drawer, where)
    sample = broken.recipe.sample
    assert told in refusal_of(lambda: broken.draw(PROMPTS, seeds=range(3), sample=sample))
    pipe = TextToImagePipeline(broken)
    pipe.set_progress_bar_config(disable=True)
    for output_type in ("pil", "np", "pt"):
        assert told in refusal_of(lambda kind=output_type: pipe(PROMPTS, output_type=kind))  # type: ignore[misc]


def test_the_pipeline_tells_whose_latents_were_not_finite(drawer: TextToImage, refusal_of: RefusalOf) -> None:
    pipe = TextToImagePipeline(drawer)
    pipe.set_progress_bar_config(disable=True)
    start = torch.zeros(1, *drawer.latent_shape())
    start[0, 0, 0, 0] = math.nan
    assert "what they start from is not" in refusal_of(lambda: pipe(PROMPTS[0], latents=start))

    def replace_last(_: Any, step: int, _time: float, _given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.full_like(start, math.inf)} if step == 1 else {}

    for output_type in ("pil", "latent"):
        message = refusal_of(
            lambda kind=output_type: pipe(PROMPTS[0], callback_on_step_end=replace_last, output_type=kind)  # type: ignore[misc]
        )
        assert "callback_on_step_end gave them" in message


def test_neither_a_trace_nor_a_study_shows_where_experts_went_among_nothing(
    drawer: TextToImage, refusal_of: RefusalOf
) -> None:
    sample, broken = drawer.recipe.sample, spoilt(drawer, "model")
    assert "latents are not finite" in refusal_of(lambda: trace_routing(broken, PROMPTS[0], seed=0, sample=sample))
    assert "there is no routing to show" in refusal_of(lambda: count_scenes(broken, 2))


class TwoRanks(SingleProcess):
    """Agreement with another rank, whose turn it is at the same time and who may have failed in it."""

    size = 2

    def __init__(self, their_fault: NonFiniteError | None) -> None:
        self.fault, self.turns = their_fault, 0

    def run_on_all(self, work: Callable[[], Any]) -> Any:
        found = work()
        self.turns += 1
        if self.fault is not None:
            raise self.fault
        return found


def test_a_folder_keeps_what_was_drawn_before_and_none_of_the_broken_part(
    drawer: TextToImage, tmp_path: Path, refusal_of: RefusalOf
) -> None:
    crew = DistributedContext(world=SingleProcess(), device=CPU, layers=SerialLayers(), dp=UNSHARDED, is_tp_leader=True)
    broken = spoilt(drawer, "embeds_BTD")
    brush = GenerationSettings(drawer=broken, sample=broken.settings(num_steps=1, guidance_scale=1.0), batch_size=1)
    jobs = [ImageRequest(prompt=prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    for _ in range(2):  # and again the same, when it is run again
        assert "of 'two green fives'" in refusal_of(lambda: generate_to_folder(tmp_path, jobs, brush, {}, crew))
        assert [path.name for path in tmp_path.glob("pictures/*")] == ["000000_a_red_seven.png"]
    assert len(generate_to_folder(tmp_path, jobs, replace(brush, drawer=drawer), {}, crew)) == 3


def test_another_ranks_broken_pictures_end_the_drawing_of_all(
    drawer: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = DistributedContext(
        world=TwoRanks(NonFiniteError("theirs")),
        device=CPU,
        layers=SerialLayers(),
        dp=ShardIndex(index=0, count=2),
        is_tp_leader=True,
    )
    monkeypatch.setattr(gallery, "_check_prompts", lambda *_: None)
    brush = GenerationSettings(drawer=drawer, sample=drawer.settings(num_steps=1, guidance_scale=1.0), batch_size=1)
    with pytest.raises(NonFiniteError, match="theirs"):
        generate_to_folder(tmp_path, [ImageRequest(prompt=prompt, seed=0) for prompt in PROMPTS], brush, {}, crew)
    assert not list(tmp_path.glob("pictures/*"))


@pytest.mark.parametrize("theirs", [0, 1])
@pytest.mark.parametrize("fails", [[], [1]])
def test_scenes_are_scored_by_all_ranks_or_by_none_and_each_draws_as_often_as_the_others(
    theirs: int, fails: list[int]
) -> None:
    scenes, calls = heldout_prompts(seed=0, per_kind=1, canvas_height=16, canvas_width=16), list[int]()

    def draw(prompts: Sequence[str], _seeds: Sequence[int]) -> np.ndarray:
        calls.append(len(calls))
        if calls[-1] in fails:
            raise NonFiniteError("latents")
        return np.zeros((len(prompts), 16, 16, 3), dtype=np.uint8)

    def total(values: Tensor) -> Tensor:
        return values + torch.tensor([theirs, *[0] * (len(values) - 1)])

    def score() -> Any:
        return drawn_alignment(draw, scenes, batch_size=2, dp=ShardIndex(index=0, count=1), total=total)

    if theirs or fails:
        with pytest.raises(NonFiniteError, match=f"pictures of {theirs + len(fails)} batches"):
            score()
    else:
        assert score().summary()["model"]["overall"] == 0.0
    assert len(calls) == len(scenes) // 2


def statistics(features: list[list[float]]) -> FeatureStatistics:
    rows_BD = torch.tensor(features, dtype=torch.float64)
    return FeatureStatistics(sum_D=rows_BD.sum(dim=0), outer_DD=rows_BD.T @ rows_BD, count=len(rows_BD), features="f")


def test_a_distance_that_overflows_is_not_a_perfect_score(
    tmp_path: Path, refusal_of: RefusalOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, huge = statistics([[1.0, 2.0], [2.0, 0.0], [0.0, 1.0]]), statistics([[1e153, 0.0], [-1e153, 1e153]])
    assert "products of covariances overflow" in refusal_of(lambda: frechet_distance(huge, huge))
    with monkeypatch.context() as patch:
        patch.setattr(FrechetInceptionDistance, "compute", lambda _: torch.tensor(math.nan))
        assert "Frechet distance: is nan" in refusal_of(lambda: frechet_distance(usual, usual))
    assert frechet_distance(usual, usual) == pytest.approx(0.0, abs=1e-6)
    broken = statistics([[math.nan, 1.0], [1.0, 2.0]])
    assert "features are not finite" in refusal_of(lambda: save_statistics(broken, tmp_path / "real.safetensors"))
    assert not list(tmp_path.iterdir())


def test_a_clip_that_is_not_finite_gives_neither_scores_nor_colours(tmp_path: Path) -> None:
    clip = load_clip(str(save_clip(tmp_path)), device=CPU)
    shown = pictures(2)
    for part in ("visual_projection", "text_projection"):
        weight = getattr(clip.model, part).weight
        kept = weight.detach().clone()
        weight.data[0, 0] = math.nan
        with pytest.raises(EvaluationError, match=r"vectors of (pictures|texts) are not finite"):
            list(clip_scores([(picture, "a") for picture in shown], clip, batch_size=2))
        weight.data.copy_(kept)
    assert isinstance(clip, Clip) and len(list(clip_scores([(shown[0], "a")], clip, batch_size=2))) == 1


@pytest.mark.parametrize("save_detector", [save_yolos, save_mask2former])
def test_a_detector_that_is_not_finite_is_not_taken_for_one_that_finds_nothing(
    tmp_path: Path, save_detector: Callable[[Path], Path]
) -> None:
    detector = load_detector(str(save_detector(tmp_path)), device=CPU)
    list(detector.detect(pictures(1), batch_size=1, confidence=0.1))
    parameter = list(detector.model.parameters())[-1]
    parameter.data.view(-1)[0] = math.nan
    with pytest.raises(EvaluationError, match="object detector: what it finds is not finite"):
        list(detector.detect(pictures(1), batch_size=1, confidence=0.1))


def test_results_that_are_not_finite_are_named_by_their_place(refusal_of: RefusalOf) -> None:
    _require_finite({"mean": 1.0, "by_time": [[0.5, 2.0]], "features": "vit", "is": True}, "x")
    results = {"mean": math.nan, "by_time": [[0.5, math.inf], [0.7, 1.0]], "kinds": {"two": {"share": math.nan}}}
    message = refusal_of(lambda: _require_finite(results, "x"))
    assert "mean, by_time.0.1, kinds.two.share not finite" in message


def test_the_tools_end_with_2_and_leave_neither_pictures_nor_scores_of_what_overflows(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("sample.guidance_scale=1.0", "data.num_heldout=2")
    tool = EvaluateTool(tmp_path, save_random_model(tmp_path / "run", recipe), monkeypatch, capfd)
    usual = TextToImage.velocity

    def overflowing(self: TextToImage, text: TextEmbeddings) -> Any:
        found = usual(self, text)
        return lambda latents, time: found(latents, time) * math.inf

    monkeypatch.setattr(TextToImage, "velocity", overflowing)

    def no_loss(_model: Any, batch: FlowBatch) -> SimpleNamespace:
        return SimpleNamespace(flow_B=torch.full_like(batch.timesteps_B, math.nan))

    monkeypatch.setattr("ecdit_ds.evaluation.heldout.flow_losses", no_loss)
    for place, flags in enumerate(
        (
            ("sample.py", "--prompt", "a red seven"),
            ("heatmaps.py", "--prompt", "a red seven"),
            ("evaluate.py", "scenes", "--per-kind", 1),
            ("evaluate.py", "loss"),
        )
    ):
        name, *rest = flags
        code, lines = tool.run(*rest, "--checkpoint", tool.checkpoint, "--output", f"o/{place}", tool=str(name))
        assert code == 2 and len(lines) == 1 and "not finite" in lines[0], (flags, lines)
    left = {path.name for path in (tmp_path / "o").rglob("*") if path.is_file()}
    assert left == {"settings.json", "evaluation.json"}
    results = tmp_path / "o" / "3" / "results.json"  # as earlier releases left it
    results.write_text(json.dumps({"results": {"mean": math.nan, "by_time": []}}))
    assert "results.json: delete it" in tool.run("loss", "--checkpoint", tool.checkpoint, "--output", "o/3")[1][0]
