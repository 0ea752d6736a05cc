"""The stand-in models, small and freshly drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import upstream_stand_in


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_language_model() -> Any:
    def make(**settings: Any) -> Any:
        model = upstream_stand_in.EnergyTransformer(upstream_stand_in.Config(**settings))
        upstream_stand_in.perturb(model)
        return model.eval()

    return make


@pytest.fixture
def make_autoencoder() -> Any:
    def make(**settings: Any) -> Any:
        model = upstream_stand_in.Autoencoder(upstream_stand_in.Config(**settings))
        upstream_stand_in.perturb(model)
        return model.eval()

    return make
