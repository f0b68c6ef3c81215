"""Runs, checkpoints, exports and encoded sets of an earlier version resume, train, convert and draw as they did."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.launch import ROOT, metrics_of, train_many

GOLDEN = ROOT / "tests" / "golden"
RECIPE = ("--config", str(GOLDEN / "recipe.yaml"))
RELATIVE = 1e-5
"""Sums of other processors; on the same one they are equal."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Go on with the run on two ranks, and train on the set on one."""
    root = tmp_path_factory.mktemp("golden")
    shutil.copytree(GOLDEN / "run", root / "run")
    own = (
        f"data.path={GOLDEN / 'set'}",
        f"data.heldout_path={GOLDEN / 'set'}",
        "data.dataset=encoded",
        "parallel.ep=1",
        "train.max_steps=3",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
    )
    overrides = [part for override in own for part in ("--set", override)]
    train_many(
        root,
        [
            (2, [*RECIPE, "--output", str(root / "run")]),
            (1, [*RECIPE, *overrides, "--output", str(root / "on the set")]),
        ],
    )
    return root


def test_a_run_of_an_earlier_version_goes_on_as_it_did(trained: Path) -> None:
    before = [json.loads(line) for line in (GOLDEN / "metrics.jsonl").read_text().splitlines()]
    after = metrics_of(trained / "run")
    assert [row["step"] for row in after] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "learning_rate", "samples_seen", "router_entropy"):
        for now, then in zip(after, before, strict=True):
            assert now[name] == pytest.approx(then[name], rel=RELATIVE), (name, now["step"])


def test_a_set_of_an_earlier_version_trains_as_it_did(trained: Path) -> None:
    losses = [row["loss"] for row in metrics_of(trained / "on the set")]
    assert losses == pytest.approx(json.loads((GOLDEN / "losses_on_the_set.json").read_text()), rel=RELATIVE)


def _run(tool: str, *arguments: str) -> None:
    subprocess.run([sys.executable, f"tools/{tool}", *arguments], cwd=ROOT, check=True, capture_output=True)


def test_a_checkpoint_of_an_earlier_version_is_exported_as_it_was(tmp_path: Path) -> None:
    _run("convert_ckpt.py", "convert", "--to", "safetensors", f"{GOLDEN}/run/checkpoints/step_3", str(tmp_path / "out"))
    for path in (GOLDEN / "export").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_export_of_an_earlier_version_draws_what_it_drew(tmp_path: Path) -> None:
    _run(
        "sample.py",
        "--checkpoint",
        str(GOLDEN / "export"),
        "--prompt",
        "a red seven",
        "--seed",
        "3",
        "--images-per-prompt",
        "2",
        "--output",
        str(tmp_path),
    )
    before = sorted((GOLDEN / "pictures").glob("*.png"))
    assert len(before) == 2
    for path in before:
        now, then = (
            np.asarray(Image.open(folder / path.name), dtype=int) for folder in (tmp_path / "pictures", path.parent)
        )
        assert np.abs(now - then).max() <= 1
