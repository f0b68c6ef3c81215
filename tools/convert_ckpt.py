"""Look into, check, compare and convert checkpoints:  python tools/convert_ckpt.py COMMAND ...

    inspect CKPT              what is in it
    verify CKPT               every checksum, every slice, every tensor of the model, every number finite; exit code 0
                              only if all hold
    diff A B                  what differs; exit code 0 only if nothing does
    convert SRC DST --to ...  the same tensors in other files; streams, resumes, verifies, overwrites nothing

CKPT is a checkpoint's folder or a run's, whose newest is then taken; or one of DeepSpeed's own, universal or ZeRO-1/2,
with --config and --set for the recipe that it does not hold. Training and sampling read any layout's checkpoint as it
is: converting is for sharing, for DeepSpeed, for one file a rank, for another number type, for giving a dense model
experts. docs/conversion.md says what each format holds and loses.

A conversion works in DST.partial, where only one may be at a time. Interrupted or killed, the same command goes on
with the file it was at; another command with the same DST clears away what the first one wrote and begins anew.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from ecdit_ds.checkpoint.convert.convert import bytes_to_move, convert_to_ecdit, convert_to_safetensors
from ecdit_ds.checkpoint.convert.file_plan import FilePlan, plan_files, plan_layout, plan_safetensors
from ecdit_ds.checkpoint.convert.formats import lacks_recipe
from ecdit_ds.checkpoint.convert.inspection import describe_checkpoint, differences, total_bytes, verify
from ecdit_ds.checkpoint.convert.model_spec import ModelFacts
from ecdit_ds.checkpoint.convert.open import expected_of, model_facts, open_checkpoint, recipe_of, upcycled
from ecdit_ds.checkpoint.convert.sources import CheckpointSource, SafetensorsSource
from ecdit_ds.checkpoint.convert.universal_writer import convert_to_universal, plan_universal
from ecdit_ds.checkpoint.convert.upcycle import WithEmaFromWeights
from ecdit_ds.checkpoint.convert.workspace import partial_of
from ecdit_ds.checkpoint.finite import tell_nonfinite
from ecdit_ds.config.recipe import STATE_NAMES
from ecdit_ds.errors import CheckpointError, ConfigError, EcditError, ExitCode, escape_unprintable
from ecdit_ds.parallel.partition_rules import sharded_axes
from tools.command_line import OneLineParser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {"all": None, "weights": "weight", "ema": "ema"}
MAX_FILE_BYTES = 5 * 10**9


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = OneLineParser(
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
    _add_convert_flags(convert)
    convert.set_defaults(run=_convert)
    for command in commands.choices.values():
        command.add_argument(
            "--config", metavar="NAME|PATH", help="recipe of a checkpoint that holds none: a folder of DeepSpeed's own"
        )
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a field of that or of the upcycled recipe",
        )
    return parser.parse_args(arguments)


def _add_convert_flags(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("source", type=_path, metavar="SRC")
    convert.add_argument("destination", type=_path, metavar="DST", help="must not exist; DST.partial until it is whole")
    convert.add_argument(
        "--to",
        choices=("ecdit", "safetensors", "universal"),
        required=True,
        help="ecdit: our format, to train on; safetensors: Hugging Face style, with index and config.json, to share; "
        "universal: for DeepSpeed's load_checkpoint with load_universal, any layout and ZeRO stage (3: Adam only, "
        "and a repair after loading; docs/conversion.md)",
    )
    convert.add_argument(
        "--only", choices=KINDS, help="weights of the last step, or averaged ones (default: all, or ema)"
    )
    convert.add_argument(
        "--dtype",
        choices=DTYPES,
        help="cast (default: as it is, bitwise); refused if a finite number became infinite, as beyond 65504 in fp16",
    )
    convert.add_argument("--files", type=_positive, metavar="N", help="ecdit: about N files of equal size (default: 1)")
    convert.add_argument(
        "--tp",
        type=_positive,
        metavar="T",
        help="ecdit: a file a rank of this layout, and a shared one; universal: T files of counts (default: 1)",
    )
    convert.add_argument("--ep", type=_positive, metavar="E", help="ecdit: as --tp")
    convert.add_argument(
        "--unmarked-experts",
        action="store_true",
        help="universal: for a script whose model does not tell DeepSpeed which parameters are experts'",
    )
    convert.add_argument(
        "--upcycle",
        metavar="RECIPE",
        help="ecdit: make a dense checkpoint into one of this recipe, its feed-forward networks into equal experts",
    )
    convert.add_argument(
        "--ema-from-weights",
        action="store_true",
        help="begin the average, which DeepSpeed's folders lack, at the weights",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and turn what a user can get wrong into one line; return the exit code."""
    torch.set_num_threads(1)  # parts are small: several threads would wait for one another longer than they work
    options = argparse.Namespace(command="")
    try:
        options = parse_arguments(arguments)
        return int(options.run(options))
    except EcditError as error:
        print(escape_unprintable(f"error: {error}"), file=sys.stderr)
        return ExitCode.USER_ERROR
    except BrokenPipeError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except OSError as error:
        print(
            escape_unprintable(f"error: {error.filename or options.command}: {error.strerror or error}"),
            file=sys.stderr,
        )
        return ExitCode.USER_ERROR
    except KeyboardInterrupt as interrupt:
        print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return ExitCode.INTERRUPTED


def _inspect(options: argparse.Namespace) -> int:
    folder, source = open_checkpoint(options.checkpoint, _facts(options))
    for line in (f"checkpoint   {folder}", *describe_checkpoint(source)):
        print(escape_unprintable(line))
    return 0


def _verify(options: argparse.Namespace) -> int:
    folder, source = open_checkpoint(options.checkpoint, _facts(options))
    with _told_of(folder), _bar(total_bytes(source), "verify") as bar:
        total = verify(source, *expected_of(source), bar.update)
    has_none = isinstance(source, SafetensorsSource)
    checked = "sizes hold; the format has no checksums" if has_none else "every checksum holds"
    print(escape_unprintable(f"{folder}: whole: {len(source.tensors)} tensors of {total:,} bytes; {checked}"))
    if not any(_has_kind(source, name) for names in STATE_NAMES.values() for name in names):
        print("note: there is no optimizer state, so training cannot go on from it")
    return 0


def _diff(options: argparse.Namespace) -> int:
    facts, paths = _facts(options), (options.first, options.second)
    needy = [path for path in paths if lacks_recipe(path)] or paths
    (_, first), (_, second) = (open_checkpoint(path, facts if path in needy else None) for path in paths)
    count = 0
    with _bar(total_bytes(first), "diff") as bar:
        for line in differences(first, second, bar.update):
            bar.clear()
            print(escape_unprintable(line))
            count += 1
    print(f"{count} differences" if count else "the same, to the last bit")
    return 1 if count else 0


def _convert(options: argparse.Namespace) -> int:
    folder, source = open_checkpoint(options.source, _facts(options))
    _check_apart(folder, options.destination)
    dtype = DTYPES[options.dtype] if options.dtype else None
    source = _derived(source, options)
    if options.unmarked_experts and options.to != "universal":
        raise ConfigError(f"--unmarked-experts: has no effect with --to {options.to}; leave it out")
    if options.to == "universal":
        if options.only or options.dtype or options.files or options.ep:
            raise ConfigError(
                "--to universal: takes --tp and --unmarked-experts alone; it holds everything, in fp32, and serves any "
                "layout"
            )
        with _told_of(folder):
            _require_state(source)
            files = plan_universal(source, sharded_axes, options.tp or 1, marks_experts=not options.unmarked_experts)
        with _bar(bytes_to_move(files), "convert") as bar:
            nonfinite = convert_to_universal(source, options.destination, files, options.tp or 1, bar.update)
    elif options.to == "safetensors":
        if options.files or options.tp or options.ep or options.only == "all":
            raise ConfigError("--to safetensors: takes --only weights or ema, and --dtype; files are cut at 5 GB")
        kind = KINDS[options.only or "ema"] or "ema"
        _require_kind(source, kind)
        files = plan_safetensors(source, kind, MAX_FILE_BYTES, dtype)
        with _bar(bytes_to_move(files), "convert") as bar:
            nonfinite = convert_to_safetensors(source, options.destination, kind, files, bar.update)
    else:
        files = _ecdit_files(source, options, dtype)
        with _bar(bytes_to_move(files), "convert") as bar:
            nonfinite = convert_to_ecdit(source, options.destination, files, bar.update)
    print(escape_unprintable(f"{folder} -> {options.destination}, read back and compared"))
    if nonfinite:
        print(
            escape_unprintable(
                f"note: {tell_nonfinite(nonfinite)}, and it says so; nothing trains on from it or draws with it"
            )
        )
    if options.to == "ecdit" and not options.only and not _has_kind(source, "ema"):
        print("note: there is no average (ema), which training needs; --ema-from-weights begins one")
    return 0


def _facts(options: argparse.Namespace) -> ModelFacts | None:
    """Return what the command line says about a checkpoint that holds no recipe."""
    if options.set and not options.config and not getattr(options, "upcycle", None):
        raise ConfigError(f"--set {options.set[0]}: changes the recipe of --config or --upcycle; give one of them")
    return model_facts(options.config, options.set) if options.config else None


def _derived(source: CheckpointSource, options: argparse.Namespace) -> CheckpointSource:
    """Return the source, with an average or with experts where that is asked for."""
    if options.to != "ecdit" and (options.upcycle or options.ema_from_weights):
        raise ConfigError(
            f"--to {options.to}: --upcycle and --ema-from-weights make a checkpoint to train on: --to ecdit"
        )
    if options.upcycle and options.config:
        raise ConfigError("--upcycle and --config: each has its own --set; convert first, then upcycle")
    if options.ema_from_weights:
        source = WithEmaFromWeights(source)
    if options.upcycle:
        source = upcycled(source, options.upcycle, options.set)
    return source


def _require_state(source: CheckpointSource) -> None:
    for kind in ("weight", *STATE_NAMES[recipe_of(source).optimizer.name]):
        if not _has_kind(source, kind):
            raise CheckpointError(f"holds no {kind}, without which DeepSpeed loads nothing")


def _has_kind(source: CheckpointSource, kind: str) -> bool:
    return any(name.startswith(f"{kind}/") for name in source.tensors)


def _check_apart(source: Path, destination: Path) -> None:
    """Refuse to write into what is read, or to read from where is written."""
    held, new = (Path(os.path.realpath(path)) for path in (source, destination))
    if held == new:
        raise ConfigError(f"{destination}: is the source itself; choose another destination")
    if new.is_relative_to(held):
        raise ConfigError(f"{destination}: lies in the source, {source}; choose a destination beside it")
    if held.is_relative_to(partial_of(new)):
        raise ConfigError(f"{source}: lies in {partial_of(destination)}, where the conversion would work; move it")


def _ecdit_files(source: CheckpointSource, options: argparse.Namespace, dtype: torch.dtype | None) -> list[FilePlan]:
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
        return {axis: counts[way] for way, axis in sharded_axes(name).items() if counts[way] > 1}

    return plan_layout(source, names, cuts, tp, ep, dtype)


def _require_kind(source: CheckpointSource, kind: str) -> None:
    if not _has_kind(source, kind):
        kinds = ", ".join(sorted({name.split("/")[0] for name in source.tensors}))
        raise ConfigError(f"--only: the checkpoint holds no {kind}; it holds {kinds}")


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """Begin what is said of a checkpoint with its folder, where it does not name a file there."""
    try:
        yield
    except EcditError as error:
        raise (
            error if str(error).startswith((f"{folder}/", f"{folder}:")) else CheckpointError(f"{folder}: {error}")
        ) from None


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
