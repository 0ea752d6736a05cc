"""Cross entropy of a linear layer's logits, fused into the matmul: Triton kernels.

The operators are put together here; what runs, and why so, is told by the headers of
``linear_cross_entropy_forward.py`` and ``linear_cross_entropy_backward.py``.

Nothing waits for the device: row counts, the split into sparse and dense rows, the scale of a mean
and the statistics stay on it, and every launch is the same whatever they are, so that a call can be
captured in a CUDA graph. float64, which no tensor core multiplies in Triton, and H = 0 go to the
reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from calm_kernels import _dispatch
from calm_kernels.triton.linear_cross_entropy_backward import chunk_columns
from calm_kernels.triton.linear_cross_entropy_backward import launch as launch_backward
from calm_kernels.triton.linear_cross_entropy_forward import Rows, choose_tiles_per_split
from calm_kernels.triton.linear_cross_entropy_forward import launch as launch_forward
from calm_kernels.triton.linear_cross_entropy_lists import Saved
from calm_kernels.triton.linear_cross_entropy_tiles import (
    Operands,
    Tiles,
    choose_tiles,
    device_properties,
    fits_descriptors,
)


def _served_here(hidden: Tensor) -> bool:
    return hidden.dtype != torch.float64 and hidden.shape[0] > 0 and hidden.shape[1] > 0


def _operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> Operands:
    bias = None if bias is None else bias.contiguous()
    return Operands(
        hidden.contiguous(), weight.contiguous(), bias, target.contiguous(), ignore_index
    )


@dataclass(frozen=True)
class Plan:
    """How a call is cut into programs.

    Attributes:
        tiles: of a program.
        descriptors: copy them by the tensor memory accelerator.
        tiles_per_split: vocabulary tiles that a program of the forward walks.
        chunk: columns of the backward's residual buffer.
    """

    tiles: Tiles
    descriptors: bool
    tiles_per_split: int
    chunk: int


def _plan(operands: Operands) -> Plan:
    processors, has_accelerator = device_properties(operands.hidden.device.index)
    descriptors = has_accelerator and fits_descriptors(operands)
    tiles = choose_tiles(operands.hidden.dtype, descriptors)
    tiles_per_split = choose_tiles_per_split(
        triton.cdiv(operands.num_rows, tiles.rows),
        triton.cdiv(operands.vocab_size, tiles.columns),
        tiles.programs * processors,
    )
    chunk = chunk_columns(
        operands.num_rows, operands.vocab_size, operands.hidden.element_size(), tiles
    )
    return Plan(tiles, descriptors, tiles_per_split, chunk)


def _forward(operands: Operands, drop_mass: float, plan: Plan) -> Rows:
    return launch_forward(operands, drop_mass, plan.tiles, plan.tiles_per_split, plan.descriptors)


def linear_cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    drop_mass: float,
) -> tuple[Tensor, ...]:
    """The operator: loss, correct, top, total, the lists and the statistics."""
    if not _served_here(hidden):
        operator = torch.ops.calm_kernels.linear_cross_entropy_rows.reference
        return tuple(operator(hidden, weight, bias, target, ignore_index, drop_mass))
    operands = _operands(hidden, weight, bias, target, ignore_index)
    with torch.cuda.device(hidden.device):
        rows = _forward(operands, drop_mass, _plan(operands))
    return (
        rows.loss,
        rows.correct,
        rows.top,
        rows.total,
        rows.list_columns,
        rows.list_probabilities,
        rows.list_length,
        rows.statistics,
    )


def scales(grad_loss: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The incoming gradient [R] as one of at most 1 in magnitude, and the factor [1] to it."""
    grad = torch.where(counted, grad_loss, 0.0)
    largest = torch.where(grad.isfinite(), grad.abs(), 0.0).amax()
    largest = torch.where(largest > 0.0, largest, 1.0)
    return grad / largest, largest.reshape(1)


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
    """The operator: gradients of hidden, weight and bias in their dtype, [0] where not wanted."""
    saved = Saved(top, total, list_columns, list_probabilities, list_length)
    if not (_served_here(hidden) and any(wanted)):
        operator = torch.ops.calm_kernels.linear_cross_entropy_rows_backward.reference
        lists = (list_columns, list_probabilities, list_length)
        arguments = (hidden, weight, bias, target, top, total, *lists, ignore_index, wanted)
        results: tuple[Tensor, Tensor, Tensor] = operator(grad_loss, *arguments)
        return results
    operands = _operands(hidden, weight, bias, target, ignore_index)
    with torch.cuda.device(hidden.device):
        plan = _plan(operands)
        row_scale, global_scale = scales(grad_loss, target != ignore_index)
        grad_hidden, grad_weight, grad_bias = launch_backward(
            operands,
            saved,
            row_scale,
            global_scale,
            wanted,
            hidden.dtype,
            plan.tiles,
            plan.chunk,
            plan.descriptors,
        )
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def reduced(
    operands: Operands,
    drop_mass: float,
    mean: bool,
    wanted: list[bool],
    plan: Plan,
) -> tuple[Tensor, ...]:
    """Loss, by-products and gradients with every choice made."""
    rows = _forward(operands, drop_mass, plan)
    counted = operands.target != operands.ignore_index
    count = counted.sum() if mean else counted.new_ones((), dtype=torch.int64)
    gradients: tuple[Tensor, ...]
    if any(wanted):
        saved = Saved(
            rows.top, rows.total, rows.list_columns, rows.list_probabilities, rows.list_length
        )
        gradients = launch_backward(
            operands,
            saved,
            counted.float(),
            count.clamp(min=1).float().reciprocal().reshape(1),
            wanted,
            torch.float32,
            plan.tiles,
            plan.chunk,
            plan.descriptors,
        )
    else:
        gradients = tuple(rows.loss.new_empty((0,)) for _ in wanted)
    return (rows.loss.sum() / count, rows.correct, rows.statistics, *gradients)


def linear_cross_entropy_reduced(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    drop_mass: float,
    mean: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The operator: loss, correct, statistics, and float32 gradients, [0] where not wanted."""
    if not _served_here(hidden):
        operator = torch.ops.calm_kernels.linear_cross_entropy_reduced.reference
        arguments = (hidden, weight, bias, target, ignore_index, drop_mass, mean, wanted)
        return tuple(operator(*arguments))
    operands = _operands(hidden, weight, bias, target, ignore_index)
    with torch.cuda.device(hidden.device):
        return reduced(operands, drop_mass, mean, wanted, _plan(operands))


_dispatch.register_triton("linear_cross_entropy_rows", linear_cross_entropy_rows)
_dispatch.register_triton("linear_cross_entropy_rows_backward", linear_cross_entropy_rows_backward)
_dispatch.register_triton("linear_cross_entropy_reduced", linear_cross_entropy_reduced)
