"""Refusals that name the field, the value and what would work. No torch: a recipe is checked on a laptop."""

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ecdit_ds.errors import ConfigError

_MOST = 2**31 - 1
"""Largest value of an integer without a limit of its own: counts travel between ranks and libraries in 32 bits."""
_LEAST_FLOAT, _MOST_FLOAT = 1e-30, 1e30
"""Between them, a number and its square root or inverse are finite and not 0 in fp32, which everything computes in."""


@lru_cache(maxsize=256)
def divisors_of(n: int) -> tuple[int, ...]:
    """Return the divisors of `n`, ascending: those up to its root, and their partners; none below 1."""
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return *small, *(n // d for d in reversed(small) if d * d != n)


def divisors(n: int) -> str:
    """Return the divisors of `n`, for messages."""
    return ", ".join(map(str, divisors_of(n)))


def require_multiple_of_4(name: str, value: int, who_needs_it: str) -> None:
    """Refuse a value that is not a multiple of 4."""
    if value % 4:
        nearest = f"{value // 4 * 4} or {value // 4 * 4 + 4}" if value >= 4 else "4"
        raise ConfigError(f"{name}: {value} is not a multiple of 4, which {who_needs_it}; choose {nearest}")


def require_in_range(section: str, config: Any, at_most: Mapping[str, int]) -> None:
    """Refuse numbers of a frozen section that no machine could use, before anything counts up to them.

    Args:
        section: its name in a recipe.
        config: the section, a dataclass.
        at_most: limits of whole numbers that are not `_MOST`.
    """
    for spec in dataclasses.fields(config):
        given = getattr(config, spec.name)
        for value in given if isinstance(given, tuple) else (given,):
            limit = at_most.get(spec.name, _MOST)
            if isinstance(value, int) and abs(value) > limit:
                raise ConfigError(f"{section}.{spec.name}: {value} is beyond {limit}; choose a smaller number")
            if isinstance(value, float) and abs(value) >= _MOST_FLOAT:  # NaN is each field's own business
                raise ConfigError(f"{section}.{spec.name}: {value} is {_MOST_FLOAT:g} or beyond; choose a smaller one")
            if isinstance(value, float) and 0.0 < abs(value) < _LEAST_FLOAT:
                raise ConfigError(
                    f"{section}.{spec.name}: {value} is nearer to 0 than {_LEAST_FLOAT:g}; choose a larger one, or 0"
                )


def require_positive(section: str, name: str, value: float) -> None:
    """Refuse zero, negative and non-finite numbers."""
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{section}.{name}: {value} is not a positive, finite number")


def require_not_negative(section: str, name: str, value: float) -> None:
    """Refuse negative and non-finite numbers."""
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"{section}.{name}: {value} is negative or not finite; use 0 or more")


def require_fraction(name: str, value: float) -> None:
    """Refuse what is outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name}: {value} is outside [0, 1]")


def require_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Refuse a divisor that leaves a rest, naming those that do not."""
    if divisor < 1 or value % divisor:
        raise ConfigError(f"{divisor_name}({divisor}) does not divide {name}({value}); choose from {divisors(value)}")
