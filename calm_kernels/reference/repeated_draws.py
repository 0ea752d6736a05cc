"""Draws that share all tokens so far with enough others: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def repeated_draws(
    rows: Tensor, groups: Tensor, tokens: Tensor, fewest: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`calm_kernels.ops.repeated_draws.repeated_draws`."""
    pairs = torch.stack((groups, tokens), dim=1)
    _, alike, counts = torch.unique(pairs, dim=0, return_inverse=True, return_counts=True)
    kept = counts[alike] >= fewest[rows % len(fewest)]
    # A group has the number of its first draw.
    firsts = torch.full_like(counts, len(rows))
    firsts.scatter_reduce_(0, alike, torch.arange(len(rows), device=rows.device), "amin")
    return rows[kept], firsts[alike][kept]
