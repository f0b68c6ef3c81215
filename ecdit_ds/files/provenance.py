"""Where a figure comes from: device, versions, commit and command."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe_run(device: torch.device, packages: tuple[str, ...]) -> dict[str, Any]:
    """Return what a figure must be published with: device, versions, commit, command."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=sys.path[0], capture_output=True, check=False, text=True
    )
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": git.stdout.strip() or "none",
        "command": shlex.join(["python", *sys.argv]),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
