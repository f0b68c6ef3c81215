"""Look into, check, compare and convert checkpoints:  python tools/convert_ckpt.py COMMAND ...

    inspect CKPT              what is in it
    verify CKPT               every checksum, every slice, every tensor of the model; exit code 0 only if all hold
    diff A B                  what differs; exit code 0 only if nothing does
    convert SRC DST --to ...  the same tensors in other files; streams, resumes, verifies, overwrites nothing

CKPT is a checkpoint's folder or a run's, whose newest is then taken; or one of DeepSpeed's own, universal or ZeRO-1/2,
with --config and --set for the recipe that it does not hold. Training and sampling read any layout's checkpoint as it
is: converting is for sharing, for DeepSpeed, for one file a rank, for another number type, for giving a dense model
experts. docs/conversion.md says what each format holds and loses.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from ecdit_ds.checkpoint.convert import (
    bytes_to_move,
    convert_to_ecdit,
    convert_to_safetensors,
    plan_files,
    plan_layout,
)
from ecdit_ds.checkpoint.derived import WithAverage
from ecdit_ds.checkpoint.formats import deepspeed_folder, lacks_recipe, open_deepspeed
from ecdit_ds.checkpoint.inspection import describe, differences, total_bytes, verify
from ecdit_ds.checkpoint.manifest import MANIFEST_NAME, list_checkpoints
from ecdit_ds.checkpoint.model_facts import ModelFacts
from ecdit_ds.checkpoint.sources import INDEX_NAME, SafetensorsSource, Source, open_source
from ecdit_ds.checkpoint.universal import convert_to_universal
from ecdit_ds.config import Recipe
from ecdit_ds.errors import CheckpointError, ConfigError, EcditError
from ecdit_ds.optim import STATE_NAMES
from ecdit_ds.parallel.sharding import cut_axes
from ecdit_ds.recipe_file import recipe_from_dict
from tools.convert_sources import model_facts, parameter_shapes, upcycled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = {"all": None, "weights": "weight", "ema": "ema"}
MAX_FILE_BYTES = 5 * 10**9


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="tools/convert_ckpt.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, help_text in (("inspect", _inspect, "what is in it"), ("verify", _verify, "is it whole?")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("checkpoint", type=Path, metavar="CKPT")
        command.set_defaults(run=run)
    diff = commands.add_parser("diff", help="what differs")
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    diff.set_defaults(run=_diff)
    convert = commands.add_parser("convert", help="the same tensors in other files")
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument("destination", type=Path, metavar="DST", help="must not exist; DST.partial until it is whole")
    convert.add_argument(
        "--to", choices=("ecdit", "safetensors", "universal"), required=True,
        help="ecdit: our format, to train on; safetensors: Hugging Face style, with index and config.json, to share; "
        "universal: for DeepSpeed's load_checkpoint with load_universal, any layout and ZeRO stage (3: Adam only, "
        "and a repair after loading; docs/conversion.md)",
    )  # fmt: skip
    convert.add_argument(
        "--only", choices=KINDS, help="weights of the last step, or averaged ones (default: all, or ema)"
    )
    convert.add_argument("--dtype", choices=DTYPES, help="cast (default: as it is, bitwise)")
    convert.add_argument("--files", type=_positive, metavar="N", help="ecdit: about N files of equal size (default: 1)")
    convert.add_argument(
        "--tp", type=_positive, metavar="T",
        help="ecdit: a file a rank of this layout, and a shared one; universal: T files of counts (default: 1)",
    )  # fmt: skip
    convert.add_argument("--ep", type=_positive, metavar="E", help="ecdit: as --tp")
    convert.add_argument(
        "--upcycle", metavar="RECIPE",
        help="ecdit: make a dense checkpoint into one of this recipe, its feed-forward networks into equal experts",
    )  # fmt: skip
    convert.add_argument(
        "--ema-from-weights",
        action="store_true",
        help="begin the average, which DeepSpeed's folders lack, at the weights",
    )
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


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and turn what a user can get wrong into one line; return the exit code."""
    options = parse_arguments(arguments)
    try:
        return int(options.run(options))
    except EcditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        return 130


def _inspect(options: argparse.Namespace) -> int:
    folder, source = _open(options.checkpoint, _facts(options))
    print("\n".join([f"checkpoint   {folder}", *describe(source)]))
    return 0


def _verify(options: argparse.Namespace) -> int:
    folder, source = _open(options.checkpoint, _facts(options))
    with _bar(total_bytes(source), "verify") as bar:
        total = verify(source, _expected_shapes(source), bar.update)
    has_none = isinstance(source, SafetensorsSource)
    checked = "sizes hold; the format has no checksums" if has_none else "every checksum holds"
    print(f"{folder}: whole: {len(source.tensors)} tensors of {total:,} bytes; {checked}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    facts, paths = _facts(options), (options.first, options.second)
    needy = [path for path in paths if lacks_recipe(path)] or paths
    (_, first), (_, second) = (_open(path, facts if path in needy else None) for path in paths)
    count = 0
    with _bar(total_bytes(first), "diff") as bar:
        for line in differences(first, second, bar.update):
            bar.clear()
            print(line)
            count += 1
    print(f"{count} differences" if count else "the same, to the last bit")
    return 1 if count else 0


def _convert(options: argparse.Namespace) -> int:
    folder, source = _open(options.source, _facts(options))
    if options.destination.resolve() == folder.resolve():
        raise ConfigError(f"{options.destination}: is the source itself; choose another destination")
    dtype = DTYPES[options.dtype] if options.dtype else None
    source = _derived(source, options)
    if options.to == "universal":
        _require_universal(source, options)
        with _bar(2 * total_bytes(source), "convert") as bar:
            convert_to_universal(source, options.destination, cut_axes, options.tp or 1, bar.update)
    elif options.to == "safetensors":
        if options.files or options.tp or options.ep or options.only == "all":
            raise ConfigError("--to safetensors: takes --only weights or ema, and --dtype; files are cut at 5 GB")
        kind = KINDS[options.only or "ema"] or "ema"
        _require_kind(source, kind)
        names = [name for name in source.tensors if name.startswith(f"{kind}/")]
        with _bar(bytes_to_move(plan_files(source, names, 1, dtype)), "convert") as bar:
            convert_to_safetensors(source, options.destination, kind, dtype, MAX_FILE_BYTES, bar.update)
    else:
        files = _ecdit_files(source, options, dtype)
        with _bar(bytes_to_move(files), "convert") as bar:
            convert_to_ecdit(source, options.destination, files, bar.update)
    print(f"{folder} -> {options.destination}, read back and compared")
    return 0


def _facts(options: argparse.Namespace) -> ModelFacts | None:
    """Return what the command line says about a checkpoint that holds no recipe."""
    if options.set and not options.config and not getattr(options, "upcycle", None):
        raise ConfigError(f"--set {options.set[0]}: changes the recipe of --config or --upcycle; give one of them")
    return model_facts(options.config, options.set) if options.config else None


def _derived(source: Source, options: argparse.Namespace) -> Source:
    """Return the source, with an average or with experts where that is asked for."""
    if options.to != "ecdit" and (options.upcycle or options.ema_from_weights):
        raise ConfigError(
            f"--to {options.to}: --upcycle and --ema-from-weights make a checkpoint to train on: --to ecdit"
        )
    if options.upcycle and options.config:
        raise ConfigError("--upcycle and --config: each has its own --set; convert first, then upcycle")
    if options.ema_from_weights:
        source = WithAverage(source)
    if options.upcycle:
        source = upcycled(source, options.upcycle, options.set)
    if options.to == "ecdit" and not options.only and not _has_kind(source, "ema"):
        print("note: there is no average (ema), which training needs; --ema-from-weights begins one", file=sys.stderr)
    return source


def _require_universal(source: Source, options: argparse.Namespace) -> None:
    if options.only or options.dtype or options.files or options.ep:
        raise ConfigError("--to universal: takes --tp alone; it holds everything, in fp32, and serves any layout")
    for kind in ("weight", *STATE_NAMES[_recipe(source).optimizer.name]):
        if not _has_kind(source, kind):
            raise ConfigError(f"--to universal: the checkpoint holds no {kind}, without which DeepSpeed loads nothing")


def _has_kind(source: Source, kind: str) -> bool:
    return any(name.startswith(f"{kind}/") for name in source.tensors)


def _ecdit_files(source: Source, options: argparse.Namespace, dtype: torch.dtype | None) -> list[Any]:
    kind = KINDS[options.only or "all"]
    if dtype is not None and kind is None:
        raise ConfigError(f"--dtype {options.dtype}: would round the optimizer's state too; add --only weights or ema")
    if kind is not None:
        _require_kind(source, kind)
    names = [name for name in source.tensors if kind is None or name.startswith(f"{kind}/")]
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
    if not _has_kind(source, kind):
        kinds = ", ".join(sorted({name.split("/")[0] for name in source.tensors}))
        raise ConfigError(f"--only: the checkpoint holds no {kind}; it holds {kinds}")


def _open(path: Path, facts: ModelFacts | None = None) -> tuple[Path, Source]:
    """Open a checkpoint's folder, or the newest of a run's."""
    if facts is not None and not lacks_recipe(path):
        raise ConfigError(f"--config: {path} is no folder of DeepSpeed's own and has its recipe; leave the flag away")
    if folder := deepspeed_folder(path):
        return folder, open_deepspeed(folder, facts)
    if (path / MANIFEST_NAME).exists() or (path / INDEX_NAME).exists():
        return path, open_source(path)
    for root in (path / "checkpoints", path):
        if found := list_checkpoints(root):
            return found[0], open_source(found[0])
    raise CheckpointError(f"{path}: is neither a checkpoint nor a run with checkpoints")


def _expected_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(_recipe(source))


def _recipe(source: Source) -> Recipe:
    try:
        return recipe_from_dict(dict(source.meta["recipe"]))
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"its recipe cannot be read, so its tensors cannot be compared with it: {error}"
        ) from None


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
