"""Forward of the linear cross entropy: every row's log-sum-exp, target logit and short list.

What: of each row of z = h W^T + b the largest logit (top), the sum of exp(z - top) (total), the
logit of the target, whether the target's is the largest, and the list of the entries that hold
nearly all of the probability. Logits live in registers only.

Mapping: a program owns a tile of rows and a contiguous range (split) of vocabulary tiles, and walks
the range with the running top and total of each row in registers. Programs are numbered row tiles
first, so that those that run at a time read the same part of the weight. Where row tiles alone do
not fill the GPU there are several splits; ``linear_cross_entropy_join.py`` joins them, one program
a row, in the order of their columns. Which program ran first shows nowhere: results are bitwise the
same every time.

Lists: an entry belongs in the list if p = exp(z - top) / total exceeds the significance. total only
grows and the target's logit is computed before the first tile (one gathered dot a row), so
max(z_target, log-sum-exp so far) + log(significance) is at any time a lower bound of the least
logit that can still matter; for a row that is sure of its target it is tight from the start. (A row
whose mass lies on other tokens has a loose bound until they come by; if its list overflows
meanwhile it is dense, which is always right and costs time alone.) A tile's candidates are taken
out one column at a time, all rows side by side, in rising order: two reductions over registers for
each candidate of the row that has most, and one round in a typical tile. The join computes the
final p, drops what the final total has made insignificant, and decides.

Fewest bytes: hidden and weight once in (148 MB at R = 16384, H = 512, V = 128257, bfloat16) and 3 +
2 * 64 values a row out (9 MB). Operations: 2 R V H on the tensor cores, and beside them of each
logit the maximum, exponential, sum and comparisons with bound and target; two programs share a
multiprocessor so that these overlap with the other's matmul.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from calm_kernels.reference.linear_cross_entropy import CAPACITY, significance
from calm_kernels.triton.linear_cross_entropy_join import SPLITS_PER_STEP, finite, join_kernel
from calm_kernels.triton.linear_cross_entropy_tiles import (
    Operands,
    Tiles,
    logits_tile,
    tiles_of,
)

MAX_SPLITS = 512
# Starting and ending a program, in vocabulary tiles: what one more split costs.
TILES_PER_PROGRAM_OVERHEAD = 0.5
# Candidates are listed down to this much (in nats) below the significance: the running bound and
# the final p round differently.
BOUND_MARGIN = 0.01

_LOWEST = tl.constexpr(-3.0e38)


@triton.jit(do_not_specialize=["num_rows", "tiles_per_split", "num_splits", "ignore_index"])
def split_kernel(
    hidden,  # [R, H]
    weight,  # [V, H]
    bias,  # [V], or anything
    hidden_tiles,  # hidden again: pointer, or descriptor
    weight_tiles,
    target,  # int64 [R]
    split_top,  # float32 [splits, R]
    split_total,  # float32 [splits, R]
    target_logit,  # float32 [R]; written where the target is a token
    target_is_first,  # uint8 [R], likewise: no earlier column of its split is as large
    candidate_columns,  # int32 [R, splits, CAPACITY]
    candidate_logits,  # float32 [R, splits, CAPACITY]
    num_candidates,  # int32 [splits, R]; CAPACITY + 1: too many
    num_rows,
    vocab_size,
    tiles_per_split,
    num_splits,
    ignore_index,
    log_significance,
    HIDDEN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LISTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    row_tile = tl.program_id(0) % num_row_tiles
    split = tl.program_id(0) // num_row_tiles
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab_size, COLUMNS))

    rows = row_tile * ROWS + tl.arange(0, ROWS)
    existing = rows < num_rows
    safe_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    wanted = tl.load(target + safe_rows)
    is_token = existing & (wanted != ignore_index) & (wanted >= 0) & (wanted < vocab_size)
    wanted = tl.where(is_token, wanted, -1).to(tl.int32)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    at_target = tl.full((ROWS,), float("-inf"), tl.float32)
    is_first = tl.zeros((ROWS,), tl.int32)
    if LISTS:
        count = tl.where(is_token, 0, CAPACITY + 1)
        bound = _target_logits(
            hidden, weight, bias, safe_rows, wanted, HIDDEN_SIZE, HAS_BIAS, ROWS, INNER
        )
        lists = (safe_rows * num_splits + split) * CAPACITY
    local = tl.arange(0, COLUMNS)[None, :]
    for tile in range(first_tile, last_tile):
        first_column = tile * COLUMNS
        logits = logits_tile(
            hidden_tiles, weight_tiles, bias, row_tile * ROWS, num_rows, first_column, vocab_size,
            HIDDEN_SIZE, HAS_BIAS, DESCRIPTORS, ROWS, COLUMNS, INNER,
        )  # fmt: skip
        local_target = wanted - first_column
        here = (wanted >= 0) & (local_target >= 0) & (local_target < COLUMNS)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            before = local < local_target[:, None]
            z = tl.sum(tl.where(local == local_target[:, None], logits, 0.0), axis=1)
            as_large = before & ((logits >= z[:, None]) | (logits != logits))
            earlier = tl.max(as_large.to(tl.int32), axis=1)
            # A NaN is larger than every number; total is NaN once there was one.
            larger = ((z > top) & (total == total)) | ((z != z) & (total == total))
            at_target = tl.where(here, z, at_target)
            is_first = tl.where(here, (larger & (earlier == 0)).to(tl.int32), is_first)

        new_top = tl.maximum(top, tl.max(logits, axis=1))
        shift = finite(new_top)
        terms = tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        total = total * tl.exp(finite(top) - shift) + terms
        top = new_top

        if LISTS:
            bound = tl.maximum(bound, top + tl.log(total))
            least = tl.where(count <= CAPACITY, bound + log_significance, float("inf"))
            listed = tl.where(count <= CAPACITY, local_target, -1)
            # -inf: no candidate. A target of logit -inf is one all the same.
            candidate = (logits > least[:, None]) | (local == listed[:, None])
            left = tl.where(candidate, tl.maximum(logits, _LOWEST), float("-inf"))
            found = tl.sum((left > float("-inf")).to(tl.int32), axis=1)
            fits = count + found <= CAPACITY
            found = tl.where(fits, found, 0)
            for taken in range(tl.max(found, axis=0)):
                column = tl.min(tl.where(left > float("-inf"), local, COLUMNS), axis=1)
                chosen = local == column[:, None]
                value = tl.max(tl.where(chosen, left, float("-inf")), axis=1)
                left = tl.where(chosen, float("-inf"), left)
                slot = lists + count + taken
                tl.store(candidate_columns + slot, first_column + column, mask=taken < found)
                tl.store(candidate_logits + slot, value, mask=taken < found)
            count = tl.where(fits, count + found, CAPACITY + 1)

    out = split.to(tl.int64) * num_rows + rows
    tl.store(split_top + out, top, mask=existing)
    tl.store(split_total + out, total, mask=existing)
    mine = (wanted >= first_tile * COLUMNS) & (wanted < last_tile * COLUMNS)
    tl.store(target_logit + rows, at_target, mask=mine)
    tl.store(target_is_first + rows, is_first.to(tl.uint8), mask=mine)
    if LISTS:
        tl.store(num_candidates + out, count, mask=existing)


@triton.jit
def _target_logits(
    hidden,
    weight,
    bias,
    rows,
    wanted,
    HIDDEN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The logit of each row's target, -inf where there is none."""
    inner = tl.arange(0, INNER)
    columns = tl.maximum(wanted, 0).to(tl.int64)
    products = tl.zeros((ROWS, INNER), tl.float32)
    for k in range(0, HIDDEN_SIZE, INNER):
        mask = inner[None, :] < HIDDEN_SIZE - k
        h = tl.load(hidden + rows[:, None] * HIDDEN_SIZE + k + inner[None, :], mask, 0.0)
        w = tl.load(weight + columns[:, None] * HIDDEN_SIZE + k + inner[None, :], mask, 0.0)
        products += h.to(tl.float32) * w.to(tl.float32)
    logits = tl.sum(products, axis=1)
    if HAS_BIAS:
        logits += tl.load(bias + columns).to(tl.float32)
    return tl.where(wanted >= 0, logits, float("-inf"))


@dataclass(frozen=True)
class Rows:
    """What the forward leaves behind, as the operator ``linear_cross_entropy_rows`` returns it."""

    loss: Tensor
    correct: Tensor
    top: Tensor
    total: Tensor
    list_columns: Tensor
    list_probabilities: Tensor
    list_length: Tensor
    statistics: Tensor


def choose_tiles_per_split(num_row_tiles: int, num_column_tiles: int, num_programs: int) -> int:
    """Vocabulary tiles a program, so that the last of them ends as early as possible.

    Programs run ``num_programs`` at a time, so a choice takes (waves) x (tiles each + overhead).
    """

    def cost(tiles: int) -> tuple[float, int]:
        programs = num_row_tiles * triton.cdiv(num_column_tiles, tiles)
        waves = triton.cdiv(programs, num_programs)
        return waves * (tiles + TILES_PER_PROGRAM_OVERHEAD), -tiles

    splits = range(1, min(MAX_SPLITS, num_column_tiles) + 1)
    return min({triton.cdiv(num_column_tiles, split) for split in splits}, key=cost)


def launch(
    operands: Operands, drop_mass: float, tiles: Tiles, tiles_per_split: int, descriptors: bool
) -> Rows:
    """The forward with every choice made. ``drop_mass`` 0: no lists."""
    hidden, target = operands.hidden, operands.target
    num_rows, vocab_size = operands.num_rows, operands.vocab_size
    lists = drop_mass > 0.0
    capacity = CAPACITY if lists else 0
    num_splits = triton.cdiv(triton.cdiv(vocab_size, tiles.columns), tiles_per_split)

    def floats(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    split_top, split_total = floats(num_splits, num_rows), floats(num_splits, num_rows)
    target_logit, loss = floats(num_rows), floats(num_rows)
    target_is_first = torch.empty_like(target, dtype=torch.uint8)
    candidate_columns = target.new_empty((num_rows, num_splits, capacity), dtype=torch.int32)
    candidate_logits = floats(num_rows, num_splits, capacity)
    num_candidates = target.new_empty((num_splits, num_rows), dtype=torch.int32)
    split_kernel[(triton.cdiv(num_rows, tiles.rows) * num_splits,)](
        hidden,
        operands.weight,
        operands.bias if operands.bias is not None else loss,
        tiles_of(hidden, tiles.rows, tiles.inner, descriptors),
        tiles_of(operands.weight, tiles.columns, tiles.inner, descriptors),
        target,
        split_top,
        split_total,
        target_logit,
        target_is_first,
        candidate_columns,
        candidate_logits,
        num_candidates,
        num_rows,
        vocab_size,
        tiles_per_split,
        num_splits,
        operands.ignore_index,
        math.log(significance(drop_mass)) - BOUND_MARGIN if lists else 0.0,
        HIDDEN_SIZE=operands.hidden_size,
        HAS_BIAS=operands.bias is not None,
        LISTS=lists,
        DESCRIPTORS=descriptors,
        CAPACITY=CAPACITY,
        **tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    correct = torch.empty_like(target, dtype=torch.bool)
    top, total, dropped = floats(num_rows), floats(num_rows), torch.zeros_like(loss)
    list_columns = target.new_zeros((num_rows, capacity), dtype=torch.int32)
    list_probabilities = hidden.new_zeros((num_rows, capacity), dtype=torch.float32)
    list_length = torch.empty_like(target, dtype=torch.int32)
    join_kernel[(num_rows,)](
        target,
        split_top,
        split_total,
        target_logit,
        target_is_first,
        candidate_columns,
        candidate_logits,
        num_candidates,
        loss,
        correct.view(torch.uint8),
        top,
        total,
        list_columns,
        list_probabilities,
        list_length,
        dropped,
        num_rows,
        vocab_size,
        num_splits,
        tiles_per_split * tiles.columns,
        operands.ignore_index,
        significance(drop_mass),
        drop_mass,
        LISTS=lists,
        CAPACITY=CAPACITY,
        SPLITS=triton.next_power_of_2(num_splits),
        STEP=min(SPLITS_PER_STEP, triton.next_power_of_2(num_splits)),
        num_warps=1,
    )
    counted = (target != operands.ignore_index).sum()
    statistics = torch.stack([counted.float(), (list_length > 0).sum().float(), dropped.amax()])
    return Rows(
        loss, correct, top, total, list_columns, list_probabilities, list_length, statistics
    )
