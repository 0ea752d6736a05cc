"""linear_argmax where several processes hold parts of the vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from calm_kernels.ops.linear_argmax import linear_argmax


def vocabulary_parallel_linear_argmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`calm_kernels.linear_argmax` over a weight that is sharded by rows of the vocabulary.

    Every process calls it with the same ``hidden`` and with its own rows of the weight, and every
    process gets the whole vocabulary's result: lowest token on ties, first NaN of a row first.
    Two numbers a row and process are exchanged.

    Args:
        hidden: [*, H], the same on all processes.
        weight: [V_r, H], this process's rows, V_r >= 1; numbers of rows may differ.
        bias: [V_r] or None.
        vocab_start: token id of the first of these rows. Shards must not overlap.
        group: process group over which the vocabulary is sharded; None for all processes.

    Returns:
        int64 [*], token ids. No gradient.

    Raises:
        As :func:`calm_kernels.linear_argmax`. RuntimeError: no process group is initialised.
    """
    index, value = linear_argmax(hidden, weight, bias, return_max=True)
    index = index + vocab_start
    world = dist.get_world_size(group)
    indices = [torch.empty_like(index) for _ in range(world)]
    values = [torch.empty_like(value) for _ in range(world)]
    dist.all_gather(indices, index.contiguous(), group=group)
    dist.all_gather(values, value.contiguous(), group=group)
    best, best_index = values[0], indices[0]
    for value, index in zip(values[1:], indices[1:], strict=True):
        equal = (value == best) | (value.isnan() & best.isnan())
        better = (value > best) | (value.isnan() & ~best.isnan()) | (equal & (index < best_index))
        best = torch.where(better, value, best)
        best_index = torch.where(better, index, best_index)
    return best_index
