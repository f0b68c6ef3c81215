"""Flags that benchmarks share."""

import argparse
import math
import os
from pathlib import Path

from ecdit_ds.errors import ConfigError


def add_common(command: argparse.ArgumentParser, what_rounds: str = "of each side and case (default 7)") -> None:
    """Add the flags of what is reported, and on what it runs."""
    add_report(command, what_rounds)
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto")
    command.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and tokens (default fp32)"
    )


def add_report(command: argparse.ArgumentParser, what_rounds: str) -> None:
    """Add the flags of how much is measured, and where it is kept."""
    command.add_argument("--quick", action="store_true", help="fewer, smaller cases and rounds: some seconds")
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, with device, versions, command"
    )
    command.add_argument("--rounds", type=positive, help=f"timings {what_rounds}")


def check_folder(folder: Path) -> None:
    """Check that files can be written in a folder.

    Raises:
        ConfigError: they cannot.
    """
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--folder {folder}: is no folder that can be written")


def positive_number(text: str) -> float:
    """Return a number above 0, as argparse wants its types."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def positive(text: str) -> int:
    """Return a whole number above 0, as argparse wants its types."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
