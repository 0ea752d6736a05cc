"""Largest output of a linear layer and its index, tile by tile: the specification.

Logits are products in float32 (float64 for float64 inputs), whatever the inputs' dtype: rounding
them to 16 bits would make ties that are not there. A tie goes to the lowest index, and the first
NaN of a row wins, as in torch.argmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_PER_TILE = 1024
COLUMNS_PER_TILE = 1024
"""Logits of a tile: 4 MiB in float32, small beside the last-level cache. Tiles of half and of twice
the rows, at 4 and 8 MiB, measured no faster (800 and 2048 rows, H = 512)."""

COLUMN_UNIT = 64
"""A matmul's last few columns may be summed in another order than the others, so that what is equal
would not tie: tiles have whole units of columns. (In float64 that does not suffice everywhere.)"""


def linear_argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden [R, H], weight [V, H], bias [V] -> index int64 [R], value float32 (float64) [R]."""
    parts = [_rows_argmax(rows, weight, bias) for rows in hidden.split(ROWS_PER_TILE)]
    return torch.cat([index for index, _ in parts]), torch.cat([value for _, value in parts])


def logit_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logits are computed and compared in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    hidden = hidden.to(logit_dtype(hidden.dtype))
    vocab_size = weight.shape[0]
    whole = vocab_size - vocab_size % COLUMN_UNIT
    width = min(COLUMNS_PER_TILE, whole) if whole else vocab_size
    best, best_index = _tile_max(hidden, weight, bias, 0, width)
    for first in range(width, vocab_size, width):
        # The last tile overlaps the one before it, so that all are of one shape.
        value, index = _tile_max(hidden, weight, bias, min(first, vocab_size - width), width)
        # Strictly greater keeps the lowest index; a NaN compares greater than all but a NaN.
        better = (value > best) | (value.isnan() & ~best.isnan())
        best = torch.where(better, value, best)
        best_index = torch.where(better, index, best_index)
    return best_index, best


def _tile_max(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, first: int, width: int
) -> tuple[Tensor, Tensor]:
    tile = slice(first, first + width)
    logits = torch.mm(hidden, weight[tile].to(hidden.dtype).t())
    if bias is not None:
        logits += bias[tile].to(hidden.dtype)
    value, index = logits.max(dim=1)
    return value, index + first
