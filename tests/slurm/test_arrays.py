"""Array jobs, really submitted: slurm/encode.sh, sample.sh and evaluate.sh on virtual nodes, with tiny work on CPUs."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from ecdit_ds.config.yaml_loader import load_recipe
from ecdit_ds.data.latents.dataset import LatentDataset
from ecdit_ds.inference.image_folder import read_gallery
from tests.conftest import TINY_RECIPE
from tests.helpers.launch import ROOT
from tests.helpers.photographs import crops, encoded
from tests.helpers.random_model import save_random_model
from tools.local_slurm import LocalSlurm, why_not
from tools.sample import draw, parse_arguments

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ON_CPUS = ("--gpus-per-node=0", "--cpus-per-task=1", "--nodes=1", "--ntasks-per-node=1", "--mem-per-cpu=30")
ENVIRONMENT = {
    "ECDIT_REHEARSAL": "1",
    "ECDIT_MASTER_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "ECDIT_STEPS_PER_INDEX": "1",
}
PROMPTS = ("a nine", "a six", "a two", "a four", "two ones")
DRAWING = ("--prompt", *PROMPTS, "--seed", "7", "--batch-size", "1", "--steps", "2", "--height", "16")
STEPS = (1, 2)
SECONDS_AT_MOST = 80
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a task of an array ended, or a job without one."""

    state: str
    code: int
    restarts: int
    log: str
    errors: list[str]


class Arrays:
    """Submits scripts of slurm/, and waits for them."""

    def __init__(self, lab: LocalSlurm, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self._jobs: dict[str, str] = {}

    def submit(self, name: str, script: str, *arguments: object, flags: tuple[str, ...] = ()) -> str:
        """Submit a script; its log is NAME_INDEX.log. Returns the job's number."""
        log = f"--output={self.folder / name}_%a.log"
        command = ("sbatch", "--parsable", log, *ON_CPUS, *flags, f"slurm/{script}", *map(str, arguments))
        at = {"ECDIT_ROOT": str(ROOT)}
        self._jobs[name] = self.lab.ask(*command, environment=ENVIRONMENT | at).strip()
        return self._jobs[name]

    def ended(self, name: str) -> Mapping[int | None, Ended]:
        """Wait for all tasks of a job, and return how each ended, by index; None where it is no array."""
        deadline = time.monotonic() + SECONDS_AT_MOST
        while True:
            lines = self.lab.ask("scontrol", "show", "job", "--oneliner", self._jobs[name]).splitlines()
            told = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
            if all(job["JobState"] in OVER for job in told):
                return {self._index(job): self._ended(name, job) for job in told}
            assert time.monotonic() < deadline, (told, [log.read_text() for log in self.folder.glob(f"{name}_*.log")])
            time.sleep(0.2)

    def _index(self, job: Mapping[str, str]) -> int | None:
        return int(job["ArrayTaskId"]) if "ArrayTaskId" in job else None

    def _ended(self, name: str, job: Mapping[str, str]) -> Ended:
        log = Path(job["StdOut"]).read_text()
        return Ended(
            state=job["JobState"],
            code=int(job["ExitCode"].split(":")[0]),
            restarts=int(job["Restarts"]),
            log=log,
            errors=[line for line in log.splitlines() if line.startswith("error: ")],
        )


def wait_for(path: Path) -> None:
    """Wait until there is such a file."""
    deadline = time.monotonic() + SECONDS_AT_MOST
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with five captioned photographs and a run of two random checkpoints."""
    root = tmp_path_factory.mktemp("arrays")
    (root / "pictures").mkdir()
    for i, image in enumerate(crops(5)):
        (root / "pictures" / f"{i}.jpg").write_bytes(encoded(image))
        (root / "pictures" / f"{i}.txt").write_text(f"part {i}")
    (root / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    recipe = load_recipe(str(root / "tiny.yaml"), [f"data.cache_dir={root / 'cache'}"])
    for step in STEPS:
        save_random_model(root / "run" / "checkpoints", recipe, step)
    return root


@pytest.fixture(scope="module")
def arrays(folder: Path) -> Iterator[Arrays]:
    """Return a lab in which all jobs of this file were submitted, and a task that draws was begun twice."""
    checkpoint = folder / "run" / "checkpoints" / "step_2"
    with LocalSlurm(nodes=1, gpus=1) as lab:
        arrays = Arrays(lab, folder)
        drawing = arrays.submit(
            "sample",
            "sample.sh",
            "--checkpoint",
            checkpoint,
            "--output",
            folder / "drawn",
            *DRAWING,
            flags=("--array=0-1",),
        )
        arrays.submit("nothing", "evaluate.sh", folder / "run", "loss", flags=("--array=3",))
        arrays.submit("same", "sample.sh", "--task", "1/2", "--checkpoint", checkpoint, flags=("--array=0-1",))
        arrays.submit("no_array", "evaluate.sh", folder / "run", "loss")
        wait_for(folder / "drawn" / "task_0_of_2" / "settings.json")
        lab.ask("scontrol", "requeue", f"{drawing}_0")
        arrays.submit(
            "encode",
            "encode.sh",
            folder / "pictures",
            folder / "set",
            "--size",
            32,
            "--shard-samples",
            2,
            flags=("--array=4-5",),
        )
        arrays.submit(
            "evaluate",
            "evaluate.sh",
            folder / "run",
            "loss",
            "--samples",
            8,
            "--times",
            2,
            "--ep",
            2,
            flags=("--array=1,2", "--ntasks-per-node=2"),
        )
        arrays.submit("gaps", "encode.sh", folder / "pictures", folder / "gaps", "--size", 32, flags=("--array=0,3",))
        yield arrays


def test_tasks_encode_one_set_together(arrays: Arrays, folder: Path) -> None:
    ended = arrays.ended("encode")
    assert {index: task.code for index, task in ended.items()} == {4: 0, 5: 0}, ended
    assert [sample.caption for sample in map(LatentDataset(folder / "set").__getitem__, range(5))] == [
        f"part {i}" for i in range(5)
    ]
    assert not (folder / "set.partial").exists()
    assert sum("other tasks have units left" in task.log for task in ended.values()) <= 1


def test_tasks_draw_what_one_command_draws_also_when_one_is_requeued(
    arrays: Arrays, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "1"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, number)
    whole = folder / "whole"
    checkpoint = folder / "run" / "checkpoints" / "step_2"
    draw(parse_arguments(["--checkpoint", str(checkpoint), "--output", str(whole), *DRAWING]))
    ended = arrays.ended("sample")
    assert {index: (task.code, task.restarts) for index, task in ended.items()} == {0: (0, 1), 1: (0, 0)}, ended
    parts = [read_gallery(folder / "drawn" / f"task_{task}_of_2") for task in (0, 1)]
    assert [[picture.index for picture in part] for part in parts] == [[0, 2, 4], [1, 3]]
    assert sorted([*parts[0], *parts[1]], key=lambda picture: picture.index) == read_gallery(whole)
    for task, part in enumerate(parts):
        for picture in part:
            drawn = (folder / "drawn" / f"task_{task}_of_2" / picture.file).read_bytes()
            assert drawn == (whole / picture.file).read_bytes()


def test_tasks_score_a_checkpoint_each_in_folders_of_their_own(arrays: Arrays, folder: Path) -> None:
    ended = arrays.ended("evaluate")
    assert {index: task.code for index, task in ended.items()} == {1: 0, 2: 0}, ended
    assert {path.name for path in (folder / "run" / "evaluation").iterdir()} == {"step_1", "step_2"}
    for step in STEPS:
        told = json.loads((folder / "run" / "evaluation" / f"step_{step}" / "loss" / "results.json").read_text())
        assert told["settings"]["checkpoint"].startswith(f"step_{step} ")
        assert told["results"]["mean"] > 0


def test_an_array_that_names_no_checkpoint_ends_in_one_line_and_is_not_begun_again(
    arrays: Arrays, folder: Path
) -> None:
    (task,) = arrays.ended("nothing").values()
    assert (task.state, task.code, task.restarts, len(task.errors)) == ("FAILED", 2, 0, 1), task
    assert f"no checkpoint {folder}/run/checkpoints/step_3 (index 3 x ECDIT_STEPS_PER_INDEX=1)" in task.errors[0]
    assert task.errors[0].endswith("there are 2: step_1 step_2") and task.log.count("\n") == 1
    (job,) = arrays.ended("no_array").values()
    assert (job.state, job.code, job.restarts, len(job.errors)) == ("FAILED", 2, 0, 1), job
    assert "no array; name checkpoints by sbatch --array=" in job.errors[0] and job.log.count("\n") == 1


def test_an_array_of_which_all_are_told_to_be_one_task_is_refused(arrays: Arrays) -> None:
    ended = arrays.ended("same")
    assert {index: (task.code, task.restarts) for index, task in ended.items()} == {0: (2, 0), 1: (2, 0)}, ended
    told = "error: --task: names one task, and this array has 2; submit with --array=0\n"
    assert [task.log for task in ended.values()] == [told, told]


def test_an_array_with_gaps_encodes_nothing_and_is_not_begun_again(arrays: Arrays, folder: Path) -> None:
    ended = arrays.ended("gaps")
    assert {index: (task.code, task.restarts) for index, task in ended.items()} == {0: (2, 0), 3: (2, 0)}, ended
    for task in ended.values():
        assert len(task.errors) == 1 and "with gaps; submit --array=0-1" in task.errors[0]
        assert "Traceback" not in task.log
    assert not (folder / "gaps").exists() and not (folder / "gaps.partial").exists()
