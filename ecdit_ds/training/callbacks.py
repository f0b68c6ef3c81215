"""Who is told what a run does: the terminal, files, TensorBoard. Rank 0 only."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ecdit_ds.errors import escape_unprintable
from ecdit_ds.files.durable import own_file

Record = dict[str, Any]


class Callback:
    """Five hooks, all optional."""

    def on_report(self, records: list[Record]) -> None:
        """Take the steps since the last report, oldest first."""

    def on_evaluation(self, record: Record) -> None:
        """Take a held-out evaluation."""

    def on_samples(self, step: int, images_BHWC: np.ndarray, captions: list[str]) -> None:
        """Take drawn pictures, uint8."""

    def on_bad_samples(self, samples: list[Record]) -> None:
        """Take the bad samples that were replaced since the last report; `step`, `position`, `set`, `key`, `cause`."""

    def on_note(self, text: str) -> None:
        """Take something a person should read."""

    def close(self) -> None:
        """Finish, whatever happened."""


class Console(Callback):
    """A progress bar on a terminal, one line a report elsewhere."""

    def __init__(self, first_step: int, max_steps: int) -> None:
        self._max_steps = max_steps
        self._bar = tqdm(
            total=max_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def on_report(self, records: list[Record]) -> None:
        last, losses = records[-1], [r["loss"] for r in records if r["loss"] is not None]
        loss = sum(losses) / len(losses) if losses else math.nan
        told = (
            f"loss {loss:.4f} | grad norm {_number(last['grad_norm']):.3f} | {last['images_per_second']:.0f} images/s"
        )
        if last["experts_per_token"] is not None:
            told += f" | {last['experts_per_token']:.3g} experts/token"
        if self._bar.disable:
            print(f"step {last['step']}/{self._max_steps} | {told}", flush=True)
        else:
            self._bar.set_postfix_str(told)
            self._bar.update(last["step"] - self._bar.n)

    def on_evaluation(self, record: Record) -> None:
        last, averaged = (_number(record[name]) for name in ("heldout_loss", "heldout_loss_ema"))
        self.on_note(f"step {record['step']} | held-out loss {last:.4f} | of the averaged weights {averaged:.4f}")
        if "scenes" in record:
            kinds = record["scenes"]["model"]["kinds"].items()
            told = ", ".join(f"{kind} {100 * score['share']:.0f}" for kind, score in kinds)
            mean = 100 * record["scenes"]["model"]["overall"]
            self.on_note(f"step {record['step']} | scenes drawn right {mean:.1f} % ({told})")

    def on_note(self, text: str) -> None:
        if self._bar.disable:
            print(escape_unprintable(text), flush=True)
        else:
            self._bar.write(escape_unprintable(text))

    def close(self) -> None:
        self._bar.close()


class JsonLines(Callback):
    """One line a step in metrics.jsonl, one an evaluation in evaluations.jsonl."""

    def __init__(self, metrics: Path, evaluations: Path) -> None:
        self._metrics, self._evaluations = _LinesFile(metrics), _LinesFile(evaluations)

    def on_report(self, records: list[Record]) -> None:
        self._metrics.append(records)

    def on_evaluation(self, record: Record) -> None:
        self._evaluations.append([record])


class BadSampleLines(Callback):
    """One line a bad sample in bad_samples.jsonl."""

    def __init__(self, path: Path) -> None:
        self._lines = _LinesFile(path)

    def on_bad_samples(self, samples: list[Record]) -> None:
        self._lines.append(samples)


class TensorBoard(Callback):
    """Scalars, one series a MoE layer, and sample grids."""

    def __init__(self, folder: Path, first_step: int, num_skipped: int = 0) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)
        self._skipped = num_skipped

    def on_report(self, records: list[Record]) -> None:
        for record in records:
            self._skipped += record["is_skipped"]
            for name, value in record.items():
                if name in ("step", "is_skipped") or value is None:
                    continue
                if isinstance(value, list):
                    for layer, cell in enumerate(value):
                        if cell is None:
                            continue
                        self._writer.add_scalar(f"routing/{name}/moe_layer_{layer}", cell, record["step"])
                else:
                    self._writer.add_scalar(f"train/{name}", value, record["step"])
            self._writer.add_scalar("train/skipped_steps", self._skipped, record["step"])

    def on_evaluation(self, record: Record) -> None:
        for name in ("heldout_loss", "heldout_loss_ema"):
            if record[name] is None:
                continue
            self._writer.add_scalar(f"heldout/{name}", record[name], record["step"])
        for whose, scores in record.get("scenes", {}).items():
            self._writer.add_scalar(f"scenes_{whose}/mean", scores["overall"], record["step"])
            for kind, score in scores["kinds"].items():
                self._writer.add_scalar(f"scenes_{whose}/{kind}", score["share"], record["step"])

    def on_samples(self, step: int, images_BHWC: np.ndarray, captions: list[str]) -> None:
        self._writer.add_images("samples", images_BHWC, step, dataformats="NHWC")
        self._writer.add_text("captions", " / ".join(captions), step)

    def close(self) -> None:
        self._writer.close()


def _number(value: float | None) -> float:
    """Return a recorded number; None stands for one that is not finite."""
    return math.nan if value is None else value


class _LinesFile:
    """Takes whole lines or none: what a full disk refuses is kept and written with the next ones."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, b""

    def append(self, records: list[Record]) -> None:
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        self._waiting += lines.encode("ascii")
        with open(self._path, "ab", buffering=0, opener=own_file) as handle:
            size, written = handle.tell(), 0
            try:
                while written < len(self._waiting):
                    written += handle.write(self._waiting[written:])
            except OSError:
                handle.truncate(size)
                raise
        self._waiting = b""
