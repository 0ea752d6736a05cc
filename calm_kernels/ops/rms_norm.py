"""RMSNorm, in two passes over a row that is in cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from calm_kernels import _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import rms_norm as reference


def _fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty((x.shape[0],), dtype=dtype)


def _fake_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_rms_norm_backward = define(
    "rms_norm_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    reference=reference.rms_norm_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None
    grad_x, grad_weight = _rms_norm_backward(
        grad_out.device, grad_out.contiguous(), *ctx.saved_tensors
    )
    return grad_x, grad_weight, None


_rms_norm = define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor rstd)",
    reference=reference.rms_norm,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x * (mean(x^2) + eps)^(-1/2) * weight, the mean over the last dimension.

    Args:
        x: [*, H], H >= 1, float32, bfloat16, float16 or float64.
        weight: [H], dtype and device of ``x``.
        eps: added to the mean square.

    Returns:
        [*, H], dtype of ``x``. Computed in float32 (float64 for float64) and rounded once, under
        autocast too. Gradients of ``x`` and ``weight``, no second derivative; ``x`` and one number
        a row are kept for them.

    Raises:
        TypeError: wrong dtype or type. ValueError: wrong shape, devices differ.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    _checks.tensor("x", x, _checks.FLOAT_DTYPES, ("*", "H"))
    _checks.at_least("x.shape[-1]", x.shape[-1], 1)
    _checks.tensor("weight", weight, (x.dtype,), (x.shape[-1],))
    device = _checks.same_device(x=x, weight=weight)
    out: Tensor
    out, _ = _rms_norm(device, x.reshape(-1, x.shape[-1]), weight, eps)
    return out.reshape(x.shape)


__all__ = ["rms_norm"]
