"""Where ranks write, however their run is called."""

import subprocess
import sys
from pathlib import Path

import pytest

from ecdit_ds.slurm.completion import tell_ranks
from ecdit_ds.slurm.rank_logs import flags_for_logs

ROOT = Path(__file__).resolve().parents[3]
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_PROCID": "11",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "12",
    "SLURM_LOCALID": "11",
}


def run_rank(logs: Path, words: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a rank that says something on both streams."""
    program = logs.parent / "program.py"
    program.write_text("import sys; print('to', sys.argv[1:]); sys.exit('to stderr')", encoding="ascii")
    command = tell_ranks(["slurm/rank.sh", "--hold-signals", str(program), "--logs"], *words)
    return subprocess.run(
        command,
        cwd=ROOT,
        env=TASK | {"ECDIT_PYTHON": sys.executable} | changes,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["50%4t", "a%%b", "%", "%t", "100%"])
def test_slurm_is_given_no_name_to_write_to_that_it_reads_in_its_own_way(name: str, tmp_path: Path) -> None:
    logs = tmp_path / name / "slurm"
    logs.mkdir(parents=True)
    flags, words = flags_for_logs(logs)
    assert "%" not in "".join(flags)
    for _ in range(2):
        ended = run_rank(logs, words)
        assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "")
    assert (logs / "rank_0011.log").read_text() == "to ['--logs']\nto stderr\n" * 2


def test_any_other_name_is_left_to_srun(tmp_path: Path) -> None:
    flags, words = flags_for_logs(tmp_path / "a run")
    log = f"{tmp_path}/a run/rank_%4t.log"
    assert (flags, words) == ([f"--output={log}", f"--error={log}", "--open-mode=append"], [])


@pytest.mark.parametrize("is_link", [False, True])
def test_a_log_that_cannot_be_opened_is_told_in_one_line(tmp_path: Path, is_link: bool) -> None:
    logs = tmp_path / "100%"
    if is_link:
        logs.mkdir()
        (logs / "rank_0011.log").symlink_to(tmp_path / "victim")
    ended = run_rank(logs, flags_for_logs(logs)[1])
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {logs}/rank_0011.log: cannot be written: ")
    assert not (tmp_path / "victim").exists()


def test_what_is_wrong_with_a_rank_is_told_in_its_log(tmp_path: Path) -> None:
    logs = tmp_path / "100%"
    logs.mkdir()
    ended = run_rank(logs, flags_for_logs(logs)[1], SLURM_NODEID="1")
    assert (ended.returncode, ended.stderr) == (2, "")
    assert (logs / "rank_0011.log").read_text().startswith("error: environment variable SLURM_NODEID: 1")
