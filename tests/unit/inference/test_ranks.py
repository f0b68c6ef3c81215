"""How the processes of a tool end."""

import subprocess
import sys

import pytest

from tests.helpers.launch import ROOT, free_port

PROGRAM = """
import atexit, sys
import torch.distributed as dist
from ecdit_ds.inference.ranks import exit_process
if sys.argv[1] == "one of many":
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=0, world_size=1)
atexit.register(print, "taken down")
print("all is said", end="")
exit_process(3)
"""


@pytest.mark.parametrize(("who", "said"), [("one of many", "all is said"), ("alone", "all is saidtaken down\n")])
def test_one_of_many_leaves_without_taking_down_what_others_may_be_in(who: str, said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, who, str(free_port())], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (3, said), ended.stderr
