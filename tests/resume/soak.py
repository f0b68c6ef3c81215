"""Kill a run again and again, at seeded random moments, and compare what it ends with to the run that was left alone.

    python tests/resume/soak.py --kills 100 --seed 0 --output runs/soak        # or: make soak

Each life is a real `deepspeed` launch; SIGKILL goes to a rank, the launcher or all of them, at any moment from the
start of the imports to the last save. A run that ends before its moment is compared and another one begins, until all
kills are done. Exit code 0 only if every life found what the last one had published, and every run ended the same to
the last bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil
from tqdm import tqdm

from ecdit_ds.checkpoint.manifest import list_checkpoints, read_manifest
from ecdit_ds.checkpoint.reader import newest_valid
from tests.helpers.launch import ROOT, finish, metrics_of, start
from tests.helpers.recipes import SMALL_MODEL, arguments

RANKS, STEPS = 2, 40
SMALL = (
    *SMALL_MODEL, "parallel.ep=2", f"train.max_steps={STEPS}", "train.checkpoint_every=2", "train.log_every=1",
    "data.num_workers=1",
)  # fmt: skip
VICTIMS = ("rank 0", "rank 1", "launcher", "everything")


class SoakError(Exception):
    """The promise was broken."""


def main() -> int:
    """Soak; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), help="removed first (default: %(default)s)")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    os.environ["ECDIT_FAULTS"] = "delay=0.1@step"  # more moments within training than within the imports
    try:
        facts = soak(options.output.resolve(), options.kills, random.Random(options.seed))
    except SoakError as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts | {"seed": options.seed}, indent=1))
    return 0


def soak(root: Path, kills: int, draws: random.Random) -> dict[str, object]:
    """Kill `kills` times and return what was seen."""
    began = time.monotonic()
    live(root / "reference", 0.0, None)
    whole_life = time.monotonic() - began
    hits: Counter[str] = Counter()
    rounds, published = 0, 0
    with tqdm(total=kills, unit="kill", disable=None) as bar:
        while bar.n < kills:
            output = root / f"round_{rounds}"
            victim = draws.choice(VICTIMS)
            moment = draws.uniform(0, whole_life)
            is_over = live(output, moment, victim)
            published = check_newest(output, published)
            if is_over:
                compare(output, root / "reference")
                rounds, published = rounds + 1, 0
                continue
            hits[where(output)] += 1
            hits[f"killed {victim}"] += 1
            bar.update()
    while not live(root / f"round_{rounds}", 0.0, None):
        pass
    compare(root / f"round_{rounds}", root / "reference")
    return {"kills": kills, "runs_compared": rounds + 1, "seconds": round(time.monotonic() - began), **hits}


def live(output: Path, moment: float, victim: str | None) -> bool:
    """Start the run, or go on with it; kill `victim` after `moment` seconds; return whether it had ended by then."""
    run = start(RANKS, ROOT / "ecdit_ds" / "train.py", arguments(output, output.parent / "cache", *SMALL))
    try:
        run.communicate(timeout=moment if victim else 300)
        if run.returncode:
            raise SoakError(f"{output}: a life that nobody killed ended with {run.returncode}")
        return True
    except subprocess.TimeoutExpired:
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        _kill(run, victim or "everything")
        finish(run, 120)
        psutil.wait_procs(processes, timeout=60)
        if left := [process.pid for process in processes if process.is_running()]:
            raise SoakError(f"{output}: processes {left} outlived the kill of {victim}") from None
        return False


def _kill(run: "subprocess.Popen[str]", victim: str) -> None:
    ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if f"--local_rank={victim[-1]}" in p.cmdline()]
    if victim == "everything":
        os.killpg(run.pid, signal.SIGKILL)
    else:
        (ranks[0] if ranks else psutil.Process(run.pid)).kill()  # before there are ranks: the launcher


def check_newest(output: Path, at_least: int) -> int:
    """Return the step of the newest valid checkpoint, every byte of which was checked; none is 0."""
    reader, rejections = newest_valid(output / "checkpoints", thorough=True)
    step = reader.manifest.step if reader else 0
    if rejections or step < at_least:
        raise SoakError(f"{output}: step {at_least} was published, {step} is found; rejected: {rejections}")
    return step


def where(output: Path) -> str:
    """Return what the kill hit."""
    if list(output.glob("checkpoints/*.tmp-*")):
        return "hit a save"
    if list(output.glob("checkpoints/.trash-*")):
        return "hit a removal"
    return "hit training" if (output / "metrics.jsonl").exists() else "hit the start"


def compare(output: Path, reference: Path) -> None:
    """Compare losses and the last checkpoint, to the last bit."""
    for name in ("step", "samples_seen", "loss", "grad_norm"):
        if [m[name] for m in metrics_of(output)] != [m[name] for m in metrics_of(reference)]:
            raise SoakError(f"{output}: {name} differs from the unbroken run")
    if digest(output) != digest(reference):
        raise SoakError(f"{output}: its last checkpoint differs from the unbroken run's")


def digest(output: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the checksums of the last checkpoint."""
    manifest = read_manifest(list_checkpoints(output / "checkpoints")[0])
    if manifest.step != STEPS:
        raise SoakError(f"{output}: ended at step {manifest.step}")
    return {name: [(str(s.box), s.xxh3) for s in tensor.slices] for name, tensor in manifest.tensors.items()}


if __name__ == "__main__":
    sys.exit(main())
