"""A Llama layer's attention: the specification.

    n = RMSNorm(x),  out = x + Wo attend(Wq n, Wk n, Wv n)

with attend of :mod:`calm_kernels.reference.rotary_attention`. Everything is computed in the inputs'
dtype; the backward recomputes n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels.reference.rotary_attention import rotary_attention, rotary_attention_backward


def attention_block(
    x: Tensor,
    norm_weight: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, T, H] -> out [B, T, H], and what the backward reads.

    Of the R = B * T rows: the norm's factors [R], queries, keys and values side by side
    [R, A + 2K], what queries see [R, A]; and log_sums [B, heads, T].
    """
    rstd = torch.rsqrt(x.square().mean(dim=2, keepdim=True) + eps)
    normed = x * rstd * norm_weight
    query, key, value = (normed @ w.t() for w in (query_weight, key_weight, value_weight))
    seen, log_sums = rotary_attention(query, key, value, cos, sin, scale)
    projected = torch.cat((query, key, value), dim=2).flatten(0, 1)
    return x + seen @ out_weight.t(), rstd.reshape(-1), projected, seen.flatten(0, 1), log_sums


def attention_block_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    rstd: Tensor,
    projected: Tensor,
    seen: Tensor,
    log_sums: Tensor,
    scale: float,
    weight_grads: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and the five weights; without ``weight_grads`` the latter are [0]."""
    weights = (query_weight, key_weight, value_weight)
    query, key, value = projected.unflatten(0, x.shape[:2]).split([len(w) for w in weights], dim=2)
    seen_by_sequence = seen.unflatten(0, x.shape[:2])
    grads = rotary_attention_backward(
        grad_out @ out_weight, query, key, value, cos, sin, seen_by_sequence, log_sums, scale
    )
    grad_normed = grads[0] @ query_weight + grads[1] @ key_weight + grads[2] @ value_weight
    factors = rstd.reshape(*x.shape[:2], 1)
    unit = x * factors
    grad_unit = grad_normed * norm_weight
    mean = (grad_unit * unit).mean(dim=2, keepdim=True)
    grad_x = (grad_unit - unit * mean) * factors + grad_out
    if not weight_grads:
        return (grad_x, *(x.new_empty(0) for _ in range(5)))
    normed = (unit * norm_weight).flatten(0, 1)
    return (
        grad_x,
        (grad_normed * unit).sum(dim=(0, 1)),
        *(grad.flatten(0, 1).t() @ normed for grad in grads),
        grad_out.flatten(0, 1).t() @ seen,
    )
