"""Drawing patches of tokens from the energy head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from calm_kernels.models.energy_transformer import EnergyTransformer

LARGEST_BATCH = 2**14
"""Patches drawn and decoded at once; bounds the memory of the head and of the decoder."""


_DRAWS_PER_SEQUENCE = 2**32
"""Philox rows of the head's noise set aside for each sequence: row = sequence * 2^32 + draw."""


def draw_patches(model: EnergyTransformer, hidden: Tensor, noise: Tensor) -> Tensor:
    """Turn noise into patches of tokens.

    Args:
        hidden: [A, H].
        noise: [S, A, noise_size].

    Returns:
        int64 [S, A, K]
    """
    at_once = max(1, LARGEST_BATCH // max(1, hidden.shape[0]))
    tokens = [
        model.ae_model.decode(model.mlp_generator(hidden, len(part), noise=part))
        for part in noise.split(at_once)
    ]
    return torch.cat(tokens)


def noise_rows(sequences: Tensor, first: int, count: int) -> Tensor:
    """Philox rows of the head's noise for draws [first, first + count) of some sequences.

    int64 [A] -> [count * A], draw by draw.
    """
    numbers = torch.arange(first, first + count, device=sequences.device)
    return (sequences * _DRAWS_PER_SEQUENCE + numbers.unsqueeze(1)).flatten()
