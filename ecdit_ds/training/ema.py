"""The exponential moving average of the fp32 weights, cut as the optimizer cuts them: no communication."""

import torch
from torch import Tensor


class ShardedEMA:
    """An average of this rank's flat weight partitions.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a young average forgets its start.
    """

    def __init__(self, partitions: list[Tensor], decay: float) -> None:
        self.averages = [partition.detach().clone() for partition in partitions]
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, partitions: list[Tensor]) -> None:
        """Move the average towards the weights; called after each step that was not skipped."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.averages, [partition.detach() for partition in partitions], 1 - decay)
        self.num_updates += 1
