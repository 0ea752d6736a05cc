"""A Llama layer's attention: norm, projections, rotary attention and residual in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calm_kernels import _autocast, _checks
from calm_kernels._dispatch import define
from calm_kernels._native import why_not_avx512
from calm_kernels.ops.rotary_attention import check_heads
from calm_kernels.reference import attention_block as reference

_INPUTS = (
    "Tensor x, Tensor norm_weight, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
    "Tensor out_weight, Tensor cos, Tensor sin"
)
_NUM_WEIGHTS = 5


def _fake(
    x: Tensor, norm_weight: Tensor, query_weight: Tensor, key_weight: Tensor, *others: Any
) -> Any:
    (batch, length, _), size = x.shape, query_weight.shape[0]
    width = others[2].shape[2]
    rows = batch * length
    return (
        x.new_empty(x.shape),
        x.new_empty(rows),
        x.new_empty((rows, size + 2 * key_weight.shape[0])),
        x.new_empty((rows, size)),
        x.new_empty((batch, size // width, length)),
    )


def _fake_backward(grad_out: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    weights, weight_grads = others[:_NUM_WEIGHTS], others[-1]
    grads = (w.new_empty(w.shape if weight_grads else (0,)) for w in weights)
    return (x.new_empty(x.shape), *grads)


_attention_block_backward = define(
    "attention_block_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor rstd, Tensor projected, Tensor seen, Tensor log_sums, "
    f"float scale, bool weight_grads) -> ({', '.join(['Tensor'] * (1 + _NUM_WEIGHTS))})",
    reference=_autocast.disabled(reference.attention_block_backward),
    fake=_fake_backward,
    native_dtype=torch.float32,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * (1 + _NUM_WEIGHTS + 4)
    weight_grads = any(ctx.needs_input_grad[1 : 1 + _NUM_WEIGHTS])
    grads = _attention_block_backward(
        grad_out.device, grad_out, *ctx.saved_tensors, ctx.scale, weight_grads
    )
    if not weight_grads:
        grads = (grads[0], *[None] * _NUM_WEIGHTS)
    return (*grads, None, None, None, None)


_attention_block = define(
    "attention_block",
    f"({_INPUTS}, float scale, float eps) -> "
    "(Tensor out, Tensor rstd, Tensor projected, Tensor seen, Tensor log_sums)",
    reference=_autocast.disabled(reference.attention_block),
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    native_dtype=torch.float32,
)


def why_not_attention_block(x: Tensor) -> str | None:
    """Why :func:`attention_block` is not the fast way for such a tensor; None if it is."""
    if x.dtype != torch.float32:
        return f"the tensor is {x.dtype}, not float32"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    return _attention_block.why_not("native", x.device.type) or why_not_avx512()


def attention_block(
    x: Tensor,
    norm_weight: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    rotary: tuple[Tensor, Tensor],
    *,
    scale: float,
    eps: float = 1e-6,
) -> Tensor:
    """x + out_weight attend(RMSNorm(x)): causal attention of rotated queries and keys.

    Args:
        x: float32 or float64 [B, T, H].
        norm_weight: [H], of the RMSNorm.
        query_weight: [heads * width, H].
        key_weight, value_weight: [key_heads * width, H]; query head h reads key head
            h // (heads / key_heads).
        out_weight: [H, heads * width]. All of one dtype on one device.
        rotary: cosines and sines [1 or B, T, width], width even; no gradient.
        scale: of the products of queries and keys.
        eps: added to the mean square in the norm.

    Returns:
        [B, T, H]. Differentiable once, in x and the weights.

    Memory: while a gradient is due, a row keeps x, queries, keys, values and what the queries see;
    the norm is recomputed.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, devices or dtypes differ.

    Source: transformers' Llama layer; arXiv 2104.09864 for the rotation.
    """
    dtypes = (torch.float32, torch.float64)
    _checks.tensor("x", x, dtypes, ("B", "T", "H"))
    batch, length, size = x.shape
    _checks.tensor("query_weight", query_weight, dtypes, ("heads*width", size))
    _checks.tensor("key_weight", key_weight, dtypes, ("key_heads*width", size))
    _checks.tensor("value_weight", value_weight, dtypes, tuple(key_weight.shape))
    _checks.tensor("out_weight", out_weight, dtypes, (size, query_weight.shape[0]))
    _checks.tensor("norm_weight", norm_weight, dtypes, (size,))
    check_heads(rotary, dtypes, batch, length, query_weight.shape[0], key_weight.shape[0])
    named = {
        "x": x,
        "norm_weight": norm_weight,
        "query_weight": query_weight,
        "key_weight": key_weight,
        "value_weight": value_weight,
        "out_weight": out_weight,
        "cos": rotary[0].detach(),
        "sin": rotary[1].detach(),
    }
    _checks.same_dtype(**named)
    device = _checks.same_device(**named)
    out: Tensor
    out, *_ = _attention_block(device, *named.values(), scale, eps)
    return out
