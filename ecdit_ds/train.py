"""Train a recipe:  deepspeed ecdit_ds/train.py --deepspeed ds_configs/zero2.json

With no other flag this trains the demo. Every rank runs this file; `build.run` says what is built, in which order.

A recipe is checked before torch is imported: what is wrong with it is said at once.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Run by path, Python puts ecdit_ds/ itself first on the path, where our file names would shadow libraries.
    sys.path[0] = str(ROOT)
    from ecdit_ds.runtime.signals import StopSignal

    # The imports below take seconds, in which a signal may come or a launcher may be killed.
    _stop = StopSignal()
    _stop.listen()
    from ecdit_ds.runtime.launcher_watch import exit_with_launcher

    exit_with_launcher(ask_to_leave=_stop.launcher_died)

from ecdit_ds.config.deepspeed_json import DEFAULT_PATH, load_deepspeed_config
from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import DEFAULT_RECIPE, dump_recipe, load_recipe, recipe_names
from ecdit_ds.errors import ConfigError, EcditError, ExitCode, StaleRunError, exit_code_of
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.runtime.exit_report import RunStatus, exit_summary, ignore_broken_pipes, print_quietly
from ecdit_ds.runtime.signals import StopSignal
from ecdit_ds.slurm.completion import DRY_RUN, is_watched, mark_complete, mark_ended, training_to


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="deepspeed ecdit_ds/train.py",
        description="Train an expert-choice diffusion transformer with DeepSpeed.",
        epilog=f"Recipes: {', '.join(recipe_names())}. Run again after a crash: it goes on from the newest checkpoint.",
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, metavar="NAME|PATH", help="recipe (default: %(default)s)")
    parser.add_argument(
        "--deepspeed",
        type=Path,
        default=DEFAULT_PATH,
        metavar="JSON",
        help="DeepSpeed configuration; batch sizes, clipping and precision come from the recipe (default: zero2.json)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a recipe field, such as train.max_steps=20; may be repeated",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: go on from the newest valid checkpoint in the folder; never: refuse a folder that holds a run; "
        "PATH: a folder without checkpoints starts from that checkpoint or run (default: %(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that needs no training, count a rank's memory, and stop; needs no GPU",
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: as one of N ranks, here alone")
    parser.add_argument("--rank", type=int, metavar="N", help="with --dry-run: whose memory is counted (default: 0)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher appends it
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, stop: StopSignal | None = None) -> int:
    """Run, and turn what a user can get wrong into one line; return the exit code (see ExitCode)."""
    options = parse_arguments(arguments)
    is_first = os.environ.get("RANK", "0") == "0"
    stop, status, lost, is_superseded = stop or StopSignal(), RunStatus(), list[int](), False
    try:
        recipe = load_recipe(options.config, options.set)
        if options.print_config:
            if is_first:
                print(dump_recipe(recipe), end="")
            return ExitCode.DONE
        code = _start(recipe, options, stop, status)
        if options.dry_run:
            return code
        cause = status.stop_reason if code == ExitCode.CHECKPOINTED else "all steps are done"
    except EcditError as error:
        if is_first or is_watched():
            print_quietly(f"error: {error}", sys.stderr)
        code, cause = exit_code_of(error), str(error)
        is_superseded = isinstance(error, StaleRunError)
    except KeyboardInterrupt:
        code, cause = ExitCode.INTERRUPTED, "interrupted from the keyboard"
    except Exception as error:
        status.is_exiting = True
        if lost := status.lost_ranks():
            code, cause = ExitCode.RETRY, f"rank {', '.join(map(str, lost))} died"
        else:
            traceback.print_exc()
            code, cause = ExitCode.CRASHED, f"{type(error).__name__}: {error}"
    finally:
        status.is_exiting = True
    if status.step is not None and status.is_reporter(lost):
        print_quietly(exit_summary(status, code.name.lower().replace("_", " "), cause), sys.stderr)
    ignore_broken_pipes()
    if code == ExitCode.DONE:
        mark_complete(training_to(recipe.train.max_steps))
    elif not is_superseded:  # of the life that took over this one knows nothing
        mark_ended(code)
    status.has_exited = True
    return code


def _start(recipe: Recipe, options: argparse.Namespace, stop: StopSignal, status: RunStatus) -> ExitCode:
    """Train, or say what training would do; what this imports takes seconds."""
    from ecdit_ds.data.encoders.from_recipe import fetch_typed
    from ecdit_ds.parallel.world import rank_info_from_env
    from ecdit_ds.training.run_dir import RunDir
    from ecdit_ds.training.setup import run, share_cores

    place = rank_info_from_env()
    world_size = _world_size(options, place.world_size)
    topology = Topology(world_size=world_size, tp=recipe.parallel.tp, ep=recipe.parallel.ep)
    deepspeed_config = load_deepspeed_config(options.deepspeed, recipe, topology.dp)
    fetch_typed(recipe.data, options.set)
    output = options.output or Path("runs") / recipe.name
    if not options.dry_run:
        share_cores(place)
        return run(recipe, topology, deepspeed_config, RunDir(path=output), options.resume, stop, status)
    stop.stand_down()
    if place.rank == 0:
        from ecdit_ds.training.dry_run import dry_run

        told, is_ready = dry_run(
            recipe,
            topology,
            deepspeed_config,
            options.rank or 0,
            output,
            is_named=bool(options.output),
            resume=options.resume,
        )
        print(told)
        if not is_ready:
            return ExitCode.USER_ERROR
    mark_complete(DRY_RUN)
    return ExitCode.DONE


def _world_size(options: argparse.Namespace, started: int) -> int:
    """Return how many ranks to act for: those that were started, or in a dry run those that are asked about."""
    for flag, value in (("--world-size", options.world_size), ("--rank", options.rank)):
        if value is not None and not options.dry_run:
            raise ConfigError(
                f"{flag}: {value} has no effect without --dry-run; the launcher says how many ranks start"
            )
    size = started if options.world_size is None else options.world_size
    rank = options.rank or 0
    if size < 1 or not 0 <= rank < size:
        raise ConfigError(f"--world-size: {size}, --rank: {rank}; ranks are 0 to N - 1 of N")
    return size


if __name__ == "__main__":
    # All is said and on the disk. Process groups that Python takes down may wait for the dead, or abort.
    os._exit(main(stop=_stop))
