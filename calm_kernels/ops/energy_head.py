"""A block of the energy head: norm, MLP with shared conditioning, gate and residual in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calm_kernels import _autocast, _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import energy_head as reference

_WEIGHTS = (
    "Tensor norm_weight, Tensor norm_bias, Tensor in_weight, Tensor in_bias, Tensor mid_weight, "
    "Tensor mid_bias, Tensor out_weight, Tensor out_bias, Tensor down_weight, Tensor down_bias"
)
_NUM_WEIGHTS = 10
_NUM_FIRST_WEIGHTS = 4 + _NUM_WEIGHTS


def _weight_shapes(size: int) -> dict[str, tuple[int, ...]]:
    return {
        "norm_weight": (size,),
        "norm_bias": (size,),
        "in_weight": (size, 2 * size),
        "in_bias": (size,),
        "mid_weight": (size, size),
        "mid_bias": (size,),
        "out_weight": (2 * size, size),
        "out_bias": (2 * size,),
        "down_weight": (size, size),
        "down_bias": (size,),
    }


def _fake(e: Tensor, condition: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rows, size = e.shape
    kept = rows if others[-1] else 0
    shapes = ((rows, size), (kept, size), (kept, size), (kept, 2 * size))
    return tuple(e.new_empty(shape) for shape in shapes)


def _fake_backward(grad_out: Tensor, e: Tensor, condition: Tensor, *others: Any) -> Any:
    weights, weight_grads = others[:_NUM_WEIGHTS], others[-1]
    grads = (w.new_empty(w.shape if weight_grads else (0,)) for w in weights)
    return (e.new_empty(e.shape), condition.new_empty(condition.shape), *grads)


_block_backward = define(
    "energy_head_block_backward",
    f"(Tensor grad_out, Tensor e, Tensor condition, {_WEIGHTS}, Tensor first, Tensor second, "
    f"Tensor gate_up, float eps, bool weight_grads) -> ({', '.join(['Tensor'] * 12)})",
    reference=_autocast.disabled(reference.energy_head_block_backward),
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.saved = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the size of the activations
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * (2 + _NUM_WEIGHTS + 2)
    if not ctx.saved:
        raise RuntimeError(
            "energy_head_block: no gradient without its activations: call the operator with "
            "save_activations=True"
        )
    weight_grads = any(ctx.needs_input_grad[2 : 2 + _NUM_WEIGHTS])
    grads = _block_backward(
        grad_out.device, grad_out.contiguous(), *ctx.saved_tensors, ctx.eps, weight_grads
    )
    if not weight_grads:
        grads = (*grads[:2], *[None] * _NUM_WEIGHTS)
    return (*grads, None, None)


_block = define(
    "energy_head_block",
    f"(Tensor e, Tensor condition, {_WEIGHTS}, float eps, bool save_activations) "
    "-> (Tensor out, Tensor first, Tensor second, Tensor gate_up)",
    reference=_autocast.disabled(reference.energy_head_block),
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def _fake_first(noise: Tensor, condition: Tensor, weights: Sequence[Tensor], *others: Any) -> Any:
    return _fake(noise.new_empty((noise.shape[0], condition.shape[1])), condition, *others)


def _fake_first_backward(
    grad_out: Tensor, noise: Tensor, condition: Tensor, weights: Sequence[Tensor], *others: Any
) -> Any:
    grads = [w.new_empty(w.shape if others[-1] else (0,)) for w in weights]
    return condition.new_empty(condition.shape), grads


_first_block_backward = define(
    "energy_head_first_block_backward",
    "(Tensor grad_out, Tensor noise, Tensor condition, Tensor[] weights, Tensor first, "
    "Tensor second, Tensor gate_up, float eps, bool weight_grads) -> (Tensor, Tensor[])",
    reference=_autocast.disabled(reference.energy_head_first_block_backward),
    fake=_fake_first_backward,
)


def _setup_context_first(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    noise, condition, weights, ctx.eps, ctx.saved = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(noise, condition, *weights, *output[1:])


def _backward_first(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_out is None:
        return None, None, [None] * _NUM_FIRST_WEIGHTS, None, None
    if not ctx.saved:
        raise RuntimeError(
            "energy_head_first_block: no gradient without its activations: call the operator with "
            "save_activations=True"
        )
    weight_grads = any(ctx.needs_input_grad[2])
    noise, condition, *tensors = ctx.saved_tensors
    weights, kept = tensors[:_NUM_FIRST_WEIGHTS], tensors[_NUM_FIRST_WEIGHTS:]
    grad_condition, grads = _first_block_backward(
        noise.device, grad_out.contiguous(), noise, condition, weights, *kept, ctx.eps, weight_grads
    )
    if not weight_grads:
        grads = [None] * _NUM_FIRST_WEIGHTS
    return None, grad_condition, grads, None, None


_first_block = define(
    "energy_head_first_block",
    "(Tensor noise, Tensor condition, Tensor[] weights, float eps, bool save_activations) "
    "-> (Tensor out, Tensor first, Tensor second, Tensor gate_up)",
    reference=_autocast.disabled(reference.energy_head_first_block),
    fake=_fake_first,
    backward=_backward_first,
    setup_context=_setup_context_first,
)


def why_not_first_block(noise: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why :func:`energy_head_first_block` does not serve; None if it does.

    In 16 bits folded weights would be rounded once more.
    """
    if noise.requires_grad and torch.is_grad_enabled():
        return "noise needs a gradient"
    if torch.is_autocast_enabled(noise.device.type):
        return "autocast is on"
    if weights[0].dtype not in (torch.float32, torch.float64):
        return f"weights are {weights[0].dtype}, not float32 or float64"
    return _first_block.why_not_native_for(weights, weights[0].dtype)


def energy_head_first_block(
    noise: Tensor, condition: Tensor, weights: Sequence[Tensor], *, eps: float = 1e-6
) -> Tensor:
    """:func:`energy_head_block` of e = LayerNorm(W u + b), noise u.

    Both norms in front of the block's MLP are affine in the noise but for two factors a row. So
    they, the linear layer and the half of the MLP's first layer that reads them become one product
    with E + 2 inputs a row, in place of one with H after two norms of rows in memory.

    Args:
        noise: [*, N, E], N samples of every position; float32 or float64.
        condition: [*, H].
        weights: W [H, E], b [H], weight and bias of its LayerNorm [H], and the ten of
            :func:`energy_head_block` in order. All of one dtype on one device.
        eps: added to the variance in both norms.

    Returns:
        [*, N, H]. Differentiable once, in condition and weights.

    Memory: while a gradient is due, a row keeps 4H numbers; e is recomputed from the noise.

    Autocast: nothing is cast; everything is computed in the dtype of the tensors.

    Raises:
        TypeError: a dtype is not float32 or float64, or they differ. ValueError: a shape does not
            fit, devices differ, noise requires a gradient.

    Source: this package's; the function is that of arXiv 2510.27688, section 3.
    """
    dtypes = (torch.float32, torch.float64)
    _checks.tensor("noise", noise, dtypes, ("*", "N", "E"))
    _checks.tensor("condition", condition, dtypes, (*noise.shape[:-2], "H"))
    size, noise_size = condition.shape[-1], noise.shape[-1]
    shapes = {
        "embed_weight": (size, noise_size),
        "embed_bias": (size,),
        "embed_norm_weight": (size,),
        "embed_norm_bias": (size,),
        **_weight_shapes(size),
    }
    if len(weights) != len(shapes):
        raise ValueError(f"weights: expected {len(shapes)} tensors; got {len(weights)}")
    named = dict(zip(shapes, weights, strict=True))
    for name, shape in shapes.items():
        _checks.tensor(name, named[name], dtypes, shape)
    if noise.requires_grad and torch.is_grad_enabled():
        raise ValueError("noise: it gets no gradient here; energy_head_block of its norm gives one")
    named = {"noise": noise, "condition": condition, **named}
    device = _checks.same_device(**named)
    _checks.same_dtype(**named)
    save_activations = torch.is_grad_enabled() and any(t.requires_grad for t in named.values())
    out: Tensor
    out, *_ = _first_block(
        device,
        noise.reshape(-1, noise_size).contiguous(),
        condition.reshape(-1, size).contiguous(),
        list(weights),
        eps,
        save_activations,
    )
    return out.reshape(*noise.shape[:-1], size)


def energy_head_block(
    e: Tensor,
    condition: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    mid_weight: Tensor,
    mid_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """e + down(silu(gate) * up), (gate, up) = MLP(cat(LayerNorm(e), condition)); all samples of
    a position share its condition.

    The MLP is three linear layers with SiLU between them. What the first one makes of the
    condition is computed once per position.

    Args:
        e: [*, N, H], N samples of every position; float32, bfloat16, float16 or float64.
        condition: [*, H].
        norm_weight, norm_bias: [H], of the LayerNorm.
        in_weight, in_bias: [H, 2H] and [H], of the first layer; its left half reads the norm.
        mid_weight, mid_bias: [H, H] and [H].
        out_weight, out_bias: [2H, H] and [2H]; the first H results are the gate.
        down_weight, down_bias: [H, H] and [H]. All of one dtype on one device.
        eps: added to the variance in the norm.

    Returns:
        [*, N, H], dtype of e. The norm and the pointwise steps are computed in float32 (float64
        for float64 inputs), matmuls accumulate in float32. Differentiable once, in all tensors.

    Memory: while a gradient is due, a row keeps e and 4H more numbers in its dtype; everything
    else is recomputed in the backward. Without gradient nothing is kept.

    Autocast: all tensors are cast to the autocast dtype, so the result has that dtype.

    Raises:
        TypeError: a dtype is not floating, or they differ. ValueError: a shape does not fit,
            devices differ.

    Source: arXiv 2510.27688, section 3; the shared conditioning is this package's.
    """
    _checks.tensor("e", e, _checks.FLOAT_DTYPES, ("*", "N", "H"))
    size = e.shape[-1]
    given_weights = (
        norm_weight, norm_bias, in_weight, in_bias, mid_weight, mid_bias, out_weight, out_bias,
        down_weight, down_bias,
    )  # fmt: skip
    shapes = {"condition": (*e.shape[:-2], size), **_weight_shapes(size)}
    named = dict(zip(shapes, (condition, *given_weights), strict=True))
    for name, shape in shapes.items():
        _checks.tensor(name, named[name], _checks.FLOAT_DTYPES, shape)
    named = {"e": e, **named}
    device = _checks.same_device(**named)
    named = {name: _autocast.cast(device, tensor) for name, tensor in named.items()}
    _checks.same_dtype(**named)
    rows, given, *weights = named.values()
    save_activations = torch.is_grad_enabled() and any(t.requires_grad for t in named.values())
    out: Tensor
    out, *_ = _block(
        device,
        rows.reshape(-1, size).contiguous(),
        given.reshape(-1, size).contiguous(),
        *weights,
        eps,
        save_activations,
    )
    return out.reshape(e.shape)
