"""Layers one after the other over rows, from packed weights: the specification.

A linear layer's weight [N, K] is packed in panels of 32 outputs, [ceil(N / 32), K, 32], zero past
the last; its bias is a row of as many numbers, or several, of which as many rows in turn take each.
A gated layer's panels hold sixteen outputs of the gate and the same sixteen of what it gates.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 32
"""Outputs of a panel; csrc/cpu/row_layers.cpp has the same number."""


class LayerKind(enum.IntEnum):
    """What a layer does to rows; the numbers are those of csrc/cpu/row_layers.cpp."""

    LAYER_NORM = 0
    RMS_NORM = 1
    LINEAR = 2
    LINEAR_SILU = 3
    GATED = 4
    ADD_LINEAR = 5

    @property
    def is_norm(self) -> bool:
        return self in (LayerKind.LAYER_NORM, LayerKind.RMS_NORM)

    @property
    def num_tensors(self) -> int:
        return 1 if self is LayerKind.RMS_NORM else 2


def pack_panels(weight: Tensor, other: Tensor | None) -> Tensor:
    """Weight [N, K] -> panels [ceil(N / 32), K, 32]; with another one [ceil(N / 16), K, 32]."""
    weights = [weight] if other is None else [weight, other]
    rows = PANEL // len(weights)
    size, depth = weight.shape
    parts = [F.pad(part, (0, 0, 0, -size % rows)).view(-1, rows, depth) for part in weights]
    return torch.cat(parts, dim=1).transpose(1, 2).contiguous()


def row_layers(
    rows: Tensor,
    kinds: Sequence[int],
    tensors: Sequence[Tensor],
    eps: Sequence[float],
    out_size: int,
) -> Tensor:
    """rows [R, K] -> [R, out_size]; see :class:`calm_kernels.ops.row_layers.RowLayers`."""
    given, next_eps = list(tensors), iter(eps)
    current = residual = rows
    for kind in map(LayerKind, kinds):
        weight, bias = (given.pop(0) if i < kind.num_tensors else None for i in range(2))
        assert weight is not None
        if kind.is_norm:
            residual = current
            size = (len(weight),)
            current = current[:, : len(weight)]
            if kind is LayerKind.LAYER_NORM:
                current = F.layer_norm(current, size, weight, bias, next(next_eps))
            else:
                current = F.rms_norm(current, size, weight, next(next_eps))
            continue
        assert bias is not None
        flat = weight.transpose(1, 2).flatten(0, 1)
        product = F.linear(current[:, : flat.shape[1]], flat)
        if len(rows):
            product = (product.view(len(bias), -1, len(flat)) + bias.unsqueeze(1)).flatten(0, 1)
        if kind is LayerKind.ADD_LINEAR:
            current = residual = residual + product[:, : residual.shape[1]]
        elif kind is LayerKind.GATED:
            gate, up = product.unflatten(1, (-1, 2, PANEL // 2)).unbind(dim=2)
            current = (F.silu(gate) * up).flatten(1)
        else:
            current = F.silu(product) if kind is LayerKind.LINEAR_SILU else product
    return current[:, :out_size].clone()


def row_layers_argmax(
    rows: Tensor,
    kinds: Sequence[int],
    tensors: Sequence[Tensor],
    eps: Sequence[float],
    out_size: int,
) -> Tensor:
    """The first column of the largest number of each row of :func:`row_layers`, int64 [R]."""
    return row_layers(rows, kinds, tensors, eps, out_size).argmax(dim=1)
