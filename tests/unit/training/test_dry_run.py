"""A dry run is one rank of a cluster that is not there: real model, real groups, real checks."""

import dataclasses
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ecdit_ds import train
from ecdit_ds.config.data_config import DataConfig
from ecdit_ds.config.yaml_loader import dump_recipe, load_recipe
from ecdit_ds.data.encoders.from_recipe import encoders_of
from ecdit_ds.data.splits import open_split
from ecdit_ds.training.dry_run import small_sizes
from tests.helpers.forked import in_a_copy
from tests.helpers.made_sets import write_set
from tests.helpers.photographs import crops, encoded
from tests.helpers.tiny_encoders import save_t5, save_vae

ROOT = Path(__file__).resolve().parents[3]
DryRun = Callable[..., tuple[int, str, str]]
STATIC = ("weights", "gradients", "optimizer, with fp32 weights", "average")
ACTIVATIONS = "activations, CPU kernels"


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """Return `dry_run(*flags)`: the command in a copy of this process; gives exit code, stdout and stderr."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    return lambda *flags: in_a_copy(lambda: train.main(["--dry-run", *flags]))


def memory(out: str) -> dict[str, tuple[float, float]]:
    """Return what the table says: kind -> (counted, planner), in GB."""
    rows = re.findall(r"^  (\S.*?)\s+([\d.]+) GB\s+([\d.]+) GB$", out, re.MULTILINE)
    return {kind: (float(counted), float(planned)) for kind, counted, planned in rows}


def test_a_laptop_dry_runs_any_rank_of_the_97_billion_model_on_512_gpus() -> None:
    command = ["ecdit_ds/train.py", "--dry-run", "--config", "ecdit_m_64e", "--world-size", "512", "--rank", "77"]
    json_file = ("--deepspeed", "ds_configs/zero2_overlap.json")
    done = subprocess.run([sys.executable, *command, *json_file], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, ""), "as training would end: its data is not named"
    out = done.stdout
    for told in (
        "96,451,077,136 parameters",
        "512 ranks",
        "4096 images a step",
        "memory of rank 77",
        "data.path names no folder yet",
        "but training needs data.path and data.heldout_path;",
    ):
        assert told in out
    found = memory(out)
    assert found.keys() == {*STATIC, ACTIVATIONS}
    for kind, (counted, planned) in found.items():
        assert planned == pytest.approx(counted, rel=0.01), kind
    # Of all children of this process, the largest.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4 * 2**30


@pytest.mark.parametrize(
    ("zero", "flags"),
    [
        ("1", ["parallel.tp=2", "parallel.ep=4"]),
        ("3", ["parallel.ep=2", "optimizer.name=adamw", "train.unmasked_from_step=null"]),
        ("2", ["parallel.tp=6", "parallel.ep=8", "train.recompute=block", "train.global_batch_size=3072"]),
        ("2_offload", ["train.precision=fp32", "train.recompute=block", "train.recompute_every=2"]),
    ],
)
def test_what_is_counted_on_a_rank_is_what_the_planner_says_under_any_layout(
    dry_run: DryRun, zero: str, flags: list[str]
) -> None:
    overrides = [part for flag in ("model.num_layers=6", *flags) for part in ("--set", flag)]
    world = "48" if "parallel.tp=6" in flags else "32"
    code, out, err = dry_run(
        "--config", "ecdit_xl_8e", "--world-size", world, "--deepspeed", f"ds_configs/zero{zero}.json", *overrides
    )
    assert (code, err) == (2, "")
    for kind, (counted, planned) in memory(out).items():
        assert planned == pytest.approx(counted, rel=0.01 if kind in STATIC else 0.05, abs=0.002), kind


def test_a_mask_takes_half_of_the_main_blocks_work_out_of_a_step(dry_run: DryRun) -> None:
    masked = ("train.mask_ratio=0.5", "model.decoder_layers=2", "train.unmasked_from_step=1400")
    code, out, _ = dry_run(*(part for flag in masked for part in ("--set", flag)))
    assert code == 0
    found = re.findall(r"^compute +([\d.]+) GFLOP .*; ([\d.]+) but for the decoder, .*: (\d+) of 16", out, re.MULTILINE)
    (whole_8, main_8, seen_8), (whole_16, main_16, seen_16) = found
    assert (seen_8, seen_16) == ("8", "16")
    assert float(main_8) / float(main_16) == pytest.approx(0.5, abs=0.06)  # keys and values of the text stay whole
    assert float(whole_16) - float(main_16) == pytest.approx(float(whole_8) - float(main_8), rel=0.02)
    never_masked = dry_run("--set", "model.decoder_layers=2")[1]
    assert memory(out) == memory(never_masked), "there is room for the steps that see every token"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--world-size", "500"], ["parallel.ep(64)", "250 data-parallel ranks", "1, 2, 5, 10"]),
        (["--world-size", "0"], ["--world-size: 0"]),
        (["--world-size", "512", "--rank", "512"], ["--rank: 512", "0 to N - 1"]),
        (["--world-size", "512", "--set", "data.path=/no/such"], ["data.path: /no/such is no folder"]),
        (["--world-size", "512", "--output", "/proc/run"], ["--output /proc/run", "/proc"]),
        (["--world-size", "512", "--set", "train.mask_ratio=0.999"], ["train.mask_ratio: 0.999 leaves 1 of 256"]),
        (["--world-size", "512", "--set", "model.max_text_tokens=0"], ["model.max_text_tokens: 0"]),
    ],
)
def test_what_would_stop_the_run_is_refused_in_one_line(dry_run: DryRun, flags: list[str], told: list[str]) -> None:
    code, out, err = dry_run("--config", "ecdit_m_64e", *flags)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and all(part in line for part in told)


def test_a_named_folder_without_room_for_the_checkpoints_is_refused_with_the_numbers(
    dry_run: DryRun, tmp_path: Path
) -> None:
    code, out, err = dry_run("--config", "ecdit_m_64e", "--world-size", "512", "--output", str(tmp_path / "run"))
    assert (code, out) == (2, "")
    assert "2 kept + 1 being written) = 4,630 GB" in err and "GB free; choose another folder" in err
    assert list(tmp_path.iterdir()) == []


def test_a_json_that_contradicts_the_recipe_is_refused(dry_run: DryRun, tmp_path: Path) -> None:
    contradicting = tmp_path / "zero2.json"
    contradicting.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 2048}))
    code, _, err = dry_run("--config", "ecdit_m_64e", "--world-size", "512", "--deepspeed", str(contradicting))
    assert code == 2
    assert "train_batch_size: 2048 differs from the recipe's train.global_batch_size: 4096" in err


def test_encoders_beside_training_are_told_with_what_they_keep(dry_run: DryRun, tmp_path: Path) -> None:
    pictures, vae, t5 = tmp_path / "pictures", save_vae(tmp_path / "vae"), save_t5(tmp_path / "t5")
    pictures.mkdir()
    for i, image in enumerate(crops(3)):
        (pictures / f"{i}.png").write_bytes(encoded(image, "PNG"))
        (pictures / f"{i}.txt").write_text("a part")
    flags = [
        "data.dataset=encoded",
        "data.encode=online",
        f"data.path={pictures}",
        f"data.vae={vae}",
        f"data.text=[{t5}]",
        "model.in_channels=5",
        "model.text_embed_dim=12",
        "sample.prompts=[a part]",
    ]
    code, out, err = dry_run(*(part for flag in flags for part in ("--set", flag)))
    assert (code, err) == (2, ""), "data.heldout_path is not named"
    assert f"data         3 raw samples in {pictures}; latents 16 x 16" in out
    (line,) = (line for line in out.splitlines() if line.startswith("beside"))
    sizes = [
        sum(values.numel() for values in load_file(next(folder.glob("*.safetensors"))).values()) for folder in (vae, t5)
    ]
    assert f"each device keeps {sizes[0]:,} parameters of the image encoder and {sizes[1]:,} of the text" in line
    assert "pictures and captions" in line
    code, _, err = dry_run(*(part for flag in [*flags, "model.in_channels=4"] for part in ("--set", flag)))
    assert code == 2 and "latents (5, 16, 16), but the model's are (4, 16, 16)" in err


@pytest.mark.parametrize("key", ["data.vae", "data.text"])
def test_a_recipes_file_chooses_nothing_that_is_fetched_and_who_types_a_name_does(
    key: str, dry_run: DryRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "somebody/model"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded(crops(1)[0], "PNG"))
    (tmp_path / "pictures" / "a.txt").write_text("a part")
    asked = ["data.dataset=encoded", "data.encode=online", f"data.path={tmp_path / 'pictures'}"]
    named = f"{key}=[{name}]" if key == "data.text" else f"{key}={name}"
    (tmp_path / "mine.yaml").write_text(dump_recipe(load_recipe("demo", [*asked, named])))

    def seek(*_: object, **__: object) -> None:
        print("SOUGHT")
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", seek)
    code, out, err = dry_run("--config", str(tmp_path / "mine.yaml"))
    assert code == 2 and "SOUGHT" not in out and f"train.py: --set {key}={name}" in err
    code, out, err = dry_run("--config", str(tmp_path / "mine.yaml"), "--set", named)
    assert code == 2 and "SOUGHT" in out and "the hub does not give it" in err


def test_an_encoded_set_is_told_and_one_of_other_shapes_is_refused(dry_run: DryRun, tmp_path: Path) -> None:
    recipe = load_recipe("demo")
    small = dataclasses.replace(recipe, data=DataConfig(num_train=8, num_heldout=8, cache_dir=str(tmp_path)))
    open_split(small, "train", encoders_of(recipe))
    (folder,) = tmp_path.iterdir()
    flags = ["--set", "data.dataset=encoded", "--set", f"data.path={folder}", "--set", "sample.prompts=[]"]
    code, out, err = dry_run(*flags)
    assert (code, err) == (2, ""), "data.heldout_path is not named"
    assert f"8 encoded samples in {folder}" in out and "data.heldout_path names no folder yet" in out
    code, _, err = dry_run(*flags, "--set", "model.in_channels=5")
    assert code == 2
    assert "holds latents (3, 16, 16), but the model's are (5, 16, 16)" in err


def test_a_mixture_is_told_with_the_shares_of_its_sets_and_sizes(dry_run: DryRun, tmp_path: Path) -> None:
    width = load_recipe("demo").model.text_embed_dim
    square, wide = (3, 16, 16), (3, 12, 20)
    a = write_set(tmp_path / "a", [(square, 3), (wide, 1)], tokens=4, width=width)
    b = write_set(tmp_path / "b", [(square, 2)], tokens=4, width=width)
    flags = [
        "model.max_text_tokens=4",
        "data.dataset=encoded",
        f"data.path=[{a}, {b}]",
        "data.weights=[1, 4]",
        f"data.heldout_path={b}",
        "sample.prompts=[]",
    ]
    code, out, err = dry_run(*(part for flag in flags for part in ("--set", flag)))
    assert (code, err) == (0, "")
    assert f"data         6 encoded samples in {a} (20 %), {b} (80 %); latents 12 x 20 (5 %), 16 x 16 (95 %)\n" in out
    assert f"data         2 encoded samples in {b}; latents 16 x 16\n" in out


def test_flags_of_a_dry_run_are_refused_without_it(tmp_path: Path) -> None:
    command = [sys.executable, "ecdit_ds/train.py", "--world-size", "2", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--world-size: 2 has no effect without --dry-run" in done.stderr
    assert not (tmp_path / "run").exists()


def test_sizes_of_which_there_are_fewer_samples_than_a_step_takes_are_told() -> None:
    held = {(3, 4, 4): 64, (3, 2, 8): 63, (3, 8, 2): 5}
    (line,) = small_sizes(held, 64)
    assert "the 64 of a step: 2 x 8 (63), 8 x 2 (5);" in line and "fewer --buckets" in line
    assert small_sizes(held, 5) == []


def test_a_run_that_would_need_another_folder_is_not_in_order(dry_run: DryRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own folder was not named, so that is no error of the flags; but the same command would not train."""
    code, out, err = dry_run()
    assert (code, err) == (0, "") and out.endswith("all checks passed; nothing was trained\n")
    full = shutil._ntuple_diskusage(10**12, 10**12, 0)
    monkeypatch.setattr("ecdit_ds.training.dry_run.shutil.disk_usage", lambda path: full)
    code, out, err = dry_run()
    assert (code, err) == (2, "") and "so the run needs another --output" in out
    assert out.endswith("the other checks passed, but training needs another --output; nothing was trained\n")
