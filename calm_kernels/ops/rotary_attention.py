"""Causal attention of rotated queries and keys, from the projections to what the queries see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels._dispatch import define
from calm_kernels._native import why_not_avx512
from calm_kernels.reference import rotary_attention as reference


def _fake(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, length, size = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, size // cos.shape[2], length))


def _fake_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


_rotary_attention_backward = define(
    "rotary_attention_backward",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor out, "
    "Tensor log_sums, float scale) -> (Tensor, Tensor, Tensor)",
    reference=reference.rotary_attention_backward,
    fake=_fake_backward,
    native_dtype=torch.float32,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.scale = inputs[5]


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    gradients = _rotary_attention_backward(grad_out.device, grad_out, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None)


_rotary_attention = define(
    "rotary_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, float scale) "
    "-> (Tensor out, Tensor log_sums)",
    reference=reference.rotary_attention,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    native_dtype=torch.float32,
)


def why_not_rotary_attention(x: Tensor) -> str | None:
    """Why :func:`rotary_attention` is not the fast way for such a tensor; None if it is."""
    if x.dtype != torch.float32:
        return f"the tensor is {x.dtype}, not float32"
    return _rotary_attention.why_not("native", x.device.type) or why_not_avx512()


def check_heads(
    rotary: tuple[Tensor, Tensor],
    dtypes: tuple[torch.dtype, ...],
    batch: int,
    length: int,
    query_size: int,
    key_size: int,
) -> None:
    """Raise unless rotary fits the sequences, and queries and keys are whole heads of its width."""
    cos, sin = rotary
    _checks.tensor("rotary", cos, dtypes, ("1 or B", length, "width"))
    _checks.tensor("rotary", sin, dtypes, tuple(cos.shape))
    width = cos.shape[2]
    if cos.shape[0] not in (1, batch) or width < 2 or width % 2:
        raise ValueError(
            f"rotary: expected [1 or {batch}, {length}, width], width even; got {list(cos.shape)}"
        )
    if key_size % width or key_size == 0 or query_size % key_size:
        raise ValueError(
            f"key: expected key_heads * width numbers a position, a multiple of {width} that "
            f"divides the queries' {query_size}; got {key_size}"
        )


def rotary_attention(
    query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor], *, scale: float
) -> Tensor:
    """softmax(scale * q k^T) v over the positions up to a query's own, q and k rotated.

    Args:
        query: float32 or float64 [B, T, heads * width].
        key, value: [B, T, key_heads * width]; query head h reads key head h // (heads / key_heads).
        rotary: cosines and sines [1 or B, T, width], width even; no gradient.
        scale: of the products.

    Returns:
        [B, T, heads * width]. Differentiable in query, key and value, once.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, devices or dtypes differ.

    Source: arXiv 2104.09864 (the halves of a head are its pairs, as transformers' Llama has it).
    """
    dtypes = (torch.float32, torch.float64)
    _checks.tensor("query", query, dtypes, ("B", "T", "heads*width"))
    batch, length, size = query.shape
    _checks.tensor("key", key, dtypes, (batch, length, "key_heads*width"))
    _checks.tensor("value", value, dtypes, tuple(key.shape))
    check_heads(rotary, dtypes, batch, length, size, key.shape[2])
    cos, sin = rotary
    _checks.same_dtype(query=query, key=key, value=value, cos=cos, sin=sin)
    device = _checks.same_device(query=query, key=key, value=value, cos=cos, sin=sin)
    out: Tensor
    out, _ = _rotary_attention(device, query, key, value, cos.detach(), sin.detach(), scale)
    return out
