"""What tests of whole parts share: a tiny recipe, its file, and checkpoints of a random model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.config.yaml_loader import load_recipe
from tests.helpers.random_model import save_random_model

# Some tests fork, and a forked child hangs in a thread pool that its parent has used: use none.
torch.set_num_threads(1)

MakeRecipe = Callable[..., Recipe]
SaveModel = Callable[..., Path]

TINY_RECIPE = """\
# Four layers, two of them with four experts, on the smallest canvas that digit scenes have.
name: tiny
model:
  {hidden_size: 32, num_layers: 4, num_heads: 2, num_kv_heads: 1, head_dim: 16, cross_num_heads: 2, cross_head_dim: 16,
   ffn_hidden_size: 48, patch_size: 4, in_channels: 3, latent_height: 16, latent_width: 16, text_embed_dim: 24,
   max_text_tokens: 12, num_experts: 4}
train: {max_steps: 4, global_batch_size: 8, log_every: 1, checkpoint_every: 2, evaluate_every: 2, sample_every: 4}
data: {num_train: 64, num_heldout: 8, num_workers: 0}
sample: {num_steps: 2, prompts: [a red seven, two green fives]}
"""


@pytest.fixture
def tiny_recipe_file(tmp_path: Path) -> Path:
    """Return a file with a recipe that trains in seconds: batch 8, 4 steps."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tiny_recipe_file: Path, tmp_path: Path) -> MakeRecipe:
    """Return `make_recipe("train.max_steps=2", ...)`: the tiny recipe with some fields changed."""

    def make(*overrides: str) -> Recipe:
        return load_recipe(str(tiny_recipe_file), [f"data.cache_dir={tmp_path / 'cache'}", *overrides])

    return make


@pytest.fixture
def tiny_recipe(make_recipe: MakeRecipe) -> Recipe:
    """Return the tiny recipe as it is."""
    return make_recipe()


@pytest.fixture
def save_model() -> SaveModel:
    """Return `save_model(root, recipe, step, meta)`: a checkpoint of random weights and another random average."""
    return save_random_model
