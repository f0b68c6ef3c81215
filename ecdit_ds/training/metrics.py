"""Measurements: recorded as device tensors each step, reduced and read together at a report.

So a step never waits for the device. Suffixes: B pools, S tokens of a pool, E experts.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ecdit_ds.data.sources.bad_sample import ReplacedSample
from ecdit_ds.errors import UnrecoverableError
from ecdit_ds.model.moe import ExpertChoiceRouter, Routing, experts_per_token
from ecdit_ds.parallel.world import World
from ecdit_ds.planner.hardware import bf16_peak_of

JUDGED_FROM = 1000
"""Samples: of fewer, the share that is bad says little, and is taken of so many."""
MAX_TOLD = 1000
"""Bad samples that a rank names at a report; all are counted."""
NAMES = 3
"""How many samples of a cause are named in a line."""


class RoutingProbe:
    """Watches routers through hooks; modules keep no counters."""

    def __init__(self, model: nn.Module) -> None:
        self._latest: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, ExpertChoiceRouter):
                self._handles.append(module.register_forward_hook(self._watch_expert_choice(name)))
            elif name.endswith("deepspeed_moe.gate"):
                self._handles.append(module.register_forward_hook(self._watch_token_choice(name)))

    def latest(self) -> dict[str, Tensor]:
        """Return, for the last forward, vectors over MoE layers; empty for a dense model.

        experts_per_token: mean over tokens. untaken_fraction: share of tokens that no expert took.
        router_entropy: mean entropy of a token's scores over experts, in nats (expert choice only).
        """
        names = ("experts_per_token", "untaken_fraction", "router_entropy")
        found = {name: [v for key, v in self._latest.items() if key.startswith(name)] for name in names}
        return {name: torch.stack(values) for name, values in found.items() if values}

    def _watch_expert_choice(self, layer: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, routing: Routing) -> None:
            with torch.no_grad():
                self._record_counts(layer, experts_per_token(routing))
                scores_BSE = routing.scores_BSE / routing.scores_BSE.sum(dim=-1, keepdim=True)
                self._latest[f"router_entropy {layer}"] = torch.special.entr(scores_BSE).sum(dim=-1).mean()

        return hook

    def _watch_token_choice(self, layer: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, gating: tuple[Any, ...]) -> None:
            experts_of_tokens_KS = gating[3]  # -1 where the expert had no place left
            self._record_counts(layer, (experts_of_tokens_KS >= 0).sum(dim=0))

        return hook

    def _record_counts(self, layer: str, counts: Tensor) -> None:
        self._latest[f"experts_per_token {layer}"] = counts.float().mean()
        self._latest[f"untaken_fraction {layer}"] = (counts == 0).float().mean()


class MetricLog:
    """Steps not yet reported."""

    def __init__(self) -> None:
        self._facts: list[dict[str, Any]] = []
        self._tensors: list[dict[str, Tensor]] = []
        self._counts: list[dict[str, int]] = []

    def record(
        self, facts: dict[str, Any], tensors: dict[str, Tensor], counts: Mapping[str, int] | None = None
    ) -> None:
        """Keep one step: `facts` equal on all ranks, small tensors whose mean over ranks is wanted, counts to add."""
        self._facts.append(facts)
        self._tensors.append(tensors)
        self._counts.append(dict(counts or {}))

    def flush(self, world: World, answers: Sequence[bool] = ()) -> tuple[list[dict[str, Any]], list[float]]:
        """Return the recorded steps as plain numbers, and for each answer the share of ranks that say yes; collective.

        Vectors become lists, and what is not finite None. The answers ride on the same reduction. Without a recorded
        step nobody is asked, and every share is 0.
        """
        if not self._facts:
            return [], [0.0] * len(answers)
        said = torch.tensor(answers, dtype=torch.float64, device=self._tensors[0]["loss"].device)
        counts = torch.tensor([list(step.values()) for step in self._counts], dtype=torch.float64, device=said.device)
        rows = [
            torch.cat([said, of_step, *(t.detach().flatten().double() for t in step.values())])
            for of_step, step in zip(counts, self._tensors, strict=True)
        ]
        table = world.mean(torch.stack(rows)).tolist()
        shares = table[0][: len(answers)]
        records = []
        for facts, tensors, names, row in zip(self._facts, self._tensors, self._counts, table, strict=True):
            record, values = dict(facts), iter([finite_or_none(v) for v in row[len(answers) :]])
            record |= {name: round(world.size * (next(values) or 0.0)) for name in names}
            for name, tensor in tensors.items():
                cells = [next(values) for _ in range(tensor.numel())]
                record[name] = cells if tensor.dim() else cells[0]
            records.append(record)
        self._facts, self._tensors, self._counts = [], [], []
        return records, shares


@dataclass(frozen=True, kw_only=True)
class BadSampleCounts:
    """Bad samples so far."""

    counts: Counter[str] = field(default_factory=Counter)
    """By cause."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The first of each cause, in one line each."""

    def name(self, cause: str, key: str) -> None:
        """Keep a name among the first ones."""
        names = self.names.setdefault(cause, [])
        if len(names) < NAMES and _in_one_line(key) not in names:
            names.append(_in_one_line(key))


def count_bad_samples(lines: Iterable[str]) -> BadSampleCounts:
    """Return what the lines of bad_samples.jsonl say of earlier lives."""
    tally = BadSampleCounts()
    for line in lines:
        bad = json.loads(line)
        tally.counts[str(bad.get("cause"))] += 1
        tally.name(str(bad.get("cause")), str(bad.get("key")))
    return tally


class BadSamples:
    """The bad samples of a run that others stand in for, as all ranks agree upon at reports."""

    def __init__(self, max_share: float, *, before: BadSampleCounts | None = None, num_trained: int = 0) -> None:
        """Begin with those of earlier lives.

        Args:
            max_share: data.max_bad.
            before: alike on all ranks.
            num_trained: samples trained on so far.
        """
        self._max_share = max_share
        before = before or BadSampleCounts()
        self._read = num_trained + before.counts.total()
        self._tally = BadSampleCounts(
            counts=Counter(before.counts), names={cause: [*names] for cause, names in before.names.items()}
        )
        self._here: list[ReplacedSample] = []

    def note(self, replaced: Iterable[ReplacedSample]) -> int:
        """Keep what this rank met in a step until the report; return how many."""
        found = list(replaced)
        self._here += found
        return len(found)

    def agree(self, world: World, num_trained: int, num_bad: int) -> list[ReplacedSample]:
        """Return what all ranks met since the last report, by position; collective where there are any, else silent.

        Args:
            num_trained: samples trained on since then.
            num_bad: bad ones since then, over all ranks.
        """
        self._read += num_trained + num_bad
        if not num_bad:
            return []
        counts = Counter[str](bad.cause for bad in self._here)
        shared = world.share((counts, self._here[:MAX_TOLD]))
        self._here = []
        told = sorted((bad for _, of_rank in shared for bad in of_rank), key=lambda bad: bad.position)
        for of_rank, _ in shared:
            self._tally.counts.update(of_rank)
        for bad in told:
            self._tally.name(bad.cause, bad.key)
        return told

    def check(self) -> None:
        """Check that few enough were bad.

        Raises:
            UnrecoverableError: on all ranks alike.
        """
        bad, least = sum(self._tally.counts.values()), max(self._read, JUDGED_FROM)
        if bad <= self._max_share * least:
            return
        causes = ", ".join(f"{count} {cause}" for cause, count in self._tally.counts.most_common())
        worst = self._tally.counts.most_common(1)[0][0]
        raise UnrecoverableError(
            f"data.max_bad: {bad} of {self._read} samples read are bad ({causes}), more than {self._max_share:g} of "
            f"{least}; the first that are {worst}: {', '.join(self._tally.names[worst])}; encode the sets anew "
            "without them, or go on from the last checkpoint with a higher data.max_bad"
        )


def bad_sample_lines(told: Iterable[ReplacedSample], step: int) -> list[str]:
    """Return a line a cause for people to read."""
    by_cause: dict[str, list[str]] = {}
    for bad in told:
        by_cause.setdefault(bad.cause, []).append(_in_one_line(bad.key))
    return [
        f"step {step} | {len(names)} bad samples replaced: {cause} "
        f"({', '.join(names[:NAMES])}{', ...' if len(names) > NAMES else ''})"
        for cause, names in by_cause.items()
    ]


def _in_one_line(name: str) -> str:
    return " ".join(name.split())


def finite_or_none(value: float) -> float | None:
    """Return what JSON can hold: None for a number that is not finite."""
    return value if math.isfinite(value) else None


def peak_flops_per_s(device: torch.device) -> float | None:
    """Return the device's bf16 peak, or None where it is not known."""
    if device.type != "cuda":
        return None
    return bf16_peak_of(torch.cuda.get_device_name(device))
