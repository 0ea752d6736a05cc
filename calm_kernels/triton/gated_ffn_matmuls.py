"""The matmuls of the gated feed-forward block with its pointwise steps inside: Triton kernels.

gate_up: x by the packed weights of gate and up, which the norm's weight has scaled; rstd and
silu(gate) up in the epilogue. down: the residual added to the accumulator. product_gradient: the
matmul that makes the product's gradient, turned into those of gate and up in the epilogue, so that
it never leaves registers. Fewest bytes: operands read and results written once; gate and up are
written only for a backward, and read once there.

Mapping: a program makes a tile of rows x columns; programs of the same rows are neighbours, so
that rows come from memory once and weights, which fit the L2 cache, stay there. Gate and up tiles
of the same columns lie in one program's registers. Edges: rows and columns past the end read the
last one again and are not stored; the inner dimension is masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def choose_tiles(tiles: Tiles, dtype: torch.dtype, num_rows: int) -> Tiles:
    """``tiles``, or those for float32, or fewer rows of them."""
    if dtype == torch.float32:
        return FLOAT32
    if num_rows > FEW_ROWS:
        return tiles
    return Tiles(64, tiles.columns, tiles.inner, num_warps=4, num_stages=tiles.num_stages)


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


def specializations() -> list[Specialization]:
    """The instances of the autoencoder's blocks: H = 512, I = 1280."""
    hidden_size, size = 512, 1280
    found = []
    for dtype, torch_dtype, num_rows in (
        ("bf16", torch.bfloat16, FEW_ROWS),
        ("bf16", torch.bfloat16, FEW_ROWS + 1),
        ("fp32", torch.float32, FEW_ROWS + 1),
    ):
        tiles = choose_tiles(GATE_UP, torch_dtype, num_rows)
        found += [
            _matmul_instance("gate_up", dtype, tiles, hidden_size, save=save)
            for save in (True, False)
        ]
        tiles = choose_tiles(DOWN, torch_dtype, num_rows)
        found.append(_matmul_instance("down", dtype, tiles, size))
        tiles = choose_tiles(PRODUCT_GRADIENT, torch_dtype, num_rows)
        found.append(_matmul_instance("product_gradient", dtype, tiles, hidden_size))
    return found
