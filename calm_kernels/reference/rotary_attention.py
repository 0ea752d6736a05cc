"""Causal attention of rotated queries and keys: the specification.

    q' = q cos + rotate_half(q) sin, k' likewise; out = softmax(scale q' k'^T) v

over the positions up to the query's own, for every head. Query head h reads key head
h // (heads / key_heads). Everything is computed in the inputs' dtype; the backward recomputes the
weights from the logarithms of their sums.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _heads(x: Tensor, width: int) -> Tensor:
    """[B, T, heads * width] -> [B, heads, T, width]"""
    batch, length, size = x.shape
    return x.reshape(batch, length, size // width, width).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2).contiguous()


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + _rotate_half(x) * sin.unsqueeze(1)


def _rotated_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return grad * cos.unsqueeze(1) - _rotate_half(grad * sin.unsqueeze(1))


def _scores(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys (a head for every query head) and their masked products."""
    width = cos.shape[2]
    q, k = (_rotated(_heads(x, width), cos, sin) for x in (query, key))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return q, k, (q @ k.transpose(2, 3) * scale).masked_fill(later, float("-inf"))


def rotary_attention(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """-> (out [B, T, heads * width], logarithms of the weights' sums [B, heads, T])."""
    q, _, scores = _scores(query, key, cos, sin, scale)
    v = _heads(value, cos.shape[2])
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    log_sums = scores.logsumexp(dim=3)
    return _flat((scores - log_sums.unsqueeze(3)).exp() @ v), log_sums


def rotary_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    log_sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    q, k, scores = _scores(query, key, cos, sin, scale)
    weights = (scores - log_sums.unsqueeze(3)).exp()
    width, group = cos.shape[2], q.shape[1] * cos.shape[2] // key.shape[2]
    v = _heads(value, width).repeat_interleave(group, dim=1)
    grad, result = _heads(grad_out, width), _heads(out, width)
    mean = (grad * result).sum(dim=3, keepdim=True)
    grad_scores = weights * (grad @ v.transpose(2, 3) - mean) * scale

    def shared(per_query_head: Tensor) -> Tensor:
        batch, heads = per_query_head.shape[:2]
        parts = per_query_head.reshape(batch, heads // group, group, *per_query_head.shape[2:])
        return parts.sum(dim=2)

    grad_query = _rotated_back(grad_scores @ k, cos, sin)
    grad_key = _rotated_back(shared(grad_scores.transpose(2, 3) @ q), cos, sin)
    grad_value = shared(weights.transpose(2, 3) @ grad)
    return _flat(grad_query), _flat(grad_key), _flat(grad_value)
