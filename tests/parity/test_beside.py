"""Encoders beside training: raw pictures, or captions without vectors, train as the set that was encoded before."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.launch import Planned, metrics_of, train_many
from tests.helpers.photographs import crops, encoded
from tests.helpers.recipes import SMALL_MODEL, arguments
from tests.helpers.tiny_encoders import save_clip_text, save_t5, save_vae
from tests.helpers.witness import SAMPLES_FILE
from tools import encode_data

STEPS, HALFWAY = 6, 3
PROMPT = "part 1 of a cat"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on a set in fp32, on the same one without text vectors, and on its pictures; T5 and CLIP are joined."""
    root = tmp_path_factory.mktemp("beside")
    vae, texts = save_vae(root / "vae"), [save_t5(root / "t5"), save_clip_text(root / "clip")]
    images = crops(32)
    for name, part in (("train", slice(24)), ("heldout", slice(24, 32))):
        source = root / f"{name}_pictures"
        source.mkdir()
        for i, image in enumerate(images[part]):
            (source / f"{i}.jpg").write_bytes(encoded(image))
            (source / f"{i}.txt").write_text(f"part {i} of a cat")
        tools = [
            "--vae",
            str(vae),
            "--text",
            *map(str, texts),
            "--text-tokens",
            "24",
            "--size",
            "32",
            "--dtype",
            "fp32",
        ]
        for kind, flags in (("whole", []), ("captions", ["--captions-only"])):
            assert encode_data.main(["encode", str(source), str(root / f"{name}_{kind}"), *tools, *flags]) == 0

    def run(name: str, kind: str, *changes: str, ranks: int = 1, steps: int = STEPS) -> Planned:
        given = [
            *SMALL_MODEL,
            "data.num_train=16384",
            "data.num_heldout=256",
            "data.dataset=encoded",
            f"data.path={root / f'train_{kind}'}",
            f"data.heldout_path={root / f'heldout_{kind}'}",
            "model.in_channels=5",
            "model.latent_height=8",
            "model.latent_width=8",
            "model.patch_size=2",
            "model.text_embed_dim=28",
            "model.max_text_tokens=24",
            f"sample.prompts=[{PROMPT}]",
            "sample.num_steps=2",
            "flow.text_dropout_prob=0.3",
            "train.micro_batch_size=2",
            f"train.checkpoint_every={HALFWAY}",
            f"train.max_steps={steps}",
            *changes,
        ]
        if kind == "pictures":
            given += ["data.encode=online", f"data.vae={vae}", f"data.text=[{','.join(map(str, texts))}]"]
        seen = {SAMPLES_FILE: str(root / f"{name}.samples")}
        return Planned(ranks, arguments(root / name, root / "unused", *given), seen)

    train_many(
        root,
        [
            run("whole", "whole"),
            run("captions", "captions", "data.num_workers=1"),
            run("online", "pictures"),
            run("two", "pictures", "parallel.ep=2", "data.num_workers=1", ranks=2),
            run("tensors", "pictures", "parallel.tp=2", ranks=2),
            run("lives", "pictures", "data.num_workers=2", steps=HALFWAY),
        ],
        [
            run("lives", "pictures"),
            Planned(
                1,
                ["--checkpoint", str(root / "online"), "--prompt", PROMPT, "--output", str(root / "drawn")],
                tool="sample.py",
            ),
        ],
    )
    return root


def heldout_losses(run: Path) -> list[float]:
    """Return the held-out losses of a run."""
    return [json.loads(line)["heldout_loss"] for line in (run / "evaluations.jsonl").read_text().splitlines()]


def samples_of(root: Path, run: str) -> list[Any]:
    """Return which samples a run read, micro-batch after micro-batch."""
    return sorted(json.loads(line)[1] for line in (root / f"{run}.samples").read_text().splitlines())


@pytest.mark.parametrize("run", ["captions", "online"])
def test_what_is_encoded_beside_training_trains_as_what_was_encoded_before(runs: Path, run: str) -> None:
    before, beside = metrics_of(runs / "whole"), metrics_of(runs / run)
    assert len(before) == STEPS
    assert [m["loss"] for m in beside] == pytest.approx([m["loss"] for m in before], rel=1e-6)
    assert [m["grad_norm"] for m in beside] == pytest.approx([m["grad_norm"] for m in before], rel=1e-5)
    assert heldout_losses(runs / run) == pytest.approx(heldout_losses(runs / "whole"), rel=1e-6)
    assert samples_of(runs, run) == samples_of(runs, "whole")


@pytest.mark.parametrize("run", ["two", "tensors"])
def test_pictures_train_the_same_on_one_rank_and_on_two(runs: Path, run: str) -> None:
    one, two = metrics_of(runs / "online"), metrics_of(runs / run)
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in two] == pytest.approx([m[key] for m in one], rel=1e-5), key
    assert samples_of(runs, run) == sorted(samples_of(runs, "online") * (2 if run == "tensors" else 1))


def test_a_run_on_pictures_goes_on_to_the_bit_with_any_number_of_workers(runs: Path) -> None:
    assert [m["loss"] for m in metrics_of(runs / "lives")] == [m["loss"] for m in metrics_of(runs / "online")]
    assert heldout_losses(runs / "lives")[-1] == heldout_losses(runs / "online")[-1]


def test_prompts_are_drawn_through_the_encoders_that_the_recipe_names(runs: Path) -> None:
    assert list((runs / "online" / "samples").glob("*.png"))
    (line,) = (runs / "drawn" / "pictures.jsonl").read_text().splitlines()
    with Image.open(runs / "drawn" / json.loads(line)["file"]) as picture:
        assert np.asarray(picture).shape == (32, 32, 3)


def test_a_set_of_captions_is_smaller(runs: Path) -> None:
    sizes = {
        kind: sum(path.stat().st_size for path in (runs / f"train_{kind}").glob("*.arrow"))
        for kind in ("whole", "captions")
    }
    assert sizes["whole"] - sizes["captions"] >= 24 * 24 * 28 * 4
