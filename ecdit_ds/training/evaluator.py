"""What a run looks at while it trains: held-out loss, sample grids, and whether digit scenes are drawn right.

All of it is collective and equal on every rank and layout; tools/sample.py and tools/evaluate.py use the same code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.data.digit_scenes.scenes import Scene
from ecdit_ds.data.encoders.base import TextEmbeddings
from ecdit_ds.data.encoders.from_recipe import encoders_of
from ecdit_ds.data.encoders.online import OnlineEncoders
from ecdit_ds.data.mixture import SampleSet
from ecdit_ds.evaluation.digit_scenes.alignment import drawn_alignment
from ecdit_ds.evaluation.digit_scenes.score import heldout_prompts
from ecdit_ds.evaluation.heldout import heldout_loss
from ecdit_ds.inference.images import to_uint8
from ecdit_ds.inference.text_to_image import TextToImage
from ecdit_ds.model.ecdit import ECDiT
from ecdit_ds.model.sharding import ShardIndex
from ecdit_ds.parallel.topology import Topology
from ecdit_ds.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Looks at the model of one run."""

    recipe: Recipe
    topology: Topology
    world: World
    device: torch.device
    heldout_set: SampleSet
    null_text: TextEmbeddings
    """What training drops texts to."""
    encoders: OnlineEncoders | None = None
    """Those that run beside training; without any, prompts are drawn through encoders in host memory."""

    def heldout_losses(self, model: nn.Module) -> list[float]:
        """Return the held-out loss at each fixed time."""
        dp = self._dp
        return heldout_loss(
            model,
            self.heldout_set,
            batch_size=self._batch_size,
            dp_rank=dp.index,
            dp_size=dp.count,
            device=self.device,
            total=self.world.sum,
            finish=self.encoders.finish if self.encoders else None,
        )

    def draw(self, model: nn.Module) -> np.ndarray:
        """Return uint8 pictures (B, H, W, 3) of the recipe's prompts; the first one's seed is the run's.

        Raises:
            NonFiniteError: as `TextToImage.draw`.
        """
        prompts, seed = self.recipe.sample.prompts, self.recipe.train.seed
        return self._pictures(model, prompts, range(seed, seed + len(prompts)))

    def scene_scores(self, model: nn.Module) -> dict[str, Any]:
        """Return how many held-out digit scenes of each kind it draws right (sample.scenes_per_kind), as plain data.

        Raises:
            NonFiniteError: on all ranks alike.
        """
        counts_here = self.topology.coordinates(self.world.rank).tp == 0  # ranks of one group draw the same
        return drawn_alignment(
            lambda prompts, seeds: self._pictures(model, prompts, seeds),
            self._scenes,
            batch_size=self._batch_size,
            dp=self._dp,
            total=lambda counts: self.world.sum(counts * counts_here),
        ).summary()

    def _pictures(self, model: nn.Module, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        image_encoder, text_encoder = encoders_of(self.recipe, self.device if self.encoders else None)
        drawer = TextToImage(
            model=cast(ECDiT, model),
            recipe=self.recipe,
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            device=self.device,
            null_text=self.null_text,
        )
        return to_uint8(drawer.draw(prompts, seeds=seeds, sample=self.recipe.sample))

    @cached_property
    def _scenes(self) -> list[Scene]:
        config, pixels = self.recipe.model, encoders_of(self.recipe)[0].downsampling
        return heldout_prompts(
            seed=self.recipe.data.seed,
            per_kind=self.recipe.sample.scenes_per_kind,
            canvas_height=config.latent_height * pixels,
            canvas_width=config.latent_width * pixels,
        )

    @property
    def _dp(self) -> ShardIndex:
        return ShardIndex(index=self.topology.coordinates(self.world.rank).dp, count=self.topology.dp)

    @property
    def _batch_size(self) -> int:
        return self.recipe.micro_batch_size(self.topology.dp)
