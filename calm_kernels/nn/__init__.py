"""Drop-in layers with the parameter names of the CALM release; no logic beyond calling ops."""

from calm_kernels.nn.diffusion_head import DiffusionHead
from calm_kernels.nn.energy import EnergyLoss
from calm_kernels.nn.energy_head import EnergyHead
from calm_kernels.nn.flow_head import FlowHead
from calm_kernels.nn.gated_ffn import GatedFFN
from calm_kernels.nn.linear_cross_entropy import LinearCrossEntropyLoss
from calm_kernels.nn.patch_codec import FoldedEncoder, PatchDecoder, PatchEncoder
from calm_kernels.nn.rms_norm import RMSNorm
from calm_kernels.nn.temperature import TemperatureSampler

__all__ = [
    "DiffusionHead",
    "EnergyHead",
    "EnergyLoss",
    "FlowHead",
    "FoldedEncoder",
    "GatedFFN",
    "LinearCrossEntropyLoss",
    "PatchDecoder",
    "PatchEncoder",
    "RMSNorm",
    "TemperatureSampler",
]
