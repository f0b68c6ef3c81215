"""What several unit tests share: a tiny architecture, numbers to feed it, and how a refusal must read.

Numbers are drawn by name, so a test reads the same ones alone, in a suite, and in any order.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ecdit_ds.config.model_config import ModelConfig
from ecdit_ds.config.recipe import Recipe, TrainConfig
from ecdit_ds.errors import EcditError
from ecdit_ds.seeding import parameter_generator

SECONDS_AT_MOST = 600
"""Of a test, with the fixtures that it is the first to ask for; other folders have what pyproject.toml says."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of this folder less time than real launches get."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS_AT_MOST))


@pytest.fixture
def tiny_config() -> ModelConfig:
    """Return an architecture of four layers and four experts that runs in milliseconds; tests `replace` its fields."""
    return ModelConfig(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        cross_num_heads=2,
        cross_head_dim=16,
        ffn_hidden_size=48,
        patch_size=2,
        in_channels=3,
        latent_height=8,
        latent_width=8,
        text_embed_dim=24,
        max_text_tokens=6,
        num_experts=4,
    )


@pytest.fixture
def moe_config(tiny_config: ModelConfig) -> ModelConfig:
    """Return a layer of four experts for nine tokens: 1.5 x 9 / 4 = 3.375 and 1.5 x 18 / 4 = 6.75 leave a remainder."""
    return replace(
        tiny_config, hidden_size=16, ffn_hidden_size=24, latent_height=6, latent_width=6, capacity_factor=1.5
    )


@pytest.fixture
def tiny_recipe(tiny_config: ModelConfig) -> Recipe:
    """Return a whole recipe around the tiny architecture."""
    return Recipe(name="tiny", model=tiny_config, train=TrainConfig(max_steps=4, global_batch_size=8))


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Return `draw(name, *shape)`: fp32 standard normal numbers that depend on the name and the shape alone."""

    def draw_normal(name: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=parameter_generator(0, name))

    return draw_normal


@pytest.fixture
def randomize(draw: Callable[..., Tensor]) -> Callable[[nn.Module], None]:
    """Return a function that gives every parameter, zero-initialised ones too, a value that is not special."""

    @torch.no_grad()
    def fill(module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.2 * draw(name, *parameter.shape))

    return fill


@pytest.fixture
def refusal_of() -> Callable[[Callable[[], object]], str]:
    """Return a function that runs an action which must be refused, and gives the message: exactly one line."""

    def message_of(action: Callable[[], object]) -> str:
        with pytest.raises(EcditError) as refused:
            action()
        message = str(refused.value)
        assert len(message.strip().splitlines()) == 1, f"not one line: {message!r}"
        return message

    return message_of
