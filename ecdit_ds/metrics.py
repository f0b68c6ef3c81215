"""Measurements: recorded as device tensors each step, reduced and read together at a report.

So a step never waits for the device. Suffixes: B pools, S tokens of a pool, E experts.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ecdit_ds.model.moe import ExpertChoiceRouter, Routing, experts_per_token
from ecdit_ds.parallel.world import World
from ecdit_ds.planner.hardware import bf16_peak_of


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

    def record(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep one step: `facts` equal on all ranks, and small tensors whose mean over ranks is wanted."""
        self._facts.append(facts)
        self._tensors.append(tensors)

    def flush(self, world: World, answers: Sequence[bool] = ()) -> tuple[list[dict[str, Any]], list[float]]:
        """Return the recorded steps as plain numbers, and for each answer the share of ranks that say yes; collective.

        Vectors become lists, and what is not finite None. The answers ride on the same reduction. Without a recorded
        step nobody is asked, and every share is 0.
        """
        if not self._facts:
            return [], [0.0] * len(answers)
        said = torch.tensor(answers, dtype=torch.float64, device=self._tensors[0]["loss"].device)
        rows = [torch.cat([said, *(t.detach().flatten().double() for t in step.values())]) for step in self._tensors]
        columns = world.mean(torch.stack(rows)).T.tolist()
        shares = [column[0] for column in columns[: len(answers)]]
        table = list(zip(*columns[len(answers) :], strict=True))
        records = []
        for facts, tensors, row in zip(self._facts, self._tensors, table, strict=True):
            record, values = dict(facts), iter([finite_or_none(v) for v in row])
            for name, tensor in tensors.items():
                cells = [next(values) for _ in range(tensor.numel())]
                record[name] = cells if tensor.dim() else cells[0]
            records.append(record)
        self._facts, self._tensors = [], []
        return records, shares


def finite_or_none(value: float) -> float | None:
    """Return what JSON can hold: None for a number that is not finite."""
    return value if math.isfinite(value) else None


def peak_flops_per_s(device: torch.device) -> float | None:
    """Return the device's bf16 peak, or None where it is not known."""
    if device.type != "cuda":
        return None
    return bf16_peak_of(torch.cuda.get_device_name(device))
