"""The last layers of the energy head: norm, linear, SiLU and linear in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calm_kernels import _autocast, _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import energy_head as reference

_WEIGHTS = (
    "Tensor norm_weight, Tensor norm_bias, Tensor hidden_weight, Tensor hidden_bias, "
    "Tensor latent_weight, Tensor latent_bias"
)
_NUM_WEIGHTS = 6


def _fake(e: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rows, size = e.shape
    latent_weight, saves = others[4], others[-1]
    latents = e.new_empty((rows, latent_weight.shape[0]))
    return latents, e.new_empty((rows if saves else 0, size))


def _fake_backward(grad_latents: Tensor, e: Tensor, *others: Any) -> tuple[Tensor, ...]:
    weights, weight_grads = others[:_NUM_WEIGHTS], others[-1]
    grads = (w.new_empty(w.shape if weight_grads else (0,)) for w in weights)
    return (e.new_empty(e.shape), *grads)


_output_backward = define(
    "energy_head_output_backward",
    f"(Tensor grad_latents, Tensor e, {_WEIGHTS}, Tensor hidden, float eps, bool weight_grads) "
    f"-> ({', '.join(['Tensor'] * (1 + _NUM_WEIGHTS))})",
    reference=_autocast.disabled(reference.energy_head_output_backward),
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.saved = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_latents: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_latents is None:
        return (None,) * (1 + _NUM_WEIGHTS + 2)
    if not ctx.saved:
        raise RuntimeError(
            "energy_head_output: no gradient without its activations: call the operator with "
            "save_activations=True"
        )
    weight_grads = any(ctx.needs_input_grad[1 : 1 + _NUM_WEIGHTS])
    grads = _output_backward(
        grad_latents.device, grad_latents.contiguous(), *ctx.saved_tensors, ctx.eps, weight_grads
    )
    if not weight_grads:
        grads = (grads[0], *[None] * _NUM_WEIGHTS)
    return (*grads, None, None)


_output = define(
    "energy_head_output",
    f"(Tensor e, {_WEIGHTS}, float eps, bool save_activations) -> (Tensor latents, Tensor hidden)",
    reference=_autocast.disabled(reference.energy_head_output),
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def why_not_output(weights: Sequence[Tensor]) -> str | None:
    """Why no kernel of :func:`energy_head_output` serves weights; None if one does."""
    return _output.why_not_native_for(weights, weights[0].dtype)


def energy_head_output(
    e: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    latent_weight: Tensor,
    latent_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Latents of rows: linear(silu(linear(LayerNorm(e)))).

    Args:
        e: [*, H]; float32, bfloat16, float16 or float64.
        norm_weight, norm_bias: [H], of the LayerNorm.
        hidden_weight, hidden_bias: [H, H] and [H], of the first linear layer.
        latent_weight, latent_bias: [D, H] and [D], of the second. All of one dtype on one device.
        eps: added to the variance in the norm.

    Returns:
        [*, D], dtype of e. The norm and SiLU are computed in float32 (float64 for float64 inputs),
        matmuls accumulate in float32. Differentiable once, in all tensors.

    Memory: while a gradient is due, a row keeps e and H more numbers in its dtype.

    Autocast: all tensors are cast to the autocast dtype, so the result has that dtype.

    Raises:
        TypeError: a dtype is not floating, or they differ. ValueError: a shape does not fit,
            devices differ.

    Source: arXiv 2510.27688, section 3.
    """
    _checks.tensor("e", e, _checks.FLOAT_DTYPES, ("*", "H"))
    size = e.shape[-1]
    _checks.tensor("latent_weight", latent_weight, _checks.FLOAT_DTYPES, ("D", size))
    named = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "hidden_weight": hidden_weight,
        "hidden_bias": hidden_bias,
        "latent_weight": latent_weight,
        "latent_bias": latent_bias,
    }
    latent_size = latent_weight.shape[0]
    shapes = ((size,), (size,), (size, size), (size,), (latent_size, size), (latent_size,))
    for (name, tensor), shape in zip(named.items(), shapes, strict=True):
        _checks.tensor(name, tensor, _checks.FLOAT_DTYPES, shape)
    named = {"e": e, **named}
    device = _checks.same_device(**named)
    named = {name: _autocast.cast(device, tensor) for name, tensor in named.items()}
    _checks.same_dtype(**named)
    rows, *weights = named.values()
    save_activations = torch.is_grad_enabled() and any(t.requires_grad for t in named.values())
    latents: Tensor
    latents, _ = _output(
        device, rows.reshape(-1, size).contiguous(), *weights, eps, save_activations
    )
    return latents.reshape(*e.shape[:-1], latent_size)
