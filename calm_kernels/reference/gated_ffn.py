"""The gated feed-forward block with its norm and residual: the specification.

    n = x * rstd * norm_weight,  rstd = (mean(x^2) + eps)^(-1/2)        (RMSNorm)
    out = x + (silu(n Wg^T) * (n Wu^T)) Wd^T                            (SwiGLU, residual)

The norm and every pointwise step are computed in float32 (float64 for float64 inputs); what goes
into a matmul is in the inputs' dtype. The backward keeps x, rstd and the two products n Wg^T and
n Wu^T, and recomputes the rest pointwise; without the products it recomputes them too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the norm and the pointwise steps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gated_ffn(
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    eps: float,
    save_activations: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, H] -> (out [R, H], rstd [R], gate_up [R, 2I]).

    gate_up holds n Wg^T beside n Wu^T; it is [0, 2I] unless ``save_activations``.
    """
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    rstd = torch.rsqrt(wide.square().mean(dim=1) + eps)
    normed = (wide * rstd.unsqueeze(1)).mul_(norm_weight.to(dtype)).to(x.dtype)
    gate_up = _gate_up(normed, gate_weight, up_weight)
    gate, up = gate_up.to(dtype).chunk(2, dim=1)
    product = silu(gate).mul_(up).to(x.dtype)
    out = torch.addmm(x, product, down_weight.t())
    if not save_activations:
        gate_up = gate_up.new_empty((0, gate_up.shape[1]))
    return out, rstd, gate_up


def gated_ffn_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    rstd: Tensor,
    gate_up: Tensor,
    weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, norm_weight, gate_weight, up_weight, down_weight, each in its dtype.

    ``gate_up`` of zero rows is recomputed. Without ``weight_grads`` the last four are [0].
    """
    dtype = compute_dtype(x.dtype)
    unit = x.to(dtype) * rstd.unsqueeze(1)
    scale = norm_weight.to(dtype)
    normed = (unit * scale).to(x.dtype)
    if gate_up.shape[0] == 0:
        gate_up = _gate_up(normed, gate_weight, up_weight)
    gate, up = gate_up.to(dtype).chunk(2, dim=1)

    activated = silu(gate)
    grad_product = torch.mm(grad_out, down_weight).to(dtype)
    grad_down = torch.mm(grad_out.t(), (activated * up).to(x.dtype)) if weight_grads else None
    grad_up = activated.mul_(grad_product).to(x.dtype)
    grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate).to(x.dtype)
    grad_normed = torch.mm(grad_gate, gate_weight).addmm_(grad_up, up_weight).to(dtype)

    grad_norm_weight = (grad_normed * unit).sum(dim=0) if weight_grads else None
    # d unit: remove the component along unit, since scaling x leaves unit unchanged.
    grad_unit = grad_normed.mul_(scale)
    along = (grad_unit * unit).mean(dim=1, keepdim=True)
    grad_x = grad_unit.sub_(unit.mul_(along)).mul_(rstd.unsqueeze(1)).add_(grad_out).to(x.dtype)
    if grad_down is None or grad_norm_weight is None:
        nothing = [x.new_empty(0) for _ in range(4)]
        return grad_x, nothing[0], nothing[1], nothing[2], nothing[3]
    return (
        grad_x,
        grad_norm_weight.to(norm_weight.dtype),
        torch.mm(grad_gate.t(), normed),
        torch.mm(grad_up.t(), normed),
        grad_down,
    )


def _gate_up(normed: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    intermediate_size = gate_weight.shape[0]
    gate_up = normed.new_empty((normed.shape[0], 2 * intermediate_size))
    torch.mm(normed, gate_weight.t(), out=gate_up[:, :intermediate_size])
    torch.mm(normed, up_weight.t(), out=gate_up[:, intermediate_size:])
    return gate_up
