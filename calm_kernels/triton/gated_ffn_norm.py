"""RMSNorm of rows and its gradients: Triton kernels.

A program takes a row, or in the backward NORM_BACKWARD_ROWS of them, with the row in registers.
Fewest bytes: rstd reads H a row; the normed row reads and writes H; the backward reads 3 H and
writes H, and leaves a row of sums a program for the gradient of the weight, so that the sum over
all rows has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.triton.specialization import Specialization

# What a program of the backward sums before it stores.
NORM_BACKWARD_ROWS = 32


@triton.jit(do_not_specialize=["num_rows", "eps"])
def rms_norm_kernel(
    x,  # [R, H]
    norm_weight,  # [H]
    rstd,  # [R] float32: written, or read for NORMED
    normed,  # [R, H], or anything
    num_rows,
    eps,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    NORMED: tl.constexpr,
):
    """rstd of a row, or the normed row from it."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    values = tl.load(x + row * SIZE + columns, mask=columns < SIZE, other=0).to(tl.float32)
    if NORMED:
        scale = tl.load(norm_weight + columns, mask=columns < SIZE, other=0).to(tl.float32)
        result = values * tl.load(rstd + row) * scale
        result = result.to(normed.dtype.element_ty)
        tl.store(normed + row * SIZE + columns, result, mask=columns < SIZE)
    else:
        mean_square = tl.sum(values * values, axis=0) / SIZE
        tl.store(rstd + row, 1.0 / tl.sqrt(mean_square + eps))


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_backward_kernel(
    x,  # [R, H]
    norm_weight,  # [H]
    rstd,  # [R] float32
    grad_out,  # [R, H]
    grad_x,  # [R, H]: gradient of the normed rows, becomes that of x
    partial,  # [programs, H] float32: sums over a program's rows
    num_rows,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    columns = tl.arange(0, PADDED)
    inside = columns < SIZE
    scale = tl.load(norm_weight + columns, mask=inside, other=0).to(tl.float32)
    sums = tl.zeros((PADDED,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, num_rows)):
        at = row * SIZE + columns
        r = tl.load(rstd + row)
        unit = tl.load(x + at, mask=inside, other=0).to(tl.float32) * r
        grad = tl.load(grad_x + at, mask=inside, other=0).to(tl.float32)
        sums += grad * unit
        grad *= scale
        # Scaling x leaves the unit vector unchanged: the component along it is taken off.
        along = tl.sum(grad * unit, axis=0) / SIZE
        result = (grad - unit * along) * r
        result += tl.load(grad_out + at, mask=inside, other=0).to(tl.float32)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * SIZE + columns, sums, mask=inside)


def _row_warps(padded: int) -> int:
    return min(max(padded // 256, 1), 16)


def normed_rstd(x: Tensor, eps: float) -> Tensor:
    """x [R, H], R >= 1 -> rstd [R]."""
    rstd = x.new_empty((x.shape[0],), dtype=torch.float32)
    padded = triton.next_power_of_2(x.shape[1])
    rms_norm_kernel[(x.shape[0],)](
        *(x, x, rstd, x, x.shape[0], eps),
        SIZE=x.shape[1],
        PADDED=padded,
        NORMED=False,
        num_warps=_row_warps(padded),
    )
    return rstd


def normed_rows(x: Tensor, norm_weight: Tensor, rstd: Tensor) -> Tensor:
    """x [R, H] -> x rstd norm_weight."""
    normed = torch.empty_like(x)
    padded = triton.next_power_of_2(x.shape[1])
    rms_norm_kernel[(x.shape[0],)](
        *(x, norm_weight, rstd, normed, x.shape[0], 0.0),
        SIZE=x.shape[1],
        PADDED=padded,
        NORMED=True,
        num_warps=_row_warps(padded),
    )
    return normed


def norm_gradient(
    x: Tensor, norm_weight: Tensor, rstd: Tensor, grad_out: Tensor, grad_normed: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (grad_out added) and norm_weight; grad_normed is overwritten."""
    num_rows, hidden_size = x.shape
    programs = triton.cdiv(num_rows, NORM_BACKWARD_ROWS)
    partial = x.new_empty((programs, hidden_size), dtype=torch.float32)
    padded = triton.next_power_of_2(hidden_size)
    rms_norm_backward_kernel[(programs,)](
        *(x, norm_weight, rstd, grad_out, grad_normed, partial, num_rows),
        SIZE=hidden_size,
        PADDED=padded,
        ROWS=NORM_BACKWARD_ROWS,
        num_warps=_row_warps(padded),
    )
    return grad_normed, partial.sum(dim=0).to(norm_weight.dtype)


def _row_instance(kernel: str, dtype: str, size: int, *, normed: bool = False) -> Specialization:
    padded = triton.next_power_of_2(size)
    constants: dict[str, int | bool] = {"SIZE": size, "PADDED": padded}
    if kernel == "rms_norm":
        pointers: tuple[str, ...] = ("x", "norm_weight", "rstd", "normed")
        constants["NORMED"] = normed
    else:
        pointers = ("x", "norm_weight", "rstd", "grad_out", "grad_x", "partial")
        constants["ROWS"] = NORM_BACKWARD_ROWS
    signature = {n: "*fp32" if n in ("rstd", "partial") else f"*{dtype}" for n in pointers}
    signature["num_rows"] = "i32"
    if kernel == "rms_norm":
        signature["eps"] = "fp32"
    return Specialization(
        f"gated_ffn {kernel}{' normed' if normed else ''} {dtype} H={size}",
        globals()[f"{kernel}_kernel"],
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constants,
        pointers,
        _row_warps(padded),
        3,
        tensor_cores=False,
    )


def specializations() -> list[Specialization]:
    """The instances of the autoencoder's blocks: H = 512."""
    found = [_row_instance("rms_norm", dtype, 512) for dtype in ("bf16", "fp32")]
    found.append(_row_instance("rms_norm", "bf16", 512, normed=True))
    found.append(_row_instance("rms_norm_backward", "bf16", 512))
    return found
