"""The held-out loss: fixed samples, fixed noise, fixed equidistant times, so that two numbers can be compared."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ecdit_ds.data.latents.dataset import Samples
from ecdit_ds.data.loader import evaluation_batches
from ecdit_ds.data.mixture import SampleSet
from ecdit_ds.flow.objective import FlowBatch, VelocityModel, flow_losses, sample_noise

NUM_TIMES = 8
"""In training."""
_NOISE_SEED = 0


def heldout_times(num_times: int = NUM_TIMES) -> Tensor:
    """Return the times, the middles of equal parts of [0, 1] (as in SD3's validation loss)."""
    return (torch.arange(num_times) + 0.5) / num_times


@torch.no_grad()
def heldout_loss(
    model: VelocityModel,
    dataset: SampleSet,
    *,
    batch_size: int,
    dp_rank: int,
    dp_size: int,
    device: torch.device,
    total: Callable[[Tensor], Tensor],
    num_times: int = NUM_TIMES,
    finish: Callable[[Sequence[Samples]], list[Samples]] | None = None,
) -> list[float]:
    """Return the mean flow loss at each of `heldout_times`; collective, equal on all ranks and layouts.

    Args:
        batch_size: images a rank sees at a time.
        total: sums a tensor over the data-parallel ranks.
        num_times: how many of `heldout_times`.
        finish: encodes what the set holds raw.
    """
    sums = torch.zeros(num_times + 1, dtype=torch.float64, device=device)
    batches = evaluation_batches(dataset, batch_size=batch_size, dp_rank=dp_rank, dp_size=dp_size)
    for stored, weights_B in batches:
        samples = (finish([stored])[0] if finish else stored).float()
        weights_B = weights_B.to(device).double()
        noise = sample_noise(
            tuple(samples.latents_BCHW.shape[1:]), samples.stream_index_B, _NOISE_SEED, "heldout noise"
        )
        sums[num_times] += weights_B.sum()
        for i, time in enumerate(heldout_times(num_times).tolist()):
            batch = FlowBatch(
                latents_BCHW=samples.latents_BCHW,
                noise_BCHW=noise,
                timesteps_B=torch.full((len(weights_B),), time),
                text_embeds_BTD=samples.text_embeds_BTD,
                text_mask_BT=samples.text_mask_BT,
                text_pooled_BD=samples.text_pooled_BD,
            ).to(device)
            losses_B = flow_losses(model, batch).flow_B
            sums[i] += (losses_B.double() * weights_B).sum()
    sums = total(sums)
    return (sums[:num_times] / sums[num_times]).tolist()
