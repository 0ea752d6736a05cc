"""Drawing patches of tokens from the head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calm_kernels.models.heads import Head
from calm_kernels.nn.energy_head import EnergyHead
from calm_kernels.nn.packed import PackedDecoder, PackedEnergyHead, why_not_packed
from calm_kernels.nn.patch_codec import PatchDecoder

if TYPE_CHECKING:
    from calm_kernels.models.energy_transformer import EnergyTransformer

LARGEST_BATCH = 2**14
"""Patches drawn and decoded at once; bounds the memory of the head and of the decoder."""

_WORTH_PACKING = 64
"""So few rows take as long as packing the weights does."""


_DRAWS_PER_SEQUENCE = 2**32
"""Philox rows of the head's noise set aside for each sequence: row = sequence * 2^32 + draw."""


class Drawer:
    """Head and decoder of a model whose weights stay put, as drawing patches needs them.

    Where many patches are drawn at a time and the CPU is one that gains by it, both are copies in
    packed order.

    Args:
        model: the language model.
        num_draws: patches that will be drawn at a time.
    """

    def __init__(self, model: EnergyTransformer, num_draws: int) -> None:
        self.head: Head | PackedEnergyHead = model.mlp_generator
        self.decoder: PatchDecoder | PackedDecoder = model.ae_model.decoder
        if num_draws < _WORTH_PACKING or torch.is_autocast_enabled(model.device.type):
            return
        if isinstance(self.head, EnergyHead) and why_not_packed(self.head) is None:
            self.head = PackedEnergyHead(self.head)
        if isinstance(self.decoder, PatchDecoder) and why_not_packed(self.decoder) is None:
            self.decoder = PackedDecoder(self.decoder)

    @property
    def noise_size(self) -> int:
        """Width of the noise that becomes one draw."""
        return self.head.noise_size

    def latents(self, hidden: Tensor, noise: Tensor) -> Tensor:
        """hidden [A, H], noise [S, A, noise_size] -> [S, A, D]."""
        latents: Tensor = self.head(hidden, len(noise), noise=noise)
        return latents

    def patches(self, hidden: Tensor, noise: Tensor) -> Tensor:
        """hidden [A, H], noise [S, A, noise_size] -> tokens, int64 [S, A, K]."""
        at_once = max(1, LARGEST_BATCH // max(1, hidden.shape[0]))
        tokens = []
        for part in noise.split(at_once):
            latents = self.latents(hidden, part)
            decoded = self.decoder.decode(latents.flatten(0, 1))
            tokens.append(decoded.unflatten(0, latents.shape[:2]))
        return torch.cat(tokens)


def noise_rows(sequences: Tensor, first: int, count: int) -> Tensor:
    """Philox rows of the head's noise for draws [first, first + count) of some sequences.

    int64 [A] -> [count * A], draw by draw.
    """
    numbers = torch.arange(first, first + count, device=sequences.device)
    return (sequences * _DRAWS_PER_SEQUENCE + numbers.unsqueeze(1)).flatten()
