"""Backward of the linear cross entropy: gradients from the lists, and from matmuls.

What: with r = scale (p - onehot) of a row, over all its columns or those of its list,
    grad_hidden = r W,  grad_weight = r^T hidden,  grad_bias = sum over rows of r.

Sparse rows meet no matmul of V columns. grad_hidden: one program a row gathers the listed rows of W
(``linear_cross_entropy_lists.py``). grad_weight: the entries of all lists, sorted by column, are
further terms of the sums of the vocabulary tile that they fall in: a matrix [columns, entries] with
one coefficient an entry, built in registers, times the gathered rows of hidden, on the tensor
cores, into the same accumulators.

Dense rows are compacted (their number stays on the device; grids are made for all rows, and
programs past the last dense row end at once) and go through the vocabulary in chunks of columns,
two kernels a chunk:
 1. residual: the logits' tile again, r from it, stored in the inputs' dtype.
 2. gradients, in one launch: programs of grad_weight [columns of the chunk, H] = r^T hidden +
    lists, final as it stands, and of grad_hidden [dense rows, H] += r W[chunk], in float32. The
    long sums (over rows) start first, the short ones (over a chunk) fill the gaps.
Every sum belongs to one program and runs in a fixed order; there are no atomics.

Why a stored chunk: fused kernels compute the logits again for either product, 4 matmuls of 2 R V H
operations, and H = 512 accumulators a row beside a tile of logits do not fit a register file. With
r stored it takes 3, each a plain matmul. At R = 16384, H = 512, V = 128257, bfloat16, all rows
dense, that is 2.15 TFLOP a matmul, 3 ms at 700 TFLOP/s. r is written once and read twice: 12.6 GB,
3.8 ms at 3.3 TB/s, under the 9 ms of matmuls that it overlaps with. The float32 sums of grad_hidden
are read and written once a chunk, 67 MB, 2.8 GB in all. The buffer holds 96 MiB (1/42 of the
bfloat16 logits); a smaller one means more launches and more of the latter traffic. When a sixth of
the rows is dense, so are the matmuls a sixth; what is left whatever the split is grad_weight, V H
values written.

Precision: r is rounded to the inputs' dtype as an operand of matmuls. It is kept relative to the
largest scale of any row, which multiplies the float32 sums: nothing is lost to the 1/rows of a mean
in float16's range.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.reference.linear_cross_entropy import CAPACITY, DENSE
from calm_kernels.triton.linear_cross_entropy_lists import Saved, add_sparse_rows, sorted_entries
from calm_kernels.triton.linear_cross_entropy_tiles import (
    Operands,
    Tiles,
    logits_tile,
    tiles_of,
)

RESIDUAL_BYTES = 96 * 2**20

_DENSE = tl.constexpr(DENSE)


@triton.jit(do_not_specialize=["num_rows"])
def compact_kernel(
    hidden,  # [R, H]
    list_length,  # int32 [R]
    rank,  # int64 [R]: dense rows up to and including this one
    dense_rows,  # int32 [R]
    dense_hidden,  # [row tiles * ROWS, H]
    num_rows,
    HIDDEN_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies one row of hidden to its place among the dense rows, if it is dense.

    The rest of the last tile of ROWS dense rows becomes 0.
    """
    program = tl.program_id(0).to(tl.int64)
    count = tl.load(rank + num_rows - 1)
    padded = (count + ROWS - 1) // ROWS * ROWS
    for first in range(0, HIDDEN_SIZE, BLOCK):
        unit = first + tl.arange(0, BLOCK)
        if (program >= count) & (program < padded):
            zeros = tl.zeros((BLOCK,), dense_hidden.dtype.element_ty)
            tl.store(dense_hidden + program * HIDDEN_SIZE + unit, zeros, mask=unit < HIDDEN_SIZE)
        if program < num_rows:  # noqa: SIM102 - no short circuit in Triton
            if tl.load(list_length + program) == _DENSE:
                place = tl.load(rank + program) - 1
                tl.store(dense_rows + place, program.to(tl.int32))
                values = tl.load(hidden + program * HIDDEN_SIZE + unit, mask=unit < HIDDEN_SIZE)
                out = dense_hidden + place * HIDDEN_SIZE + unit
                tl.store(out, values, mask=unit < HIDDEN_SIZE)


@triton.jit(do_not_specialize_on_alignment=["num_dense"])
def residual_kernel(
    dense_hidden,  # [row tiles * ROWS, H]: pointer, or descriptor
    weight,  # [V, H]: pointer, or descriptor
    bias,  # [V], or anything
    dense_rows,  # int32 [R]
    num_dense,  # int64 [1]
    target,  # int64 [R]
    top,  # float32 [R]
    total,  # float32 [R]
    row_scale,  # float32 [R]
    residual,  # [row tiles * ROWS, chunk]
    first_column,
    vocab_size,
    chunk,
    HIDDEN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """row_scale (p - onehot) of a tile of dense rows and columns of the chunk.

    Zero past the last dense row and past the vocabulary.
    """
    count = tl.load(num_dense).to(tl.int32)
    first_place = tl.program_id(0) * ROWS
    if first_place >= count:
        return
    place = first_place + tl.arange(0, ROWS)
    row = tl.load(dense_rows + tl.minimum(place, count - 1))
    first_here = tl.program_id(1) * COLUMNS
    logits = logits_tile(
        dense_hidden, weight, bias, first_place, first_place + ROWS, first_column + first_here,
        vocab_size, HIDDEN_SIZE, HAS_BIAS, DESCRIPTORS, ROWS, COLUMNS, INNER,
    )  # fmt: skip
    scale = tl.load(row_scale + row)
    factor = scale / tl.load(total + row)
    here = first_here + tl.arange(0, COLUMNS)
    local_target = (tl.load(target + row) - first_column).to(tl.int32)
    r = tl.exp(logits - tl.load(top + row)[:, None]) * factor[:, None]
    r -= tl.where(here[None, :] == local_target[:, None], scale[:, None], 0.0)
    within = (place[:, None] < count) & (first_column + here[None, :] < vocab_size)
    r = tl.where(within, r, 0.0)
    at = place.to(tl.int64)[:, None] * chunk + here[None, :]
    tl.store(residual + at, r.to(residual.dtype.element_ty))


@triton.jit
def _tile(
    matrix,
    first_row,
    num_rows,
    first_column,
    num_columns,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of a matrix, 0 past its last column; past the last row anything finite."""
    if DESCRIPTORS:
        tile = matrix.load([first_row, first_column])
    else:
        rows = tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
        columns = first_column + tl.arange(0, COLUMNS)[None, :]
        pointers = matrix + rows[:, None] * num_columns + columns
        tile = tl.load(pointers, mask=columns < num_columns, other=0.0)
    return tile


@triton.jit(do_not_specialize=["num_weight_programs"], do_not_specialize_on_alignment=["num_dense"])
def gradient_kernel(
    residual,  # [row tiles * ROWS, chunk]: pointer, or descriptor of tiles [INNER, COLUMNS]
    residual_rows,  # residual again, or descriptor of tiles [ROWS, INNER]
    dense_hidden,  # [row tiles * ROWS, H]: pointer, or descriptor of tiles [INNER, COLUMNS]
    dense_rows,  # int32 [R]
    num_dense,  # int64 [1]
    hidden,  # [R, H]
    weight,  # [V, H]: pointer, or descriptor of tiles [INNER, COLUMNS]
    keys,  # int32, sorted: the columns of all entries
    order,  # int64: where the sorted entries were, row * CAPACITY + slot
    coefficients,  # float32, in the order of keys
    tile_starts,  # int64: how many keys lie before each tile of COLUMNS columns
    global_scale,  # float32 [1]
    grad_hidden,  # float32 [R, H]; dense rows are added to
    grad_weight,  # [V, H]
    grad_bias,  # [V]
    num_weight_programs,
    first_column,
    vocab_size,
    chunk,
    HIDDEN_SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    LISTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Programs below num_weight_programs: a tile [COLUMNS, COLUMNS] of grad_weight, and of
    grad_bias. The others: a tile [ROWS, COLUMNS] of grad_hidden."""
    unit_tiles: tl.constexpr = (HIDDEN_SIZE + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    count = tl.load(num_dense).to(tl.int32)
    scale = tl.load(global_scale)
    if program < num_weight_programs:
        first_unit = program % unit_tiles * COLUMNS
        first_here = program // unit_tiles * COLUMNS
        sums = tl.zeros((COLUMNS, COLUMNS), tl.float32)
        bias_sums = tl.zeros((COLUMNS,), tl.float32)
        if WANT_WEIGHT:
            for k in range(0, count, INNER):
                r = _tile(residual, k, k + INNER, first_here, chunk, DESCRIPTORS, INNER, COLUMNS)
                h = _tile(
                    dense_hidden, k, k + INNER, first_unit, HIDDEN_SIZE, DESCRIPTORS, INNER, COLUMNS
                )
                sums = tl.dot(r.T, h, sums, input_precision="ieee")
        # A loop of its own: a tile that is also wanted in registers would stall the matrix units.
        if WANT_BIAS and first_unit == 0:
            for k in range(0, count, INNER):
                r = _tile(residual, k, k + INNER, first_here, chunk, DESCRIPTORS, INNER, COLUMNS)
                bias_sums += tl.sum(r.to(tl.float32), axis=0)
        if LISTS:
            tile = (first_column + first_here) // COLUMNS
            begin, end = tl.load(tile_starts + tile), tl.load(tile_starts + tile + 1)
            here = first_column + first_here + tl.arange(0, COLUMNS)
            unit = first_unit + tl.arange(0, COLUMNS)
            for first in range(begin, end, INNER):
                entry = first + tl.arange(0, INNER)
                exists = entry < end
                column = tl.load(keys + entry, mask=exists, other=-1)
                coefficient = tl.load(coefficients + entry, mask=exists, other=0.0)
                r = tl.where(column[None, :] == here[:, None], coefficient[None, :], 0.0)
                if WANT_WEIGHT:
                    row = tl.load(order + entry, mask=exists, other=0) // CAPACITY
                    mask = exists[:, None]
                    if HIDDEN_SIZE % COLUMNS != 0:
                        mask = mask & (unit[None, :] < HIDDEN_SIZE)
                    pointers = hidden + row[:, None] * HIDDEN_SIZE + unit[None, :]
                    h = tl.load(pointers, mask=mask, other=0.0)
                    sums = tl.dot(r.to(h.dtype), h, sums, input_precision="ieee")
                if WANT_BIAS and first_unit == 0:
                    bias_sums += tl.sum(r, axis=1)
        columns = (first_column + first_here + tl.arange(0, COLUMNS)).to(tl.int64)
        units = first_unit + tl.arange(0, COLUMNS)
        exists = columns < vocab_size
        if WANT_WEIGHT:
            out = grad_weight + columns[:, None] * HIDDEN_SIZE + units[None, :]
            mask = exists[:, None] & (units[None, :] < HIDDEN_SIZE)
            tl.store(out, (sums * scale).to(grad_weight.dtype.element_ty), mask=mask)
        if WANT_BIAS and first_unit == 0:
            bias_values = (bias_sums * scale).to(grad_bias.dtype.element_ty)
            tl.store(grad_bias + columns, bias_values, mask=exists)
    else:
        program -= num_weight_programs
        first_unit = program % unit_tiles * COLUMNS
        first_place = program // unit_tiles * ROWS
        if first_place < count:
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in range(0, tl.minimum(chunk, vocab_size - first_column), INNER):
                r = _tile(
                    residual_rows, first_place, first_place + ROWS, k, chunk,
                    DESCRIPTORS, ROWS, INNER,
                )  # fmt: skip
                # Of columns past the vocabulary the residual is 0.
                w = _tile(
                    weight, first_column + k, vocab_size, first_unit, HIDDEN_SIZE, DESCRIPTORS,
                    INNER, COLUMNS,
                )  # fmt: skip
                sums = tl.dot(r, w, sums, input_precision="ieee")
            place = first_place + tl.arange(0, ROWS)
            unit = first_unit + tl.arange(0, COLUMNS)
            row = tl.load(dense_rows + place, mask=place < count, other=0).to(tl.int64)
            out = grad_hidden + row[:, None] * HIDDEN_SIZE + unit[None, :]
            mask = (place[:, None] < count) & (unit[None, :] < HIDDEN_SIZE)
            tl.store(out, tl.load(out, mask=mask, other=0.0) + sums * scale, mask=mask)


def chunk_columns(num_rows: int, vocab_size: int, itemsize: int, tiles: Tiles) -> int:
    """Columns of a chunk: what RESIDUAL_BYTES hold, in whole tiles."""
    padded_rows = triton.cdiv(num_rows, tiles.rows) * tiles.rows
    fitting = RESIDUAL_BYTES // (padded_rows * itemsize) // tiles.columns
    return min(max(fitting, 1), triton.cdiv(vocab_size, tiles.columns)) * tiles.columns


def launch(
    operands: Operands,
    saved: Saved,
    row_scale: Tensor,
    global_scale: Tensor,
    wanted: list[bool],
    dtype: torch.dtype,
    tiles: Tiles,
    chunk: int,
    descriptors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with every choice made.

    Args:
        row_scale: float32 [R], at most 1 in magnitude, 0 for ignored rows; times
            global_scale, float32 [1], it is the incoming gradient of each row's loss.
        wanted: which of the gradients by hidden, weight and bias.
        dtype: of the gradients by weight and bias. That by hidden is float32.
        chunk: columns of the residual's buffer, a multiple of ``tiles.columns``.
    """
    hidden, weight = operands.hidden, operands.weight
    num_rows, hidden_size, vocab_size = hidden.shape[0], hidden.shape[1], weight.shape[0]
    want_hidden, want_weight, want_bias = wanted
    lists = saved.list_columns.shape[1] > 0
    grad_hidden = hidden.new_zeros(hidden.shape if want_hidden else (0,), dtype=torch.float32)
    grad_weight = weight.new_empty(weight.shape if want_weight else (0,), dtype=dtype)
    grad_bias = weight.new_empty((vocab_size,) if want_bias else (0,), dtype=dtype)

    entries = sorted_entries(operands, saved, row_scale, tiles.columns) if lists else None
    if entries is not None and want_hidden:
        add_sparse_rows(operands, saved, entries, global_scale, grad_hidden)

    rank = (saved.list_length == DENSE).cumsum(0)
    num_dense = rank[-1:]
    dense_rows = torch.empty_like(saved.list_length)
    row_tiles = triton.cdiv(num_rows, tiles.rows)
    dense_hidden = hidden.new_empty((row_tiles * tiles.rows, hidden_size))
    compact_kernel[(row_tiles * tiles.rows,)](
        hidden,
        saved.list_length,
        rank,
        dense_rows,
        dense_hidden,
        num_rows,
        HIDDEN_SIZE=hidden_size,
        ROWS=tiles.rows,
        BLOCK=min(triton.next_power_of_2(hidden_size), 1024),
        num_warps=1,
    )
    residual = hidden.new_empty((row_tiles * tiles.rows, chunk))
    unit_tiles = triton.cdiv(hidden_size, tiles.columns)

    def tiles_by(matrix: Tensor, rows: int, columns: int) -> Any:
        return tiles_of(matrix, rows, columns, descriptors)

    hidden_rows = tiles_by(dense_hidden, tiles.rows, tiles.inner)
    weight_rows = tiles_by(weight, tiles.columns, tiles.inner)
    residual_columns = tiles_by(residual, tiles.inner, tiles.columns)
    residual_rows = tiles_by(residual, tiles.rows, tiles.inner)
    hidden_columns = tiles_by(dense_hidden, tiles.inner, tiles.columns)
    weight_columns = tiles_by(weight, tiles.inner, tiles.columns)
    for first_column in range(0, vocab_size, chunk):
        column_tiles = triton.cdiv(min(chunk, vocab_size - first_column), tiles.columns)
        residual_kernel[(row_tiles, column_tiles)](
            hidden_rows,
            weight_rows,
            operands.bias if operands.bias is not None else row_scale,
            dense_rows,
            num_dense,
            operands.target,
            saved.top,
            saved.total,
            row_scale,
            residual,
            first_column,
            vocab_size,
            chunk,
            HIDDEN_SIZE=hidden_size,
            HAS_BIAS=operands.bias is not None,
            DESCRIPTORS=descriptors,
            **tiles.constants,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        weight_programs = column_tiles * unit_tiles if want_weight or want_bias else 0
        hidden_programs = row_tiles * unit_tiles if want_hidden else 0
        gradient_kernel[(weight_programs + hidden_programs,)](
            residual_columns,
            residual_rows,
            hidden_columns,
            dense_rows,
            num_dense,
            hidden,
            weight_columns,
            entries.keys if entries is not None else dense_rows,
            entries.order if entries is not None else rank,
            entries.coefficients if entries is not None else row_scale,
            entries.tile_starts if entries is not None else rank,
            global_scale,
            grad_hidden,
            grad_weight,
            grad_bias,
            weight_programs,
            first_column,
            vocab_size,
            chunk,
            HIDDEN_SIZE=hidden_size,
            CAPACITY=CAPACITY,
            LISTS=lists,
            DESCRIPTORS=descriptors,
            WANT_WEIGHT=want_weight,
            WANT_BIAS=want_bias,
            **tiles.constants,
            num_warps=tiles.gradient_warps,
            num_stages=tiles.num_stages,
        )
    return grad_hidden, grad_weight, grad_bias
