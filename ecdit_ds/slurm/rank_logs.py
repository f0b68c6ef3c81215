"""What ranks said last, from their logs; standard library only."""

from pathlib import Path

from ecdit_ds.errors import plain

_TOLD_LINES = 20
_TAIL_BYTES = 65536


def remove_links(logs: Path) -> None:
    """Remove links that have names of ranks' logs: srun would write through them.

    Raises:
        OSError: they cannot be removed.
    """
    for link in filter(Path.is_symlink, logs.glob("rank_*.log")):
        link.unlink()


def last_words(logs: Path, *, is_why_wanted: bool) -> list[str]:
    """Return why ranks ended, each line once, and where it was said.

    Args:
        logs: their folder.
        is_why_wanted: whether, where none says why, such as a shell that finds no program, it is each rank's last line.
    """
    told, last_lines = dict[str, Path](), dict[str, Path]()
    for log in sorted(logs.glob("rank_*.log")):
        lines = [line for line in _tail(log) if line.strip()]
        for line in lines:
            if line.startswith(("end: ", "error: ")):
                told.setdefault(line, log)
        for line in lines[-1:]:
            last_lines.setdefault(line, log)
    if not told and is_why_wanted:
        told = last_lines
    return [plain(f"{log.name}: {line}") for line, log in list(told.items())[:_TOLD_LINES]]


def _tail(log: Path) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
