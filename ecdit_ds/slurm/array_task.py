"""Which part of a tool's work a process has: one task of an array, or of several that somebody starts by hand."""

from collections.abc import Mapping

from ecdit_ds.errors import ConfigError

ARRAY = "SLURM_ARRAY_TASK_ID"


def task_of(asked: str | None, environment: Mapping[str, str], *, are_ranks_tasks: bool) -> tuple[int, int]:
    """Return which task of how many this is: as asked, of a Slurm array, the rank of a launcher, or the only one.

    Args:
        asked: I/N, which goes before all else.
        environment: what Slurm and a launcher tell.
        are_ranks_tasks: whether ranks share the work as tasks do, those of an array's task what that one has; where
            ranks work together on each part, all of them are one task.

    Raises:
        ConfigError: it is none of them.
    """
    text, where, ranks = asked, "--task", (0, 1)
    if are_ranks_tasks and asked is None and "RANK" in environment:
        ranks = _parse(f"{environment['RANK']}/{environment.get('WORLD_SIZE', '')}", "RANK/WORLD_SIZE")
    if text is None and ARRAY in environment:
        text, where = _text_of_array(environment), ARRAY
    task, tasks = _parse(text if text is not None else "0/1", where)
    return task * ranks[1] + ranks[0], tasks * ranks[1]


def _text_of_array(environment: Mapping[str, str]) -> str:
    """Return I/N; empty where Slurm's numbers are none.

    Raises:
        ConfigError: the array has gaps, so that somebody's part would be nobody's.
    """
    try:
        index, count = int(environment[ARRAY]), int(environment["SLURM_ARRAY_TASK_COUNT"])
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", n)) for name, n in (("MIN", 0), ("STEP", 1)))
        last = int(environment.get("SLURM_ARRAY_TASK_MAX", first + step * (count - 1)))
        i = (index - first) // step
    except (ValueError, KeyError, ZeroDivisionError):
        return ""
    if count == 1 and index > 0:
        raise ConfigError(
            f"{ARRAY}: {index} is alone in its array, and would have all the work; name its part by --task, or submit "
            "--array=0"
        )
    if last - first != step * (count - 1) or (index - first) % step:
        raise ConfigError(
            f"{ARRAY}: {index} of {count} from {first} to {last}, with gaps; submit --array=0-{count - 1}, or one task "
            "alone and name it by --task"
        )
    return f"{i}/{count}"


def _parse(text: str, where: str) -> tuple[int, int]:
    try:
        task, tasks = (int(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"{where}: {text!r} is no I/N, such as 0/4; name one by --task") from None
    if not 0 <= task < tasks:
        raise ConfigError(
            f"{where}: {task}/{tasks}: tasks count from 0; choose 0/{tasks} to {max(1, tasks) - 1}/{tasks}"
        )
    return task, tasks
