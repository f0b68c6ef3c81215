"""Recipe overrides that make real launches small."""

from pathlib import Path

SMALL_MODEL = (
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.cross_num_heads=2",
    "model.cross_head_dim=16",
    "model.ffn_hidden_size=64",
    "train.global_batch_size=8",
    "data.num_train=256",
    "data.num_heldout=16",
    "data.num_workers=0",
    "sample.prompts=[]",
)


def arguments(output: Path, cache: Path, *overrides: str, zero: int | str = 2, resume: str = "auto") -> list[str]:
    """Return train.py's arguments for the demo recipe with `overrides`."""
    sets = [part for override in (f"data.cache_dir={cache}", *overrides) for part in ("--set", override)]
    return ["--deepspeed", f"ds_configs/zero{zero}.json", "--output", str(output), "--resume", resume, *sets]
