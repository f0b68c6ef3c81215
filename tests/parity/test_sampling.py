"""Pictures and scores belong to the prompt and the seed: ranks, layouts, batches and interruptions do not change them.

Pictures are compared as they are kept, in 256 grey levels: layouts sum in other orders, so a pixel may round to the
level beside, and no further.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecdit_ds.config.recipe import Recipe
from tests.helpers.launch import Planned, train_many

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]

LAYOUTS = {
    "one": (1, ()),
    "one_small_batches": (1, ("--batch-size", "2")),
    "dp2": (2, ()),
    "tp2": (2, ("--tp", "2")),
    "ep2": (2, ("--ep", "2")),
    "dp3": (3, ()),
    "tp2_ep2": (4, ("--tp", "2", "--ep", "2")),
}
SCORED = ("one", "one_small_batches", "dp3", "tp2_ep2")
SAME_PROCESSES = ("dp2", "dp3")
"""Data-parallel ranks compute each picture as one process does."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw nine pictures under every layout, and score them where that is asked for; return the folder of all."""
    from ecdit_ds.config.yaml_loader import load_recipe
    from tests.conftest import TINY_RECIPE
    from tests.helpers.random_model import save_random_model

    root = tmp_path_factory.mktemp("sampling")
    (root / "tiny.yaml").write_text(TINY_RECIPE)
    recipe = load_recipe(str(root / "tiny.yaml"), ["model.num_kv_heads=2", f"data.cache_dir={root / 'cache'}"])
    checkpoint = save_random_model(root / "run" / "checkpoints", recipe)
    (root / "prompts.txt").write_text(
        "".join(f"a red {digit}\n" for digit in ["one", "two", "three", "four", "five"]) * 2
    )
    runs = []
    for name, (ranks, flags) in LAYOUTS.items():
        common = ["--checkpoint", str(checkpoint), *flags, *(() if "--batch-size" in flags else ("--batch-size", "4"))]
        what = ["--prompts", str(root / "prompts.txt"), "--limit", "9", "--sampler", "euler_ancestral"]
        runs.append(Planned(ranks, [*common, *what, "--output", str(root / name / "pictures")], tool="sample.py"))
        for metric, asked in (("loss", ("--samples", "7")), ("scenes", ("--per-kind", "2", "--steps", "1"))):
            score = [metric, *common, *asked, "--output", str(root / name / metric)]
            runs += [Planned(ranks, score, tool="evaluate.py")] if name in SCORED else []
    output = train_many(root, runs)
    assert "Traceback" not in output
    return root


def pictures(folder: Path) -> np.ndarray:
    """Return (N, H, W, 3) of the folder's pictures, in order."""
    lines = [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    return np.stack([np.asarray(Image.open(folder / line["file"])).astype(int) for line in lines])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_a_prompt_and_a_seed_make_the_same_picture_on_every_layout(drawn: Path, layout: str) -> None:
    ours, theirs = pictures(drawn / layout / "pictures"), pictures(drawn / "one" / "pictures")
    assert len(ours) == 9
    assert np.abs(ours - theirs).max() <= (0 if layout in SAME_PROCESSES else 1)
    assert np.abs(theirs - theirs[0]).max() > 100  # one picture is not another


@pytest.mark.parametrize("layout", SCORED[1:])
def test_a_score_is_the_same_on_every_layout(drawn: Path, layout: str) -> None:
    for metric in ("loss", "scenes"):
        ours, theirs = (json.loads((drawn / name / metric / "results.json").read_text()) for name in (layout, "one"))
        if metric == "loss":
            np.testing.assert_allclose(ours["results"]["by_time"], theirs["results"]["by_time"], rtol=1e-5)
        else:
            assert ours["results"] == theirs["results"]


def test_ranks_share_the_work(drawn: Path) -> None:
    assert not list((drawn / "dp3").rglob("*.rank_*"))
    assert len(list((drawn / "dp3" / "pictures" / "pictures").iterdir())) == 9
