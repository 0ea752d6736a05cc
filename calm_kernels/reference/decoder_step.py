"""One new position of each sequence through a Llama decoder layer: the specification.

    n = RMSNorm(x); query, key, value = projections of n, query and key rotated
    y = x + Wo attention;  out = y + Wd (silu(Wg m) * (Wu m)),  m = RMSNorm(y)

The new key and value join the cache in place; the query sees the positions from the sequence's
first to its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def decoder_step(
    x: Tensor,
    norm_weight: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    post_norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    filling: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    post_eps: float,
    scale: float,
) -> Tensor:
    """See :func:`calm_kernels.ops.decoder_step.decoder_step`."""
    batch, (key_heads, capacity, width) = len(x), keys.shape[1:]
    normed = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    places = position - filling
    cos_row, sin_row = cos[places].unsqueeze(1), sin[places].unsqueeze(1)

    def rotated(weight: Tensor) -> Tensor:
        heads = F.linear(normed, weight).view(batch, -1, width)
        return heads * cos_row + heads.roll(width // 2, dims=-1) * sin_row

    value = F.linear(normed, value_weight).view(batch, key_heads, 1, width)
    keys.index_copy_(2, position, rotated(key_weight).unsqueeze(2))
    values.index_copy_(2, position, value)
    slots = torch.arange(capacity, device=x.device)
    seen_slots = (slots <= position) & (slots >= filling.unsqueeze(1))
    query = rotated(query_weight).view(batch, key_heads, -1, width)
    scores = (query @ keys.transpose(2, 3)) * scale
    scores = scores.masked_fill(~seen_slots.view(batch, 1, 1, capacity), float("-inf"))
    seen = scores.softmax(dim=-1) @ values.nan_to_num()
    y = x + F.linear(seen.reshape(batch, -1), out_weight)
    m = F.rms_norm(y, post_norm_weight.shape, post_norm_weight, post_eps)
    return y + F.linear(F.silu(F.linear(m, gate_weight)) * F.linear(m, up_weight), down_weight)
