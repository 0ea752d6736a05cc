"""The models of CALM on transformers: autoencoder, energy transformer, autoregressive baseline."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ImportError("calm_kernels.models needs transformers: pip install 'calm_kernels[models]'")

from calm_kernels.models.autoencoder import Autoencoder, AutoencoderOutput
from calm_kernels.models.baseline import AutoregressiveBaseline, BaselineOutput
from calm_kernels.models.brier import BrierScores
from calm_kernels.models.configuration import AutoencoderConfig, BaselineConfig, CalmConfig
from calm_kernels.models.energy_transformer import EnergyTransformer, EnergyTransformerOutput
from calm_kernels.models.sequences import GenerationOutput

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderOutput",
    "AutoregressiveBaseline",
    "BaselineConfig",
    "BaselineOutput",
    "BrierScores",
    "CalmConfig",
    "EnergyTransformer",
    "EnergyTransformerOutput",
    "GenerationOutput",
]
