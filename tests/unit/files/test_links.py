"""No file is opened for writing through a link that somebody planted: what the link points at stays as it is."""

import ast
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from ecdit_ds.checkpoint.convert.workspace import _locked
from ecdit_ds.checkpoint.lease import claim
from ecdit_ds.checkpoint.peers import SoloPeers
from ecdit_ds.checkpoint.retention import write_latest
from ecdit_ds.checkpoint.writer import save_checkpoint
from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.data.encoders.pretrained import load_image_encoder
from ecdit_ds.data.latents.index import read_index
from ecdit_ds.data.sources.open import open_source
from ecdit_ds.errors import EcditError
from ecdit_ds.files.durable import own_file, private_file
from ecdit_ds.inference.image_folder import read_gallery
from ecdit_ds.inference.images import save_png, save_text
from ecdit_ds.inference.jsonl_shards import ResultTable
from ecdit_ds.inference.load import _Offloaded
from ecdit_ds.slurm import job_history as lives
from ecdit_ds.slurm.completion import VARIABLE, mark_complete
from ecdit_ds.slurm.preflight import _touch, _write_speed
from ecdit_ds.slurm.rank_logs import remove_links
from ecdit_ds.training.callbacks import BadSampleLines
from ecdit_ds.training.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[3]
Write = Callable[[Path], object]


def _rows(folder: Path) -> ResultTable:
    ledger = ResultTable(path=folder / "rows.jsonl")
    ledger.append(0, [{"index": 1}])
    return ledger


def _lives(folder: Path) -> lives.JobHistory:
    ledger = lives.JobHistory(folder)
    ledger.folder.mkdir(exist_ok=True)
    return ledger


def _save(folder: Path) -> None:
    save_checkpoint(folder, 1, [], {}, SoloPeers())


def _mark(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            VARIABLE: str(folder / ".complete"),
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
        }.items():
            patch.setenv(name, value)
        mark_complete("work")


WRITERS: dict[str, Write] = {
    "lock": lambda folder: RunDir(path=folder).lock("attempt").close(),
    "lease": lambda folder: claim(folder, "attempt"),
    "latest": lambda folder: write_latest(folder, folder / "step_1"),
    "checkpoint": _save,
    "lines": lambda folder: BadSampleLines(folder / "bad_samples.jsonl").on_bad_samples([{"step": 1}]),
    "rows": _rows,
    "table": lambda folder: _rows(folder).merge(),
    "lives": lambda folder: _lives(folder).begin(lives.AttemptStarted(life="1.0", step=0, nodes="n", ranks=1)),
    "why": lambda folder: _lives(folder).end(
        "1.0", 2, 0, lives.RequeueDecision(is_again=False, exit_code=2, reason="because")
    ),
    "mark": _mark,
    "sign": lambda folder: _touch(folder / ".sign"),
    "speed": lambda folder: _write_speed(folder / ".speed"),
    "picture": lambda folder: save_png(np.zeros((2, 2, 3), np.uint8), folder / "picture.png"),
    "text": lambda folder: save_text("words", folder / "text.json"),
    "weights": lambda folder: _Offloaded(folder).put("weight", torch.ones(3)),
}
"""Name -> what writes files into a folder."""


_opened: list[list[str]] = []
"""The paths that were opened for writing since somebody asked."""


def _take_note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        is_to_be_written = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        _opened[-1] += [arguments[0]] * bool(is_to_be_written)


sys.addaudithook(_take_note)  # cannot be taken back; costs nothing while nobody asks


def _names_opened(write: Write, folder: Path) -> list[str]:
    """Return the names in a folder that a writer opens for writing, those that do not stay among them."""
    folder.mkdir()
    _opened.append([])
    try:
        write(folder)
    finally:
        paths = _opened.pop()
    return sorted({str(Path(path).relative_to(folder)) for path in paths if Path(path).is_relative_to(folder)})


@pytest.mark.parametrize("kind", ["link", "link to nothing", "hard link", "pipe"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_planted_link_changes_nothing_elsewhere(name: str, kind: str, tmp_path: Path) -> None:
    write = WRITERS[name]
    planted = _names_opened(write, tmp_path / "clean")
    assert planted
    for number, place in enumerate([*planted, f"{name}.tmp"]):
        folder, victim = tmp_path / f"trap_{number}", tmp_path / f"victim_{number}"
        trap = folder / place
        trap.parent.mkdir(parents=True, exist_ok=True)
        if kind != "link to nothing":
            victim.write_text("precious")
        if kind == "hard link":
            os.link(victim, trap)
        elif kind == "pipe":
            os.mkfifo(trap)
        else:
            trap.symlink_to(victim)
        with suppress(EcditError, OSError):
            write(folder)
        assert victim.exists() == (kind != "link to nothing")
        assert not victim.exists() or victim.read_text() == "precious"


@pytest.mark.parametrize("opener", [own_file, private_file])
def test_a_link_is_refused_with_the_way_out(opener: Callable[[str, int], int], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=r"is a link, through which nothing is written; remove it: '.*/link'"):
        opener(str(tmp_path / "link"), os.O_RDWR | os.O_APPEND)
    (tmp_path / "target").touch()
    os.link(tmp_path / "target", tmp_path / "hard")
    with pytest.raises(OSError, match=r"is a hard link; make it a copy: '.*/hard'"):
        opener(str(tmp_path / "hard"), os.O_RDWR | os.O_APPEND)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"is no regular file; remove it: '.*/pipe'"):
        opener(str(tmp_path / "pipe"), os.O_RDWR | os.O_APPEND)


@pytest.mark.parametrize("lock", ["lock", "lease", "conversion"])
@pytest.mark.parametrize("is_there", [False, True])
def test_none_but_its_owner_can_open_a_file_that_is_locked(lock: str, is_there: bool, tmp_path: Path) -> None:
    """Who can open it for reading can hold a shared lock on it, for as long as he likes."""
    path = {"lock": tmp_path / ".lock", "lease": tmp_path / ".attempt", "conversion": tmp_path / ".lock"}[lock]
    if is_there:  # as an earlier release made it
        path.touch(0o664)
    if lock == "conversion":
        with _locked(path):
            pass
    else:
        WRITERS[lock](tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


OWN_WAYS = ("own_file", "private_file")


def test_every_file_that_is_opened_for_writing_is_opened_by_one_of_the_ways_that_follow_no_link() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for folder in ("ecdit_ds", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.match("ecdit_ds/files/durable.py")
        and not path.match("tools/local_slurm.py")  # whose folder is new and its own
        and not path.match("tools/bench*.py")  # likewise, but for a file that --json names
        and not path.match("tools/benchmarks/*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and _opens_for_writing(call)
    ]
    assert found == []


def _opens_for_writing(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    of = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name in ("write_text", "write_bytes", "touch"):
        return True
    if name == "open" and of == "os":
        return "O_WRONLY" in ast.unparse(call) and "os.devnull" not in ast.unparse(call)
    texts = [
        node.value
        for node in [*call.args, *(key.value for key in call.keywords if key.arg == "mode")]
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    is_own = any(key.arg == "opener" and ast.unparse(key.value) in OWN_WAYS for key in call.keywords)
    return name == "open" and not is_own and any(set("wax+") & set(mode) for mode in texts if len(mode) < 4)


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("open(path, 'w')", True),
        ("path.open('ab')", True),
        ("open(path, mode='r+')", True),
        ("open(path)", False),
        ("open(path, 'rb')", False),
        ("open(path, 'ab', opener=own_file)", False),
        ("path.write_text('x')", True),
        ("os.open(path, os.O_WRONLY)", True),
        ("open(path, 'ab', opener=other)", True),
    ],
)
def test_a_line_that_opens_a_file_for_writing_is_told_from_others(line: str, is_one: bool) -> None:
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call)
    assert _opens_for_writing(call) == is_one


def test_the_logs_of_ranks_are_not_written_through_links(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank_0000.log").symlink_to(tmp_path / "victim")
    (logs / "rank_0001.log").write_text("of an earlier life")
    remove_links(logs)
    assert [path.name for path in logs.iterdir()] == ["rank_0001.log"]


READERS: dict[str, Callable[[Path], object]] = {
    "a.tar": lambda path: open_source(str(path.parent), unit_samples=4),
    "a.parquet": lambda path: open_source(str(path.parent), unit_samples=4),
    "index.json": lambda path: read_index(path.parent),
    "metrics.jsonl": lambda path: RunDir(path=path.parent).begin(load_recipe(), step=1),
    "recipe.yaml": lambda path: RunDir(path=path.parent).check_recipe(load_recipe()),
    "rows.jsonl": lambda path: ResultTable(path=path).rows(),
    "pictures.jsonl": lambda path: read_gallery(path.parent),
    "config.json": lambda path: load_image_encoder(str(path.parent)),
    "diffusion_pytorch_model.safetensors": lambda path: load_image_encoder(str(path.parent)),
}


@pytest.mark.parametrize("name", READERS)
def test_nobody_waits_for_a_pipe_that_has_a_files_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    if name.endswith(".safetensors"):
        (tmp_path / "place" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    os.mkfifo(tmp_path / "place" / name)
    with suppress(EcditError):  # or counted as a bad sample; a wait is ended by the suite's time-out, and fails
        READERS[name](tmp_path / "place" / name)
