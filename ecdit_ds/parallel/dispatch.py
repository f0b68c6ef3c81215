"""Dispatch to experts on several ranks: static shapes, as every rank sends every peer exactly L * B * C rows.

Suffixes as in `ecdit_ds.model.dispatch`, whose `LocalDispatcher` is the specification.
"""

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from ecdit_ds.model.dispatch import ApplyExperts, Dispatcher, combine, gather
from ecdit_ds.parallel.collectives import all_to_all_start, all_to_all_wait, copy_to_tp_region, reduce_from_tp_region


class AllToAllDispatcher:
    """Experts are spread over the ranks of `group`, in order.

    Args:
        chunks: parts of the pools that take turns, so that one part travels while another's experts compute. The
            result is the same: pools do not see one another. Each part adds one sum over the experts' gradients.
    """

    def __init__(self, group: dist.ProcessGroup, chunks: int = 1) -> None:
        self._group, self._chunks = group, chunks

    def __call__(self, x_BSD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, experts: ApplyExperts) -> Tensor:
        peers, tokens = self._group.size(), x_BSD.shape[1]
        parts = list(zip(*(z.chunk(self._chunks) for z in (x_BSD, gates_BEC, indices_BEC)), strict=True))
        to_experts = [all_to_all_start(gather(x, indices), self._group) for x, _, indices in parts]
        to_tokens = []
        for launched in to_experts:
            rows_LRD = rearrange(all_to_all_wait(launched), "(ep l) r d -> l (ep r) d", ep=peers)
            back_ERD = rearrange(experts(rows_LRD), "l (ep r) d -> (ep l) r d", ep=peers)
            to_tokens.append(all_to_all_start(back_ERD, self._group))
        outputs = [
            combine(all_to_all_wait(launched), gates, indices, tokens)
            for launched, (_, gates, indices) in zip(to_tokens, parts, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class TensorParallelDispatcher:
    """Each expert's inner width is cut over the ranks of `group`, which hold the same tokens; `inner` moves them.

    The sum over ranks comes after the combination: T rows travel instead of f * T, and the sums over tokens, whose
    order a GPU does not fix, happen before it. So all ranks get the same bits, and go on to choose the same tokens.
    """

    def __init__(self, inner: Dispatcher, group: dist.ProcessGroup) -> None:
        self._inner, self._group = inner, group

    def __call__(self, x_BSD: Tensor, gates_BEC: Tensor, indices_BEC: Tensor, experts: ApplyExperts) -> Tensor:
        x_BSD, gates_BEC = copy_to_tp_region(x_BSD, self._group), copy_to_tp_region(gates_BEC, self._group)
        return reduce_from_tp_region(self._inner(x_BSD, gates_BEC, indices_BEC, experts), self._group)
