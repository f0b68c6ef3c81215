"""docs/97b.md shows what its commands print."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "97b.md"
BLOCKS = re.findall(
    r"^```console\n\$ python (.*)\n((?:.*\n)*?)```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE
)
OF_THIS_MACHINE = ("disk ",)
"""Lines that differ from machine to machine begin so."""


def test_the_document_shows_models_a_plan_and_a_dry_run() -> None:
    commands = [command for command, _ in BLOCKS]
    assert [command.split()[0] for command in commands] == ["tools/plan.py", "tools/plan.py", "ecdit_ds/train.py"]


@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=["models", "plan", "dry_run"])
def test_every_number_of_the_document_is_what_the_command_above_it_prints(command: str, shown: str) -> None:
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (2 if "--dry-run" in command else 0), done.stderr  # training would want its data named
    printed = [line for line in done.stdout.splitlines() if not line.startswith(OF_THIS_MACHINE)]
    assert shown.splitlines() == printed
