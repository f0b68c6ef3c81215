"""What sbatch takes, which ranks start with what, and what is refused before they do.

slurm/train_97b.sh is the production script, unchanged, with its 8 ranks and GPUs a node; only the model is left out:
the container hook puts a witness in the place of the program.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from ecdit_ds.errors import ConfigError, ExitCode
from ecdit_ds.slurm.job_history import AttemptStarted, JobHistory
from tests.helpers.launch import ROOT
from tests.helpers.slurm_jobs import SCRIPT, Job, Submitter, seen, submit_witness, without_a_model
from tools.local_slurm import LocalSlurm

Witness = Callable[..., Job]


@pytest.fixture
def witness(lab: LocalSlurm, hanging: Job, tmp_path: Path) -> Witness:
    """Return `witness(name, codes, *sbatch_flags, environment=...)`, with files in the test's own folder."""
    return partial(submit_witness, lab, tmp_path)


@pytest.fixture(scope="module")
def hanging(lab: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Submit a job that waits for its time limit, which takes a minute, beside all others."""
    environment = {"ECDIT_PREFLIGHT": "0", "ECDIT_SIGNAL_SECONDS": "0"}
    flags = ("--ntasks-per-node=1", "--time=1", "--signal=USR1@10")
    return submit_witness(lab, tmp_path_factory.mktemp("hanging"), "hanging", "hang,0", *flags, environment=environment)


def test_the_production_script_starts_32_ranks_on_4_nodes_of_8_gpus_and_checks_them_first(
    lab: LocalSlurm, witness: Witness, tmp_path: Path
) -> None:
    tested = subprocess.run(
        ["sbatch", "--test-only", "--nodes=4", SCRIPT], env=lab.environment, capture_output=True, text=True, check=True
    )
    assert "to start at" in tested.stderr

    job = witness("production", "42,0", "--nodes=4", "--exclude=n1,n2,n3")
    assert job.wait() == "COMPLETED", job.text
    assert job.restarts == 1
    assert job.nodes() == ["n[4-7]", "n[4-7]"]  # also in the second life
    for life in (0, 1):
        ranks = [facts["environment"] for facts in seen(tmp_path, job, life, "train")]
        assert [int(rank["RANK"]) for rank in ranks] == list(range(32))
        assert [int(rank["LOCAL_RANK"]) for rank in ranks] == list(range(8)) * 4
        assert {(rank["WORLD_SIZE"], rank["LOCAL_SIZE"], rank["MASTER_ADDR"]) for rank in ranks} == {("32", "8", "n4")}
        assert [rank["SLURMD_NODENAME"] for rank in ranks] == [f"n{4 + index // 8}" for index in range(32)]
        assert {rank["CUDA_VISIBLE_DEVICES"] for rank in ranks} == {"0,1,2,3,4,5,6,7"}
        assert {rank["OMP_NUM_THREADS"] for rank in ranks} == {"8"}
        assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    ports = {seen(tmp_path, job, life, "train")[0]["environment"]["MASTER_PORT"] for life in (0, 1)}
    assert len(ports) == 2  # what a port lingers on does not keep the next life from starting

    assert len(seen(tmp_path, job, 0, "preflight")) == len(seen(tmp_path, job, 1, "preflight")) == 32
    (dry_run,) = seen(tmp_path, job, 0, "dry_run")
    assert {"--dry-run", "--world-size=32"} <= set(dry_run["arguments"])
    assert not seen(tmp_path, job, 1, "dry_run")  # the recipe is checked once a job
    trained = seen(tmp_path, job, 0, "train")[0]["arguments"]
    assert trained[0] == "ecdit_ds/train.py"
    assert trained[trained.index("--config") + 1] == "ecdit_m_64e"
    assert len(list((job.output / "slurm" / f"{job.number}.1").glob("rank_*.log"))) == 32


def test_a_task_of_an_array_requeues_itself_only_and_has_a_folder_of_its_own(
    lab: LocalSlurm, witness: Witness, tmp_path: Path
) -> None:
    # The last task's own number is the array's too, so that asking for it by number would requeue all.
    script = tmp_path / "codes.sh"
    script.write_text('#!/bin/bash\n[ "$SLURM_ARRAY_TASK_ID" = 1 ] || export WITNESS_CODES=0\nexec "$@"\n')
    script.chmod(0o755)
    wrapper = f"{script} {tmp_path / 'no_model.sh'}"
    flags = ("--array=0-1", "--ntasks-per-node=1", f"--output={tmp_path}/array_%a.log")
    job = witness("array", "42,0", *flags, environment={"ECDIT_WRAPPER": wrapper, "ECDIT_PREFLIGHT": "0"})
    folders = [tmp_path / f"array_{task}" for task in (0, 1)]

    def lives() -> list[int]:
        return [len(JobHistory(folder).beginnings()) for folder in folders]

    job.wait_until(lambda: lives() == [1, 2], "a second life of task 1")
    job.wait_until(lambda: not lab.ask("squeue", "-h", "-j", job.number).strip(), "its end")
    assert lives() == [1, 2]


def test_a_job_that_a_task_of_an_array_submits_is_requeued_itself(lab: LocalSlurm, tmp_path: Path) -> None:
    log, number = tmp_path / "inner.log", tmp_path / "number"
    inner = f"sbatch --parsable --nodes=1 --ntasks-per-node=1 --output={log} {SCRIPT} > {number}; sleep 300"
    environment = without_a_model(tmp_path, "inner", "42,0") | {"ECDIT_PREFLIGHT": "0"}
    outer = lab.ask("sbatch", "--parsable", "--array=3", "--output=/dev/null", "--wrap", inner, environment=environment)
    deadline = time.monotonic() + 60
    while not (number.exists() and number.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job = Job(lab=lab, number=number.read_text().strip(), output=tmp_path / "inner", log=log)
    assert job.wait() == "COMPLETED", job.text
    assert job.restarts == 1
    assert [(end["life"], end["code"]) for end in job.ends()] == [(f"{job.number}.0", 42), (f"{job.number}.1", 0)]
    outer = outer.strip()
    assert " Restarts=0 " in lab.ask("scontrol", "show", "job", "-o", outer)
    lab.ask("scancel", outer)


@pytest.mark.parametrize(
    "flags", [(), ("--export=ECDIT_ROOT,ECDIT_PYTHON,ECDIT_WRAPPER,WITNESS,WITNESS_CODES,ECDIT_OUTPUT",)]
)
def test_ranks_find_their_variables_and_logs_whatever_is_exported_and_called(
    witness: Witness, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    job = witness("50%j of a %4t run %%%", "0", "--ntasks-per-node=1", f"--output={tmp_path}/job.log", *flags)
    assert job.wait() == "COMPLETED", (tmp_path / "job.log").read_text()
    assert len(seen(tmp_path, job, 0, "train")) == 1
    assert (job.output / "slurm" / f"{job.number}.0" / "rank_0000.log").is_file()


def test_a_crash_loop_ends_after_three_lives_without_progress_and_says_why(witness: Witness, tmp_path: Path) -> None:
    job = witness("loop", "7,137,75,0", "--ntasks-per-node=1", environment={"ECDIT_PREFLIGHT": "0"})
    assert job.wait() == "FAILED", job.text
    assert [(end["code"], end["is_again"]) for end in job.ends()] == [(7, True), (137, True), (75, False)]
    why = job.output / "slurm" / "why_it_stopped.txt"
    assert "3 lives in a row" in why.read_text()

    job.lab.ask("scontrol", "requeue", job.number)  # somebody from outside, with its lives spent
    job.wait_until(lambda: job.restarts == 3, "its fourth life")
    assert job.wait() == "FAILED", job.text
    assert "3 lives in a row published no later checkpoint than step 0" in why.read_text()
    assert not seen(tmp_path, job, 3, "train")


@pytest.mark.parametrize(
    ("name", "flags", "environment", "expected"),
    [
        ("short", ["--time=5"], {}, "the time limit is 5 min, and the signal to save comes 600 s before it"),
        ("lives", [], {"ECDIT_MAX_LIVES": "0"}, "ECDIT_MAX_LIVES: '0' is not 1 or more"),
        ("number", [], {"ECDIT_MAX_LIVES": "many"}, "ECDIT_MAX_LIVES: 'many' is not 1 or more"),
        ("rehearsal", [], {"ECDIT_REHEARSAL": "yes"}, "ECDIT_REHEARSAL: 'yes' is not 0 or more"),
        ("python", [], {"ECDIT_PYTHON": "/no/python"}, "error: ECDIT_HOST_PYTHON: /no/python cannot be run"),
        ("bare", [], {"ECDIT_PYTHON": "/no/python", "ECDIT_WRAPPER": ""}, "error: ECDIT_PYTHON: /no/python cannot be"),
        ("root", [], {"ECDIT_ROOT": "/"}, "error: / is not the repository; submit from it, or set ECDIT_ROOT"),
    ],
)
def test_what_cannot_go_well_is_refused_before_ranks_start(
    witness: Witness, tmp_path: Path, name: str, flags: list[str], environment: dict[str, str], expected: str
) -> None:
    job = witness(name, "0", "--ntasks-per-node=1", *flags, environment=environment)
    assert job.wait() == "FAILED", job.text
    assert expected in job.text
    assert "Traceback" not in job.text
    assert not seen(tmp_path, job, 0, "train")
    assert job.restarts == 0


def test_a_folder_that_another_job_trains_in_is_refused(lab: LocalSlurm, witness: Witness, tmp_path: Path) -> None:
    one_rank = ("--ntasks-per-node=1",)
    first = witness("owned", "hang,0", *one_rank, environment={"ECDIT_PREFLIGHT": "0"})
    first.wait_until(lambda: bool(seen(tmp_path, first, 0, "train")), "its rank")
    second = witness("owned", "0", *one_rank, f"--output={tmp_path}/second.log", environment={"ECDIT_PREFLIGHT": "0"})
    assert second.wait() == "FAILED"
    assert f"job {first.number} is not over and trains there" in (tmp_path / "second.log").read_text()
    lab.ask("scancel", "--signal=KILL", "--full", first.number)
    assert [life.job for life in JobHistory(first.output).beginnings()] == [first.number]


def test_a_job_inherits_no_spent_lives_from_an_earlier_one_of_its_number(
    lab: LocalSlurm, witness: Witness, tmp_path: Path
) -> None:
    job = witness("again", "0", "--ntasks-per-node=1", "--hold", environment={"ECDIT_PREFLIGHT": "0"})
    for restarts in range(3):
        JobHistory(job.output).begin(AttemptStarted(life=f"{job.number}.{restarts}", step=0, nodes="n1", ranks=1))
    lab.ask("scontrol", "release", job.number)
    assert job.wait() == "COMPLETED", job.text
    assert len(seen(tmp_path, job, 0, "train")) == 1


def test_a_job_cancelled_in_its_checks_tells_its_end_and_one_requeued_there_checks_again(
    lab: LocalSlurm, witness: Witness, tmp_path: Path
) -> None:
    one_rank = ("--ntasks-per-node=1",)
    cancelled = witness("cancelled", "0", *one_rank, environment={"WITNESS_DRY_RUNS": "hang"})
    requeued = witness("requeued", "0,0,0", *one_rank, environment={"WITNESS_DRY_RUNS": "hang,0,0"})
    for job, command in ((cancelled, "scancel"), (requeued, "scontrol requeue")):
        job.wait_until(lambda job=job: bool(seen(tmp_path, job, 0, "dry_run")), "the check")  # type: ignore[misc]
        lab.ask(*command.split(), job.number)
    assert cancelled.wait() == "CANCELLED", cancelled.text
    (end,) = cancelled.ends()
    assert (end["code"], end["is_again"]) == (124, True), cancelled.text
    assert "not requeued from here: Slurm is ending it" in cancelled.text
    assert requeued.wait() == "COMPLETED", requeued.text
    assert seen(tmp_path, requeued, 1, "dry_run")


def test_ranks_that_lose_their_srun_save_before_their_life_is_judged(witness: Witness, tmp_path: Path) -> None:
    environment = {"ECDIT_PREFLIGHT": "0", "ECDIT_MAX_LIVES": "1"}
    job = witness("orphans", "save,0", "--ntasks-per-node=1", environment=environment)
    job.wait_until(lambda: bool(seen(tmp_path, job, 0, "train")), "its rank")
    found = [(process, process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    sruns = [process for process, command in found if command[:1] == ["srun"] and str(job.output) in command]
    for process in sorted(sruns, key=lambda process: process.pid in [p.pid for s in sruns for p in s.parents()]):
        process.kill()  # first its child, which would kill the ranks
    assert job.wait() == "COMPLETED", job.text
    assert [(end["code"], end["step"], end["is_again"]) for end in job.ends()] == [(137, 40, True), (0, 40, False)]
    assert "srun was killed by signal 9" in job.text


def test_a_job_whose_script_alone_gets_sigterm_saves_and_goes_on(
    lab: LocalSlurm, witness: Witness, tmp_path: Path
) -> None:
    job = witness("script", "save,0", "--ntasks-per-node=1", environment={"ECDIT_PREFLIGHT": "0"})
    job.wait_until(lambda: bool(seen(tmp_path, job, 0, "train")), "its rank")
    lab.ask("scancel", "--batch", "--signal=TERM", job.number)  # as --signal=B:TERM@S does
    assert job.wait() == "COMPLETED", job.text
    assert [(end["code"], end["step"]) for end in job.ends()] == [(42, 40), (0, 40)]


def test_a_job_that_may_not_requeue_itself_is_left_to_slurm_where_that_does_it(tmp_path: Path) -> None:
    flags = ("--no-requeue", "--ntasks-per-node=1")
    with LocalSlurm(nodes=1, settings={"RequeueExit": "42"}) as lab:
        job = submit_witness(lab, tmp_path, "left", "42,0", *flags, environment={"ECDIT_PREFLIGHT": "0"})
        assert job.wait() == "COMPLETED", job.text
        assert job.restarts == 1
    assert "left to Slurm, which requeues after exit code 42 (RequeueExit): scontrol requeue" in job.text
    assert job.text.count("not requeued") == job.text.count("not requeued: training is done") == 1


def test_a_job_whose_node_has_no_scontrol_trains_without_a_known_limit(witness: Witness, tmp_path: Path) -> None:
    refusing = tmp_path / "bin" / "scontrol"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\necho scontrol is for login nodes only >&2\nexit 1\n")
    refusing.chmod(0o755)
    path = f"{refusing.parent}:{os.environ['PATH']}"
    job = witness("blind", "42,0", "--ntasks-per-node=1", environment={"PATH": path, "ECDIT_SIGNAL_SECONDS": "60"})
    assert job.wait() == "FAILED", job.text
    assert [(end["code"], end["is_again"]) for end in job.ends()] == [(42, True)]
    assert "the time limit is not known here (scontrol show job" in job.text
    why = (job.output / "slurm" / "why_it_stopped.txt").read_text()
    assert "scontrol is for login nodes only; unless Slurm does after exit code 42, submit anew" in why


def test_a_program_that_cannot_start_is_told_in_the_jobs_log(witness: Witness, tmp_path: Path) -> None:
    environment = {"ECDIT_PREFLIGHT": "0", "ECDIT_MAX_LIVES": "1", "ECDIT_HOST_PYTHON": sys.executable}
    job = witness("no python", "0", "--ntasks-per-node=1", environment=environment | {"ECDIT_PYTHON": "/no/python"})
    assert job.wait() == "FAILED", job.text
    assert "rank_0000.log: " in job.text and "/no/python: No such file" in job.text


def test_gpus_are_asked_of_a_partition_that_has_them(lab: LocalSlurm) -> None:
    with pytest.raises(ConfigError, match="node configuration is not available"):
        lab.ask("sbatch", "--partition=cpu", "--nodes=1", SCRIPT)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("without gpus", {}, "sees no GPU"),
        ("grid", {"ECDIT_REHEARSAL": "1"}, "parallel.tp(2)"),
        ("data", {"ECDIT_REHEARSAL": "1"}, "data.path: names no folder"),
        ("recipe", {"ECDIT_RECIPE": "ecdit_xxxl"}, "ecdit_xxxl"),
    ],
)
def test_the_checks_before_training_refuse_in_one_line_and_are_not_repeated(
    submit: Submitter, name: str, changes: dict[str, str], expected: str
) -> None:
    more = {"grid": ("parallel.tp=2",), "data": ("data.dataset=encoded",)}.get(name, ())
    recipe = ("parallel.ep=1", *more)
    environment = {"ECDIT_PREFLIGHT": "1", "ECDIT_REHEARSAL": "0", "ECDIT_RECIPE": "rehearsal"} | changes
    job = submit(f"refused {name}", "--ntasks-per-node=1", nodes=1, changes=recipe, environment=environment)
    assert job.wait() == "FAILED", job.text
    assert [line for line in job.text.splitlines() if line.startswith("error: ") and expected in line], job.text
    assert "Traceback" not in job.text
    (end,) = job.ends()
    assert (end["code"], end["is_again"]) == (ExitCode.USER_ERROR, False)
    assert not list(job.output.glob("slurm/*/rank_*.log"))


def test_a_user_error_of_one_rank_is_told_and_not_tried_again_although_its_peer_was_killed_for_it(
    submit: Submitter, tmp_path: Path
) -> None:
    wrapper = tmp_path / "one_differs.sh"
    wrapper.write_text('#!/bin/bash\n[ "$SLURM_PROCID" = 0 ] || set -- "$@" --set train.max_steps=many\nexec "$@"\n')
    wrapper.chmod(0o755)
    job = submit("one differs", environment={"ECDIT_WRAPPER": str(wrapper)})
    assert job.wait() == "FAILED", job.text
    (end,) = job.ends()
    assert (end["code"], end["is_again"]) == (ExitCode.USER_ERROR, False), job.text
    (line,) = [line for line in job.text.splitlines() if " rank_0001.log: error: " in line]
    assert "train.max_steps: 'many' is a str" in line


def test_a_rehearsal_of_both_parallel_axes_passes_its_checks_and_trains(submit: Submitter) -> None:
    job = submit(
        "rehearsal",
        nodes=4,
        faults="",
        changes=("parallel.tp=2", "train.max_steps=2"),
        environment={"ECDIT_PREFLIGHT": "1"},
    )
    assert job.wait() == "COMPLETED", job.text
    assert "layout       4 ranks = data 2 x tensor 2; experts over 2" in job.text
    assert "nodes        4 with the same" in job.text
    assert "4 summed up alike" in job.text
    assert not list((job.output / "slurm").glob(".s*"))
    assert (job.output / "checkpoints" / "step_2" / "manifest.json").is_file()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_lab_is_up_and_down_in_seconds_and_leaves_nothing(is_killed: bool) -> None:
    began = time.monotonic()
    script = "sbatch -N2 -n4 -o /dev/null --wrap 'srun sleep 321' >&2; sleep 2; squeue -h | wc -l; echo $SLURM_CONF"
    script += "; exec >&-; kill -KILL $PPID" if is_killed else ""
    ended = subprocess.run(
        [sys.executable, "tools/local_slurm.py", "--nodes", "2", "--", "bash", "-c", script],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert ended.returncode == (-signal.SIGKILL if is_killed else 0)
    num_jobs, conf = ended.stdout.splitlines()[-2:]
    assert num_jobs == "1"
    folder = Path(conf).parent
    assert folder.name.startswith("slurm-lab-")
    while folder.exists() and time.monotonic() < began + 30:  # nobody is left to wait for
        time.sleep(0.1)
    assert time.monotonic() - began < 30
    left = [
        p.info["cmdline"]
        for p in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(p.info["cmdline"] or ()) or "321" in (p.info["cmdline"] or ())
    ]
    assert left == []


HEARD = """
import os, subprocess, time
from pathlib import Path
import psutil
from tools.local_slurm import _processes_of
subprocess.run(["sbatch", "-N1", "-n1", "-o", "/dev/null", "--wrap", "srun sleep 60"], check=True, stdout=2)
heard, deadline = set(), time.monotonic() + 60
while "srun" not in dict(heard) and time.monotonic() < deadline:
    time.sleep(0.2)
    for process in _processes_of(Path(os.environ["SLURM_CONF"]).parent):
        try:
            heard |= {(process.name(), at.laddr.ip) for at in process.net_connections("inet") if at.status == "LISTEN"}
        except psutil.Error:
            pass
print(sorted(heard))
"""
"""Tells who in a lab listens where, in the midst of a step."""


@pytest.mark.parametrize("host", [None, "elsewhere.example.org"])
def test_a_lab_listens_to_this_machine_only_whatever_its_name_stands_for(host: str | None) -> None:
    called = ["unshare", "--uts", "sh", "-c", f'hostname {host} && exec "$0" "$@"'] if host else []
    lab = [sys.executable, "tools/local_slurm.py", "--nodes=1", "--", sys.executable, "-c", HEARD]
    ended = subprocess.run([*called, *lab], cwd=ROOT, text=True, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    heard = ended.stdout.splitlines()[-1]
    assert heard == "[('slurmctld', '127.0.0.1'), ('slurmd', '127.0.0.1'), ('srun', '127.0.0.1')]"


def test_a_lab_that_cannot_start_says_why() -> None:
    began = time.monotonic()
    refusal = r"(slurmctld|n1) ended with exit code 1: .*select/nonsense"  # whichever is looked at first
    with pytest.raises(ConfigError, match=refusal), LocalSlurm(nodes=1, settings={"SelectType": "select/nonsense"}):
        pass
    assert time.monotonic() - began < 20


def test_a_life_that_does_not_leave_before_its_time_limit_is_followed_by_another(hanging: Job) -> None:
    job = hanging
    assert job.wait() == "COMPLETED", job.text
    assert job.restarts == 1
    assert "requeued: exit code 124" in job.text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_any_script() -> None:
    scripts = sorted(str(path) for path in (ROOT / "slurm").glob("*.sh"))
    assert len(scripts) >= 3
    assert subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, check=False).returncode == 0
