"""Photographs with captions, through a real autoencoder and real text encoders, become a run and pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecdit_ds.checkpoint.manifest import read_manifest
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.data.encoders.spec import null_text_of
from ecdit_ds.data.latents.dataset import LatentDataset
from tests.helpers.launch import Planned, metrics_of, train_many
from tests.helpers.photographs import crops, encoded
from tests.helpers.recipes import SMALL_MODEL, arguments
from tests.helpers.tiny_encoders import save_clip_text, save_t5, save_vae
from tools import encode_data

STEPS, HALFWAY = 6, 3
PROMPT = "part 1 of a picture"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encode 24 photographs and 8 held-out ones; train on one rank, on two, and in two lives; draw."""
    root = tmp_path_factory.mktemp("corpora")
    vae, t5, clip = save_vae(root / "vae"), save_t5(root / "t5"), save_clip_text(root / "clip")
    images = crops(32)
    for name, part in (("train", slice(24)), ("heldout", slice(24, 32))):
        (root / f"{name}_pictures").mkdir()
        for i, image in enumerate(images[part]):
            (root / f"{name}_pictures" / f"{i}.jpg").write_bytes(encoded(image))
            (root / f"{name}_pictures" / f"{i}.txt").write_text(f"part {i} of a picture")
        source = str(root / f"{name}_pictures")
        tools = ["--vae", str(vae), "--text-tokens", "24", "--size", "32", "--shard-samples", "10"]
        assert encode_data.main(["encode", source, str(root / f"{name}_set"), *tools, "--text", str(t5)]) == 0
        both = ["--text", str(t5), str(clip), "--dtype", "bf16"]
        assert encode_data.main(["encode", source, str(root / f"{name}_joined"), *tools, *both]) == 0
    common = (
        *SMALL_MODEL,
        "data.num_train=16384",
        "data.num_heldout=256",
        "data.dataset=encoded",
        f"data.path={root / 'train_set'}",
        f"data.heldout_path={root / 'heldout_set'}",
        "model.in_channels=5",
        "model.latent_height=8",
        "model.latent_width=8",
        "model.patch_size=2",
        "model.text_embed_dim=12",
        "model.max_text_tokens=24",
        f"sample.prompts=[{PROMPT}]",
        "sample.num_steps=2",
        "data.num_workers=1",
        f"train.checkpoint_every={HALFWAY}",
    )
    joined = (
        *common,
        f"data.path={root / 'train_joined'}",
        f"data.heldout_path={root / 'heldout_joined'}",
        "model.text_embed_dim=28",
    )
    shutil.copytree(root / "train_set", root / "damaged_set")
    shard = root / "damaged_set" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    shutil.copytree(root / "train_joined", root / "moved")
    damaged = (*common, f"data.path={root / 'damaged_set'}", "train.max_steps=1")
    whole = f"train.max_steps={STEPS}"
    output = train_many(
        root,
        [
            (1, arguments(root / "one", root / "unused", *common, whole)),
            (2, arguments(root / "two", root / "unused", *common, whole, "parallel.ep=2", "data.num_workers=0")),
            (1, arguments(root / "lives", root / "unused", *common, f"train.max_steps={HALFWAY}")),
            Planned(2, arguments(root / "damaged", root / "unused", *damaged), codes=(2,)),
            (1, arguments(root / "trusting", root / "unused", *damaged, "data.verify=sizes")),
            (1, arguments(root / "joined", root / "unused", *joined, whole)),
            (1, arguments(root / "joined_lives", root / "unused", *joined, f"train.max_steps={HALFWAY}")),
        ],
        [
            (1, arguments(root / "lives", root / "unused", *common, whole)),
            (1, arguments(root / "joined_lives", root / "unused", *joined, whole, f"data.path={root / 'moved'}")),
            Planned(
                1,
                arguments(
                    root / "two", root / "unused", *common, "train.max_steps=9", f"data.path={root / 'heldout_set'}"
                ),
                codes=(2,),
            ),
            Planned(
                1,
                ["--checkpoint", str(root / "one"), "--prompt", PROMPT, "--output", str(root / "drawn")],
                tool="sample.py",
            ),
            Planned(
                1,
                ["--checkpoint", str(root / "joined"), "--prompt", PROMPT, "--output", str(root / "drawn_joined")],
                tool="sample.py",
            ),
        ],
    )
    (root / "output.txt").write_text(output)
    return root


def test_a_run_does_not_go_on_with_other_samples(runs: Path) -> None:
    """Where the same ones are does not matter: the second life of `joined_lives` reads a copy."""
    (line,) = [line for line in (runs / "output.txt").read_text().splitlines() if "other samples" in line]
    assert f"step_{STEPS}" in line and "choose another --output" in line
    assert len(metrics_of(runs / "two")) == STEPS


def test_ranks_share_out_the_check_of_a_set_and_all_refuse_what_one_finds(runs: Path) -> None:
    """The second shard is the second rank's to read."""
    told = [line for line in (runs / "output.txt").read_text().splitlines() if "damaged_set" in line]
    assert len(told) == 1 and "shard-00001.arrow: has checksum" in told[0] and "but its index says" in told[0]
    assert not (runs / "damaged" / "metrics.jsonl").exists()
    assert len(metrics_of(runs / "trusting")) == 1, "data.verify=sizes reads no shard"


def test_the_set_holds_every_photograph_once(runs: Path) -> None:
    index = json.loads((runs / "train_set" / "index.json").read_text())
    assert index["count"] == 24 and [shard["count"] for shard in index["shards"]] == [10, 10, 4]
    assert index["buckets"] == [[5, 8, 8]]


def test_a_corpus_trains_the_same_on_one_rank_and_on_two(runs: Path) -> None:
    one, two = metrics_of(runs / "one"), metrics_of(runs / "two")
    assert len(one) == STEPS
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in two] == pytest.approx([m[key] for m in one], rel=1e-5), key


@pytest.mark.parametrize(("unbroken", "stopped"), [("one", "lives"), ("joined", "joined_lives")])
def test_a_corpus_goes_on_after_a_stop_as_if_there_had_been_none(runs: Path, unbroken: str, stopped: str) -> None:
    whole, lives = metrics_of(runs / unbroken), metrics_of(runs / stopped)
    assert [m["loss"] for m in lives] == [m["loss"] for m in whole]
    losses = [
        [json.loads(line)["heldout_loss"] for line in (runs / run / "evaluations.jsonl").read_text().splitlines()]
        for run in (unbroken, stopped)
    ]
    assert losses[0][-1] == losses[1][-1]


def test_other_text_encoders_make_another_run(runs: Path) -> None:
    one, joined = metrics_of(runs / "one"), metrics_of(runs / "joined")
    assert len(joined) == STEPS
    assert joined[-1]["loss"] != pytest.approx(one[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize(("run", "drawn"), [("one", "drawn"), ("joined", "drawn_joined")])
def test_prompts_are_drawn_through_the_encoders_that_made_the_set(runs: Path, run: str, drawn: str) -> None:
    assert not (runs / "unused").exists()
    assert list((runs / run / "samples").glob("*.png"))
    (line,) = (runs / drawn / "pictures.jsonl").read_text().splitlines()
    with Image.open(runs / drawn / json.loads(line)["file"]) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (32, 32, 3)
    assert pixels.std() > 0


@pytest.mark.parametrize(("run", "name"), [("two", "train_set"), ("joined", "train_joined")])
def test_checkpoints_say_what_the_encoders_were(runs: Path, run: str, name: str) -> None:
    described = read_manifest(runs / run / "checkpoints" / f"step_{STEPS}").meta["encoders"]
    dataset = LatentDataset(runs / name)
    assert described["image"] == dataset.index.image_encoder and described["text"] == dataset.index.text_encoder
    assert torch.equal(null_text_of(described["null_text"]).embeds_BTD, dataset.null_text.embeds_BTD)


def test_the_recipe_of_the_run_names_the_sets(runs: Path) -> None:
    assert load_recipe(str(runs / "one" / "recipe.yaml")).data.path == str(runs / "train_set")
