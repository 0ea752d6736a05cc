"""Tiny models, freshly drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from calm_kernels.models import (
    Autoencoder,
    AutoencoderConfig,
    AutoregressiveBaseline,
    BaselineConfig,
    CalmConfig,
    EnergyTransformer,
)

VOCAB_SIZE = 23


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_autoencoder() -> Callable[..., Autoencoder]:
    def make(patch_size: int = 4, **settings: Any) -> Autoencoder:
        values: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 12,
            "intermediate_size": 20,
            "latent_size": 6,
            "patch_size": patch_size,
            "init_scheme": "width_scaled",
        }
        autoencoder = Autoencoder(AutoencoderConfig(**{**values, **settings}))
        _perturb(autoencoder)
        return autoencoder

    return make


@pytest.fixture
def make_energy_transformer(
    make_autoencoder: Callable[..., Autoencoder],
) -> Callable[..., EnergyTransformer]:
    def make(
        patch_size: int = 4, autoencoder: Autoencoder | None = None, **settings: Any
    ) -> EnergyTransformer:
        autoencoder = autoencoder or make_autoencoder(patch_size)
        values: dict[str, Any] = {
            "vocab_size": autoencoder.config.vocab_size,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "latent_size": autoencoder.config.latent_size,
            "patch_size": patch_size,
            "noise_size": 5,
            "num_mlp_layers": 2,
            "num_samples": 3,
            "init_scheme": "width_scaled",
        }
        model = EnergyTransformer(CalmConfig(**{**values, **settings}), autoencoder=autoencoder)
        _perturb(model)
        return model.eval()

    return make


@pytest.fixture
def make_model(
    make_energy_transformer: Callable[..., EnergyTransformer],
) -> Callable[..., EnergyTransformer]:
    """Models whose draws vary, and vary with the context."""

    def make(patch_size: int = 4, **settings: Any) -> EnergyTransformer:
        model = make_energy_transformer(patch_size, **settings)
        head = model.mlp_generator
        with torch.no_grad():
            head.noise_embd.bias.zero_()
            head.norm_noise.bias.zero_()
            head.final_layer.linears[2].bias.zero_()
            head.final_layer.linears[2].weight.mul_(3.0)
        return model

    return make


@pytest.fixture
def make_baseline() -> Callable[..., AutoregressiveBaseline]:
    def make(**settings: Any) -> AutoregressiveBaseline:
        values: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "init_scheme": "width_scaled",
        }
        model = AutoregressiveBaseline(BaselineConfig(**{**values, **settings}))
        _perturb(model)
        return model.eval()

    return make


def _perturb(model: torch.nn.Module) -> None:
    """Move every trainable weight off its special value (zero biases, unit norms, a zero layer)."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
