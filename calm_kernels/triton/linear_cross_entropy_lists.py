"""Sparse rows of the linear cross entropy's backward: the entries of their lists.

A coefficient is row_scale (p - onehot). For grad_hidden one program a row (and 512 hidden units)
gathers its listed rows of weight, eight at a time so that their loads overlap, and sums in float32:
fewest bytes, H values an entry, nearly all from the L2 cache (13,000 rows of 10 entries are 130 MB
at H = 512, bfloat16). For grad_weight all entries are sorted by column, stably, so in the order of
rows, and each tile of columns gets to know where its own begin. How many there are stays on the
device: empty slots sort to the end under the column V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.reference.linear_cross_entropy import CAPACITY
from calm_kernels.triton.linear_cross_entropy_tiles import Operands

ENTRIES_PER_STEP = 8
COEFFICIENTS_PER_PROGRAM = 1024
UNITS_PER_PROGRAM = 512


@triton.jit(do_not_specialize=["num_entries"])
def coefficient_kernel(
    list_columns,  # int32 [R, CAPACITY]
    list_probabilities,  # float32 [R, CAPACITY]
    list_length,  # int32 [R]
    target,  # int64 [R]
    row_scale,  # float32 [R]
    keys,  # int32 [R * CAPACITY]: the column, or V where there is no entry
    coefficients,  # float32 [R * CAPACITY]
    num_entries,
    vocab_size,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """row_scale (p - onehot) of every listed entry."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < num_entries
    row = entry // CAPACITY
    listed = exists & (entry % CAPACITY < tl.load(list_length + row, mask=exists, other=0))
    column = tl.load(list_columns + entry, mask=listed, other=vocab_size)
    p = tl.load(list_probabilities + entry, mask=listed, other=0.0)
    onehot = (column == tl.load(target + row, mask=listed, other=-1)).to(tl.float32)
    scale = tl.load(row_scale + row, mask=listed, other=0.0)
    tl.store(keys + entry, column, mask=exists)
    tl.store(coefficients + entry, scale * (p - onehot), mask=exists)


@triton.jit
def sparse_rows_kernel(
    weight,  # [V, H]
    list_columns,
    list_length,
    coefficients,  # float32 [R * CAPACITY], in the order of the lists
    global_scale,  # float32 [1]
    grad_hidden,  # float32 [R, H]
    HIDDEN_SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """grad_hidden of one sparse row: the listed rows of weight, by their coefficients."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(list_length + row)
    if length <= 0:
        return
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, STEP)
    sums = tl.zeros((STEP, BLOCK), tl.float32)
    for first in range(0, length, STEP):
        slot = first + entry
        at = row * CAPACITY + slot
        column = tl.load(list_columns + at, mask=slot < length, other=0).to(tl.int64)
        coefficient = tl.load(coefficients + at, mask=slot < length, other=0.0)
        w = tl.load(
            weight + column[:, None] * HIDDEN_SIZE + unit[None, :],
            mask=(slot[:, None] < length) & (unit[None, :] < HIDDEN_SIZE),
            other=0.0,
        )
        sums += coefficient[:, None] * w.to(tl.float32)
    total = tl.sum(sums, axis=0) * tl.load(global_scale)
    tl.store(grad_hidden + row * HIDDEN_SIZE + unit, total, mask=unit < HIDDEN_SIZE)


@dataclass(frozen=True)
class Saved:
    """What the forward left behind. Lists of no columns: every row that counts is dense."""

    top: Tensor
    total: Tensor
    list_columns: Tensor
    list_probabilities: Tensor
    list_length: Tensor


@dataclass(frozen=True)
class Entries:
    """The listed entries: coefficients in the order of the lists, and all of it by column."""

    in_order: Tensor
    keys: Tensor
    order: Tensor
    coefficients: Tensor
    tile_starts: Tensor


def sorted_entries(operands: Operands, saved: Saved, row_scale: Tensor, columns: int) -> Entries:
    """From the lists; tiles of the vocabulary are ``columns`` wide."""
    keys = torch.empty_like(saved.list_columns).flatten()
    in_order = torch.empty_like(saved.list_probabilities).flatten()
    coefficient_kernel[(triton.cdiv(keys.shape[0], COEFFICIENTS_PER_PROGRAM),)](
        saved.list_columns,
        saved.list_probabilities,
        saved.list_length,
        operands.target,
        row_scale,
        keys,
        in_order,
        keys.shape[0],
        operands.vocab_size,
        CAPACITY=CAPACITY,
        BLOCK=COEFFICIENTS_PER_PROGRAM,
    )
    keys, order = keys.sort(stable=True)
    starts = torch.arange(
        0, operands.vocab_size + columns, columns, device=keys.device, dtype=torch.int32
    ).clamp_(max=operands.vocab_size)
    return Entries(in_order, keys, order, in_order[order], torch.searchsorted(keys, starts))


def add_sparse_rows(
    operands: Operands, saved: Saved, entries: Entries, global_scale: Tensor, grad_hidden: Tensor
) -> None:
    """Write the sparse rows of grad_hidden, float32 [R, H]."""
    hidden_size = operands.hidden_size
    block = min(triton.next_power_of_2(hidden_size), UNITS_PER_PROGRAM)
    sparse_rows_kernel[(operands.num_rows, triton.cdiv(hidden_size, block))](
        operands.weight,
        saved.list_columns,
        saved.list_length,
        entries.in_order,
        global_scale,
        grad_hidden,
        HIDDEN_SIZE=hidden_size,
        CAPACITY=CAPACITY,
        BLOCK=block,
        STEP=ENTRIES_PER_STEP,
    )
