"""Whatever breaks, at whatever moment of a save: the next life finds a whole checkpoint and ends as the unbroken run.

Faults are ordered by name and moment (`ecdit_ds/runtime/fault_injection.py`); all runs share one warm process.
"""

import json
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from ecdit_ds.checkpoint.fault_points import SAVE_PHASES
from ecdit_ds.checkpoint.naming import list_checkpoints
from ecdit_ds.checkpoint.reader import Reader
from ecdit_ds.data.order import sample_order
from ecdit_ds.errors import ExitCode
from tests.helpers.checkpoints import digest
from tests.helpers.launch import Planned, finish, metrics_of, start_many, train_many
from tests.helpers.recipes import SMALL_MODEL, arguments
from tests.helpers.witness import SAMPLES_FILE

STEPS, EVERY, BATCH, NUM_TRAIN = 12, 3, 8, 24
SMALL = (
    *SMALL_MODEL,
    f"train.max_steps={STEPS}",
    f"train.checkpoint_every={EVERY}",
    "train.log_every=1",
    f"data.num_train={NUM_TRAIN}",
)
KILLED_OR_ALONE = (-signal.SIGKILL, ExitCode.RETRY)
STOPS = sorted(random.Random(9).sample(range(1, STEPS), 5))
RESIZED = ((4, 4), (2, 4), (1, 4), (4, 2))
"""(ranks, ranks that wrote the checkpoint)"""
LONG = 100
LOSSES = (
    ("kill", -signal.SIGKILL),
    ("segfault", -signal.SIGSEGV),
    ("abort", -signal.SIGABRT),
    ("exit=137", 137),
)
GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_v1"
GOLDEN_LOSSES = [1.8126648664474487, 1.8873213529586792]
"""Of steps 4 and 5, as the release that wrote it trained them."""
SAME = ("step", "samples_seen", "loss", "grad_norm", "learning_rate")


def golden_arguments(root: Path) -> list[str]:
    """Return train.py's arguments to go on from the stored checkpoint."""
    changes = (
        *SMALL_MODEL,
        "model.hidden_size=16",
        "model.num_heads=1",
        "model.num_kv_heads=1",
        "model.cross_num_heads=1",
        "model.ffn_hidden_size=16",
        "model.num_experts=2",
        "train.max_steps=5",
        "train.checkpoint_every=3",
        "train.log_every=1",
        "parallel.ep=2",
        "data.num_heldout=8",
    )
    return arguments(root / "golden", root / "cache", *changes, resume=str(GOLDEN))


def elastic(root: Path, name: str, ranks: int, steps: int, source: str = "auto") -> Planned:
    """Return a data-parallel run of so many ranks that starts afresh or from another run."""
    changes = (
        *SMALL_MODEL,
        f"train.max_steps={steps}",
        "train.checkpoint_every=1000",
        "optimizer.schedule=constant",
        "optimizer.warmup_steps=0",
        "optimizer.learning_rate=1e-3",
    )
    resume = source if source == "auto" else str(root / source)
    return Planned(ranks, arguments(root / name, root / "cache", *changes, resume=resume))


class Lives:
    """Plans runs of 2 ranks, expert-parallel, each in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def life(
        self,
        name: str,
        faults: str = "",
        codes: tuple[int, ...] = (0,),
        *overrides: str,
        environment: dict[str, str] | None = None,
    ) -> Planned:
        """Return one life of run `name`; the next one of that name goes on from what it leaves."""
        changes = (*SMALL, "parallel.ep=2", *overrides)
        return Planned(
            2,
            arguments(self.root / name, self.root / "cache", *changes),
            {"ECDIT_FAULTS": faults} | (environment or {}),
            codes,
        )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run everything that needs nobody to interfere; return the folder and what was said."""
    root = tmp_path_factory.mktemp("faults")
    lives = Lives(root)
    samples = {name: {SAMPLES_FILE: str(root / f"{name}.samples")} for name in ("reference", "thrice")}
    elastic_first = [elastic(root, "4 ranks", 4, 3), elastic(root, "2 ranks", 2, 3)]
    elastic_second = [
        elastic(root, f"{ranks} after {source}", ranks, 3 + LONG, f"{source} ranks") for ranks, source in RESIZED
    ]
    first = [
        *elastic_first,
        lives.life("reference", environment=samples["reference"]),
        lives.life("at once", "", (0,), "train.async_save=false", "train.keep_every=6"),
        *(lives.life(phase, f"kill@{phase},step=9", KILLED_OR_ALONE) for phase in SAVE_PHASES),
        lives.life("slow writer", "delay=3@mid-shard,rank=1,step=6", (0,), "train.keep_every=6"),
        lives.life("full disk", "full@mid-shard,rank=1,step=6"),
        lives.life("hanging", "delay=60@mid-shard,rank=1,step=6", (ExitCode.RETRY,), "train.save_timeout_minutes=0.03"),
        lives.life(
            "hanging at once",
            "delay=60@mid-shard,rank=1,step=6",
            (ExitCode.RETRY,),
            "train.save_timeout_minutes=0.03",
            "train.async_save=false",
        ),
        lives.life("stuck removal", "full@during-removal,step=9; full@after-rename,step=6"),
        lives.life("back to back", "delay=0.1@mid-shard", (0,), "train.checkpoint_every=1"),
        Planned(2, golden_arguments(root)),
        lives.life("anchored", "", (0,), "train.keep_every=6"),
        lives.life("thrice", "kill@step,step=4", KILLED_OR_ALONE, environment=samples["thrice"]),
        *(
            lives.life(f"loser {fault}", f"{fault}@step,step=8,rank=1", (code, ExitCode.RETRY))
            for fault, code in LOSSES
        ),
    ]
    second = [
        *elastic_second,
        *(lives.life(phase) for phase in SAVE_PHASES),
        lives.life("hanging"),
        lives.life("thrice", "kill@step,step=8,rank=1", KILLED_OR_ALONE, environment=samples["thrice"]),
    ]
    third = [lives.life("thrice", "kill@step,step=11", KILLED_OR_ALONE, environment=samples["thrice"])]
    stops = [
        [
            lives.life(
                f"stopped, {n} workers",
                f"sigusr1@step,step={step},rank={step % 2}",
                (ExitCode.CHECKPOINTED,),
                f"data.num_workers={n}",
            )
            for n in (0, 2)
        ]
        for step in STOPS
    ]
    last = [
        lives.life("thrice", environment=samples["thrice"]),
        *(lives.life(f"stopped, {n} workers", "", (0,), f"data.num_workers={n}") for n in (0, 2)),
    ]
    return root, train_many(root, first, second, third, *stops, last)


@pytest.mark.parametrize("phase", SAVE_PHASES)
def test_a_run_killed_in_any_phase_of_a_save_goes_on_from_the_newest_published_and_ends_the_same_bitwise(
    story: tuple[Path, str], phase: str
) -> None:
    root, said = story
    is_published = phase in ("after-rename", "before-latest", "during-removal")
    assert f"goes on from {root / phase}/checkpoints/step_{9 if is_published else 6} at step" in said
    assert_same(root / phase, root / "reference")


def test_a_save_waits_for_its_slowest_writer_while_training_goes_on(story: tuple[Path, str]) -> None:
    root, said = story
    [seconds] = re.findall(rf"saved {root}/slow writer/checkpoints/step_6: .* published after ([0-9.]+) s", said)
    assert float(seconds) >= 3
    assert_same(root / "slow writer", root / "reference")


def test_what_is_saved_in_the_background_is_the_state_at_the_call(story: tuple[Path, str]) -> None:
    root, _ = story
    for step in (9, 12):
        assert digest(root / "reference", step) == digest(root / "at once", step)
    for step in (6, 9):  # the writer of step 6 was held while later steps were taken
        assert digest(root / "slow writer", step) == digest(root / "at once", step)


def test_a_disk_full_for_one_rank_costs_one_save_and_nothing_else(story: tuple[Path, str]) -> None:
    root, said = story
    told = (
        rf"step 6: not saved, training goes on: .*{root}/full disk.*writer 1: .*shard-00001.*the disk is full: [0-9]+"
    )
    assert re.search(told, said)
    assert re.search(r"rank 1: step 6 will not be saved: .*the disk is full", said)
    assert_same(root / "full disk", root / "reference")


def test_a_writer_that_hangs_is_named_in_time_and_nothing_is_published(story: tuple[Path, str]) -> None:
    root, said = story
    for name in ("hanging", "hanging at once"):
        told = rf"error: {root}/{name}/checkpoints/step_6: ranks 1 have not written their part within 0.03"
        assert re.search(told, said)
    assert not (root / "hanging at once" / "checkpoints" / "step_6").exists()
    assert f"goes on from {root}/hanging/checkpoints/step_3" in said
    assert_same(root / "hanging", root / "reference")


def test_what_fails_after_publishing_costs_nothing(story: tuple[Path, str]) -> None:
    root, said = story
    assert re.search(rf"saved {root}/stuck removal/checkpoints/step_6: ", said)
    assert "an old checkpoint stays: [Errno 28] a drill" in said
    for name in SAME:
        wanted = [m[name] for m in metrics_of(root / "reference")]
        assert [m[name] for m in metrics_of(root / "stuck removal")] == wanted, name
    assert digest(root / "stuck removal", STEPS) == digest(root / "reference", STEPS)


def test_saves_back_to_back_are_in_flight_one_at_a_time(story: tuple[Path, str]) -> None:
    root, said = story
    saved = re.findall(rf"saved {root}/back to back/checkpoints/step_([0-9]+)", said)
    assert saved == [str(step) for step in range(1, STEPS + 1)]
    assert_same(root / "back to back", root / "reference")


def test_anchors_outlive_newer_checkpoints(story: tuple[Path, str]) -> None:
    root, _ = story
    assert [folder.name for folder in list_checkpoints(root / "anchored" / "checkpoints")] == [
        "step_12",
        "step_9",
        "step_6",
    ]
    assert [folder.name for folder in list_checkpoints(root / "reference" / "checkpoints")] == ["step_12", "step_9"]
    assert (root / "reference" / "checkpoints" / "latest").read_text() == "step_12\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_five_times_has_the_losses_and_the_weights_of_the_unbroken_one_bitwise(
    story: tuple[Path, str], workers: int
) -> None:
    root, said = story
    name = f"stopped, {workers} workers"
    for step in STOPS:
        assert f"goes on from {root}/{name}/checkpoints/step_{step} at step {step}" in said
    assert_same(root / name, root / "reference")


def test_a_run_killed_three_times_trains_on_every_sample_once_an_epoch_in_the_same_order(
    story: tuple[Path, str],
) -> None:
    root, _ = story
    reference, thrice = samples_of(root / "reference.samples"), samples_of(root / "thrice.samples")
    assert reference.keys() == {(rank, step) for rank in range(2) for step in range(1, STEPS + 1)}
    assert thrice == reference
    by_step = [np.array(reference[0, step] + reference[1, step]) for step in range(1, STEPS + 1)]
    trained = sample_order(np.concatenate(by_step), NUM_TRAIN, seed=0)
    for epoch in trained.reshape(-1, NUM_TRAIN):
        assert sorted(epoch) == list(range(NUM_TRAIN))
    assert_same(root / "thrice", root / "reference")


@pytest.mark.parametrize(("fault", "code"), LOSSES)
def test_a_lost_rank_is_named_in_one_line_and_its_peers_end_within_five_seconds(
    story: tuple[Path, str], fault: str, code: int
) -> None:
    root, said = story
    newest = f"{root}/loser {fault}/checkpoints/step_"  # 6 if its files were on the disk by then, else 3
    line = "end: retry | cause: rank 1 died | rank 0 | step 7 | last valid checkpoint: "
    [end] = re.finditer(rf"{re.escape(line + newest)}[36]\n", said)
    [(dead, at)] = re.findall(rf"process ([0-9]+) ended with {code} at ([0-9.]+)\n", said[: end.end()])[-1:]
    [(peer, later)] = re.findall(r"process ([0-9]+) ended with 75 at ([0-9.]+)\n", said[end.end() :])[:1]
    assert float(later) - float(at) < 5
    assert not psutil.pid_exists(int(dead)) and not psutil.pid_exists(int(peer))


@pytest.mark.parametrize(("ranks", "source"), RESIZED[1:])
def test_a_hundred_steps_after_a_change_of_the_number_of_ranks_the_losses_are_still_the_same(
    story: tuple[Path, str], ranks: int, source: int
) -> None:
    root, _ = story
    unchanged, resized = metrics_of(root / "4 after 4"), metrics_of(root / f"{ranks} after {source}")
    assert len(resized) == LONG
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in resized] == pytest.approx([m[name] for m in unchanged], rel=1e-5), name


def test_an_old_life_that_did_not_die_cannot_publish_over_the_new_one(story: tuple[Path, str]) -> None:
    root, _ = story
    lives, output, job = Lives(root), root / "two lives", {"SLURM_JOB_ID": "7"}
    old = start_many(
        root, [lives.life("two lives", "stop@before-rename,rank=0,step=6", (ExitCode.UNRECOVERABLE,), environment=job)]
    )
    holder = _wait_for_stopped(output)
    said = train_many(root, [lives.life("two lives", environment=job | {"SLURM_RESTART_COUNT": "1"})])
    assert f"goes on from {output}/checkpoints/step_3" in said
    before = {path: path.stat().st_mtime_ns for path in (output / "checkpoints").rglob("*")}
    holder.send_signal(signal.SIGCONT)
    code, told = finish(old)
    assert code == 0, told  # both ranks ended with UNRECOVERABLE, as planned
    assert re.search(r"attempt 7\.1\.\S+ has taken over from this one, 7\.0\.", told)
    assert {path: path.stat().st_mtime_ns for path in (output / "checkpoints").rglob("*")} == before
    assert_same(output, root / "reference")


def test_training_outlives_a_disk_without_room_and_a_closed_terminal(story: tuple[Path, str]) -> None:
    root, _ = story
    output = root / "no room"
    run = start_many(root, [Lives(root).life("no room", "delay=0.2@step")])
    rank_0 = _wait_for_step(run, output, 2)
    with _limited_files(rank_0, size_bytes=100):  # no file may grow beyond it: logs, events and shards alike
        _wait_until_damaged(run, output)
    assert run.stdout is not None
    run.stdout.close()
    assert run.wait(timeout=120) == 0
    assert "step_3" not in {path.name for path in (output / "checkpoints").iterdir()}
    assert_same(output, root / "reference")


def test_a_checkpoint_of_the_first_format_still_goes_on_with_the_losses_of_its_day(story: tuple[Path, str]) -> None:
    root, _ = story
    assert [m["step"] for m in metrics_of(root / "golden")] == [4, 5]
    assert [m["loss"] for m in metrics_of(root / "golden")] == pytest.approx(GOLDEN_LOSSES, rel=1e-5)


def _wait_for_stopped(output: Path) -> psutil.Process:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lock = output / ".lock"
        if lock.exists() and (process := lock.read_text().partition(" ")[0]):
            found = psutil.Process(int(process))
            if found.status() == psutil.STATUS_STOPPED:
                return found
        time.sleep(0.05)
    pytest.fail("nobody stopped")


def _wait_for_step(run: "subprocess.Popen[str]", output: Path, step: int) -> psutil.Process:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert run.poll() is None, finish(run)
        if (output / "metrics.jsonl").exists() and len(metrics_of(output)) >= step:
            return psutil.Process(int((output / ".lock").read_text().partition(" ")[0]))
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached: {finish(run, 1)}")


@contextmanager
def _limited_files(process: psutil.Process, size_bytes: int) -> Iterator[None]:
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size_bytes, hard))
    yield
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))


def _wait_until_damaged(run: "subprocess.Popen[str]", output: Path) -> None:
    """Wait until a report and a save have failed: step 3's, which is due 0.2 s after step 2's report."""
    time.sleep(1.0)
    assert run.poll() is None, finish(run)
    assert len(metrics_of(output)) <= 3


def samples_of(file: Path) -> dict[tuple[int, int], list[int]]:
    """Return the samples by rank and step; whoever trained a step again must have used the same."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank, indices in map(json.loads, file.read_text().splitlines()):
        steps = {index // BATCH + 1 for index in indices}
        assert len(steps) == 1
        assert found.setdefault((rank, *steps), indices) == indices
    return found


def assert_same(output: Path, reference: Path) -> None:
    """Compare losses, the last checkpoint to the last bit, and that nothing half-done is left."""
    for name in SAME:
        assert [m[name] for m in metrics_of(output)] == [m[name] for m in metrics_of(reference)], name
    assert digest(output, STEPS) == digest(reference, STEPS)
    for folder in list_checkpoints(output / "checkpoints"):
        Reader(folder).verify()
    assert not [path for path in (output / "checkpoints").iterdir() if ".tmp-" in path.name or "trash" in path.name]
