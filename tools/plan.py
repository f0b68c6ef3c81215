"""Plan a run before a cluster sees it:  python tools/plan.py --config ecdit_m_64e --nodes 64 --gpu h100-80gb

Predicts memory, FLOPs, traffic, step time, checkpoints and interruptions of a layout. Without both --tp and --ep it
tries all layouts, ranks those that fit, and says why the others do not; what a flag gives is fixed. Nothing is
measured: how good the predictions are stands in docs/97b.md. Needs neither torch nor a GPU.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ecdit_ds.config.deepspeed_json import DEFAULT_PATH, load_deepspeed_config
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe, recipe_names
from ecdit_ds.errors import ConfigError, EcditError, ExitCode
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.planner.hardware import Cluster, default_assumptions, find_gpu, gpu_names, read_machine, reasons
from ecdit_ds.planner.launch_files import phase_notes, write_run_files
from ecdit_ds.planner.models import describe_models
from ecdit_ds.planner.plan import ClusterAssumptions, Plan, make_plan, with_micro_batch
from ecdit_ds.planner.reliability import FAILURE_RATES
from ecdit_ds.planner.report import describe_memory, describe_plan, describe_refusals, describe_search, to_json
from ecdit_ds.planner.search import (
    Candidate,
    SearchResult,
    SearchSpace,
    all_choices,
    check_before_search,
    require_experts_divide,
    search,
    smallest_nodes,
)
from ecdit_ds.planner.zero import zero_settings
from tools.command_line import OneLineParser

STAGES = (1, 2, 3)
STAGE_FILES = {stage: DEFAULT_PATH.parent / f"zero{stage}.json" for stage in STAGES}
OVERLAP_FILE = DEFAULT_PATH.parent / "zero2_overlap.json"
"""Stage 2 with gradients that travel during backward, in smaller buckets."""
GIGABIT = 1e9 / 8
SPEEDS, RATES, MINUTES, SHARES, HOST_SPEEDS = (1e-3, 1e6), (1e-3, 1e6), (0.0, 1e5), (0.01, 1.0), (1e6, 1e13)
"""What flags that are no whole numbers may say: gigabits a second, interruptions per 1000 node-days, minutes, shares of
a peak, bytes a second. Far beyond any machine, and near enough that everything predicted stays finite."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = OneLineParser(
        prog="tools/plan.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Recipes: {', '.join(recipe_names())}.",
    )
    parser.add_argument("--models", action=_Models, nargs=0, help="print the sizes of all recipes, and stop")
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the recipe")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="(default: the file's, or 8)")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(gpu_names())}")
    kind.add_argument("--machine", type=Path, metavar="YAML", help="another one; docs/97b.md shows such a file")
    parser.add_argument("--tp", type=_positive, metavar="N", help="tensor-parallel ranks")
    parser.add_argument("--ep", type=_positive, metavar="N", help="expert-parallel ranks")
    parser.add_argument("--zero", type=int, choices=STAGES, help="stage, as in ds_configs/ (default: 2, or searched)")
    parser.add_argument("--deepspeed", type=Path, metavar="JSON", help="DeepSpeed configuration, instead of --zero")
    parser.add_argument("--micro-batch", type=_positive, metavar="N", help="images a rank sees in one forward")
    parser.add_argument("--recompute", choices=("none", "block", "selective"), help="activation checkpointing")
    parser.add_argument("--recompute-every", type=_positive, metavar="N", help="of n blocks, the last is recomputed")
    parser.add_argument(
        "--network-gbps", type=_within(*SPEEDS), metavar="X", help="gigabits a second and GPU between nodes"
    )
    parser.add_argument(
        "--storage-gbps",
        type=_within(*SPEEDS),
        default=160.0,
        metavar="X",
        help="gigabits a second to storage, of the whole job (default: %(default)s, which is 20 GB/s)",
    )
    parser.add_argument(
        "--failures-per-1000-node-days",
        type=_within(*RATES),
        action="append",
        metavar="X",
        help=f"interruptions; may be repeated (default: {' and '.join(f'{r:g}' for r in FAILURE_RATES.values())})",
    )
    parser.add_argument(
        "--recovery-minutes",
        type=_within(*MINUTES),
        default=10.0,
        metavar="X",
        help="from an interruption to the next step (default: %(default)s)",
    )
    parser.add_argument("--top", type=_positive, default=10, metavar="N", help="layouts to list (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print numbers for programs")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="DIR",
        help="write recipe.yaml, deepspeed.json, header.sh (Slurm) and overrides.txt of the plan",
    )
    parser.add_argument("--overwrite", action="store_true", help="with --write: replace such files")
    for name, value in asdict(default_assumptions()).items():
        limits = HOST_SPEEDS if name == "host_bytes_per_s" else SHARES
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=_within(*limits),
            metavar="X",
            help=f"{reasons()[name]} (default: {value:g})".replace("%", "%%"),
        )
    return parser.parse_args(arguments)


class _Models(argparse.Action):
    """Prints a table instead of planning."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_models(load_recipe(name) for name in recipe_names()))
        parser.exit()


def main(arguments: list[str] | None = None) -> int:
    """Plan, and turn what a user can get wrong into one line; return the exit code."""
    try:
        return _plan(parse_arguments(arguments))
    except EcditError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except BrokenPipeError:
        _read_no_more()
        return ExitCode.DONE
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return ExitCode.USER_ERROR


def _read_no_more() -> None:
    """Let what is still printed vanish: who read it has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _plan(options: argparse.Namespace) -> int:
    recipe, machine = _recipe(options), _machine(options)
    surroundings = ClusterAssumptions(
        storage_bytes_per_s=options.storage_gbps * GIGABIT,
        recovery_seconds=options.recovery_minutes * 60,
        failure_rates=tuple(options.failures_per_1000_node_days or FAILURE_RATES.values()),
    )
    if options.overwrite and not options.write:
        raise ConfigError("--overwrite: has no effect without --write DIR")
    found = None
    if options.tp and options.ep:
        path = _files(options)[-1]
        _check_tp(options.tp, machine)
        check_before_search(recipe, machine, replace(_choices(options, recipe, machine), deepspeed_files=(path,)))
        require_experts_divide(recipe, machine.world_size // options.tp, options.ep)
        topology = Topology(world_size=machine.world_size, tp=options.tp, ep=options.ep)
        zero = zero_settings(load_deepspeed_config(path, recipe, topology.dp))
        plan = make_plan(recipe, topology, zero, machine, surroundings)
    else:
        choices = _choices(options, recipe, machine)
        check_before_search(recipe, machine, choices)
        found = search(recipe, machine, choices)
        best = _best(found)
        path = best.deepspeed_file
        plan = make_plan(best.recipe, best.topology, best.zero, machine, surroundings, best.micro_batches)
    if options.write and plan.fits:  # before the tables: who reads those may go away in their midst
        write_run_files(plan, load_recipe(options.config), path, options.write, overwrite=options.overwrite)
        wrote = f"wrote {options.write}/recipe.yaml, deepspeed.json, header.sh, overrides.txt"
        print("\n".join([wrote, *phase_notes(plan)]), file=sys.stderr)
    try:
        _print(plan, found, options)
    except BrokenPipeError:  # whether the plan fits is said all the same
        _read_no_more()
    if not plan.fits:
        raise ConfigError(_way_out(plan, found, recipe, machine, options))
    return ExitCode.DONE


def _recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe with what the flags give; those of a search, which are free, at values that work alone."""
    overrides = list(options.set)
    given = {
        "parallel.tp": options.tp,
        "parallel.ep": options.ep,
        "train.micro_batch_size": options.micro_batch,
        "train.recompute": options.recompute,
        "train.recompute_every": options.recompute_every,
    }
    for key, value in given.items():
        twice = next((override for override in options.set if override.split("=")[0].strip() == key), None)
        if value is not None and twice:
            raise ConfigError(f"--set {twice}: the flag for {key} says {value}; leave one away")
    is_search = not (options.tp and options.ep)
    # Recomputation that needs an exchange is refused by a recipe without one: the search sets it with its layouts.
    late = ("train.recompute", "train.recompute_every") if is_search else ()
    overrides += [f"{key}={value}" for key, value in given.items() if value is not None and key not in late]
    if options.recompute_every and not options.recompute:
        raise ConfigError("--recompute-every: has no effect without --recompute block or selective")
    return load_recipe(options.config, overrides)


def _machine(options: argparse.Namespace) -> Cluster:
    gpu, own = (find_gpu(options.gpu), None) if options.gpu else read_machine(options.machine)
    per_node = options.gpus_per_node if options.gpus_per_node is not None else own or 8
    if options.network_gbps is not None:
        gpu = replace(gpu, network_bytes_per_s=options.network_gbps * GIGABIT)
    usual = asdict(default_assumptions())
    given = {name: getattr(options, name) for name in usual if getattr(options, name) is not None}
    assumptions = replace(default_assumptions(), **given)
    return Cluster(gpu=gpu, nodes=options.nodes, gpus_per_node=per_node, assumptions=assumptions)


def _files(options: argparse.Namespace) -> list[Path]:
    """Return the DeepSpeed configurations that are tried; the last is the one where nothing is searched."""
    if options.deepspeed is None:
        is_search = not (options.tp and options.ep)
        stages = [options.zero] if options.zero else STAGES if is_search else [2]
        files = [STAGE_FILES[stage] for stage in stages]
        return [*files, OVERLAP_FILE] if is_search and 2 in stages else files
    if options.zero is not None:
        stage = _stage_of(options.deepspeed)
        if stage in STAGES and stage != options.zero:
            raise ConfigError(
                f"--zero {options.zero}: {options.deepspeed} says stage {stage}; leave --zero away, or --deepspeed"
            )
    return [options.deepspeed]


def _stage_of(path: Path) -> Any:
    """Return the stage, or None where a file is broken: what is wrong with it is said by who loads it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _choices(options: argparse.Namespace, recipe: Recipe, machine: Cluster) -> SearchSpace:
    choices = all_choices(recipe, machine, tuple(_files(options)))
    train, micro = recipe.train, options.micro_batch
    if options.tp:
        choices = replace(choices, tp=(options.tp,))
    if options.ep:
        choices = replace(choices, ep=(options.ep,))
    if options.recompute:
        choices = replace(choices, recompute=((options.recompute, options.recompute_every or 1),))
    elif train.recompute != "none":
        choices = replace(choices, recompute=((train.recompute, train.recompute_every),))
    is_set = any(override.split("=")[0].strip() == "parallel.dispatch_chunks" for override in options.set)
    if is_set or recipe.parallel.dispatch_chunks != 1:
        choices = replace(choices, dispatch_chunks=(recipe.parallel.dispatch_chunks,))
    if micro is None and train.micro_batch_size != "auto":
        micro = train.micro_batch_size
    return replace(choices, micro_batch=micro)


def _check_tp(tp: int, machine: Cluster) -> None:
    if tp > machine.gpus_per_node or machine.gpus_per_node % tp:
        raise ConfigError(
            f"--tp {tp}: a tensor-parallel group must lie within a node of {machine.gpus_per_node} GPUs, or its sums "
            "would cross the network in every layer; choose a divisor"
        )


def _best(found: SearchResult) -> Candidate:
    """Return the fastest layout, or the one nearest to fitting.

    Raises:
        ConfigError: there is none at all.
    """
    candidates = found.feasible or found.too_large
    if candidates:
        return candidates[0]
    reason, _ = found.refusals.most_common(1)[0]
    raise ConfigError(f"none of {sum(found.refusals.values())} layouts is possible, most often: {reason}")


def _print(plan: Plan, found: SearchResult | None, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(to_json(plan, found), indent=2, allow_nan=False), flush=True)
        return
    usable = plan.machine.usable_bytes
    if found is not None and plan.fits:
        print("\n".join([*describe_search(found, options.top, usable), ""]))
    elif found is not None:
        print("\n".join([*describe_refusals(found, usable), ""]))
    print("\n".join(describe_plan(plan) if plan.fits else describe_memory(plan)), flush=True)


def _way_out(
    plan: Plan, found: SearchResult | None, recipe: Recipe, machine: Cluster, options: argparse.Namespace
) -> str:
    """Return by how much a plan does not fit, and what would."""
    needs = f"needs {plan.needed_bytes / 1e9:.1f} GB of {machine.usable_bytes / 1e9:.1f} GB a GPU"
    name = f"tp {plan.topology.tp} x ep {plan.topology.ep}, ZeRO-{plan.zero.stage}"
    if found is None:
        free = replace(recipe, train=replace(recipe.train, recompute="none", recompute_every=1))
        choices = all_choices(free, machine, tuple(STAGE_FILES.values()))
        same = search(free, machine, replace(choices, tp=(options.tp,), ep=(options.ep,)))
        others = same.feasible or search(free, machine, choices).feasible
        if others:
            other = others[0]
            return f"{name}: {needs}; what would fit: {other.layout}, {other.needed_bytes / 1e9:.1f} GB"
    else:
        choices = _choices(options, recipe, machine)
    nodes = smallest_nodes(with_micro_batch(recipe, 1) if found is None else recipe, machine, choices)
    more = f"the smallest number that fits is {nodes} nodes" if nodes else "nor does it on more nodes; use a larger GPU"
    return f"no layout fits on {machine.nodes} nodes, the nearest being {name}, which {needs}; {more}"


def _within(least: float, most: float) -> Callable[[str], float]:
    """Return what reads a number of a flag, and refuses those outside both limits, infinity and NaN among them."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {most:g}")
        return value

    return read


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
