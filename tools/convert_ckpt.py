"""Look into, check, compare and convert checkpoints:  python tools/convert_ckpt.py COMMAND ...

    inspect CKPT              what is in it
    verify CKPT               every checksum, every slice, every tensor of the model; exit code 0 only if all hold
    diff A B                  what differs; exit code 0 only if nothing does
    convert SRC DST --to ...  the same tensors in other files; streams, resumes, verifies, overwrites nothing

CKPT is a checkpoint's folder or a run's, whose newest is then taken. Training and sampling read any layout's
checkpoint as it is: converting is for sharing, for one file a rank, for another number type.

A conversion works in DST.partial, where only one may be at a time. Interrupted or killed, the same command goes on
with the file it was at; another command with the same DST clears away what the first one wrote and begins anew.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from ecdit_ds.checkpoint.convert import (
    FilePlan,
    bytes_to_move,
    convert_to_ecdit,
    convert_to_safetensors,
    plan_files,
    plan_layout,
    plan_safetensors,
)
from ecdit_ds.checkpoint.inspection import describe, differences, total_bytes, verify
from ecdit_ds.checkpoint.manifest import MANIFEST_NAME, list_checkpoints
from ecdit_ds.checkpoint.partial import partial_of
from ecdit_ds.checkpoint.sources import INDEX_NAME, EcditSource, SafetensorsSource, Source, open_source
from ecdit_ds.errors import CheckpointError, ConfigError, EcditError, ExitCode
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.parallel.layers import SerialLayers
from ecdit_ds.parallel.sharding import cut_axes
from ecdit_ds.recipe_file import recipe_from_dict

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {"all": None, "weights": "weight", "ema": "ema"}
MAX_FILE_BYTES = 5 * 10**9


class _OneLineParser(argparse.ArgumentParser):
    """Answers a wrong flag with one line; `--help` tells the rest."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = _OneLineParser(
        prog="tools/convert_ckpt.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, help_text in (("inspect", _inspect, "what is in it"), ("verify", _verify, "is it whole?")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("checkpoint", type=_path, metavar="CKPT")
        command.set_defaults(run=run)
    diff = commands.add_parser("diff", help="what differs")
    diff.add_argument("first", type=_path, metavar="A")
    diff.add_argument("second", type=_path, metavar="B")
    diff.set_defaults(run=_diff)
    convert = commands.add_parser("convert", help="the same tensors in other files")
    convert.add_argument("source", type=_path, metavar="SRC")
    convert.add_argument("destination", type=_path, metavar="DST", help="must not exist; DST.partial until it is whole")
    convert.add_argument(
        "--to", choices=("ecdit", "safetensors"), required=True,
        help="ecdit: our format, to train on; safetensors: Hugging Face style, with index and config.json, to share",
    )  # fmt: skip
    convert.add_argument(
        "--only", choices=KINDS, help="weights of the last step, or averaged ones (default: all, or ema)"
    )
    convert.add_argument(
        "--dtype", choices=DTYPES,
        help="cast (default: as it is, bitwise); refused if a finite number became infinite, as beyond 65504 in fp16",
    )  # fmt: skip
    convert.add_argument("--files", type=_positive, metavar="N", help="ecdit: about N files of equal size (default: 1)")
    convert.add_argument(
        "--tp", type=_positive, metavar="T", help="ecdit: a file a rank of this layout, and a shared one"
    )
    convert.add_argument("--ep", type=_positive, metavar="E", help="ecdit: as --tp")
    convert.set_defaults(run=_convert)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and turn what a user can get wrong into one line; return the exit code."""
    torch.set_num_threads(1)  # parts are small: several threads would wait for one another longer than they work
    options = argparse.Namespace(command="")
    try:
        options = parse_arguments(arguments)
        return int(options.run(options))
    except EcditError as error:
        print(_one_line(f"error: {error}"), file=sys.stderr)
        return ExitCode.USER_ERROR
    except OSError as error:
        print(_one_line(f"error: {error.filename or options.command}: {error.strerror or error}"), file=sys.stderr)
        return ExitCode.USER_ERROR
    except KeyboardInterrupt as interrupt:
        print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return ExitCode.INTERRUPTED


def _inspect(options: argparse.Namespace) -> int:
    folder, source = _open(options.checkpoint)
    for line in (f"checkpoint   {folder}", *describe(source)):
        print(_one_line(line))
    return 0


def _verify(options: argparse.Namespace) -> int:
    folder, source = _open(options.checkpoint)
    with _told_of(folder), _bar(total_bytes(source), "verify") as bar:
        total = verify(source, _expected_shapes(source), bar.update)
    checked = "every checksum holds" if isinstance(source, EcditSource) else "sizes hold; the format has no checksums"
    print(_one_line(f"{folder}: whole: {len(source.tensors)} tensors of {total:,} bytes; {checked}"))
    return 0


def _diff(options: argparse.Namespace) -> int:
    (_, first), (_, second) = _open(options.first), _open(options.second)
    count = 0
    with _bar(total_bytes(first), "diff") as bar:
        for line in differences(first, second, bar.update):
            bar.clear()
            print(_one_line(line))
            count += 1
    print(f"{count} differences" if count else "the same, to the last bit")
    return 1 if count else 0


def _convert(options: argparse.Namespace) -> int:
    folder, source = _open(options.source)
    _check_apart(folder, options.destination)
    dtype = DTYPES[options.dtype] if options.dtype else None
    if options.to == "safetensors":
        if options.files or options.tp or options.ep or options.only == "all":
            raise ConfigError("--to safetensors: takes --only weights or ema, and --dtype; files are cut at 5 GB")
        kind = KINDS[options.only or "ema"] or "ema"
        _require_kind(source, kind)
        files = plan_safetensors(source, kind, MAX_FILE_BYTES, dtype)
        with _bar(bytes_to_move(files), "convert") as bar:
            convert_to_safetensors(source, options.destination, kind, files, bar.update)
    else:
        files = _ecdit_files(source, options, dtype)
        with _bar(bytes_to_move(files), "convert") as bar:
            convert_to_ecdit(source, options.destination, files, bar.update)
    print(_one_line(f"{folder} -> {options.destination}, read back and compared"))
    return 0


def _check_apart(source: Path, destination: Path) -> None:
    """Refuse to write into what is read, or to read from where is written."""
    held, new = (Path(os.path.realpath(path)) for path in (source, destination))
    if held == new:
        raise ConfigError(f"{destination}: is the source itself; choose another destination")
    if new.is_relative_to(held):
        raise ConfigError(f"{destination}: lies in the source, {source}; choose a destination beside it")
    if held.is_relative_to(partial_of(new)):
        raise ConfigError(f"{source}: lies in {partial_of(destination)}, where the conversion would work; move it")


def _ecdit_files(source: Source, options: argparse.Namespace, dtype: torch.dtype | None) -> list[FilePlan]:
    kind = KINDS[options.only or "all"]
    if dtype is not None and kind is None:
        raise ConfigError(f"--dtype {options.dtype}: would round the optimizer's state too; add --only weights or ema")
    if kind is not None:
        _require_kind(source, kind)
    names = [name for name in source.tensors if kind is None or name.startswith(f"{kind}/")]
    if not names:
        raise CheckpointError(f"{options.source}: holds no tensors; there is nothing to convert")
    if options.tp is None and options.ep is None:
        return plan_files(source, names, options.files or 1, dtype)
    if options.files:
        raise ConfigError(f"--files {options.files}: --tp and --ep say how many files there are; leave one away")
    tp, ep = options.tp or 1, options.ep or 1

    def cuts(name: str) -> dict[int, int]:
        counts = {"tp": tp, "ep": ep}
        return {axis: counts[way] for way, axis in cut_axes(name).items() if counts[way] > 1}

    return plan_layout(source, names, cuts, tp, ep, dtype)


def _require_kind(source: Source, kind: str) -> None:
    if not any(name.startswith(f"{kind}/") for name in source.tensors):
        kinds = ", ".join(sorted({name.split("/")[0] for name in source.tensors}))
        raise ConfigError(f"--only: the checkpoint holds no {kind}; it holds {kinds}")


def _open(path: Path) -> tuple[Path, EcditSource | SafetensorsSource]:
    """Open a checkpoint's folder, or the newest of a run's."""
    try:
        if (path / MANIFEST_NAME).exists() or (path / INDEX_NAME).exists():
            return path, open_source(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    for root in (path / "checkpoints", path):
        if found := list_checkpoints(root):
            return found[0], open_source(found[0])
    raise CheckpointError(f"{path}: is neither a checkpoint nor a run with checkpoints")


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """Begin what is said of a checkpoint with its folder, where it does not name a file there."""
    try:
        yield
    except EcditError as error:
        raise (
            error if str(error).startswith((f"{folder}/", f"{folder}:")) else CheckpointError(f"{folder}: {error}")
        ) from None


def _expected_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    try:
        recipe = recipe_from_dict(source.meta["recipe"])
        if recipe.model.num_layers > len(source.tensors):
            raise ConfigError(f"model.num_layers: {recipe.model.num_layers}, with {len(source.tensors)} tensors")
        with torch.device("meta"):
            model = ECDiT(recipe.model, SerialLayers())
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, ConfigError) as error:
        raise CheckpointError(
            f"its recipe cannot be read, so its tensors cannot be compared with it: {error}"
        ) from None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _one_line(text: str) -> str:
    """Return text with what would break or hide a line, such as a newline in a file's name, written out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)


def _path(text: str) -> Path:
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return Path(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
