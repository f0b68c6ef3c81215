"""What benchmarks print and write: medians with quartiles, and where they come from."""

import statistics
from typing import Any


def compare(case: str, peer: str, ours_ms: list[float], peer_ms: list[float]) -> dict[str, Any]:
    """Return a row: medians, quartiles, and the median of the ratios ours / peer, paired within rounds."""
    ratios = [a / b for a, b in zip(ours_ms, peer_ms, strict=True)]
    return {
        "case": case,
        "peer": peer,
        "ours_ms": statistics.median(ours_ms),
        "peer_ms": statistics.median(peer_ms),
        "ratio": statistics.median(ratios),
        "ours_quartiles_ms": _quartiles(ours_ms),
        "peer_quartiles_ms": _quartiles(peer_ms),
        "ratio_quartiles": _quartiles(ratios),
    }


def _quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return [values[0], values[0]]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def rotated(items: list[Any], turn: int) -> list[Any]:
    """Return the items in the order of round `turn`, so that none always goes first."""
    start = turn % len(items)
    return items[start:] + items[:start]


def times_text(row: dict[str, Any]) -> str:
    """Return both sides' times in ms, with quartiles, and the ratio."""
    (ours_low, ours_high), (peer_low, peer_high) = row["ours_quartiles_ms"], row["peer_quartiles_ms"]
    return (
        f"ours {row['ours_ms']:8.1f} [{ours_low:.1f}, {ours_high:.1f}] ms  "
        f"{row['peer']:<15} {row['peer_ms']:8.1f} [{peer_low:.1f}, {peer_high:.1f}] ms  ratio {row['ratio']:.3f}"
    )
