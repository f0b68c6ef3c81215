"""Which axis of a parameter a layout cuts, by the parameter's name alone: no torch, no model."""

_TP_AXES = {
    "query.weight": 0,
    "key.weight": 0,
    "value.weight": 0,
    "up.weight": 0,
    "attention.out.weight": 1,
    "down.weight": 1,
    "experts.w1": 2,
    "experts.w2": 1,
}
_EXPERTS = ("experts.w1", "experts.w2", "experts.bank.w1", "experts.bank.w2")
"""Ours, and those inside DeepSpeed's token-choice layer, which tensor parallelism never cuts."""


def sharded_axes(name: str) -> dict[str, int]:
    """Return which axis of parameter `name` tensor and expert parallelism cut: {"tp": axis, "ep": axis}.

    For tools that have a name and no model; a test compares it with the marks that the layers make.
    """
    found = [axis for ending, axis in _TP_AXES.items() if name.endswith(ending)]
    by_tp = {"tp": found[0]} if found else {}
    return by_tp | {"ep": 0} if name.endswith(_EXPERTS) else by_tp
