"""A block of the energy head: the specification.

    n = LayerNorm(e),  (gate, up) = W2 silu(W1 silu(W0 cat(n, c) + b0) + b1) + b2
    out = e + Wd (silu(gate) * up) + bd

e has a row for every sample, c one for every position. W0 cat(n, c) = W0e n + W0c c, so the half
that reads c is computed once per position and added to the rows of all its samples.

The norm and every pointwise step are computed in float32 (float64 for float64 inputs); what goes
into a matmul is in the inputs' dtype. The backward keeps e and the inputs of the three nonlinear
steps, and recomputes the rest pointwise.
"""

from __future__ import annotations

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
    unit, _ = _unit(e.to(dtype), eps)
    normed = (unit * norm_weight.to(dtype)).add_(norm_bias.to(dtype)).to(e.dtype)
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

    unit, rstd = _unit(e.to(dtype), eps)
    grad_normed = torch.mm(grad_first, in_weight[:, :size]).to(dtype)
    # Shifting or scaling a row leaves its unit row unchanged: both components are taken off.
    grad_unit = grad_normed * norm_weight.to(dtype)
    scale = (grad_unit * unit).mean(dim=1, keepdim=True)
    shift = grad_unit.mean(dim=1, keepdim=True)
    grad_e = narrow((grad_unit - shift - unit * scale) * rstd + grad_out)
    if not weight_grads:
        return (grad_e, grad_condition, *(e.new_empty(0) for _ in range(10)))
    normed = narrow(unit * norm_weight.to(dtype) + norm_bias.to(dtype))
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


def _unit(e: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, and the factor that made the latter."""
    centred = e - e.mean(dim=1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)
    return centred * rstd, rstd


def _silu(x: Tensor) -> Tensor:
    return silu(x.to(compute_dtype(x.dtype))).to(x.dtype)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    dtype = compute_dtype(x.dtype)
    wide: Tensor = torch.ops.aten.silu_backward(grad.to(dtype), x.to(dtype))
    return wide.to(x.dtype)
