"""Cross entropy of a linear layer's logits, forward and backward: the specification.

    loss = log(total) - (z_target - top),  p = exp(z - top) / total,  d loss / d z = p - onehot
    with z = h W^T + b,  top = max_v z_v,  total = sum_v exp(z_v - top)

The largest logit and the sum stay two numbers: their logarithmic sum would lose, at logits of
1e4, three digits of every p.

Logits exist for one chunk of rows at a time, in float32 (float64 for float64 inputs) whatever the
inputs' dtype, and gradients are summed in it.

Certified sparse backward (``drop_mass`` > 0). A row lists its significant entries: those with
p > drop_mass / (2 CAPACITY), and the target. The row is *sparse* if the list holds at most CAPACITY
entries and the rest have a mass of at most drop_mass, else *dense*. The gradient of a sparse row
uses its list only, so what it leaves out has an L1 norm of at most drop_mass times the row's
incoming gradient, to within the rounding of p; that of a dense row is exact. An implementation
may treat any row as dense.

By-products, on the device: whether each row's largest logit is its target's, and *statistics*,
float32 [3]: the rows that count, how many of them are sparse, the largest mass that a sparse row
leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CAPACITY = 64
"""Entries that a sparse row may list."""

DENSE = -1
"""In place of the length of its list: the row is dense."""

LOGITS_PER_CHUNK = 3 * 2**19
"""Logits held at a time, 6 MiB in float32. Fewer rows a chunk stream the weight more often."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, losses and gradient sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def significance(drop_mass: float) -> float:
    """The least probability that is listed.

    Lower lists overflow sooner, higher ones leave out more. Of the rows whose 64 largest entries
    would do, this finds 95% (drop_mass 1e-3, an autoencoder of 4096 tokens in and after training);
    half or twice of it finds 80 to 87%.
    """
    return drop_mass / (2 * CAPACITY)


def list_capacity(drop_mass: float) -> int:
    """Columns of the saved lists."""
    return CAPACITY if drop_mass > 0.0 else 0


def linear_cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    drop_mass: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of every row, and what :func:`linear_cross_entropy_rows_backward` needs.

    hidden [R, H], weight [V, H], bias [V], target int64 [R] ->
    loss [R] (0 where ignored), correct bool [R] (False where ignored), top [R], total [R], the
    lists of sparse rows, C = CAPACITY or 0: list_columns int32 [R, C], list_probabilities [R, C],
    list_length int32 [R] (DENSE for dense rows, 0 for ignored ones), and statistics [3]. A target
    outside [0, V) makes its row NaN. Slots of a list past its length are 0.
    """
    dtype = compute_dtype(hidden.dtype)
    rows, capacity = hidden.shape[0], list_capacity(drop_mass)
    loss = hidden.new_empty((rows,), dtype=dtype)
    correct = torch.empty_like(loss, dtype=torch.bool)
    top, total, dropped = torch.empty_like(loss), torch.empty_like(loss), torch.zeros_like(loss)
    list_columns = target.new_zeros((rows, capacity), dtype=torch.int32)
    list_probabilities = loss.new_zeros((rows, capacity))
    list_length = torch.where(target == ignore_index, 0, DENSE).to(torch.int32)
    logits = _Logits(rows, weight, bias, dtype)
    for chunk in _chunks(rows, weight.shape[0]):
        targets = _targets(target[chunk], ignore_index, weight.shape[0])
        softmax = _cross_entropy(logits(hidden[chunk]), targets)
        exponentials, loss[chunk], correct[chunk], top[chunk], total[chunk] = softmax
        if drop_mass > 0.0:
            p = exponentials.div_(total[chunk].unsqueeze(1))
            lists, length, dropped[chunk] = _significant(p, targets, drop_mass)
            list_length[chunk] = length.to(torch.int32)
            slot = _position_within_row(lists.rows)
            list_columns[chunk][lists.rows, slot] = lists.columns.to(torch.int32)
            list_probabilities[chunk][lists.rows, slot] = lists.probabilities
    counted = (target != ignore_index).sum()
    statistics = _statistics(counted, list_length > 0, dropped)
    return loss, correct, top, total, list_columns, list_probabilities, list_length, statistics


def linear_cross_entropy_rows_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    top: Tensor,
    total: Tensor,
    list_columns: Tensor,
    list_probabilities: Tensor,
    list_length: Tensor,
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each in its dtype; [0] where not wanted.

    grad_loss [R]. The logits of dense rows are computed again, chunk by chunk. A row whose target
    is none of the columns has no onehot: columns may be a part of the vocabulary, ``top`` and
    ``total`` those of the whole.
    """
    dtype = compute_dtype(hidden.dtype)
    targets = _targets(target, ignore_index, weight.shape[0])
    scale = torch.where(targets.counted, grad_loss, 0.0)
    onehot = scale.masked_fill(targets.broken, 0.0)
    gradients = _Gradients(hidden, weight, targets.index, onehot, wanted)
    selections: list[Tensor] | list[slice]
    if list_columns.shape[1] > 0:
        slots = torch.arange(list_columns.shape[1], device=hidden.device)
        listed = slots < list_length.unsqueeze(1)
        rows, _ = listed.nonzero(as_tuple=True)
        gradients.add_lists(_Lists(rows, list_columns[listed].long(), list_probabilities[listed]))
        (dense,) = (list_length == DENSE).nonzero(as_tuple=True)
        selections = [dense[chunk] for chunk in _chunks(dense.shape[0], weight.shape[0])]
    else:
        selections = list(_chunks(hidden.shape[0], weight.shape[0]))
    logits = _Logits(hidden.shape[0], weight, bias, dtype)
    for selected in selections:
        exponentials = logits(hidden[selected]).sub_(top[selected].unsqueeze(1)).exp_()
        factor = scale[selected] / total[selected]
        gradients.add_dense(selected, exponentials.mul_(factor.unsqueeze(1)))
    grad_hidden, grad_weight, grad_bias = gradients.results()
    return (
        grad_hidden.to(hidden.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(hidden.dtype),
    )


def linear_cross_entropy_reduced(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    drop_mass: float,
    mean: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum or mean of the row losses together with its gradients, in one pass.

    A reduced loss weighs all rows alike, so gradients need not wait for the incoming one: they
    are made while a chunk's logits are at hand, and the backward scales them. That saves the
    second computation of the logits.

    Returns:
        loss (scalar), correct bool [R], statistics [3], and the loss's gradients by hidden [R, H],
        weight [V, H] and bias [V], all in the compute dtype; [0] where not wanted.
    """
    dtype = compute_dtype(hidden.dtype)
    targets = _targets(target, ignore_index, weight.shape[0])
    counted = targets.counted.sum()
    count = counted if mean else torch.ones_like(counted)
    scale = torch.where(targets.counted, 1.0 / count.to(dtype), 0.0)
    gradients = _Gradients(hidden, weight, targets.index, scale, wanted)
    logits = _Logits(hidden.shape[0], weight, bias, dtype)
    loss, dropped = torch.empty_like(scale), torch.zeros_like(scale)
    correct = torch.empty_like(targets.counted)
    sparse = torch.zeros_like(correct)
    lists: list[_Lists] = []
    for chunk in _chunks(hidden.shape[0], weight.shape[0]):
        softmax = _cross_entropy(logits(hidden[chunk]), targets.of(chunk))
        exponentials, loss[chunk], correct[chunk], _, total = softmax
        if drop_mass > 0.0:
            p = exponentials.div_(total.unsqueeze(1))
            found, length, dropped[chunk] = _significant(p, targets.of(chunk), drop_mass)
            sparse[chunk] = length > 0
            lists.append(found._replace(rows=found.rows + chunk.start))
            (dense,) = (length == DENSE).nonzero(as_tuple=True)
            rows = dense + chunk.start
            gradients.add_dense(rows, p.index_select(0, dense).mul_(scale[rows].unsqueeze(1)))
        else:
            gradients.add_dense(chunk, exponentials.mul_((scale[chunk] / total).unsqueeze(1)))
    if lists:
        gradients.add_lists(_Lists(*(torch.cat(part) for part in zip(*lists, strict=True))))
    statistics = _statistics(counted, sparse, dropped)
    return (loss.sum() / count, correct, statistics, *gradients.results())


def _statistics(counted: Tensor, sparse: Tensor, dropped: Tensor) -> Tensor:
    largest = dropped.amax() if dropped.shape[0] > 0 else dropped.new_zeros(())
    return torch.stack([counted.float(), sparse.sum().float(), largest.float()])


class _Lists(NamedTuple):
    """Significant entries of sparse rows, ordered by row."""

    rows: Tensor
    columns: Tensor
    probabilities: Tensor


@dataclass
class _Targets:
    """index: the target, 0 where there is none. counted: not ignored. broken: not a token."""

    index: Tensor
    counted: Tensor
    broken: Tensor

    def of(self, rows: slice) -> _Targets:
        return _Targets(self.index[rows], self.counted[rows], self.broken[rows])


def _targets(target: Tensor, ignore_index: int, vocab_size: int) -> _Targets:
    counted = target != ignore_index
    outside = (target < 0) | (target >= vocab_size)
    return _Targets(target.masked_fill(outside, 0), counted, counted & outside)


def _rows_per_chunk(vocab_size: int) -> int:
    return max(1, LOGITS_PER_CHUNK // vocab_size)


def _chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    size = _rows_per_chunk(vocab_size)
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


class _Logits:
    """h W^T + b of a chunk of rows, in one buffer for all chunks."""

    def __init__(self, rows: int, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        rows = min(rows, _rows_per_chunk(weight.shape[0]))
        self._buffer = weight.new_empty((rows, weight.shape[0]), dtype=dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [r, H] -> [r, V], valid until the next call."""
        logits = self._buffer[: hidden.shape[0]]
        torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out=logits)
        return logits if self.bias is None else logits.add_(self.bias)


def _cross_entropy(
    logits: Tensor, targets: _Targets
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [r, V], overwritten -> (exponentials [r, V], loss, correct, top, total, each [r]).

    p = exponentials / total; the division is left to the caller, who may have a factor to go with.
    """
    correct = logits.argmax(dim=1) == targets.index
    correct &= targets.counted & ~targets.broken
    top = logits.amax(dim=1)
    at_target = logits.sub_(top.unsqueeze(1)).gather(1, targets.index.unsqueeze(1)).squeeze(1)
    exponentials = logits.exp_()
    total = exponentials.sum(dim=1).masked_fill_(targets.broken, torch.nan)
    loss = torch.where(targets.counted, total.log() - at_target, 0.0)
    return exponentials, loss, correct, top, total


def _significant(p: Tensor, targets: _Targets, drop_mass: float) -> tuple[_Lists, Tensor, Tensor]:
    """The lists of the sparse rows of p [r, V], each row's list length, or DENSE, and the mass
    that each sparse row leaves out.

    Ignored rows are neither sparse nor dense: they have no list and length 0.
    """
    significant = (p > significance(drop_mass)).scatter_(1, targets.index.unsqueeze(1), True)
    # Few rows at a time: counting makes 64-bit integers of the flags.
    parts = significant.split(max(1, LOGITS_PER_CHUNK // (16 * p.shape[1])))
    length = torch.cat([part.count_nonzero(dim=1) for part in parts])
    (fitting,) = (targets.counted & (length <= CAPACITY)).nonzero(as_tuple=True)
    row, columns = significant.index_select(0, fitting).nonzero(as_tuple=True)
    rows = fitting[row]
    probabilities = p[rows, columns]
    kept = p.new_zeros(p.shape[0]).index_add_(0, rows, probabilities)
    sparse = kept >= 1.0 - drop_mass  # 0 for rows that do not fit
    length = torch.where(sparse, length, DENSE).masked_fill_(~targets.counted, 0)
    listed = sparse[rows]
    dropped = torch.where(sparse, (1.0 - kept).clamp_min(0.0), 0.0)
    return _Lists(rows[listed], columns[listed], probabilities[listed]), length, dropped


def _position_within_row(rows: Tensor) -> Tensor:
    """For sorted row numbers: how many entries of the same row come before each."""
    _, counts = rows.unique_consecutive(return_counts=True)
    starts: Tensor = counts.cumsum(0) - counts
    return torch.arange(rows.shape[0], device=rows.device) - starts.repeat_interleave(counts)


class _Gradients:
    """Sums of scale * d loss / d (hidden, weight, bias), row selection by row selection."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        index: Tensor,
        scale: Tensor,
        wanted: list[bool],
    ) -> None:
        dtype = compute_dtype(hidden.dtype)
        self.hidden = hidden
        self.weight = weight.to(dtype)
        self.index = index
        self.scale = scale
        sources = (self.hidden, self.weight, self.weight[:, 0])
        self.sums = [
            source.new_zeros(source.shape, dtype=dtype) if want else None
            for source, want in zip(sources, wanted, strict=True)
        ]

    def add_dense(self, rows: slice | Tensor, scaled_p: Tensor) -> None:
        """Rows with all their probabilities: scale * p, [r, V], overwritten."""
        scale = self.scale[rows].unsqueeze(1)
        residual = scaled_p.scatter_add_(1, self.index[rows].unsqueeze(1), -scale)
        to_hidden, to_weight, to_bias = self.sums
        if to_hidden is not None and isinstance(rows, slice):
            torch.mm(residual, self.weight, out=to_hidden[rows])
        elif to_hidden is not None:
            to_hidden[rows] = torch.mm(residual, self.weight)
        if to_weight is not None:
            to_weight.addmm_(residual.t(), self.hidden[rows].to(residual.dtype))
        if to_bias is not None:
            to_bias += residual.sum(dim=0)

    def add_lists(self, lists: _Lists) -> None:
        """Rows with their significant entries."""
        rows, columns, probabilities = lists
        residual = probabilities - (columns == self.index[rows]).to(probabilities.dtype)
        residual *= self.scale[rows]
        to_hidden, to_weight, to_bias = self.sums
        if to_hidden is not None:
            _add_weighted_rows(to_hidden, rows, residual, columns, self.weight)
        columns, order = columns.sort(stable=True)
        rows, residual = rows[order], residual[order]
        if to_weight is not None:
            _add_weighted_rows(to_weight, columns, residual, rows, self.hidden)
        if to_bias is not None:
            ones = residual.new_ones((self.hidden.shape[0], 1))
            _add_weighted_rows(to_bias.unsqueeze(1), columns, residual, rows, ones)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums; [0] where not wanted."""
        to_hidden, to_weight, to_bias = (
            self.scale.new_empty(0) if total is None else total for total in self.sums
        )
        return to_hidden, to_weight, to_bias


def _add_weighted_rows(
    out: Tensor, segments: Tensor, factors: Tensor, rows: Tensor, source: Tensor
) -> None:
    """out[segments[i]] += factors[i] * source[rows[i]] over all i; ``segments`` is sorted."""
    ids, counts = segments.unique_consecutive(return_counts=True)
    sums = embedding_bag(
        rows,
        source.to(factors.dtype),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=factors,
    )
    out.index_add_(0, ids, sums)
