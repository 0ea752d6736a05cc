"""A block of the energy head: the specification.

    n = LayerNorm(e),  (gate, up) = W2 silu(W1 silu(W0 cat(n, c) + b0) + b1) + b2
    out = e + Wd (silu(gate) * up) + bd

e has a row for every sample, c one for every position. W0 cat(n, c) = W0e n + W0c c, so the half
that reads c is computed once per position and added to the rows of all its samples.

The norm and every pointwise step are computed in float32 (float64 for float64 inputs); what goes
into a matmul is in the inputs' dtype. The backward keeps e and the inputs of the three nonlinear
steps, and recomputes the rest pointwise.

The first block's e is LayerNorm(We u + be) of noise u; the last layers are a LayerNorm and a linear
layer, SiLU and another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the norm and the pointwise steps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    eps: float,
    save_activations: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e [P * N, H], condition [P, H] -> out, first, second [P * N, H] and gate_up [P * N, 2H].

    Row p * N + n of e is sample n of position p. The last three are the inputs of the nonlinear
    steps; they have no rows unless ``save_activations``.
    """
    dtype, size = compute_dtype(e.dtype), e.shape[1]
    normed = _normed(e, norm_weight, norm_bias, eps)[0]
    shared = torch.addmm(in_bias, condition, in_weight[:, size:].t())
    first = torch.mm(normed, in_weight[:, :size].t())
    if e.shape[0]:
        first = (first.view(condition.shape[0], -1, size) + shared.unsqueeze(1)).view(-1, size)
    second = torch.addmm(mid_bias, _silu(first), mid_weight.t())
    gate_up = torch.addmm(out_bias, _silu(second), out_weight.t())
    gate, up = gate_up.to(dtype).chunk(2, dim=1)
    product = (silu(gate) * up).to(e.dtype)
    out = torch.addmm(e + down_bias, product, down_weight.t())
    if not save_activations:
        first, second, gate_up = (t.new_empty((0, t.shape[1])) for t in (first, second, gate_up))
    return out, first, second, gate_up


def energy_head_block_backward(
    grad_out: Tensor,
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
    first: Tensor,
    second: Tensor,
    gate_up: Tensor,
    eps: float,
    weight_grads: bool,
) -> tuple[Tensor, ...]:
    """Gradients of e, condition and the ten weights, each in its dtype.

    Without ``weight_grads`` the last ten are [0].
    """
    dtype, size = compute_dtype(e.dtype), e.shape[1]

    def narrow(wide: Tensor) -> Tensor:
        return wide.to(e.dtype)

    def sums(grad: Tensor) -> Tensor:
        return narrow(grad.sum(dim=0, dtype=dtype))

    gate, up = gate_up.to(dtype).chunk(2, dim=1)
    activated = silu(gate)
    product = narrow(activated * up)
    grad_product = torch.mm(grad_out, down_weight).to(dtype)
    grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
    grad_gate_up = narrow(torch.cat((grad_gate, grad_product * activated), dim=1))
    grad_second = _silu_backward(torch.mm(grad_gate_up, out_weight), second)
    grad_first = _silu_backward(torch.mm(grad_second, mid_weight), first)
    grad_shared = condition.new_zeros(condition.shape)
    if e.shape[0]:
        by_position = grad_first.view(condition.shape[0], -1, size)
        grad_shared = narrow(by_position.sum(dim=1, dtype=dtype))
    grad_condition = torch.mm(grad_shared, in_weight[:, size:])

    normed, unit, rstd = _normed(e, norm_weight, norm_bias, eps)
    grad_normed = torch.mm(grad_first, in_weight[:, :size]).to(dtype)
    grad_e = narrow(_unit_backward(grad_normed * norm_weight.to(dtype), unit, rstd) + grad_out)
    if not weight_grads:
        return (grad_e, grad_condition, *(e.new_empty(0) for _ in range(10)))
    grad_in = torch.cat((grad_first.t() @ normed, grad_shared.t() @ condition), dim=1)
    return (
        grad_e,
        grad_condition,
        narrow((grad_normed * unit).sum(dim=0)),
        sums(grad_normed),
        grad_in,
        sums(grad_first),
        torch.mm(grad_second.t(), _silu(first)),
        sums(grad_second),
        torch.mm(grad_gate_up.t(), _silu(second)),
        sums(grad_gate_up),
        torch.mm(grad_out.t(), product),
        sums(grad_out),
    )


def energy_head_first_block(
    noise: Tensor,
    condition: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    save_activations: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`energy_head_block` of e = LayerNorm(We u + be), noise u [P * N, E].

    ``weights``: We, be, the norm's two, and the block's ten.
    """
    e = _embed(noise, weights[:4], eps)[0].to(noise.dtype)
    arguments: Sequence[Any] = (e, condition, *weights[4:], eps, save_activations)
    return energy_head_block(*arguments)


def energy_head_first_block_backward(
    grad_out: Tensor,
    noise: Tensor,
    condition: Tensor,
    weights: Sequence[Tensor],
    first: Tensor,
    second: Tensor,
    gate_up: Tensor,
    eps: float,
    weight_grads: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of condition and weights; without ``weight_grads`` the latter are [0]."""
    dtype = compute_dtype(noise.dtype)
    e, unit, rstd = _embed(noise, weights[:4], eps)
    inputs = (grad_out, e.to(noise.dtype), condition, *weights[4:], first, second, gate_up)
    arguments: Sequence[Any] = (*inputs, eps, weight_grads)
    grad_e, grad_condition, *grads = energy_head_block_backward(*arguments)
    if not weight_grads:
        return grad_condition, [noise.new_empty(0) for _ in weights]
    wide = grad_e.to(dtype)
    grad_z = _unit_backward(wide * weights[2].to(dtype), unit, rstd)
    of_embedding = (
        grad_z.t() @ noise.to(dtype),
        grad_z.sum(dim=0),
        (wide * unit).sum(dim=0),
        wide.sum(dim=0),
    )
    return grad_condition, [*(g.to(noise.dtype) for g in of_embedding), *grads]


def energy_head_output(
    e: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    latent_weight: Tensor,
    latent_bias: Tensor,
    eps: float,
    save_activations: bool,
) -> tuple[Tensor, Tensor]:
    """e [R, H] -> latents [R, D], and [R, H] that SiLU reads (no rows unless saved)."""
    normed = _normed(e, norm_weight, norm_bias, eps)[0]
    hidden = torch.addmm(hidden_bias, normed, hidden_weight.t())
    latents = torch.addmm(latent_bias, _silu(hidden), latent_weight.t())
    return latents, hidden if save_activations else hidden.new_empty((0, hidden.shape[1]))


def energy_head_output_backward(
    grad_latents: Tensor,
    e: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    latent_weight: Tensor,
    latent_bias: Tensor,
    hidden: Tensor,
    eps: float,
    weight_grads: bool,
) -> tuple[Tensor, ...]:
    """Gradients of e and the six weights; without ``weight_grads`` the latter are [0]."""
    dtype = compute_dtype(e.dtype)
    normed, unit, rstd = _normed(e, norm_weight, norm_bias, eps)
    grad_hidden = _silu_backward(torch.mm(grad_latents, latent_weight), hidden)
    grad_normed = torch.mm(grad_hidden, hidden_weight).to(dtype)
    grad_e = _unit_backward(grad_normed * norm_weight.to(dtype), unit, rstd).to(e.dtype)
    if not weight_grads:
        return (grad_e, *(e.new_empty(0) for _ in range(6)))
    gradients = (
        (grad_normed * unit).sum(dim=0),
        grad_normed.sum(dim=0),
        torch.mm(grad_hidden.t(), normed),
        grad_hidden.sum(dim=0, dtype=dtype),
        torch.mm(grad_latents.t(), _silu(hidden)),
        grad_latents.sum(dim=0, dtype=dtype),
    )
    return (grad_e, *(gradient.to(e.dtype) for gradient in gradients))


def _normed(e: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(e) in its dtype, and its unit rows and their factors in the compute dtype."""
    dtype = compute_dtype(e.dtype)
    unit, rstd = _unit(e.to(dtype), eps)
    return (unit * weight.to(dtype) + bias.to(dtype)).to(e.dtype), unit, rstd


def _embed(noise: Tensor, weights: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of a linear layer's results, and its unit rows and their factors."""
    weight, bias, norm_weight, norm_bias = weights
    dtype = compute_dtype(noise.dtype)
    unit, rstd = _unit(torch.addmm(bias, noise, weight.t()).to(dtype), eps)
    return unit * norm_weight.to(dtype) + norm_bias.to(dtype), unit, rstd


def _unit(e: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, and the factor that made the latter."""
    centred = e - e.mean(dim=1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)
    return centred * rstd, rstd


def _unit_backward(grad_unit: Tensor, unit: Tensor, rstd: Tensor) -> Tensor:
    """Shifting or scaling a row leaves its unit row unchanged: both components are taken off."""
    scale = (grad_unit * unit).mean(dim=1, keepdim=True)
    return (grad_unit - grad_unit.mean(dim=1, keepdim=True) - unit * scale) * rstd


def _silu(x: Tensor) -> Tensor:
    return silu(x.to(compute_dtype(x.dtype))).to(x.dtype)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    wide: Tensor = torch.ops.aten.silu_backward(grad.to(dtype), x.to(dtype))
    return wide.to(x.dtype)
