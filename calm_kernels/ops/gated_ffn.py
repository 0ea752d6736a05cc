"""The gated feed-forward block of the autoencoder: norm, SwiGLU and residual in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calm_kernels import _autocast, _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import gated_ffn as reference

# On a GPU the compiled library comes first and these kernels where it is absent.
TRITON_MODULE = "calm_kernels.triton.gated_ffn"


def _fake(
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    eps: float,
    save_activations: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty((rows,), dtype=reference.compute_dtype(x.dtype)),
        x.new_empty((rows if save_activations else 0, 2 * gate_weight.shape[0])),
    )


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    rstd: Tensor,
    gate_up: Tensor,
    weight_grads: bool,
) -> tuple[Tensor, ...]:
    weights = (norm_weight, gate_weight, up_weight, down_weight)
    grads = [w.new_empty(w.shape if weight_grads else (0,)) for w in weights]
    return (x.new_empty(x.shape), *grads)


_gated_ffn_backward = define(
    "gated_ffn_backward",
    "(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor gate_weight, Tensor up_weight, "
    "Tensor down_weight, Tensor rstd, Tensor gate_up, bool weight_grads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_autocast.disabled(reference.gated_ffn_backward),
    fake=_fake_backward,
    triton_module=TRITON_MODULE,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rstd, gate_up = output
    ctx.mark_non_differentiable(rstd, gate_up)
    ctx.set_materialize_grads(False)  # no zeros of the size of the activations
    ctx.save_for_backward(*inputs[:5], rstd, gate_up)


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    weight_grads = any(ctx.needs_input_grad[1:5])
    grads = _gated_ffn_backward(
        grad_out.device, grad_out.contiguous(), *ctx.saved_tensors, weight_grads
    )
    return (*(grads if weight_grads else (grads[0], None, None, None, None)), None, None)


_gated_ffn = define(
    "gated_ffn",
    "(Tensor x, Tensor norm_weight, Tensor gate_weight, Tensor up_weight, Tensor down_weight, "
    "float eps, bool save_activations) -> (Tensor out, Tensor rstd, Tensor gate_up)",
    reference=_autocast.disabled(reference.gated_ffn),
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    triton_module=TRITON_MODULE,
)


def gated_ffn(
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """x + down(silu(gate(n)) * up(n)) with n = RMSNorm(x; norm_weight, eps), residual included.

    Args:
        x: [*, H], float32, bfloat16, float16 or float64.
        norm_weight: [H].
        gate_weight: [I, H].
        up_weight: [I, H].
        down_weight: [H, I]. All of one dtype on one device.
        eps: added to the mean square in the norm.

    Returns:
        [*, H], dtype of x. The norm and the pointwise steps are computed in float32 (float64 for
        float64 inputs), matmuls accumulate in float32. Differentiable once, in all five tensors.

    Memory: while a gradient is due, a row keeps x, its 2I gate and up products in x's dtype and
    one float32; silu, product and norm are recomputed in the backward. Without gradient nothing
    is kept. On CPUs a calling thread keeps up to 64 MB of working memory from call to call.

    Autocast: all five tensors are cast to the autocast dtype, so the result, residual included,
    has that dtype.

    Raises:
        TypeError: a dtype is not floating, or they differ. ValueError: a shape does not fit,
            devices differ.

    Source: arXiv 2510.27688, section 3 (the autoencoder's blocks).
    """
    _checks.tensor("x", x, _checks.FLOAT_DTYPES, ("*", "H"))
    hidden_size = x.shape[-1]
    _checks.tensor("norm_weight", norm_weight, _checks.FLOAT_DTYPES, (hidden_size,))
    _checks.tensor("gate_weight", gate_weight, _checks.FLOAT_DTYPES, ("I", hidden_size))
    _checks.tensor("up_weight", up_weight, _checks.FLOAT_DTYPES, gate_weight.shape)
    _checks.tensor(
        "down_weight", down_weight, _checks.FLOAT_DTYPES, (hidden_size, gate_weight.shape[0])
    )
    device = _checks.same_device(
        x=x,
        norm_weight=norm_weight,
        gate_weight=gate_weight,
        up_weight=up_weight,
        down_weight=down_weight,
    )
    x, norm_weight, gate_weight, up_weight, down_weight = tensors = [
        _autocast.cast(device, t) for t in (x, norm_weight, gate_weight, up_weight, down_weight)
    ]
    _checks.same_dtype(
        x=x,
        norm_weight=norm_weight,
        gate_weight=gate_weight,
        up_weight=up_weight,
        down_weight=down_weight,
    )
    save_activations = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    out: Tensor
    out, _, _ = _gated_ffn(
        device,
        x.reshape(-1, hidden_size).contiguous(),
        norm_weight,
        gate_weight,
        up_weight,
        down_weight,
        eps,
        save_activations,
    )
    return out.reshape(x.shape)
