"""What is published is on the disk before it gets its name, and its name is right after: after a crash, all or nothing.

`tests/helpers/power.py` stands in for a disk that loses what was not synced, whoever wrote it.
"""

import ast
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecdit_ds.checkpoint.lease import LEASE_NAME, claim
from ecdit_ds.checkpoint.retention import apply_retention
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.encoders.base import HashedWordEncoder, PixelVAE
from ecdit_ds.data.encoders.spec import image_encoder_spec, text_encoder_spec
from ecdit_ds.data.latents.shard_writer import commit_dataset, create_staging_dir
from ecdit_ds.data.precompute.job import PrecomputeJob, encode_corpus
from ecdit_ds.data.precompute.unit import EncodeSettings
from ecdit_ds.data.sources.open import open_source
from ecdit_ds.evaluation.fid import FeatureStatistics, save_statistics
from ecdit_ds.files.durable import make_folders, put_on_disk, replace_durably
from ecdit_ds.inference.images import save_png, save_text
from ecdit_ds.inference.jsonl_shards import ResultTable
from ecdit_ds.slurm import job_history as lives
from ecdit_ds.training.run_dir import RunDir
from tests.helpers.made_sets import write_set
from tests.helpers.power import Disk
from tests.helpers.random_model import save_random_model
from tools import convert_ckpt

PACKAGE = Path(__file__).resolve().parents[3] / "ecdit_ds"
HOMES = {
    "checkpoint/convert/workspace.py": 1,
    "checkpoint/writer.py": 2,
    "checkpoint/retention.py": 2,
    "data/precompute/job.py": 2,
    "data/precompute/unit.py": 2,
    "data/latents/shard_writer.py": 2,
    "files/durable.py": 1,
}
"""How often a module gives a name by a rename or a link."""


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Return the disk under `tmp_path`, which is on it as it is now."""
    return Disk(tmp_path, monkeypatch)


def assert_whole(disk: Disk, *targets: str) -> None:
    """Compare what got a name, in which order, and check that it was on the disk before, and that it stays."""
    assert [move.target for move in disk.moves] == list(targets)
    assert [move for move in disk.moves if move.unsynced] == []
    there = [disk.root / target for target in targets if (disk.root / target).exists()]
    assert [name for place in there for name in disk.lost(place)] == []


def test_what_was_not_synced_is_lost_on_this_disk_and_what_was_is_not(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    path.parent.mkdir()
    path.write_bytes(b"one")
    assert disk.lost(path) == ["a/b", "a", "a/b"]  # its name, its folder's, its content
    for place in (path, path.parent, tmp_path):
        put_on_disk(place)
    assert disk.lost(path) == disk.lost(path.parent) == []
    path.write_bytes(b"two")
    assert disk.lost(path.parent) == ["a/b"]
    os.rename(path, tmp_path / "c")
    path.write_bytes(b"two")
    os.link(path, tmp_path / "d")
    assert [(move.target, move.unsynced, move.pending) for move in disk.moves] == [
        ("c", ["a/b"], []),
        ("d", ["a/b"], ["c", "c"]),
    ]


def test_a_replaced_file_is_whole_before_it_has_its_name_and_has_it_for_good(disk: Disk, tmp_path: Path) -> None:
    for count, content in enumerate((b"one", b"two"), start=1):
        replace_durably(tmp_path / "it", content)
        assert_whole(disk, *["it"] * count)
        assert (tmp_path / "it").read_bytes() == content


def test_what_cannot_replace_leaves_the_other_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    replace_durably(tmp_path / "it", b"one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_durably(tmp_path / "it", b"two")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("it", b"one")]


@pytest.mark.parametrize(("error", "is_file"), [(errno.EINVAL, True), (errno.EIO, False), (errno.EIO, True)])
def test_only_a_file_system_that_syncs_no_folder_is_forgiven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, is_file: bool
) -> None:
    def refuse(_: int) -> None:
        raise OSError(error, os.strerror(error))

    (tmp_path / "it").touch()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=os.strerror(error)):
        put_on_disk(tmp_path / "it" if is_file else tmp_path)
    if error == errno.EINVAL:
        put_on_disk(tmp_path)


def test_new_folders_have_names_that_stay(disk: Disk, tmp_path: Path) -> None:
    for _ in range(2):
        make_folders(tmp_path / "a" / "b" / "c")
    assert disk.lost(tmp_path / "a" / "b" / "c") == []


def test_a_checkpoint_and_the_hint_of_it_stay_and_no_older_one_goes_before(
    disk: Disk, tmp_path: Path, tiny_recipe: Recipe
) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        save_random_model(root, tiny_recipe, step=step)
    damaged = root / "step_3" / "shard-00000.safetensors"
    damaged.write_bytes(b"damaged")
    put_on_disk(damaged)
    save_random_model(root, tiny_recipe, step=3)
    [aside] = root.glob("step_3.damaged-*")
    names = ["step_1", "latest", "step_2", "latest", "step_3", "latest", aside.name, "step_3", "latest"]
    assert_whole(disk, *(f"run/checkpoints/{name}" for name in names))
    assert [move.pending for move in disk.moves if move.target.endswith("latest")] == [[]] * 4
    assert [folder.name for folder in apply_retention(root, 2)] == ["step_1"]
    assert "/.trash-step_1-" in disk.moves[-1].target and not disk.moves[-1].pending


def test_a_lease_and_the_lives_of_a_job_stay(disk: Disk, tmp_path: Path) -> None:
    claim(tmp_path, "12.0.a")
    assert disk.lost(tmp_path / LEASE_NAME) == []
    ledger = lives.JobHistory(tmp_path / "run")
    ledger.begin(lives.AttemptStarted(life="12.0", step=0, nodes="n1", ranks=1))
    assert disk.lost(ledger.folder / "lives.jsonl") == []
    ledger.end("12.0", 3, 7, lives.RequeueDecision(is_again=False, exit_code=3, reason="gave up"))
    assert disk.lost(ledger.folder / "lives.jsonl") == []
    assert_whole(disk, "run/slurm/why_it_stopped.txt")


def test_a_life_begins_with_a_recipe_and_logs_that_stay(disk: Disk, tmp_path: Path, tiny_recipe: Recipe) -> None:
    folder = RunDir(path=tmp_path / "runs" / "mine")
    logs = (folder.metrics, folder.evaluations, folder.bad_samples)
    with folder.lock("12.0.a"):
        for log in logs:
            log.write_text('{"step": 1}\n{"step": 9}\n')
        folder.begin(tiny_recipe, 1)
    assert_whole(disk, *(f"runs/mine/{path.name}" for path in (folder.recipe, *logs)))


@pytest.mark.parametrize("to", ["ecdit", "safetensors", "universal"])
def test_a_conversion_gives_all_its_files_a_name_at_once(
    tmp_path: Path, tiny_recipe: Recipe, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("weight", "ema", "exp_avg", "exp_avg_sq")
    checkpoint = save_random_model(tmp_path / "checkpoints", tiny_recipe, kinds=kinds)
    disk = Disk(tmp_path, monkeypatch)
    only = ["--only", "ema"] if to == "safetensors" else []
    assert convert_ckpt.main(["convert", str(checkpoint), str(tmp_path / "new" / "it"), "--to", to, *only]) == 0
    assert_whole(disk, "new/it")


def test_a_set_written_at_once_stays(disk: Disk, tmp_path: Path) -> None:
    draft = create_staging_dir(tmp_path / "sets" / "it")
    write_set(draft / "it", [((1, 2, 2), 3)])
    assert disk.moves[-1].target.endswith("index.json") and not disk.moves[-1].unsynced
    disk.moves.clear()
    commit_dataset(draft / "it", tmp_path / "sets" / "it")
    assert_whole(disk, "sets/it")


def test_a_corpus_has_its_plan_before_its_shards_and_its_shards_before_their_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(name)
    image, text = PixelVAE(), HashedWordEncoder(embed_dim=6, max_tokens=8)
    job = PrecomputeJob(
        source=open_source(str(tmp_path / "pictures"), unit_samples=1),
        destination=tmp_path / "sets" / "it",
        encoding=EncodeSettings(
            image_encoder=image, text_encoder=text, sizes=((16, 16),), dtype="float32", batch_size=1, threads=1
        ),
        image_facts=image_encoder_spec(image),
        text_facts=text_encoder_spec(text),
        settings={},
    )
    disk = Disk(tmp_path, monkeypatch)
    encode_corpus(job)
    partial = job.partial.relative_to(tmp_path).as_posix()
    units = [[f"{partial}/set/shard-0000{unit}.arrow", f"{partial}/records/0000{unit}.json"] for unit in (0, 1)]
    whole = [move for move in disk.moves if "/drafts/" not in move.target]
    parts = [f"{partial}/set/{name}" for name in ("index.json", "null_text.safetensors", "report.json")]
    assert [move.target for move in whole] == [f"{partial}/plan.json", *units[0], *units[1], *parts, "sets/it"]
    assert [move for move in disk.moves if move.unsynced] == disk.lost(job.destination) == []
    for move in whole:  # the parts but for the first are renamed together, and relied on when all are
        pending = [name for name in move.pending if "/drafts/" not in name]
        assert move.target in parts[1:] or pending == [], f"{move.target} relies on what may be lost"


def test_tables_statistics_and_pictures_stay(disk: Disk, tmp_path: Path) -> None:
    ledger = ResultTable(path=tmp_path / "new" / "rows.jsonl")
    ledger.append(0, [{"index": 0}])
    ledger.merge()
    statistics = FeatureStatistics(sum_D=torch.zeros(2), outer_DD=torch.zeros(2, 2), count=3, features="made")
    save_statistics(statistics, tmp_path / "of" / "all.safetensors")
    save_png(np.zeros((2, 2, 3), dtype=np.uint8), tmp_path / "pictures" / "a.png")
    save_text("a page", tmp_path / "page" / "it.html")
    assert_whole(disk, "new/rows.jsonl", "of/all.safetensors", "pictures/a.png", "page/it.html")


def test_names_are_given_by_a_rename_only_where_this_file_looks() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): _num_renames(path) for path in PACKAGE.rglob("*.py")}
    assert {module: count for module, count in found.items() if count} == HOMES


def _num_renames(path: Path) -> int:
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return sum(isinstance(call.func, ast.Attribute) and _is_rename(call.func, call) for call in calls)


def _is_rename(function: ast.Attribute, call: ast.Call) -> bool:
    of = ast.unparse(function.value)
    if of in ("os", "shutil"):
        return function.attr in ("rename", "renames", "replace", "link", "symlink", "move")
    one_argument = len(call.args) == 1 and not call.keywords  # Path.replace; texts and dataclasses need more
    return function.attr in ("rename", "hardlink_to", "symlink_to") or (function.attr == "replace" and one_argument)
