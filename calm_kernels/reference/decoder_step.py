"""New positions of each sequence through Llama decoder layers: the specification.

    n = RMSNorm(x); query, key, value = projections of n, query and key rotated
    y = x + Wo attention;  x = y + Wd (silu(Wg m) * (Wu m)),  m = RMSNorm(y)

for every layer, then an RMSNorm.

One position after the other: the new key and value join the cache in place; the query sees the
positions from the sequence's first to its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LAYER_TENSORS = 9


def decoder_step(
    x: Tensor,
    weights: list[Tensor],
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    filling: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: list[float],
    scale: float,
) -> Tensor:
    """See :func:`calm_kernels.ops.decoder_step.decoder_step`.

    ``x`` is [B * T, H]; ``weights`` are nine a layer and the last norm's, ``eps`` two a layer and
    the last norm's.
    """
    if not len(x):
        return x.clone()
    slots = torch.arange(keys.shape[3], device=x.device)
    results = []
    for step in x.view(keys.shape[1], -1, x.shape[1]).unbind(dim=1):
        # Of a sequence that begins later, what comes out is not a number.
        places = position - filling
        rotary = (cos[places].unsqueeze(1), sin[places].unsqueeze(1))
        seen_slots = (slots <= position) & (slots >= filling.unsqueeze(1))
        for i in range(len(keys)):
            layer = weights[i * _LAYER_TENSORS : (i + 1) * _LAYER_TENSORS]
            layer_eps = eps[2 * i : 2 * i + 2]
            step = _layer(
                step, layer, keys[i], values[i], position, seen_slots, rotary, layer_eps, scale
            )
        results.append(F.rms_norm(step, step.shape[1:], weights[-1], eps[-1]))
        position = position + 1
    return torch.stack(results, dim=1).flatten(0, 1)


def _layer(
    x: Tensor,
    weights: list[Tensor],
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    seen_slots: Tensor,
    rotary: tuple[Tensor, Tensor],
    eps: list[float],
    scale: float,
) -> Tensor:
    """keys, values [B, key_heads, capacity, width] of this layer; seen_slots [B, capacity]."""
    norm, query_weight, key_weight, value_weight, out, post_norm, gate, up, down = weights
    batch, (key_heads, capacity, width) = len(x), keys.shape[1:]
    normed = F.rms_norm(x, norm.shape, norm, eps[0])

    def rotated(weight: Tensor) -> Tensor:
        heads = F.linear(normed, weight).view(batch, -1, width)
        return heads * rotary[0] + heads.roll(width // 2, dims=-1) * rotary[1]

    value = F.linear(normed, value_weight).view(batch, key_heads, 1, width)
    keys.index_copy_(2, position, rotated(key_weight).unsqueeze(2))
    values.index_copy_(2, position, value)
    query = rotated(query_weight).view(batch, key_heads, -1, width)
    scores = (query @ keys.transpose(2, 3)) * scale
    scores = scores.masked_fill(~seen_slots.view(batch, 1, 1, capacity), float("-inf"))
    seen = scores.softmax(dim=-1) @ values.nan_to_num()
    y = x + F.linear(seen.reshape(batch, -1), out)
    m = F.rms_norm(y, post_norm.shape, post_norm, eps[1])
    return y + F.linear(F.silu(F.linear(m, gate)) * F.linear(m, up), down)
