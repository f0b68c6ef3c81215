"""Kill a run again and again, at seeded random moments, and compare what it ends with to the run that was left alone.

    python tests/resume/soak.py --kills 100 --seed 0 --output runs/soak        # or: make soak

Every tenth life is a real `deepspeed` launch, the others are ranks forked from this warm process, which saves the
imports. SIGKILL goes to a rank, the launcher or all of them, at any moment from the start to the last save. A run that
ends before its moment is compared and another one begins, until all kills are done. Exit code 0 only if every life
found what the last one had published, and every run ended the same to the last bit.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil
from tqdm import tqdm

from ecdit_ds.checkpoint.reader import newest_valid
from tests.helpers.checkpoints import digest
from tests.helpers.launch import ROOT, free_port, metrics_of
from tests.helpers.many_runs import fork_rank
from tests.helpers.recipes import SMALL_MODEL, arguments

RANKS, STEPS = 2, 60
SMALL = (
    *SMALL_MODEL,
    "parallel.ep=2",
    f"train.max_steps={STEPS}",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "data.num_workers=1",
)
REAL_EVERY = 10
PATIENCE_S = 300.0


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
    os.environ["ECDIT_FAULTS"] = "delay=0.05@step"  # more moments within training than within the imports
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
    whole_life = {}
    for is_real in (False, True):
        live(root / f"warm up {is_real}", None, is_real, draws)  # makes the data, once
        middle = time.monotonic()
        live(root / f"reference {is_real}", None, is_real, draws)
        whole_life[is_real] = time.monotonic() - middle
    compare(root / "reference True", root / "reference False")
    hits: Counter[str] = Counter()
    lives, rounds, published = 0, 0, 0
    with tqdm(total=kills, unit="kill", disable=None) as bar:
        while bar.n < kills:
            output, is_real = root / f"round_{rounds}", lives % REAL_EVERY == 0
            victim = live(output, draws.uniform(0, whole_life[is_real] / 3), is_real, draws)
            published = check_newest(output, published)
            lives += 1
            if victim is None:
                compare(output, root / "reference False")
                rounds, published = rounds + 1, 0
                continue
            hits[where(output)] += 1
            hits[f"killed {victim}"] += 1
            bar.n += 1
            bar.refresh()
            if bar.disable and bar.n % 10 == 0:
                print(f"{bar.n} kills, {rounds} runs compared, {dict(hits)}", flush=True)
    live(root / f"round_{rounds}", None, False, draws)
    compare(root / f"round_{rounds}", root / "reference False")
    return {
        "kills": kills,
        "lives": lives,
        "runs_compared": rounds + 1,
        "seconds": round(time.monotonic() - began),
        **hits,
    }


def live(output: Path, moment: float | None, is_real: bool, draws: random.Random) -> str | None:
    """Start the run, or go on with it, and kill somebody after `moment` seconds.

    Return who was killed, or None where the run came to its end first.
    """
    began = time.time()
    run_arguments = arguments(output, output.parent / "cache", *SMALL)
    processes = _start_real(run_arguments) if is_real else _start_forked(run_arguments)
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S if moment is None else moment)
    if alive and moment is None:
        raise SoakError(f"{output}: did not end within {PATIENCE_S} s")
    if not alive:
        codes = [vars(process)["returncode"] for process in processes]  # wait_procs puts it there
        if any(codes):
            raise SoakError(f"{output}: a life that nobody killed ended with {codes}")
        return None
    victim = draws.choice(("a rank", "everything", *(["the launcher"] if is_real else [])))
    everyone = [process for top in processes for process in (top, *_below(top))]
    ranks = [process for process in everyone if _is_rank(process)] if is_real else processes
    struck = {"a rank": ranks[:1] if draws.random() < 0.5 else ranks[-1:], "everything": everyone, "the launcher": []}
    for process in struck[victim] or processes[:1]:
        with suppress(psutil.Error):
            process.kill()
    _, left = psutil.wait_procs(everyone, timeout=60 if is_real else 15)  # `deepspeed` is patient with the others
    for process in left:
        # Before ranks know one another only a launcher can end those that are left.
        if is_real or _have_met(output, began):
            raise SoakError(f"{output}: process {process.pid} outlived the kill of {victim}")
        process.kill()
    psutil.wait_procs(left, timeout=15)
    return victim


def _have_met(output: Path, since: float) -> bool:
    return (output / ".lock").exists() and (output / ".lock").stat().st_mtime > since


def _start_forked(run_arguments: list[str]) -> list[psutil.Process]:
    port = free_port()
    run = {"ranks": RANKS, "arguments": run_arguments, "environment": {}}
    with _quiet():
        return [psutil.Process(fork_rank(rank, run, port)) for rank in range(RANKS)]


def _start_real(run_arguments: list[str]) -> list[psutil.Process]:
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(RANKS)]
    command = [*launcher, "--master_port", str(free_port()), str(ROOT / "ecdit_ds" / "train.py"), *run_arguments]
    nowhere = subprocess.DEVNULL
    return [psutil.Popen(command, cwd=ROOT, start_new_session=True, stdout=nowhere, stderr=nowhere)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Let processes that are forked within write to nowhere."""
    sys.stdout.flush()
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, nowhere):
            os.close(descriptor)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = process.children(recursive=True)
        return found
    except psutil.Error:
        return []


def _is_rank(process: psutil.Process) -> bool:
    try:
        return any(part.startswith("--local_rank=") for part in process.cmdline())
    except psutil.Error:
        return False


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
    if digest(output, STEPS) != digest(reference, STEPS):
        raise SoakError(f"{output}: its last checkpoint differs from the unbroken run's")


if __name__ == "__main__":
    sys.exit(main())
