"""RMSNorm: the specification.

    out = x * rstd * weight,  rstd = (mean(x^2) + eps)^(-1/2)

in float32 (float64 for float64 inputs), rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [R, H], weight [H] -> (out [R, H], rstd [R])."""
    wide = x.to(compute_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(dim=1) + eps)
    out = (wide * rstd.unsqueeze(1)).mul_(weight.to(wide.dtype)).to(x.dtype)
    return out, rstd


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, each in its dtype."""
    dtype = compute_dtype(x.dtype)
    unit = x.to(dtype) * rstd.unsqueeze(1)
    grad = grad_out.to(dtype)
    grad_weight = (grad * unit).sum(dim=0).to(weight.dtype)
    # d unit: remove the component along unit, since scaling x leaves unit unchanged.
    grad_unit = grad * weight.to(dtype)
    along = (grad_unit * unit).mean(dim=1, keepdim=True)
    return ((grad_unit - unit * along) * rstd.unsqueeze(1)).to(x.dtype), grad_weight
