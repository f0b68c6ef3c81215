"""The page and the numbers of a drawing: they say what was traced, a browser runs it, and no prompt breaks out of it.

And the command that writes them.
"""

import html.parser
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.interpret.concentration import gini
from ecdit_ds.interpret.heatmap_page import Drawing, json_in_script, trace_numbers, trace_page
from ecdit_ds.interpret.routing_trace import RoutingTrace, trace_routing
from tests.helpers.random_model import random_pipeline, save_random_model

Run = Callable[..., tuple[int, list[str]]]
Browse = Callable[..., "Shown"]

TOOL = Path(__file__).resolve().parents[3] / "tools" / "heatmaps.py"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = [
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "\" onload='document.title=1' @@data $data ${data} \\u003c/script\\u003e <!-- <script>",
    "a red seven \u2028 \u202e & &lt;b&gt; 七",
]
WATCHER = """<script>
addEventListener("error", (event) => { document.documentElement.dataset.fault = event.message; });
</script>"""
PAINTED = """<script>
{ const { width, height } = document.getElementById("map"), found = [];
  const pixels = document.getElementById("map").getContext("2d").getImageData(0, 0, width, height).data;
  for (let row = 0; row < 3; row++) for (let column = 0; column < 4; column++) {
    const at = 4 * (Math.floor((row + 0.1) * height / 3) * width + Math.floor((column + 0.1) * width / 4));
    found.push(Array.from(pixels.slice(at, at + 4)).join(" "));
  }
  document.documentElement.dataset.painted = found.join(","); }
</script>"""


MOVED = """<script>
{ const move = (id, value, kind) => {
    const control = document.getElementById(id);
    control.value = value;
    control.dispatchEvent(new Event(kind));
  };
  move("step", "4", "input");
  move("layer", "1", "input");
  move("opacity", "0", "input");
  move("measure", "1", "change");
  document.documentElement.dataset.address = location.hash; }
</script>"""


@pytest.fixture
def trace() -> RoutingTrace:
    """Return five steps of three layers of five experts on three rows of four patches, each taking six, at random."""
    rng = np.random.default_rng(0)
    taken = np.zeros((5, 3, 5, 12), dtype=bool)
    for place in np.ndindex(5, 3, 5):
        taken[place][rng.permutation(12)[:6]] = True
    return RoutingTrace(
        image_HWC=rng.integers(0, 256, (12, 16, 3), dtype=np.uint8),
        steps=list(range(5)),
        times=[1.0, 0.8, 0.6, 0.4, 0.2],
        states_THWC=rng.integers(0, 256, (5, 12, 16, 3), dtype=np.uint8),
        layers=[1, 3, 5],
        taken_TLEHW=taken.reshape(5, 3, 5, 3, 4),
        expected=2.5,
    )


def drawing(prompt: str = "a red seven") -> Drawing:
    """Return what a person asked for."""
    return Drawing(prompt=prompt, seed=3, sampler="heun", num_steps=5, guidance_scale=4.0, recipe="tiny")


class Shown(html.parser.HTMLParser):
    """A page after its program ran: texts by id, attributes by id, and the tags there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.by_id, self.texts = list[str](), dict[str, dict[str, str | None]](), dict[str, str]()
        self.root: dict[str, str | None] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "html":
            self.root = found
        self._open = str(found.get("id") or tag)
        self.by_id[self._open] = found

    def handle_endtag(self, _tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._open] = self.texts.get(self._open, "") + data


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Return `browse(page, hash, then)`: a page after its program and `then` ran, without a complaint."""
    if BROWSER is None:
        pytest.skip("needs Chromium on the PATH")

    def show(page: str, address: str = "", then: str = "") -> Shown:
        path = tmp_path / "page.html"
        path.write_text(
            page.replace("<title>", WATCHER + "<title>", 1).replace("</body>", then + PAINTED + "</body>"), "utf-8"
        )
        command = [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'user'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=2000",
            "--dump-dom",
            f"file://{path}{address}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        shown = Shown(done.stdout)
        assert shown.root.get("data-fault") is None
        return shown

    return show


def test_a_browser_shows_the_step_and_the_layer_that_the_address_asks_for(trace: RoutingTrace, browse: Browse) -> None:
    shown = browse(trace_page(trace, drawing(), 4), "#step=3&layer=5")
    numbers = json.loads(json.dumps(trace_numbers(trace, drawing(), 4)))
    counts = np.array(numbers["counts"][2][2])
    assert (counts == trace.counts_TLHW[2, 2]).all()
    assert shown.texts["step-shown"] == "3 of 5, t = 0.60"
    assert shown.texts["layer-shown"] == "5 (3 of 3)"
    assert shown.texts["mean"] == f"{counts.mean():.2f} experts" == "2.50 experts"
    assert shown.texts["most"].startswith(f"{counts.max()} of 5 ")
    assert shown.texts["untaken"].startswith(f"{(counts == 0).sum()} of 12 ")
    assert shown.texts["unit"] == "experts per patch, mean 2.5"
    assert shown.by_id["map"]["aria-label"] == "Experts per patch, row by row: " + " ".join(map(str, counts.flat))
    assert shown.by_id["step"]["aria-valuetext"] == "3 of 5, t = 0.60"
    # The map is painted: equal counts in equal colours, others in others.
    painted = str(shown.root["data-painted"]).split(",")
    assert len(set(zip(painted, counts.flat, strict=True))) == len(set(painted)) == len(set(counts.flat)) > 2
    assert shown.tags.count("canvas") == 1 + 5
    assert f"{numbers['concentration']['gini'][2][2]:.2f}" == f"{float(gini(counts.reshape(-1))):.2f}"
    assert shown.tags.count("circle") == 2


def test_sliders_move_what_is_shown_and_the_address(trace: RoutingTrace, browse: Browse) -> None:
    shown = browse(trace_page(trace, drawing(), 4), "#step=2&layer=5", MOVED)
    assert shown.root["data-address"] == "#step=5&layer=3"
    assert (shown.texts["step-shown"], shown.texts["layer-shown"]) == ("5 of 5, t = 0.20", "3 (2 of 3)")
    assert shown.by_id["map"]["aria-label"] == (
        "Experts per patch, row by row: " + " ".join(map(str, trace.counts_TLHW[4, 1].flat))
    )
    assert set(str(shown.root["data-painted"]).split(",")) == {"0 0 0 0"}
    assert "one patch gets all" in shown.texts["measure-note"]
    assert shown.texts["time-title"].startswith("Layer 3 ")


def test_no_prompt_breaks_out_of_the_page(trace: RoutingTrace, browse: Browse) -> None:
    prompt = " ".join(HOSTILE)
    shown = browse(trace_page(trace, drawing(prompt), 4), "#step=99&layer=2&x=<b>")
    assert shown.texts["title"] == f"Experts per patch: {prompt}"
    assert shown.texts["h1"].strip() == f"“{prompt}”"
    assert shown.texts["step-shown"] == "1 of 5, t = 1.00"
    assert shown.tags.count("script") == 2 + 2  # data and program, and the two of this test


@pytest.mark.parametrize("prompt", ["a red seven", *HOSTILE])
def test_the_page_refers_to_nothing_outside_itself(trace: RoutingTrace, prompt: str) -> None:
    page = trace_page(trace, drawing(prompt), 4)
    unpacked = re.sub(r'"[A-Za-z0-9+/=]{9,}"|base64,[A-Za-z0-9+/=]*', "", page)
    assert re.findall(r"https?:|//\w|@import|url\(|fetch|XMLHttp|src=.http", unpacked) == []
    parsed = Shown(page)
    assert parsed.tags.count("script") == 2
    assert not {"link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert "default-src 'none'" in page
    assert parsed.texts["h1"].strip() == f"“{prompt}”"
    assert "@@" not in page.replace("@@data $data", "")


def test_json_cannot_end_the_script_it_stands_in() -> None:
    data = {"recipe": " ".join(HOSTILE)}
    text = json_in_script(data)
    assert not set("<>&") & set(text)
    assert json.loads(text) == data


def page_data(page: str) -> dict[str, Any]:
    """Return the numbers that the page holds."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return dict(json.loads(text))


def test_the_page_holds_every_choice_and_every_picture(trace: RoutingTrace) -> None:
    data = page_data(trace_page(trace, drawing(), 4))
    assert len(data["states"]) == len(data["times"]) == 5
    assert all(url.startswith("data:image/png;base64,") for url in [data["picture"], *data["states"]])
    assert data["top"] == trace.counts_TLHW.max()
    assert len(data["colours"]) == data["top"] + 1
    assert [measure["key"] for measure in data["measures"]][:2] == ["gini", "entropy"]
    expected = gini(trace.counts_TLHW.reshape(5, 3, 12))
    assert np.array(data["measures"][0]["values"]) == pytest.approx(expected, abs=1e-4)


def test_large_pictures_are_made_smaller_so_that_the_page_stays_small(trace: RoutingTrace) -> None:
    rng = np.random.default_rng(0)
    large = RoutingTrace(
        image_HWC=np.zeros((1024, 1024, 3), np.uint8),
        steps=list(range(24)),
        times=[1 - i / 24 for i in range(24)],
        states_THWC=np.repeat(rng.integers(0, 256, (1, 512, 512, 3), dtype=np.uint8), 24, axis=0),
        layers=[1, 3, 5],
        taken_TLEHW=rng.random((24, 3, 8, 32, 32)) < 0.25,
        expected=2.0,
    )
    assert len(trace_page(large, drawing(), 32)) < 2e6


def test_numbers_hold_what_each_expert_took_and_nothing_that_json_does_not_know(trace: RoutingTrace) -> None:
    blank = RoutingTrace(**{**vars(trace), "image_HWC": np.zeros_like(trace.image_HWC)})
    numbers = trace_numbers(blank, drawing(HOSTILE[0]), 4)
    text = json.dumps(numbers, allow_nan=False)
    assert json.loads(text) == numbers
    assert numbers["prompt"] == HOSTILE[0]
    assert numbers["steps"] == [1, 2, 3, 4, 5]
    assert numbers["ink_patches"] == []
    assert numbers["concentration"]["ink_ratio"] == [[None] * 3] * 5
    for step, layer, expert in np.ndindex(5, 3, 5):
        taken = numbers["taken_patches"][step][layer][expert]
        assert taken == np.flatnonzero(trace.taken_TLEHW[step, layer, expert]).tolist()
    full = trace_numbers(trace, drawing(), 4)
    assert full["ink_patches"] == list(range(12))


@pytest.fixture
def run(
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """Return `run(*flags)`: tools/heatmaps.py as `__main__` in this process; gives its exit code and stderr's lines."""
    save_random_model(tmp_path / "run" / "checkpoints", make_recipe())

    def run_main(*flags: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--checkpoint", "run", *flags])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return int(ended.value.code or 0), capfd.readouterr().err.splitlines()

    return run_main


FILES = ["concentration.png", "experts.png", "heatmaps.html", "heatmaps.json", "heatmaps.png"]


def names(folder: Path) -> list[str]:
    """Return the files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_command_leaves_a_page_pictures_and_the_numbers_of_the_drawing_that_was_asked_for(
    tmp_path: Path, make_recipe: Callable[..., Recipe], run: Run
) -> None:
    flags = ["--seed", "4", "--steps", "3", "--guidance", "1.5", "--weights", "weight"]
    assert run("--prompt", "a red seven", *flags) == (0, [])
    folder = tmp_path / "heatmaps"
    assert names(folder) == FILES
    numbers = json.loads((folder / "heatmaps.json").read_text("utf-8"))
    assert (numbers["seed"], numbers["num_steps"], numbers["guidance_scale"]) == (4, 3, 1.5)

    def counts(weights: str, seed: int, guidance_scale: float) -> list[Any]:
        pipeline = random_pipeline(make_recipe(), weights)
        sample = replace(pipeline.recipe.sample, num_steps=3, guidance_scale=guidance_scale)
        return list(trace_routing(pipeline, "a red seven", seed=seed, sample=sample).counts_TLHW.tolist())

    assert numbers["counts"] == counts("weight", 4, 1.5)
    assert numbers["counts"] not in (counts("ema", 4, 1.5), counts("weight", 0, 1.5), counts("weight", 4, 4.0))
    for name in FILES:
        assert not name.endswith(".png") or np.asarray(Image.open(folder / name)).std() > 10


def test_prompts_have_folders_of_their_own_and_an_overlong_one_costs_no_finished_one(tmp_path: Path, run: Run) -> None:
    flags = ["--steps", "1", "--prompt", "../a nine", "--prompt", "../a nine", "one " * 13, "--scenes", "1"]
    code, lines = run(*flags)
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: ") and "13 tokens" in lines[0]
    folders = ("000_a_nine", "001_a_nine")
    assert names(tmp_path / "heatmaps") == sorted(f"{folder}/{name}" for folder in folders for name in FILES)


def test_the_command_studies_scenes_without_a_prompt(tmp_path: Path, run: Run) -> None:
    assert run("--scenes", "2", "--output", "deep/down") == (0, [])
    assert names(tmp_path / "deep") == ["down/scenes.json", "down/scenes.png"]
    numbers = json.loads((tmp_path / "deep" / "down" / "scenes.json").read_text("utf-8"))
    assert numbers["scenes"] == 2
    assert np.array(numbers["measured"]["gini"]["mean"]).shape == (8, 2)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--checkpoint", "nowhere", "--prompt", "a nine"], "nowhere"),
        ([], "--prompt: none given"),
        (["--prompt", "one " * 13], "13 tokens"),
        (["--prompt", ""], "is empty"),
        (["--prompt", "a nine", "--steps", "0"], "num_steps: 0"),
        (["--prompt", "a nine", "--guidance", "nan"], "guidance_scale: nan"),
        (["--scenes", "0"], "--scenes 0"),
        (["--prompt", "a nine", "--output", "taken"], "taken"),
        (["--checkpoint", "dense", "--prompt", "a nine"], "dense has no expert-choice layers"),
        (["--checkpoint", "chosen", "--prompt", "a nine"], "token_choice has no expert-choice layers"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, make_recipe: Callable[..., Recipe], run: Run, flags: list[str], told: str
) -> None:
    (tmp_path / "taken").write_text("mine", encoding="ascii")
    if "dense" in flags or "chosen" in flags:
        kind = {"dense": "dense", "chosen": "token_choice"}[flags[1]]
        save_random_model(tmp_path / flags[1], make_recipe(f"model.ffn={kind}"))
    code, lines = run(*flags)
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: ")
    assert told in lines[0]
    assert not (tmp_path / "heatmaps").exists()
    assert (tmp_path / "taken").read_text(encoding="ascii") == "mine"
