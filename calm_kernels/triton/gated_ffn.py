"""The gated feed-forward block with its pointwise steps inside the matmuls, in Triton.

Forward, two matmuls. The norm is folded: RMSNorm(x) W^T = rstd (x (W diag(w))^T), so the first
multiplies x by the packed, scaled weights of gate and up, and its epilogue applies rstd (from a row
kernel) and silu(gate) up. The second adds the residual to its accumulator. A row of x is read for
rstd and for each matmul; the product is written and read once.

Backward: the product's gradient becomes that of gate and up in the epilogue of its matmul, the
norm's gradient is a row kernel, the plain matmuls are torch's.

Numbers: float32 accumulation and pointwise steps. bfloat16 and float16 on tensor cores: the scaled
weights are rounded to them once, in place of the normed rows. float32 in plain multiply-adds
(``input_precision="ieee"``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels import _dispatch
from calm_kernels.triton.gated_ffn_matmuls import (
    DOWN,
    GATE_UP,
    PRODUCT_GRADIENT,
    choose_tiles,
    down_with_residual,
    gate_up_product,
    product_gradient,
)
from calm_kernels.triton.gated_ffn_norm import norm_gradient, normed_rows, normed_rstd


def packed_weights(gate_weight: Tensor, up_weight: Tensor, norm_weight: Tensor | None) -> Tensor:
    """[gate; up] [2 I, H], every column times its norm weight unless that is None."""
    both = torch.cat([gate_weight, up_weight])
    return both if norm_weight is None else both.mul_(norm_weight)


def _not_for_triton(x: Tensor) -> bool:
    # Triton multiplies no float64 on tensor cores, and nothing is not worth a kernel.
    return x.dtype == torch.float64 or x.numel() == 0


def gated_ffn(
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    eps: float,
    save_activations: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference: x [R, H] -> (out [R, H], rstd [R], gate_up [R, 2I] or [0, 2I])."""
    if _not_for_triton(x):
        out, rstd, gate_up = torch.ops.calm_kernels.gated_ffn.reference(
            x, norm_weight, gate_weight, up_weight, down_weight, eps, save_activations
        )
        return out, rstd, gate_up
    x = x.contiguous()
    with torch.cuda.device(x.device):
        rstd = normed_rstd(x, eps)
        weight = packed_weights(gate_weight, up_weight, norm_weight)
        tiles = choose_tiles(GATE_UP, x.dtype, x.shape[0])
        product, gate_up = gate_up_product(x, weight, rstd, save_activations, tiles)
        tiles = choose_tiles(DOWN, x.dtype, x.shape[0])
        return down_with_residual(product, down_weight.contiguous(), x, tiles), rstd, gate_up


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
    """As the reference: gradients of x and, with ``weight_grads``, of the four weights."""
    if _not_for_triton(x):
        grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
        grads = torch.ops.calm_kernels.gated_ffn_backward.reference(
            grad_out,
            *(x, norm_weight, gate_weight, up_weight, down_weight, rstd, gate_up, weight_grads),
        )
        return grads
    grad_out, x, norm_weight = grad_out.contiguous(), x.contiguous(), norm_weight.contiguous()
    size = gate_weight.shape[0]
    with torch.cuda.device(x.device):
        weight = packed_weights(gate_weight, up_weight, None)
        recomputes = gate_up.shape[0] != x.shape[0]
        normed = normed_rows(x, norm_weight, rstd) if weight_grads or recomputes else x
        if recomputes:
            gate_up = torch.mm(normed, weight.t())
        tiles = choose_tiles(PRODUCT_GRADIENT, x.dtype, x.shape[0])
        product, grad_gate_up = product_gradient(grad_out, down_weight.contiguous(), gate_up, tiles)
        grad_x, grad_norm_weight = norm_gradient(
            x, norm_weight, rstd, grad_out, torch.mm(grad_gate_up, weight)
        )
        if not weight_grads:
            nothing = [x.new_empty(0) for _ in range(4)]
            return grad_x, nothing[0], nothing[1], nothing[2], nothing[3]
        return (
            grad_x,
            grad_norm_weight,
            torch.mm(grad_gate_up[:, :size].t(), normed),
            torch.mm(grad_gate_up[:, size:].t(), normed),
            torch.mm(grad_out.t(), product),
        )


_dispatch.register_triton("gated_ffn", gated_ffn)
_dispatch.register_triton("gated_ffn_backward", gated_ffn_backward)
