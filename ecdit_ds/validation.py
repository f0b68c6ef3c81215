"""Refusals that name the field, the value and what would work. No torch: a recipe is checked on a laptop."""

import math
from functools import lru_cache

from ecdit_ds.errors import ConfigError


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
