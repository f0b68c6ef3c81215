"""Work on the next step while the current one trains, in one thread, in order."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

THREAD_NAME = "ahead"


def prefetch(steps: Iterator[T], finish: Callable[[T], U]) -> Iterator[U]:
    """Yield `finish(step)` of each step, in order; that of the next one is under way while the caller uses this one.

    Steps are taken in the caller's thread, since what reads them may start processes that end with the thread that
    started them. What reading or finishing a step raises is raised when that step is asked for, not before. The
    thread ends when the iteration does, is closed, or fails.

    Args:
        steps: closed at the end.
        finish: called in one other thread, for one step after another.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
    try:
        coming = _begin(pool, steps, finish)
        while coming is not None:
            current, coming = coming, _begin(pool, steps, finish)
            yield current.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        close = getattr(steps, "close", None)
        if close is not None:
            close()


def _begin(pool: ThreadPoolExecutor, steps: Iterator[T], finish: Callable[[T], U]) -> Future[U] | None:
    """Take a step and let the thread finish it; return what will hold it, None after the last."""
    try:
        step = next(steps)
    except StopIteration:
        return None
    except Exception as error:
        failed: Future[U] = Future()
        failed.set_exception(error)
        return failed
    return pool.submit(finish, step)
