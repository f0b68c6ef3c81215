"""Activation checkpointing: forget a block's activations in forward, compute them again in backward.

`block` keeps a block's input only. `selective` also keeps what its all-to-alls returned: computing again is cheap,
sending tokens again is not. What else a layout communicates in a block, sums over tensor-parallel ranks and weights
gathered by ZeRO-3, happens again in both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, noop_context_fn

from ecdit_ds.parallel.collectives import save_all_to_all


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What is computed again: the last of every `every` blocks, whole or but for its exchanges."""

    mode: Literal["none", "block", "selective"] = "none"
    every: int = 1

    def __call__(self, layer: int, block: Callable[..., Any], *inputs: Any) -> Any:
        """Return `block(*inputs)` for block `layer` (from 0)."""
        is_chosen = self.mode != "none" and (layer + 1) % self.every == 0
        if not (is_chosen and torch.is_grad_enabled()):
            return block(*inputs)
        context_fn = save_all_to_all if self.mode == "selective" else noop_context_fn
        # Nothing in a block is random, so there is no random state to keep.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)
