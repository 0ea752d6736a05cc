"""Joins the vocabulary splits of the linear cross entropy's forward, and decides sparse or dense.

One program a row: its parts are 12 bytes a split and the candidates, at most 512 bytes a split, so
it is bound by launching. Splits are read in the order of their columns, and each has its candidates
in that order, so lists are in rising order of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_kernels.reference.linear_cross_entropy import DENSE

SPLITS_PER_STEP = 16

_DENSE = tl.constexpr(DENSE)


@triton.jit
def finite(x):
    """x, 0 in place of the infinities: what exponents are taken relative to."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "ignore_index"])
def join_kernel(
    target,
    split_top,
    split_total,
    target_logit,
    target_is_first,
    candidate_columns,
    candidate_logits,
    num_candidates,
    loss,  # float32 [R]
    correct,  # uint8 [R]
    final_top,  # float32 [R]
    final_total,  # float32 [R]
    list_columns,  # int32 [R, CAPACITY], zeros
    list_probabilities,  # float32 [R, CAPACITY], zeros
    list_length,  # int32 [R]
    dropped,  # float32 [R]
    num_rows,
    vocab_size,
    num_splits,
    columns_per_split,
    ignore_index,
    least_probability,
    drop_mass,
    LISTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Joins the splits of one row."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    counts = wanted != ignore_index
    is_token = counts & (wanted >= 0) & (wanted < vocab_size)
    wanted = tl.where(is_token, wanted, 0).to(tl.int32)

    splits = tl.arange(0, SPLITS)
    at = splits.to(tl.int64) * num_rows + row
    tops = tl.load(split_top + at, mask=splits < num_splits, other=float("-inf"))
    totals = tl.load(split_total + at, mask=splits < num_splits, other=0.0)
    top = tl.max(tops, axis=0)
    total = tl.sum(totals * tl.exp(finite(tops) - finite(top)), axis=0)
    has_nan = total != total
    infinite = tl.abs(top) == float("inf")
    total = tl.where((counts & (is_token == 0)) | infinite, float("nan"), total)
    z = tl.load(target_logit + row, mask=is_token, other=0.0)

    mine = wanted // columns_per_split
    larger = tl.where(splits < mine, tops >= z, tops > z) & (splits != mine)
    others_larger = tl.max(larger.to(tl.int32), axis=0) > 0
    earlier_nan = tl.max(((splits < mine) & (totals != totals)).to(tl.int32), axis=0) > 0
    is_first = tl.load(target_is_first + row, mask=is_token, other=0) != 0
    among_numbers = (has_nan == 0) & (z == top) & (others_larger == 0)
    among_nan = (z != z) & (earlier_nan == 0)
    right = is_token & is_first & (among_numbers | among_nan)

    tl.store(loss + row, tl.where(counts, tl.log(total) - (z - top), 0.0))
    tl.store(correct + row, right.to(tl.uint8))
    tl.store(final_top + row, top)
    tl.store(final_total + row, total)

    length = 0
    missing = 0.0
    if LISTS:
        kept = 0.0
        overflow = 0
        entries = tl.arange(0, STEP * CAPACITY)
        slot = entries % CAPACITY
        for first in range(0, num_splits, STEP):
            split = first + entries // CAPACITY
            exists = split < num_splits
            number = tl.load(
                num_candidates + split.to(tl.int64) * num_rows + row, mask=exists, other=0
            )
            overflow = tl.maximum(overflow, tl.max((number > CAPACITY).to(tl.int32), axis=0))
            filled = slot < tl.minimum(number, CAPACITY)
            source = (row * num_splits + split) * CAPACITY + slot
            column = tl.load(candidate_columns + source, mask=filled, other=0)
            logit = tl.load(candidate_logits + source, mask=filled, other=float("-inf"))
            p = tl.exp(logit - finite(top)) / total
            keep = filled & ((p > least_probability) | (column == wanted))
            number_kept = keep.to(tl.int32)
            place = length + tl.cumsum(number_kept, axis=0) - number_kept
            fits = keep & (place < CAPACITY)
            tl.store(list_columns + row * CAPACITY + place, column, mask=fits)
            tl.store(list_probabilities + row * CAPACITY + place, p, mask=fits)
            length += tl.sum(number_kept, axis=0)
            kept += tl.sum(tl.where(keep, p, 0.0), axis=0)
        # A NaN is sparse by no comparison.
        sparse = is_token & (overflow == 0) & (length <= CAPACITY) & (kept >= 1.0 - drop_mass)
        missing = tl.where(sparse, tl.maximum(1.0 - kept, 0.0), 0.0)
        length = tl.where(sparse, length, _DENSE)
        tl.store(dropped + row, missing)
        if sparse == 0:
            tl.debug_barrier()
            slots = tl.arange(0, CAPACITY)
            tl.store(list_columns + row * CAPACITY + slots, tl.zeros((CAPACITY,), tl.int32))
            tl.store(list_probabilities + row * CAPACITY + slots, tl.zeros((CAPACITY,), tl.float32))
    else:
        length = _DENSE
    tl.store(list_length + row, tl.where(counts, length, 0))
