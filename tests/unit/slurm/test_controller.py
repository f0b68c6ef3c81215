"""What is read from Slurm's controller, and what is made of it. Lines are real ones, without what nobody asks for."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ecdit_ds.errors import ConfigError
from ecdit_ds.slurm import controller as scheduler
from ecdit_ds.slurm import supervise
from ecdit_ds.slurm.controller import (
    AwayError,
    JobState,
    SlurmJob,
    ask_patiently,
    ask_state,
    end_steps,
    is_alive,
    own_job,
    parse_limit,
    parse_state,
    seconds_of_warning,
)
from ecdit_ds.slurm.job_history import AttemptStarted, JobHistory, decide_requeue
from ecdit_ds.slurm.signals import TerminationWatch
from ecdit_ds.slurm.supervise import JobAttempt, output_of, request_requeue, requeue_blocker

ROOT = Path(__file__).resolve().parents[3]
RefusalOf = Callable[[Callable[[], object]], str]
PutProgram = Callable[[str, str], None]

TAIL = (
    "TimeMin=N/A\n   SubmitTime=2026-11-28T20:38:20 EligibleTime=2026-11-28T20:38:20\n   StartTime=2026-11-28T20:38:21 "
    "EndTime=2026-11-28T20:48:21 Deadline=N/A\n   Partition=low AllocNode:Sid=localhost:19048\n   NodeList=n[1-2]\n   "
    "BatchHost=n1\n   NumNodes=2 NumCPUs=3 NumTasks=3 CPUs/Task=1 ReqB:S:C:T=0:0:*:*\n   TRES=cpu=3,node=2,billing=3\n"
    "   Command=/home/u/train_97b.sh\n   WorkDir=/home/u\n   StdErr=/home/u/log\n   StdIn=/dev/null\n   Power=\n   \n"
)
OWNER = "\n   UserId=root(0) GroupId=root(0) MCS_label=N/A\n   Priority=4294901759 Nice=0 Account=(null) QOS=(null)\n  "
FLAGS = "\n   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0\n  "
LOOKALIKE = "JobState=X Reason=Y Dependency=no Requeue=1 Restarts=9 BatchFlag=1 RunTime=00:00:00 TimeLimit=00:01:00 "
RUNNING = JobState(state="RUNNING", reason="None", restarts=0, limit_seconds=600.0)
JOB = SlurmJob(name="12", number="12", restarts=0, num_ranks=8, nodes="n[1-2]")
LINES = {
    "a name that looks like a line": (
        f"JobId=1 JobName=a b JobState=X Reason=Y Restarts=9 TimeLimit=1 {OWNER} JobState=RUNNING Reason=None "
        f"Dependency=(null){FLAGS} RunTime=00:00:00 TimeLimit=00:10:00 {TAIL}",
        RUNNING,
    ),
    "a name that looks like all of it": (
        f"JobId=1 JobName={LOOKALIKE} UserId=root(0) GroupId=root(0) {LOOKALIKE}{OWNER} JobState=RUNNING Reason=None "
        f"Dependency=(null){FLAGS} RunTime=00:00:00 TimeLimit=00:10:00 {TAIL}",
        RUNNING,
    ),
    "a task of an array with a comment": (
        f"JobId=7 ArrayJobId=6 ArrayTaskId=0 ArrayTaskThrottle=1 JobName=arr {OWNER} JobState=RUNNING Reason=None "
        f"Dependency=(null){FLAGS} RunTime=00:00:03 TimeLimit=00:10:00 {TAIL}   Comment=x JobState=GONE y \n",
        RUNNING,
    ),
    "a comment that looks like a line, told first": (  # where it stands is a matter of Slurm's version
        f"JobId=1 JobName=a\n   Comment={LOOKALIKE}\n   AdminComment= {LOOKALIKE}{OWNER} JobState=RUNNING Reason=None "
        f"Dependency=(null){FLAGS} RunTime=00:00:00 TimeLimit=00:10:00 {TAIL}",
        RUNNING,
    ),
    "requeued": (
        f"JobId=5 JobName=wrap {OWNER} JobState=PENDING Reason=BeginTime Dependency=(null)\n   Requeue=1 Restarts=1 "
        f"BatchFlag=1 Reboot=0 ExitCode=0:0\n   RunTime=00:00:00 TimeLimit=1-00:00:00 {TAIL}",
        JobState(state="PENDING", reason="BeginTime", restarts=1, limit_seconds=86400.0),
    ),
    "held": (
        f"JobId=4 JobName=hold {OWNER} JobState=PENDING Reason=JobHeldUser Dependency=(null){FLAGS} RunTime=00:00:00 "
        f"TimeLimit=UNLIMITED {TAIL}",
        JobState(state="PENDING", reason="JobHeldUser", restarts=0, limit_seconds=None),
    ),
    "cancelled": (
        f"JobId=5 JobName=cancelme {OWNER} JobState=COMPLETING Reason=None Dependency=(null){FLAGS} RunTime=00:00:02 "
        f"TimeLimit=00:05:00 {TAIL}",
        JobState(state="COMPLETING", reason="None", restarts=0, limit_seconds=300.0),
    ),
    "out of time": (
        f"JobId=1 JobName=tl {OWNER} JobState=COMPLETING Reason=TimeLimit Dependency=(null){FLAGS} RunTime=00:01:28 "
        f"TimeLimit=00:01:00 {TAIL}",
        JobState(state="COMPLETING", reason="TimeLimit", restarts=0, limit_seconds=60.0),
    ),
}


@pytest.fixture
def put_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PutProgram:
    """Return `put_program(name, script)`: a shell script in the place of a command of Slurm."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(scheduler, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(scheduler, "_FIRST_PAUSE_S", 0.01)

    def put(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return put


@pytest.mark.parametrize("case", LINES)
def test_a_jobs_state_is_read_from_the_controllers_line(case: str) -> None:
    line, state = LINES[case]
    assert parse_state(line) == state


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_jobs_state_is_read_however_its_comment_is_encoded(put_program: PutProgram, encoding: str) -> None:
    line, state = LINES["a task of an array with a comment"]
    comment = "".join(f"\\{byte:03o}" for byte in "répétition".encode(encoding))
    put_program("scontrol", f"cat <<'END'\n{line}END\nprintf '   Comment={comment}\\n'")
    assert ask_state(JOB, 0) == state


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_refusal_is_told_however_it_is_encoded(put_program: PutProgram, refusal_of: RefusalOf, encoding: str) -> None:
    words = "".join(f"\\{byte:03o}" for byte in "für Aufträge gesperrt".encode(encoding))
    put_program("scontrol", f"printf '{words}' >&2; exit 1")
    assert "gesperrt" in refusal_of(lambda: ask_state(JOB, 0))


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("", "JobState"),
        ("slurm_load_jobs error: Invalid job id specified", "JobState"),
        (LINES["held"][0].replace("TimeLimit=", "Limit="), "TimeLimit"),
        (LINES["held"][0].replace("Restarts=0", "Restarts=?"), "Restarts"),
        (LINES["held"][0].replace(OWNER, ""), "Reason"),  # all of it is one line then
    ],
)
def test_a_line_that_lacks_something_is_refused_and_says_what(line: str, missing: str, refusal_of: RefusalOf) -> None:
    assert missing in refusal_of(lambda: parse_state(line)).partition(" tells no ")[2]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:00:30", 30.0),
        ("00:01:00", 60.0),
        ("12:34:56", 45296.0),
        ("2-00:00:00", 172800.0),
        ("10-01:02:03", 867723.0),
        ("365-00:00:00", 31536000.0),
        ("UNLIMITED", None),
        ("Partition_Limit", None),
    ],
)
def test_a_time_limit_is_so_many_seconds_or_none(text: str, seconds: float | None) -> None:
    assert parse_limit(text) == seconds


def test_a_job_knows_itself_in_its_first_life_and_in_later_ones() -> None:
    told = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert own_job(told) == JOB
    later = own_job(told | {"SLURM_RESTART_COUNT": "3"})
    assert (later.restarts, later.life, later.name) == (3, "12.3", "12")


def test_a_task_of_an_array_is_called_by_array_and_task_but_lives_by_its_own_number() -> None:
    told = {"SLURM_JOB_ID": "13", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "n1"}
    job = own_job(told | {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0", "SLURM_RESTART_COUNT": "1"})
    assert (job.name, job.number, job.life) == ("12_0", "13", "13.1")


@pytest.mark.parametrize("told", [{}, {"SLURM_JOB_ID": "12"}, {"SLURM_NTASKS": "x", "SLURM_JOB_ID": "12"}])
def test_outside_of_a_job_one_is_told_to_submit_one(told: dict[str, str], refusal_of: RefusalOf) -> None:
    assert "sbatch slurm/train_97b.sh" in refusal_of(lambda: own_job(told))


def test_a_controller_that_is_away_is_waited_for(put_program: PutProgram) -> None:
    put_program("scontrol", f"echo try >>tries; [ $(wc -l <tries) -gt 2 ] || exit 1; echo '{LINES['held'][0]}'")
    assert ask_state(JOB, patience_s=20) == LINES["held"][1]


def test_a_controller_that_stays_away_is_refused_with_its_words(put_program: PutProgram, refusal_of: RefusalOf) -> None:
    put_program("scontrol", "echo Unable to contact >&2; echo slurm controller >&2; exit 1")
    message = refusal_of(lambda: ask_state(JOB, patience_s=0.2))
    assert message == "scontrol show job 12: Unable to contact slurm controller"


def test_a_refusal_to_tell_of_a_job_is_not_waited_for(put_program: PutProgram, refusal_of: RefusalOf) -> None:
    put_program("scontrol", "echo x >> calls; echo scontrol is for login nodes only >&2; exit 1")
    message = refusal_of(lambda: ask_state(JOB, patience_s=60))
    assert message == "scontrol show job 12: scontrol is for login nodes only"
    put_program("cat_calls", "wc -l < calls")
    assert subprocess.run(["cat_calls"], capture_output=True, text=True, check=True).stdout.strip() == "1"


def test_a_machine_without_slurm_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal_of: RefusalOf
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    began = time.monotonic()
    assert "scontrol" in refusal_of(lambda: ask_state(JOB, patience_s=60))
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(("job", "answer"), [("1", True), ("3", True), ("2", False), ("13", False)])
def test_a_job_is_alive_if_it_is_in_the_queue_itself(job: str, answer: bool, put_program: PutProgram) -> None:
    """Asked for job 1, the controller tells of all tasks of array 1."""
    put_program("squeue", '[ "$5" = "%A %T" ] || exit 1; echo 1 RUNNING; echo 3 PENDING')
    assert is_alive(job, patience_s=60) is answer


def test_a_job_that_is_being_taken_down_is_waited_for(put_program: PutProgram) -> None:
    put_program("squeue", 'echo x >> calls; [ "$(wc -l < calls)" -gt 3 ] || echo 12 COMPLETING')
    assert is_alive("12", patience_s=60) is False
    put_program("squeue", "echo 12 COMPLETING")
    assert is_alive("12", patience_s=0.05) is True


def test_a_job_that_the_controller_has_forgotten_is_not_alive(put_program: PutProgram) -> None:
    put_program("squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert is_alive("12", patience_s=60) is False


@pytest.mark.parametrize(
    ("script", "seconds"),
    [
        ("#SBATCH --signal=USR1@600", 600),
        ("#SBATCH --nodes=4 --signal=B:USR1@90", 90),
        ("#SBATCH --signal=RB:10@300", 300),
        ("#SBATCH --signal USR1@120", 120),
        ('#SBATCH --signal="USR1@120"', 120),
        ("#SBATCH --signal=USR1", 60),  # Slurm's own default
        ("#SBATCH --signal=USR1@600\n#SBATCH --signal=USR1@300", 300),
        ("#SBATCH --time=10", None),
        ("##SBATCH --signal=USR1@600", None),
        ("echo --signal=USR1@600", None),
    ],
)
def test_a_script_says_how_long_before_its_end_it_is_warned(
    script: str, seconds: int | None, put_program: PutProgram
) -> None:
    put_program("scontrol", f"cat <<'END'\n#!/bin/bash\n{script}\ntrue\nEND")
    assert seconds_of_warning(JOB) == seconds


@pytest.mark.parametrize(
    ("case", "life", "may"),
    [
        ("a name that looks like a line", 0, True),
        ("out of time", 0, True),
        ("cancelled", 0, False),
        ("held", 0, False),
        ("requeued", 0, False),
        ("a name that looks like a line", 1, False),
    ],
)
def test_a_job_is_requeued_only_if_nobody_else_has_decided(case: str, life: int, may: bool) -> None:
    job = SlurmJob(name="12", number="12", restarts=life, num_ranks=8, nodes="n1")
    against = requeue_blocker(job, LINES[case][1])
    assert (against is None) is may
    assert against is None or len(against.splitlines()) == 1


@pytest.mark.parametrize(
    "flags", [["--output", "runs/a"], ["--output=runs/a", "--set", "a=b"], ["--output", "x", "--output", "runs/a"]]
)
def test_a_runs_folder_is_what_trainings_flags_say_last(flags: list[str]) -> None:
    assert output_of(["ecdit_ds/train.py", "--config", "demo", *flags, "--resume=auto"]) == Path("runs/a")


@pytest.mark.parametrize("flags", [["--config", "demo"], ["--output"]])
def test_training_without_a_folder_is_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="--output"):
        output_of(["ecdit_ds/train.py", *flags])


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ("--dry-run", "--dry-run"),
        ("--dry", "--dry-run"),
        ("--print-config", "--print-config"),
        ("--p", "--print-config"),
        ("--help", "--help"),
        ("--h", "--help"),
        ("-h", "--help"),
    ],
)
def test_a_job_that_would_train_nothing_is_refused(given: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"train.py {flag}: does none of the work, which this job would repeat"):
        output_of(["ecdit_ds/train.py", "--output", "runs/a", given])


def test_a_supervisor_outside_of_a_job_says_so_in_one_line_and_needs_the_standard_library_only() -> None:
    """With -S there is nothing else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    ended = subprocess.run(
        [sys.executable, "-S", "ecdit_ds/slurm/supervise.py", "x", "--", "y"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert ended.returncode == 2
    (line,) = (ended.stdout + ended.stderr).splitlines()
    assert "error: " in line and "SLURM_JOB_ID" in line


@pytest.mark.parametrize("arguments", [["srun", "x"], ["--", "train.py"], ["srun", "x", "--"]])
def test_a_supervisor_with_nothing_to_start_says_so_in_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-S", "ecdit_ds/slurm/supervise.py", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = ended.stdout.splitlines()
    assert "error: supervise.py: no" in line
    assert not ended.stderr


ASKING = """[ "$1 $2" != "show config" ] || {{ echo '{config}'; exit; }}
[ $1 = requeue ] || {{ echo '{line}'; exit; }}
echo x >> calls; [ $(wc -l < calls) -gt {failures} ] || {{ {say}; }}"""
"""scontrol, whose first requeues fail."""


def ask_for_another_life(
    put_program: PutProgram, tmp_path: Path, failures: int, words: str, config: str = ""
) -> tuple[int, str, int]:
    """Return the exit code, why it stopped, and how often was asked."""
    line = LINES["a name that looks like a line"][0].replace("JobId=1 ", "JobId=12 ")
    put_program(
        "scontrol", ASKING.format(config=config, line=line, failures=failures, say=f"echo '{words}' >&2; exit 1")
    )
    life = JobAttempt(JOB, ["srun"], ["train.py", "--output", str(tmp_path)], 3, TerminationWatch())
    JobHistory(tmp_path).begin(AttemptStarted(life="12.0", step=0, nodes="n1", ranks=8))
    code = request_requeue(life, JOB, decide_requeue(75, barren=0, allowed=3))
    why = tmp_path / "slurm" / "why_it_stopped.txt"
    return code, why.read_text() if why.exists() else "", len((tmp_path / "calls").read_text().splitlines())


@pytest.mark.parametrize(
    "words",
    [
        "Socket timed out on send/recv operation",
        "Unable to contact slurm controller (connect failure) for job 12",
        "slurm_update error: Job can not be altered now, try again later",
        "Zero Bytes were transmitted or received",
        "Slurm backup controller in standby mode",
        "",  # it died before it could say anything
    ],
)
def test_a_controller_that_fails_to_requeue_is_asked_again(put_program: PutProgram, tmp_path: Path, words: str) -> None:
    assert ask_for_another_life(put_program, tmp_path, 2, words) == (0, "", 3)


@pytest.mark.parametrize(
    "words",
    [
        "Requested operation is presently disabled for job 12",
        "Jobs of this partition do not come back: see https://hpc.example.org/requeue, and do not try again",
        "requeue: no such luck; connect to the help desk",
    ],
)
def test_a_controller_that_forbids_a_requeue_in_whatever_words_is_asked_once(
    put_program: PutProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(supervise, "CONTROLLER_PATIENCE_S", 5.0)  # for a fault of this, not to be waited for
    code, why, asked = ask_for_another_life(put_program, tmp_path, 99, words)
    assert (code, asked) == (75, 1)
    assert words in why


def test_pauses_between_questions_grow_and_end_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked, told = [0.0], list[float](), list[str]()
    monkeypatch.setattr(
        scheduler,
        "time",
        SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)),
    )

    def ask() -> None:
        asked.append(now[0])
        raise AwayError("away")

    with pytest.raises(AwayError):
        ask_patiently(ask, 600, lambda error: told.append(str(error)))
    assert asked[:8] == [0, 1, 3, 7, 15, 31, 63, 123]
    assert asked[-1] == 600 and len(asked) < 20
    assert told == ["away"] * (len(asked) - 1)


@pytest.mark.parametrize(
    ("told", "is_left_to_slurm"),
    [
        ("RequeueExit             = 75", True),
        ("RequeueExit             = 42,70-80", True),
        ("RequeueExit             = 42", False),
        ("RequeueExit             = (null)\nRequeueExitHold         = 75", False),
    ],
)
def test_a_job_that_slurm_requeues_by_itself_does_not_say_that_it_stopped(
    put_program: PutProgram, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: str, is_left_to_slurm: bool
) -> None:
    """As with --no-requeue, where RequeueExit holds all the same."""
    words = "Requested operation is presently disabled for job 12"
    code, why, _ = ask_for_another_life(put_program, tmp_path, 99, words, config=told)
    assert code == 75
    *_, last = capsys.readouterr().out.splitlines()
    assert ("left to Slurm, which requeues after exit code 75 (RequeueExit)" in last) == is_left_to_slurm
    assert (why == "") == ("not requeued" not in last) == is_left_to_slurm
    assert ("submit anew" in last) != is_left_to_slurm


def test_where_nobody_can_ask_for_another_life_it_is_said_that_slurm_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    life = JobAttempt(JOB, ["srun"], ["train.py", "--output", str(tmp_path)], 3, TerminationWatch())
    JobHistory(tmp_path).begin(AttemptStarted(life="12.0", step=0, nodes="n1", ranks=8))
    assert request_requeue(life, JOB, decide_requeue(42, barren=0, allowed=3)) == 42
    (line,) = capsys.readouterr().out.splitlines()
    assert "not requeued: scontrol show job 12: No such file or directory; unless Slurm does after exit code 42" in line


def test_a_controller_that_is_away_hides_no_step(put_program: PutProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_LOOK_AT_STEPS_EVERY_S", 0.01)
    put_program("scancel", '[ "$1 $2" = "--signal=TERM 12.3" ] && echo x >> asked')
    put_program(
        "squeue",
        """echo x >> calls; n=$(wc -l < calls); [ $n -gt 2 ] || exit 1
        echo 12.batch; [ -f asked ] || echo 12.3""",
    )
    end_steps(JOB, patience_s=60)
    put_program("squeue", "wc -l < asked")
    assert subprocess.run(["squeue"], capture_output=True, text=True, check=True).stdout.strip() == "1"
