"""The gated feed-forward block with its pointwise steps inside the matmuls: Triton kernels.

Forward, two matmuls. The norm is folded: RMSNorm(x) W^T = rstd (x (W diag(w))^T), so the first
multiplies x by the packed, scaled weights of gate and up, and its epilogue applies rstd (from a row
kernel) and silu(gate) up. The second adds the residual to its accumulator. A row of x is read for
rstd and for each matmul, the product is written and read once, gate and up are written only for a
backward.

Backward: the matmul that makes the product's gradient has gate and up turned into their gradients
in its epilogue, so that gradient never leaves registers; the norm's gradient is a row kernel that
leaves sums over rows for its weight; the plain matmuls are torch's.

Numbers: float32 accumulation and pointwise steps. bfloat16 and float16 on tensor cores: the scaled
weights are rounded to them once, in place of the normed rows. float32 in plain multiply-adds
(``input_precision="ieee"``).

Mapping: a program makes a tile of rows x columns; programs of the same rows are neighbours, so
that rows come from memory once and weights, which fit the L2 cache, stay there. Gate and up tiles
of the same columns lie in one program's registers. Edges: rows and columns past the end read the last
one again and are not stored; the inner dimension is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels import _dispatch
from calm_kernels.triton.specialization import Specialization


@dataclass(frozen=True)
class Tiles:
    """Tile of a program: rows x columns results, ``inner`` steps of the sum at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "INNER": self.inner}


# 16-bit operands: 64 accumulators a thread, which leave room for the epilogue. Gate and up take
# half the columns each. Stages of 32 KiB; three of them in the 228 KiB of sm_90 twice over. The
# gradient's epilogue holds three tiles at once, so they are half as wide.
GATE_UP = Tiles(128, 128, 64, num_warps=8, num_stages=3)
DOWN = Tiles(128, 128, 64, num_warps=8, num_stages=3)
PRODUCT_GRADIENT = Tiles(128, 64, 64, num_warps=8, num_stages=3)
# Up to this many rows, tiles of fewer of them.
FEW_ROWS = 64
# float32 in plain multiply-adds: few accumulators leave registers for both operands.
FLOAT32 = Tiles(32, 32, 16, num_warps=4, num_stages=3)
# Row kernels: what a program of the norm's backward sums before it stores.
NORM_BACKWARD_ROWS = 32


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tile(num_columns, COLUMNS: tl.constexpr):
    """Row tile and column tile of a program: neighbours share their rows."""
    num_column_tiles = tl.cdiv(num_columns, COLUMNS)
    return tl.program_id(0) // num_column_tiles, tl.program_id(0) % num_column_tiles


@triton.jit
def _load_inner(pointers, offsets, k, SIZE: tl.constexpr, INNER: tl.constexpr):
    """A tile at step ``k`` of the inner dimension; zeros past its end."""
    if SIZE % INNER == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=offsets < SIZE - k, other=0)


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
def gate_up_kernel(
    x,  # [R, H]
    weight,  # [2 I, H]: of gate and of up, scaled by the norm's weight
    rstd,  # [R] float32
    product,  # [R, I]
    gate_up,  # [R, 2 I], or anything
    num_rows,
    num_columns,
    SIZE: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """product = silu(gate) up with (gate, up) = rstd (x weight^T), kept if SAVE."""
    row_tile, column_tile = _tile(num_columns, COLUMNS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    row_offsets = tl.minimum(rows, num_rows - 1).to(tl.int64)
    column_offsets = tl.minimum(columns, num_columns - 1).to(tl.int64)
    x_pointers = x + row_offsets[:, None] * SIZE + inner[None, :]
    gate_pointers = weight + column_offsets[None, :] * SIZE + inner[:, None]
    up_pointers = gate_pointers + num_columns.to(tl.int64) * SIZE
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, SIZE, INNER):
        a = _load_inner(x_pointers + k, inner[None, :], k, SIZE, INNER)
        b = _load_inner(gate_pointers + k, inner[:, None], k, SIZE, INNER)
        c = _load_inner(up_pointers + k, inner[:, None], k, SIZE, INNER)
        gate = tl.dot(a, b, gate, input_precision="ieee")
        up = tl.dot(a, c, up, input_precision="ieee")
    scale = tl.load(rstd + row_offsets)[:, None]
    gate *= scale
    up *= scale
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = row_offsets[:, None] * num_columns + columns[None, :]
    if SAVE:
        at_gate = at + row_offsets[:, None] * num_columns
        tl.store(gate_up + at_gate, gate.to(gate_up.dtype.element_ty), mask=mask)
        tl.store(gate_up + at_gate + num_columns, up.to(gate_up.dtype.element_ty), mask=mask)
    result = gate * _sigmoid(gate) * up
    tl.store(product + at, result.to(product.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def down_kernel(
    product,  # [R, I]
    weight,  # [H, I]
    x,  # [R, H]
    out,  # [R, H]
    num_rows,
    num_columns,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out = x + product weight^T."""
    row_tile, column_tile = _tile(num_columns, COLUMNS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    row_offsets = tl.minimum(rows, num_rows - 1).to(tl.int64)
    column_offsets = tl.minimum(columns, num_columns - 1).to(tl.int64)
    a_pointers = product + row_offsets[:, None] * SIZE + inner[None, :]
    b_pointers = weight + column_offsets[None, :] * SIZE + inner[:, None]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, SIZE, INNER):
        a = _load_inner(a_pointers + k, inner[None, :], k, SIZE, INNER)
        b = _load_inner(b_pointers + k, inner[:, None], k, SIZE, INNER)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = row_offsets[:, None] * num_columns + columns[None, :]
    sums += tl.load(x + at, mask=mask, other=0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def product_gradient_kernel(
    grad_out,  # [R, H]
    weight,  # [H, I]: of down
    gate_up,  # [R, 2 I]
    product,  # [R, I]: silu(gate) up, again
    grad_gate_up,  # [R, 2 I]
    num_rows,
    num_columns,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradients of gate and up from grad_out weight, the gradient of their product."""
    row_tile, column_tile = _tile(num_columns, COLUMNS)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    row_offsets = tl.minimum(rows, num_rows - 1).to(tl.int64)
    column_offsets = tl.minimum(columns, num_columns - 1)
    a_pointers = grad_out + row_offsets[:, None] * SIZE + inner[None, :]
    b_offsets = inner[:, None] * num_columns + column_offsets[None, :]
    b_first = weight
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, SIZE, INNER):
        a = _load_inner(a_pointers + k, inner[None, :], k, SIZE, INNER)
        b = _load_inner(b_first + b_offsets, inner[:, None], k, SIZE, INNER)
        b_first += INNER * num_columns
        grad = tl.dot(a, b, grad, input_precision="ieee")
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = row_offsets[:, None] * num_columns + columns[None, :]
    at_gate = at + row_offsets[:, None] * num_columns
    gate = tl.load(gate_up + at_gate, mask=mask, other=0).to(tl.float32)
    up = tl.load(gate_up + at_gate + num_columns, mask=mask, other=0).to(tl.float32)
    share = _sigmoid(gate)
    activated = gate * share
    grad_gate = grad * up * (share * (1.0 + gate * (1.0 - share)))
    element = product.dtype.element_ty
    tl.store(product + at, (activated * up).to(element), mask=mask)
    tl.store(grad_gate_up + at_gate, grad_gate.to(element), mask=mask)
    tl.store(grad_gate_up + at_gate + num_columns, (grad * activated).to(element), mask=mask)


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


def _tiles(tiles: Tiles, dtype: torch.dtype, num_rows: int) -> Tiles:
    if dtype == torch.float32:
        return FLOAT32
    if num_rows > FEW_ROWS:
        return tiles
    return Tiles(64, tiles.columns, tiles.inner, num_warps=4, num_stages=tiles.num_stages)


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


def gate_up_product(
    x: Tensor, weight: Tensor, rstd: Tensor, save: bool, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """x [R, H], weight [2 I, H] scaled -> product [R, I], gate_up [R, 2 I] or [0, 2 I]."""
    (num_rows, hidden_size), size = x.shape, weight.shape[0] // 2
    product = x.new_empty((num_rows, size))
    gate_up = x.new_empty((num_rows if save else 0, 2 * size))
    columns = tiles.columns // 2
    gate_up_kernel[(triton.cdiv(num_rows, tiles.rows) * triton.cdiv(size, columns),)](
        *(x, weight, rstd, product, gate_up if save else product, num_rows, size),
        SIZE=hidden_size,
        SAVE=save,
        **{**tiles.constants, "COLUMNS": columns},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return product, gate_up


def down_with_residual(product: Tensor, weight: Tensor, x: Tensor, tiles: Tiles) -> Tensor:
    """x [R, H] + product [R, I] times weight [H, I] transposed."""
    (num_rows, hidden_size), size = x.shape, product.shape[1]
    out = torch.empty_like(x)
    grid = triton.cdiv(num_rows, tiles.rows) * triton.cdiv(hidden_size, tiles.columns)
    down_kernel[(grid,)](
        *(product, weight, x, out, num_rows, hidden_size),
        SIZE=size,
        **tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def product_gradient(
    grad_out: Tensor, weight: Tensor, gate_up: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """grad_out [R, H], weight [H, I], gate_up [R, 2 I] -> product [R, I], grad_gate_up [R, 2 I]."""
    (num_rows, hidden_size), size = grad_out.shape, weight.shape[1]
    product = grad_out.new_empty((num_rows, size))
    grad_gate_up = torch.empty_like(gate_up)
    grid = triton.cdiv(num_rows, tiles.rows) * triton.cdiv(size, tiles.columns)
    product_gradient_kernel[(grid,)](
        *(grad_out, weight, gate_up, product, grad_gate_up, num_rows, size),
        SIZE=hidden_size,
        **tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return product, grad_gate_up


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
        tiles = _tiles(GATE_UP, x.dtype, x.shape[0])
        product, gate_up = gate_up_product(x, weight, rstd, save_activations, tiles)
        tiles = _tiles(DOWN, x.dtype, x.shape[0])
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
        tiles = _tiles(PRODUCT_GRADIENT, x.dtype, x.shape[0])
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


def _matmul_instance(
    kernel: str, dtype: str, tiles: Tiles, size: int, *, save: bool = False, capability: int = 90
) -> Specialization:
    arguments = {
        "gate_up": ("x", "weight", "rstd", "product", "gate_up"),
        "down": ("product", "weight", "x", "out"),
        "product_gradient": ("grad_out", "weight", "gate_up", "product", "grad_gate_up"),
    }[kernel]
    constants: dict[str, int | bool] = {"SIZE": size, **tiles.constants}
    if kernel == "gate_up":
        constants |= {"SAVE": save, "COLUMNS": tiles.columns // 2}
    signature = {name: "*fp32" if name == "rstd" else f"*{dtype}" for name in arguments}
    signature |= {"num_rows": "i32", "num_columns": "i32", **dict.fromkeys(constants, "constexpr")}
    return Specialization(
        f"gated_ffn {kernel} {tiles.rows} rows {dtype}{' saving' if save else ''}",
        globals()[f"{kernel}_kernel"],
        signature,
        constants,
        (*arguments, "num_columns"),
        tiles.num_warps,
        tiles.num_stages,
        tensor_cores=dtype != "fp32",
        capability=capability,
    )


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
    """The instances of the autoencoder's blocks: H = 512, I = 1280."""
    hidden_size, size = 512, 1280
    found = [_row_instance("rms_norm", dtype, hidden_size) for dtype in ("bf16", "fp32")]
    found.append(_row_instance("rms_norm", "bf16", hidden_size, normed=True))
    found.append(_row_instance("rms_norm_backward", "bf16", hidden_size))
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for num_rows in (FEW_ROWS, FEW_ROWS + 1):
            if dtype == "fp32" and num_rows == FEW_ROWS:
                continue
            tiles = _tiles(GATE_UP, torch_dtype, num_rows)
            found += [
                _matmul_instance("gate_up", dtype, tiles, hidden_size, save=save)
                for save in (True, False)
            ]
            tiles = _tiles(DOWN, torch_dtype, num_rows)
            found.append(_matmul_instance("down", dtype, tiles, size))
            tiles = _tiles(PRODUCT_GRADIENT, torch_dtype, num_rows)
            found.append(_matmul_instance("product_gradient", dtype, tiles, hidden_size))
    return found
