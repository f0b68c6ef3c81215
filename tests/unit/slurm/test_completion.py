"""A 0 of srun counts where every rank has reported that its work is complete: marks, and who acts by them."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest

from ecdit_ds import train
from ecdit_ds.errors import ConfigError, ExitCode, RankLostError, StaleRunError
from ecdit_ds.slurm import completion as module
from ecdit_ds.slurm import controller as scheduler
from ecdit_ds.slurm import preflight, run_task
from ecdit_ds.slurm.completion import (
    ARRAY_TASK,
    DRY_RUN,
    NODE_CHECK,
    VARIABLE,
    Completion,
    expect_completion,
    mark_complete,
    mark_ended,
)
from ecdit_ds.slurm.controller import SlurmJob
from ecdit_ds.slurm.job_history import JobHistory, RequeueDecision
from ecdit_ds.slurm.signals import TerminationWatch
from ecdit_ds.slurm.supervise import JobAttempt
from tests.helpers.forked import in_a_copy
from tests.helpers.launch import free_port
from tests.helpers.photographs import crops, encoded
from tools import encode_data, evaluate, sample

ROOT = Path(__file__).resolve().parents[3]
Leave = Callable[..., None]
MARK = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ecdit_ds.slurm.completion import *; mark_complete"
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIGHT_SECONDS", 0.0)
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.01)


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Leave:
    """Return `leave(completion, rank, size, work)`: leave a mark as that rank would."""

    def as_rank(completion: Completion, rank: int, size: int, work: str = DRY_RUN) -> None:
        for name, value in (
            completion.environment | {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size)}
        ).items():
            monkeypatch.setenv(name, value)
        mark_complete(work)

    return as_rank


@pytest.fixture
def leave_end(leave: Leave) -> Leave:
    """Return `leave_end(completion, rank, size, code)`: end as that rank, with an exit code."""

    def as_rank(completion: Completion, rank: int, size: int, code: int) -> None:
        with patch.object(module, "mark_complete", lambda work: leave(completion, rank, size, work)):
            mark_ended(code)

    return as_rank


def doubt(completion: Completion, work: str = DRY_RUN) -> str:
    """Return why a step is not believed."""
    with pytest.raises(RankLostError) as refused:
        completion.confirm(lambda: work)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_step_is_believed_once_its_last_rank_has_left_a_mark_and_nothing_stays(tmp_path: Path, leave: Leave) -> None:
    with expect_completion(tmp_path / "new" / "marks") as completion:
        for rank in (2, 0, 1):
            assert doubt(completion)
            leave(completion, rank, 3)
        completion.confirm(lambda: DRY_RUN)
        assert len(list((tmp_path / "new" / "marks").iterdir())) == 3
    assert list((tmp_path / "new" / "marks").iterdir()) == []


def test_a_step_whose_first_rank_is_missing_and_one_whose_later_ones_are_name_them(
    tmp_path: Path, leave: Leave
) -> None:
    with expect_completion(tmp_path) as completion:
        leave(completion, 1, 12)
        assert "exit code 0, but rank 0 never reported its dry run as complete" in doubt(completion)
        leave(completion, 0, 12)
        assert "rank 2, 3, 4, 5, 6, 7, 8, 9 and 2 more of 12 never reported" in doubt(completion)


def test_marks_that_are_seen_late_are_waited_for(tmp_path: Path, leave: Leave) -> None:
    with expect_completion(tmp_path) as completion:
        asked: list[str] = []

        def work() -> str:
            asked.append(DRY_RUN)
            if len(asked) == 3:
                leave(completion, 0, 1)
            return DRY_RUN

        completion.confirm(work, patience_s=20)
    assert len(asked) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-1],
        lambda text: text[: len(text) // 2],
        lambda text: text[1:],
        lambda text: text + text,
        lambda text: "\0" * len(text),
        lambda text: text.replace("rank ", "rank 1"),
        lambda text: text.replace("of 2", "of 1"),
        lambda text: text.replace("dry", "wet"),
        lambda text: text[:-2] + ("f" if text[-2] != "f" else "e") + "\n",
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_or_forged_mark_is_none(
    tmp_path: Path, leave: Leave, rank: int, damage: Callable[[str], str]
) -> None:
    with expect_completion(tmp_path) as completion:
        for each in (0, 1):
            leave(completion, each, 2)
        completion.confirm(lambda: DRY_RUN)
        mark = tmp_path / f"{completion.path.name}-{rank}"
        mark.write_text(damage(mark.read_text()))
        assert doubt(completion)


def test_an_older_steps_marks_are_not_believed_whatever_their_name(tmp_path: Path, leave: Leave) -> None:
    with expect_completion(tmp_path) as older, expect_completion(tmp_path) as newer:
        leave(older, 0, 1)
        assert doubt(newer)
        shutil.copy(f"{older.path}-0", f"{newer.path}-0")
        assert doubt(newer)


def test_ranks_that_completed_something_else_are_not_believed(tmp_path: Path, leave: Leave) -> None:
    with expect_completion(tmp_path) as completion:
        leave(completion, 0, 1, DRY_RUN)
        told = doubt(completion, "training to step 30")
        assert "ranks report a complete dry run, where training to step 30 is what was to be found" in told


def test_a_mark_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    def noted(name: str) -> Callable[..., object]:
        really = getattr(os, name)
        return lambda *arguments: did.append(name) or really(*arguments)  # type: ignore[func-returns-value]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    with expect_completion(tmp_path) as completion:
        leave(completion, 0, 1)
    assert did[:2] == ["fsync", "replace"]


def test_a_mark_that_cannot_be_written_is_told_in_one_line_and_ends_nothing(
    tmp_path: Path, leave: Leave, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(Completion(tmp_path / "gone" / ".complete-00"), 3, 4)
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/gone/.complete-00-3: cannot be written: "
        "No such file or directory\n"
    )


@pytest.mark.parametrize("code", [ExitCode.USER_ERROR, ExitCode.UNRECOVERABLE, ExitCode.INTERRUPTED])
@pytest.mark.parametrize("code_of_peers", [1, 75, 137, 143])
def test_a_rank_that_ended_for_good_decides_whatever_became_of_its_peers(
    tmp_path: Path, leave_end: Leave, code: int, code_of_peers: int
) -> None:
    with expect_completion(tmp_path) as older, expect_completion(tmp_path) as completion:
        leave_end(older, 1, 2, code)
        leave_end(completion, 0, 2, code_of_peers)
        assert completion.judge(code_of_peers) == code_of_peers
        leave_end(completion, 1, 2, code)
        assert completion.judge(code_of_peers) == code
        (mark,) = tmp_path.glob(f"{completion.path.name}-*")
        mark.write_text(mark.read_text().replace("of 2", "of 3"))
        assert completion.judge(code_of_peers) == code_of_peers
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--hold-signals"]])
@pytest.mark.parametrize("inherited", [None, "another/.complete-00"])
def test_ranks_leave_marks_where_nothing_of_the_environment_but_slurms_own_is_handed_on(
    tmp_path: Path, flags: list[str], inherited: str | None
) -> None:
    (tmp_path / "program.py").write_text(f"{MARK}(ARRAY_TASK)")
    command = ["srun", "--export=NONE", "slurm/rank.sh", *flags, str(tmp_path / "program.py"), "slurm/rank.sh"]
    with expect_completion(tmp_path / "marks") as completion:
        assert completion.told_to(["srun", "true"]) == ["srun", "true"]
        subprocess.run(
            completion.told_to(command)[2:],
            cwd=ROOT,
            check=True,
            env=TASK | {"ECDIT_PYTHON": sys.executable} | ({VARIABLE: inherited} if inherited else {}),
        )
        completion.confirm(lambda: ARRAY_TASK)


def test_an_arrays_task_and_each_step_of_a_life_tell_their_ranks_by_an_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []

    def noted(command: Sequence[str]) -> int:
        told.append(list(command))
        return 3

    monkeypatch.setattr(run_task, "_run", lambda command, _: noted(command))
    assert run_task.main([str(tmp_path), "srun", "slurm/rank.sh", "tools/sample.py"]) == 3
    monkeypatch.setattr(JobAttempt, "_wait_for_srun", lambda _, arguments, *__: noted(arguments))
    assert live(tmp_path, monkeypatch, launcher=("srun", "slurm/rank.sh", "--hold-signals")).exit_code == 3
    flags = [command[command.index("slurm/rank.sh") :] for command in told]
    assert [words[1] for words in flags] == ["--completion", "--hold-signals"]
    assert flags[1][2] == "--completion" and flags[1][3].startswith("run/slurm/12.0/.complete-")


def test_nobody_who_looks_for_marks_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    mark_complete(DRY_RUN)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_marks_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/marks: cannot be written: Not a directory"):
        expect_completion(tmp_path / "file" / "marks").__enter__()


SRUN = f"""#!{sys.executable} -S
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from ecdit_ds.slurm.completion import DRY_RUN, NODE_CHECK, mark_complete, mark_ended
command = " ".join(sys.argv)
step = "dry_run" if "--dry-run" in command else "preflight" if "preflight.py" in command else "train"
print(step, file=open("steps", "a"))
work = {{"dry_run": DRY_RUN, "preflight": NODE_CHECK, "train": os.environ["TRAINED"]}}[step]
started = dict(part.split("=") for part in os.environ["STARTED"].split())
size = 1 if step == "dry_run" else 2
for rank in range(size)[: int(started.get(step, size))]:
    os.environ.update(SLURM_PROCID=str(rank), SLURM_STEP_NUM_TASKS=str(size))
    mark_complete(work)
if step == os.environ.get("FAILS"):
    mark_ended(2)
    sys.exit(143)
"""
"""srun, which ends with 0 however many ranks of a step it has started: STARTED is such as `train=1`, or all of them.

In the step that FAILS names the last rank has a user error, and its peers are killed for it.
"""
STATE = "JobState=RUNNING Reason=None\n   Requeue=1 Restarts=0\n   RunTime=00:00:01 TimeLimit=UNLIMITED"
STEPS = ["dry_run", "preflight", "train"]


def live(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    started: str = "",
    trained: str = "training to step 30",
    launcher: Sequence[str] = ("srun",),
    scontrol: str | None = f"#!/bin/sh\necho '{STATE}'\n",
) -> RequeueDecision:
    """Live once with that srun, in a run that has come to step 30."""
    for name, script in (("srun", SRUN), ("scontrol", scontrol), ("squeue", "#!/bin/sh\n")):
        if script is not None:
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("STARTED", started)
    monkeypatch.setenv("TRAINED", trained)
    monkeypatch.setattr(scheduler, "_LOOK_EVERY_S", 0.01)
    monkeypatch.chdir(folder)
    (folder / "run/checkpoints/step_30").mkdir(parents=True)
    (folder / "run/checkpoints/step_30/manifest.json").touch()
    job = SlurmJob(name="12", number="12", restarts=0, num_ranks=2, nodes="n[1-2]")
    return JobAttempt(job, launcher, ["train.py", "--output", "run"], 1, TerminationWatch()).live(is_checked=True)


def test_training_is_done_where_each_step_was_done_by_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = live(tmp_path, monkeypatch)
    assert (verdict.exit_code, verdict.is_again, verdict.reason) == (ExitCode.DONE, False, "training is done")
    assert (tmp_path / "steps").read_text().split() == STEPS
    assert list((tmp_path / "run/slurm/12.0").iterdir()) == []


@pytest.mark.parametrize("scontrol", [None, "#!/bin/sh\necho scontrol is for login nodes only >&2\nexit 1\n"])
def test_a_job_on_nodes_where_scontrol_tells_nothing_trains_without_a_known_limit_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scontrol: str | None
) -> None:
    verdict = live(tmp_path, monkeypatch, scontrol=scontrol)
    assert (verdict.exit_code, verdict.is_again) == (ExitCode.DONE, False)
    assert (tmp_path / "steps").read_text().split() == STEPS
    told = [line for line in capsys.readouterr().out.splitlines() if "the time limit is not known here" in line]
    assert len(told) == 1 and ("login nodes only" if scontrol else "No such file or directory") in told[0]


@pytest.mark.parametrize(
    ("step", "started", "told"),
    [
        ("dry_run", "dry_run=0", "rank 0 never reported its dry run as complete"),
        ("preflight", "preflight=0", "rank 0 never reported its node check"),
        ("preflight", "preflight=1", "rank 1 of 2 never reported its node check"),
        ("train", "train=0", "rank 0 never reported that training is complete (newest checkpoint: step 30)"),
        ("train", "train=1", "rank 1 of 2 never reported its training to step 30"),
    ],
)
def test_a_step_of_which_not_all_was_started_is_a_life_that_failed_and_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: str,
    started: str,
    told: str,
) -> None:
    verdict = live(tmp_path, monkeypatch, started)
    assert (verdict.exit_code, verdict.is_again) == (ExitCode.RETRY, False)  # its only life
    assert (tmp_path / "steps").read_text().split() == STEPS[: STEPS.index(step) + 1]
    assert JobHistory(Path("run")).is_checked("12") == (step != "dry_run")
    assert f"exit code 75 (srun ended with exit code 0, but {told}" in Path("run/slurm/why_it_stopped.txt").read_text()
    assert [told in line for line in capsys.readouterr().out.splitlines() if "error: " in line] == [True]


@pytest.mark.parametrize("step", STEPS)
def test_a_user_error_of_one_rank_ends_a_job_for_good_although_its_peers_were_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setenv("FAILS", step)
    verdict = live(tmp_path, monkeypatch)
    assert (verdict.exit_code, verdict.is_again) == (ExitCode.USER_ERROR, False)
    assert "exit code 2: there is something to mend first" in Path("run/slurm/why_it_stopped.txt").read_text()


@pytest.mark.parametrize("trained", ["training to step 31", "training to step 3", "dry run"])
def test_training_is_not_done_unless_its_last_step_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    verdict = live(tmp_path, monkeypatch, trained=trained)
    assert verdict.exit_code == ExitCode.RETRY
    assert f"report a complete {trained}, where training to step 30 is what was to be found" in verdict.reason


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        (["true"], 75, "srun ended with exit code 0, but rank 0 never reported its array task as complete"),
        ([sys.executable, "-S", "-c", f"{MARK}(ARRAY_TASK)"], 0, ""),
        ([sys.executable, "-S", "-c", f"{MARK}(ARRAY_TASK); sys.exit(3)"], 3, ""),
        ([sys.executable, "-S", "-c", f"{MARK}(ARRAY_TASK); mark_ended(2); sys.exit(143)"], 2, ""),
        ([sys.executable, "-S", "-c", f"{MARK}(DRY_RUN)"], 75, "report a complete dry run"),
        (["sh", "-c", "kill -9 $$"], 137, ""),
        (["/no/srun"], 2, "/no/srun: No such file or directory"),
    ],
)
def test_a_task_of_an_array_ends_with_a_0_that_was_confirmed_or_another_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: list[str],
    code: int,
    told: str,
) -> None:
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")):
        monkeypatch.setenv(name, value)
    assert run_task.main([str(tmp_path / "marks"), *command]) == code
    said = capfd.readouterr().err.splitlines()
    assert len(said) == bool(told) and all(line.startswith("error: ") and told in line for line in said)
    assert list((tmp_path / "marks").iterdir()) == []


@pytest.mark.parametrize("given", ["-h", "--help", "--he"])
def test_a_task_of_an_array_that_is_only_asked_for_help_is_refused_and_not_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    command = ["/no/srun", "--hint=nomultithread", "slurm/rank.sh", "tools/sample.py", "--tp", "2", given]
    assert run_task.main([str(tmp_path / "marks"), *command]) == ExitCode.USER_ERROR
    assert capsys.readouterr().err.startswith("error: sample.py --help: does none of the work")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_an_arrays_batch_script_is_handed_on_and_what_comes_of_it_awaited(
    tmp_path: Path, number: signal.Signals
) -> None:
    ends_so = f"trap 'echo ended; exit 9' {number.name[3:]}; echo started; for _ in {{1..200}}; do sleep 0.05; done"
    command = [sys.executable, "-S", "ecdit_ds/slurm/run_task.py", str(tmp_path / "marks"), "bash", "-c", ends_so]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as task:
        assert task.stdout is not None and task.stdout.readline() == "started\n"
        task.send_signal(number)
        assert task.wait(20) == 9
        assert task.stdout.read() == "ended\n"


def test_a_task_of_an_array_needs_the_standard_library_only(tmp_path: Path) -> None:
    """With -S there is nothing else."""
    command = [sys.executable, "-S", "ecdit_ds/slurm/run_task.py", str(tmp_path / "marks"), "sh", "-c", "exit 5"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 5


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Expect marks, and return `marked()`: what was reported as complete; see `ends_told` for the rest."""
    path = tmp_path / "marks" / ".complete-00"
    path.parent.mkdir()
    for name, value in ((VARIABLE, str(path)), ("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")):
        monkeypatch.setenv(name, value)
    return lambda: [told for told in told_by_marks() if not told.startswith("end with")]


def told_by_marks() -> list[str]:
    """Return what the marks say that are expected."""
    marks = Path(os.environ[VARIABLE]).parent.iterdir()
    return [mark.read_text().partition(": ")[2].rpartition(" ")[0] for mark in marks]


def ends_told() -> list[int]:
    """Return the exit codes for good that they tell."""
    return [int(told.rpartition(" ")[2]) for told in told_by_marks() if told.startswith("end with")]


@pytest.mark.parametrize(
    ("code", "expected"),
    [(ExitCode.DONE, ["training to step 7"]), (ExitCode.CHECKPOINTED, []), (ExitCode.UNRECOVERABLE, [])],
)
def test_training_reports_its_last_step_and_no_other_end(
    marked: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    code: ExitCode,
    expected: list[str],
) -> None:
    monkeypatch.setattr("ecdit_ds.training.setup.run", lambda *_: code)
    monkeypatch.setattr("ecdit_ds.training.setup.share_cores", lambda _: None)
    assert train.main(["--set", "train.max_steps=7", "--output", str(tmp_path)]) == code
    assert marked() == expected
    assert ends_told() == [code] * (code == ExitCode.UNRECOVERABLE)


@pytest.mark.parametrize(
    ("arguments", "ends"),
    [(["--set", "train.max_steps=many"], [ExitCode.USER_ERROR]), (["--set", "parallel.tp=7"], [ExitCode.USER_ERROR])],
)
def test_training_reports_and_tells_a_user_error_on_whichever_rank_it_is(
    marked: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    ends: list[int],
) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert train.main([*arguments, "--output", str(tmp_path)]) == ExitCode.USER_ERROR
    assert (marked(), ends_told()) == ([], ends)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    monkeypatch.delenv(VARIABLE)  # as started by a launcher, which has one terminal for all
    assert train.main([*arguments, "--output", str(tmp_path)]) == ExitCode.USER_ERROR
    assert capsys.readouterr().err == ""


def test_a_rank_of_a_life_that_another_took_over_does_not_end_the_job_for_good(
    marked: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def superseded(*_: object) -> None:
        raise StaleRunError("a newer attempt took over")

    monkeypatch.setattr("ecdit_ds.training.setup.run", superseded)
    monkeypatch.setattr("ecdit_ds.training.setup.share_cores", lambda _: None)
    assert train.main(["--output", str(tmp_path)]) == ExitCode.UNRECOVERABLE
    assert (marked(), ends_told()) == ([], [])


def test_a_task_that_cannot_become_a_rank_reports_a_user_error(tmp_path: Path) -> None:
    broken = TASK | {"SLURM_STEP_TASKS_PER_NODE": "two", "ECDIT_PYTHON": sys.executable}
    with expect_completion(tmp_path / "marks") as completion:
        command = completion.told_to(["slurm/rank.sh", "program.py"])
        assert subprocess.run(command, cwd=ROOT, env=broken, check=False).returncode == ExitCode.USER_ERROR
        assert completion.judge(143) == ExitCode.USER_ERROR


def test_what_only_prints_reports_nothing(marked: Callable[[], list[str]]) -> None:
    assert train.main(["--print-config"]) == 0
    assert marked() == []


def test_a_dry_run_reports_itself_as_the_task_that_it_is_and_not_as_the_rank_that_it_plays(
    marked: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(*_: object, **__: object) -> tuple[str, bool]:
        for name, value in (("RANK", "1"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        return "in order", is_ready

    monkeypatch.setattr("ecdit_ds.training.dry_run.dry_run", play)
    is_ready = False
    assert train.main(["--dry-run", "--world-size=2", "--rank=1"]) == 2
    assert marked() == []
    is_ready = True
    assert train.main(["--dry-run", "--world-size=2", "--rank=1"]) == 0
    assert marked() == [DRY_RUN]
    Completion(Path(os.environ[VARIABLE])).confirm(lambda: DRY_RUN)


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--limit-seconds=30"], 2)])
def test_a_node_check_that_passes_reports_itself_and_no_other(
    marked: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], code: int
) -> None:
    told = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ECDIT_REHEARSAL": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    command = [*flags, "--", "--config", "rehearsal", "--output", str(tmp_path / "run")]
    ended, said, complaints = in_a_copy(lambda: preflight.main(command))
    assert ended == code, said + complaints
    assert marked() == [NODE_CHECK] * (code == 0)
    assert ends_told() == [code] * (code == 2)


def _fail(*_: object) -> None:
    raise ConfigError("something to mend")


@pytest.mark.parametrize(("work", "code"), [(lambda *_: None, 0), (_fail, 2)])
def test_drawing_and_scoring_report_a_task_that_ended_well_and_no_other(
    marked: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, work: Callable[..., None], code: int
) -> None:
    from ecdit_ds.evaluation import metrics

    monkeypatch.setattr(sample, "draw", work)
    monkeypatch.setattr(metrics, "METRICS", {"loss": work})
    for tool, arguments in ((sample, ["--checkpoint", "x"]), (evaluate, ["loss", "--checkpoint", "x"])):
        monkeypatch.setattr(sys, "argv", ["tool", *arguments])
        assert tool.main() == code
        assert marked() == [ARRAY_TASK] * (code == 0)
        assert ends_told() == [code] * (code == 2)
        for mark in Path(os.environ[VARIABLE]).parent.iterdir():
            mark.unlink()


def test_encoding_reports_a_task_that_ended_well_and_no_other(marked: Callable[[], list[str]], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.jpg").write_bytes(encoded(crops(1)[0]))
    (tmp_path / "pictures" / "0.txt").write_text("a picture")
    command = ["encode", str(tmp_path / "pictures"), str(tmp_path / "set"), "--device", "cpu"]
    assert encode_data.main([*command, "--size", "33"]) == ExitCode.USER_ERROR
    assert marked() == [] and ends_told() == [ExitCode.USER_ERROR]
    assert encode_data.main([*command, "--size", "32"]) == ExitCode.DONE
    assert marked() == [ARRAY_TASK]
