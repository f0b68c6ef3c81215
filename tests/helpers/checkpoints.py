"""What two runs must have in common to the last bit."""

from pathlib import Path
from typing import Any

from ecdit_ds.checkpoint.manifest import read_manifest
from ecdit_ds.checkpoint.naming import step_name

COUNTS = ("samples_seen", "num_updates", "skipped_in_a_row")


def digest(output: Path, step: int) -> dict[str, Any]:
    """Return the checksums of all that a run's checkpoint holds (weights, average, optimizer state), and its counts."""
    manifest = read_manifest(output / "checkpoints" / step_name(step))
    counts = {name: manifest.meta[name] for name in COUNTS}
    return counts | {name: [(str(s.box), s.xxh3) for s in tensor.slices] for name, tensor in manifest.tensors.items()}
