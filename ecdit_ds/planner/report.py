"""A plan as tables to read, and as JSON to compute with. GB are 1e9 bytes, GiB 2**30."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from ecdit_ds.planner.hardware import default_assumptions, reasons
from ecdit_ds.planner.plan import Phase, Plan, days
from ecdit_ds.planner.search import Candidate, SearchResult

GB = 1e9
MAX_REASONS = 8
_PARTS = ("attention", "cross_attention", "dense_ffn", "experts", "router", "modulation", "other")


def describe_plan(plan: Plan) -> list[str]:
    """Return the plan as lines of text."""
    return [
        *_head(plan),
        "",
        *_memory(plan),
        "",
        *_compute(plan),
        "",
        *_communication(plan),
        "",
        *_speed(plan),
        "",
        *_run(plan),
        "",
        *_assumed(plan),
    ]


def describe_memory(plan: Plan) -> list[str]:
    """Return what a plan that does not fit is made of, and by how much it is too large."""
    over = plan.needed_bytes - plan.machine.usable_bytes
    return [*_head(plan), "", *_memory(plan), "", f"does not fit: {over / GB:.1f} GB too much on a GPU"]


def describe_search(found: SearchResult, top: int, usable_bytes: int) -> list[str]:
    """Return the fastest layouts, and why the others are not among them."""
    rows = [["", "layout", "GB of a GPU", "images/s", "days"]]
    for rank, candidate in enumerate(found.feasible[:top], start=1):
        rows.append(
            [
                str(rank),
                candidate.layout,
                f"{candidate.needed_bytes / GB:.1f}",
                f"{candidate.images_per_s:,.0f}",
                f"{days(candidate.seconds):.1f}",
            ]
        )
    lines = [f"layouts that fit: {len(found.feasible)}, the fastest first"]
    return [*lines, *(_table(rows, left=(1,)) if found.feasible else []), *describe_refusals(found, usable_bytes)]


def describe_refusals(found: SearchResult, usable_bytes: int) -> list[str]:
    """Return why layouts are not possible: the kinds of reasons, with counts."""
    lines = []
    if found.too_large:
        lines.append(f"layouts too large for {usable_bytes / GB:.1f} GB: {len(found.too_large)}")
        lines += [
            f"  {_shortage(candidate, usable_bytes)}"
            for candidate in found.too_large[:: max(1, len(found.too_large) - 1)]
        ]
    if found.refusals:
        lines.append(f"layouts that are not possible: {sum(found.refusals.values())}")
        lines += [f"  {count:>4} x {reason}" for reason, count in found.refusals.most_common(MAX_REASONS)]
        left_out = len(found.refusals) - MAX_REASONS
        lines += [f"  and {left_out} other reasons"] if left_out > 0 else []
    return lines


def _shortage(candidate: Candidate, usable_bytes: int) -> str:
    return f"{candidate.layout}: needs {candidate.needed_bytes / GB:.1f} GB of {usable_bytes / GB:.1f}"


def to_json(plan: Plan, found: SearchResult | None = None) -> dict[str, Any]:
    """Return the plan as plain dicts of numbers.

    `per_gpu` is of the phase that needs most; `step` of the first phase, with all phases under `phases`.
    """
    fullest = max(plan.phases, key=lambda phase: phase.memory.total)
    steps = {phase.name: _step(plan, phase) for phase in plan.phases}
    data: dict[str, Any] = {
        "fits": plan.fits,
        "parameters": {
            "dit": plan.parameters.dit,
            "with_encoders": plan.parameters.with_encoders,
            "activated": plan.parameters.activated,
            "in_experts": plan.parameters.in_experts,
        },
        "layout": {
            "nodes": plan.machine.nodes,
            "gpus_per_node": plan.machine.gpus_per_node,
            "tp": plan.topology.tp,
            "ep": plan.topology.ep,
            "dp": plan.topology.dp,
            "edp": plan.topology.edp,
            "zero": plan.zero.stage,
        },
        "per_gpu": _bytes_of(fullest) | {"limit": plan.machine.usable_bytes},
        "step": steps[plan.phases[0].name],
        "phases": steps,
        "checkpoint": asdict(plan.checkpoint),
        "run": _run_numbers(plan),
    }
    if found is not None:
        data["search"] = {
            "feasible": [_candidate_numbers(candidate) for candidate in found.feasible],
            "too_large": len(found.too_large),
            "not_possible": dict(found.refusals),
        }
    return data


def _bytes_of(phase: Phase) -> dict[str, int]:
    return asdict(phase.memory) | {"total": phase.memory.total}


def _step(plan: Plan, phase: Phase) -> dict[str, Any]:
    batch = plan.recipe.train.global_batch_size
    return {
        "steps": phase.steps,
        "mask_ratio": phase.mask_ratio,
        "micro_batch": phase.micro_batch,
        "accumulated": phase.accumulated,
        "per_gpu": _bytes_of(phase),
        "flops": asdict(phase.model_flops)
        | {"total": phase.model_flops.total, "recomputed": phase.recomputed_flops.total},
        "bytes": {
            line.traffic.purpose: {"link": line.bytes.link, "network": line.bytes.network}
            for line in phase.time.communication
        },
        "seconds": {
            "compute": phase.time.compute,
            "communication": {line.traffic.purpose: line.seconds for line in phase.time.communication},
            "hidden": phase.time.hidden,
            "with_overlap": phase.time.with_overlap,
            "without_overlap": phase.time.without_overlap,
        },
        "mfu": phase.mfu,
        "mfu_without_overlap": phase.mfu_without_overlap,
        "images_per_second": batch / phase.time.with_overlap,
        "images_per_second_without_overlap": batch / phase.time.without_overlap,
    }


def _run_numbers(plan: Plan) -> dict[str, Any]:
    outlooks = []
    for one in plan.outlooks:
        # JSON has no infinity: a run that never gets on has no number of interruptions.
        numbers = {key: value for key, value in asdict(one).items() if key != "interruptions" or one.effective_share}
        wall = {"days": days(plan.training_seconds / one.effective_share)} if one.effective_share else {}
        outlooks.append(numbers | wall)
    return {"steps": plan.recipe.train.max_steps, "days": days(plan.training_seconds), "outlooks": outlooks}


def _candidate_numbers(candidate: Candidate) -> dict[str, Any]:
    train = candidate.recipe.train
    return {
        "tp": candidate.topology.tp,
        "ep": candidate.topology.ep,
        "zero": candidate.zero.stage,
        "micro_batch": candidate.micro_batches,
        "recompute": train.recompute,
        "recompute_every": train.recompute_every,
        "bytes": candidate.needed_bytes,
        "images_per_second": candidate.images_per_s,
    }


def _head(plan: Plan) -> list[str]:
    count, machine, top, train = plan.parameters, plan.machine, plan.topology, plan.recipe.train
    every = f", every {train.recompute_every}" if train.recompute_every > 1 else ""
    return [
        f"recipe      {plan.recipe.name}: {count.dit / 1e9:.2f} B parameters, {count.with_encoders / 1e9:.2f} B with "
        f"the frozen encoders, {count.activated / 1e9:.2f} B active a token",
        f"machine     {machine.nodes} nodes x {machine.gpus_per_node} {machine.gpu.name}, "
        f"{machine.gpu.network_bytes_per_s * 8 / 1e9:.0f} Gb/s of network a GPU",
        f"layout      tp {top.tp} x dp {top.dp}; experts over ep {top.ep}, {top.edp} copies; ZeRO-{plan.zero.stage}; "
        f"recompute {train.recompute}{every}",
        "batch       "
        + f"{train.global_batch_size} images = "
        + "; ".join(
            f"{phase.name}: {top.dp} x {phase.micro_batch} x {phase.accumulated} accumulated" for phase in plan.phases
        ),
    ]


def _memory(plan: Plan) -> list[str]:
    rows = [["memory of a GPU", *(f"{phase.name} GB" for phase in plan.phases)]]
    for kind in fields(plan.phases[0].memory):
        rows.append([kind.name, *(f"{getattr(phase.memory, kind.name) / GB:.2f}" for phase in plan.phases)])
    # Kinds that are never there together, such as activations and the optimizer step's, do not add up.
    rows.append(["at the fullest moment", *(f"{phase.memory.total / GB:.2f}" for phase in plan.phases)])
    gpu, usable = plan.machine.gpu, plan.machine.usable_bytes
    rows.append([f"usable of {gpu.memory_gib} GiB", *(f"{usable / GB:.2f}" for _ in plan.phases)])
    return _table(rows)


def _compute(plan: Plan) -> list[str]:
    rows = [["compute of a step", *_columns(plan, "PFLOP", "ms a GPU")]]
    for part in (*_PARTS, "elementwise", "optimizer"):
        cells = []
        for phase in plan.phases:
            flops = getattr(phase.model_flops, part, 0.0)
            again = getattr(phase.recomputed_flops, part, 0.0)
            cells += [f"{(flops + again) / 1e15:.2f}" if flops else "-", f"{phase.time.compute[part] * 1e3:.1f}"]
        rows.append([part, *cells])
    totals = []
    for phase in plan.phases:
        totals += [
            f"{(phase.model_flops.total + phase.recomputed_flops.total) / 1e15:.2f}",
            f"{sum(phase.time.compute.values()) * 1e3:.1f}",
        ]
    return _table([*rows, ["total", *totals]])


def _communication(plan: Plan) -> list[str]:
    rows = [["sent in a step", "collective", *_columns(plan, "link GB", "network GB", "ms", "hidden ms")]]
    lines = {
        line.traffic.purpose: line.traffic.collective for phase in plan.phases for line in phase.time.communication
    }
    for purpose, collective in lines.items():
        cells = []
        for phase in plan.phases:
            line = next(line for line in phase.time.communication if line.traffic.purpose == purpose)
            cells += [
                f"{line.bytes.link / GB:.2f}",
                f"{line.bytes.network / GB:.2f}",
                f"{line.seconds * 1e3:.1f}",
                f"{phase.time.hidden.get(purpose, 0.0) * 1e3:.1f}",
            ]
        rows.append([purpose, collective, *cells])
    return _table(rows, left=(0, 1)) if lines else ["sent in a step: nothing, one GPU does it all"]


def _speed(plan: Plan) -> list[str]:
    rows = [["speed", *_columns(plan, "with overlap", "without")]]
    values = (
        ("seconds a step", "{:.3f}", lambda p: (p.time.with_overlap, p.time.without_overlap)),
        ("images a second", "{:,.0f}", lambda p: (p.images_per_s, p.images_per_s_without_overlap)),
        ("MFU (model FLOPs over bf16 peak)", "{:.1%}", lambda p: (p.mfu, p.mfu_without_overlap)),
    )
    for name, form, pair in values:
        rows.append([name, *(form.format(value) for phase in plan.phases for value in pair(phase))])
    return _table(rows)


def _run(plan: Plan) -> list[str]:
    cost, train = plan.checkpoint, plan.recipe.train
    step = plan.training_seconds / train.max_steps
    lines = [
        f"run         {train.max_steps:,} steps, {days(plan.training_seconds):.2f} days of training",
        f"checkpoint  {cost.bytes / GB:,.0f} GB ({cost.bytes / 2**40:.2f} TiB), on disk in {cost.save_seconds:.0f} s, "
        f"training waits {cost.stall_seconds:.2f} s",
    ]
    rows = [
        [
            "failures a 1000 node-days",
            "hours between",
            "in the run",
            "save every",
            "steps",
            "effective time",
            f"at checkpoint_every {train.checkpoint_every}",
        ]
    ]
    for one in plan.outlooks:
        rows.append(
            [
                f"{one.failures_per_1000_node_days:g}",
                f"{one.mean_seconds_between / 3600:.1f}",
                f"{one.interruptions:.1f}",
                f"{one.best_interval_seconds:.0f} s",
                f"{max(1, round(one.best_interval_seconds / step)):,}",
                f"{one.effective_share:.1%}",
                f"{one.effective_share_as_set:.1%}",
            ]
        )
    return [*lines, *_table(rows)]


def _assumed(plan: Plan) -> list[str]:
    given, usual, why = asdict(plan.machine.assumptions), asdict(default_assumptions()), reasons()
    lines = ["assumed, not measured (a flag changes each; latency, stragglers and waiting for data are not counted):"]
    for name, value in given.items():
        flag = name.replace("_", "-")
        lines.append(
            f"  --{flag} {value:g}: {why[name]}" if value == usual[name] else f"  --{flag} {value:g}: as given"
        )
    return lines


def _columns(plan: Plan, *names: str) -> list[str]:
    return [f"{phase.name} {name}" for phase in plan.phases for name in names]


def _table(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    flush = set(left)
    return [
        "  ".join(
            cell.ljust(width) if column in flush else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
