"""Numbers that are no result, NaN and infinities: how many a checkpoint holds, in which tensors, and how that is told.

What is not finite stays so: no later step brings a weight, an average or a moment back. So such a checkpoint says it
of itself (`Manifest.nonfinite`), and nothing goes on from it, draws with it, or removes others in its favour.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ecdit_ds.errors import CheckpointError

_NAMED = 3


def count_nonfinite(data: Tensor) -> int:
    """Return how many numbers are NaN or infinite; one pass over them where none is."""
    if not data.is_floating_point() or not data.numel():
        return 0
    low, high = data.detach().aminmax()  # NaN where any is
    return 0 if math.isfinite(low) and math.isfinite(high) else int((~data.isfinite()).sum())


def sum_nonfinite(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the sums of counts by tensor, of those tensors that have any."""
    total = Counter[str]()
    for name, count in counts:
        total[name] += count
    return {name: count for name, count in sorted(total.items()) if count}


def tell_nonfinite(nonfinite: Mapping[str, int]) -> str:
    """Return a clause such as `3 numbers of 1 tensors are not finite (weight/a)`."""
    names = [*nonfinite]
    told = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{sum(nonfinite.values()):,} numbers of {len(names)} tensors are not finite ({told})"


def require_finite_tensors(where: Path, nonfinite: Mapping[str, int] | None) -> None:
    """Refuse a checkpoint that says, or turns out, to hold such numbers; None is one that does not say.

    Raises:
        CheckpointError: naming the first tensors.
    """
    if nonfinite:
        raise CheckpointError(f"{where}: {tell_nonfinite(nonfinite)}; use a checkpoint from before")


def nonfinite_in_json(found: Any, names: Mapping[str, Any]) -> dict[str, int] | None:
    """Return what a JSON file says of the tensors `names`; None where it says nothing.

    Raises:
        ValueError: it is no mapping of some of the names to whole numbers from 1 on.
    """
    if found is None:
        return None
    is_known = isinstance(found, dict) and all(
        name in names and type(count) is int and count > 0 for name, count in found.items()
    )
    if not is_known:
        raise ValueError(f"nonfinite is {found!r}, not numbers by tensor")
    return dict(found)
