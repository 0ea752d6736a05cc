"""What the kernels of the linear cross entropy share: a tile of logits, and the sizes of tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tiles:
    """Tile of a program: ``rows`` x ``columns`` of a product, its sums ``inner`` terms at a time.

    ``programs`` of them run on a multiprocessor at once. ``gradient_warps``: of the kernel that
    sums gradients, whose addresses of results take registers too.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    programs: int
    gradient_warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "INNER": self.inner}


# 16 bits, copied by the tensor memory accelerator (sm_90 and later): one warpgroup with 128
# accumulators a thread and three stages of 32 KiB, so that two programs share a multiprocessor, and
# one multiplies while the other takes its exponentials.
BY_DESCRIPTORS = Tiles(128, 128, 64, num_warps=4, num_stages=3, programs=2, gradient_warps=8)
# 16 bits, copied by threads (earlier parts, or rows that are not multiples of 16 bytes): addresses
# take registers, so accumulators get 32 a thread. Three stages of 12 KiB fit every part.
BY_THREADS = Tiles(128, 64, 32, num_warps=8, num_stages=3, programs=1, gradient_warps=8)
# float32 in plain multiply-adds: 16 accumulators a thread leave registers for both operands.
FLOAT32 = Tiles(64, 64, 16, num_warps=8, num_stages=3, programs=1, gradient_warps=8)


@functools.cache
def device_properties(index: int) -> tuple[int, bool]:
    """Multiprocessors, and whether there is a tensor memory accelerator."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major >= 9


def choose_tiles(dtype: torch.dtype, descriptors: bool) -> Tiles:
    """From the table above."""
    if dtype == torch.float32:
        return FLOAT32
    return BY_DESCRIPTORS if descriptors else BY_THREADS


@dataclass(frozen=True)
class Operands:
    """The checked operands of a call: contiguous, at least one row and one hidden unit."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.hidden.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]


def fits_descriptors(operands: Operands) -> bool:
    """Whether descriptors serve: 16 bits, and rows at multiples of 16 bytes."""
    hidden, weight = operands.hidden, operands.weight
    aligned = hidden.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and hidden.dtype.itemsize == 2 and operands.hidden_size % 8 == 0


def tiles_of(tensor: Tensor, rows: int, columns: int, descriptors: bool) -> Any:
    """What a kernel copies tiles [rows, columns] of a matrix by: a descriptor, or the tensor."""
    return TensorDescriptor.from_tensor(tensor, [rows, columns]) if descriptors else tensor


@triton.jit
def logits_tile(
    hidden,  # [R, H]: pointer, or descriptor of tiles [ROWS, INNER]
    weight,  # [V, H]: pointer, or descriptor of tiles [COLUMNS, INNER]
    bias,  # pointer [V], or anything
    first_row,
    num_rows,
    first_column,
    vocab_size,
    HIDDEN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of hidden times weight transposed, plus bias: float32 [ROWS, COLUMNS].

    Columns past the end of the vocabulary are -inf; rows past the last hold anything.
    """
    columns = first_column + tl.arange(0, COLUMNS)
    within = tl.minimum(columns, vocab_size - 1)
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DESCRIPTORS:
        for k in range(0, HIDDEN_SIZE, INNER):
            h = hidden.load([first_row, k])
            w = weight.load([first_column, k])
            logits = tl.dot(h, w.T, logits, input_precision="ieee")
    else:
        rows = tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
        inner = tl.arange(0, INNER)
        hidden_pointers = hidden + rows[:, None] * HIDDEN_SIZE + inner[None, :]
        weight_pointers = weight + within[None, :].to(tl.int64) * HIDDEN_SIZE + inner[:, None]
        for k in range(0, HIDDEN_SIZE, INNER):
            if HIDDEN_SIZE % INNER == 0:
                h = tl.load(hidden_pointers + k)
                w = tl.load(weight_pointers + k)
            else:
                h = tl.load(hidden_pointers + k, mask=inner[None, :] < HIDDEN_SIZE - k, other=0.0)
                w = tl.load(weight_pointers + k, mask=inner[:, None] < HIDDEN_SIZE - k, other=0.0)
            logits = tl.dot(h, w, logits, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias + within).to(tl.float32)[None, :]
    return tl.where(columns[None, :] < vocab_size, logits, float("-inf"))
