"""argmax of a linear layer's outputs inside the matmul: Triton kernels.

What: hidden [R, H] times weight [V, H] transposed, plus bias, and of every row the largest logit
and its index. float32 accumulation and comparison; bfloat16 and float16 on tensor cores, float32
in plain multiply-adds (``input_precision="ieee"``), since tf32 would round the operands.

Mapping: a program owns a tile of rows and a contiguous range of vocabulary tiles. It walks the
range with the loops over vocabulary and H flattened into one, so that the loads of the next tile
are in flight while the last one is reduced, and keeps (value, index) of each row in registers:
logits never leave them. Programs are numbered row tiles first, so that those which run at a time
read the same vocabulary tiles and the weight comes from memory once. Where rows alone do not fill
the GPU, the vocabulary is split; a second kernel joins the splits.

Fewest bytes: hidden and weight once, 12 bytes a row out (131 MB at V = 128257, H = 512, 16 bits).
Operations: 2 R V H, and about five a logit for the reduction (a maximum that keeps NaN, two
comparisons, a select, a minimum of indices): at H = 512, an eighth of the cycles that a Hopper SM
needs for the matmul, where nothing overlaps.

Ties: tiles come in rising order and only a larger value replaces the best, so the lowest index
stays; inside a tile and between splits the lowest index among equal values is taken. NaN: the
maximum keeps it, and then only NaN entries are candidates.

Edges: rows and columns past the end read the last one again, so no logit has to be masked: a copy
of the last column has its index and changes nothing. With tensor descriptors, which fill with
zeros, the last vocabulary tile is shifted back instead; what is computed twice is equal. H that is
no multiple of the inner tile is masked; H whose rows are not multiples of 16 bytes goes without
descriptors and with narrow loads: right, and slow.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from calm_kernels import _dispatch
from calm_kernels.triton.specialization import Specialization


@dataclass(frozen=True)
class Tiles:
    """Tile of a program: rows x columns logits, ``inner`` steps of H at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    programs_per_processor: int = 1

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "INNER": self.inner}


# With tensor descriptors and 228 KiB of shared memory (sm_90, sm_100). Many rows: two warpgroups of
# 64 rows each, the widest wgmma (n = 256), 128 accumulators a thread, three stages of 48 KiB. Up to
# one tile of 64 rows the weight's bytes are the limit: four stages of 24 KiB, two programs an SM.
SM90_MANY_ROWS = Tiles(128, 256, 64, num_warps=8, num_stages=3)
SM90_FEW_ROWS = Tiles(64, 128, 64, 4, num_stages=4, programs_per_processor=2)
# Without (sm_80, the parts with 100 KiB, operands that no descriptor fits): stages of 16 KiB, 64 in
# all; of 24 KiB, 72 in all.
SM80_MANY_ROWS = Tiles(128, 128, 32, num_warps=4, num_stages=4)
SM80_FEW_ROWS = Tiles(64, 128, 64, num_warps=4, num_stages=3)
# float32 in plain multiply-adds: 32 accumulators a thread leave registers for both operands.
FLOAT32 = Tiles(64, 64, 16, num_warps=4, num_stages=3, programs_per_processor=2)
FEW_ROWS = 64
LARGE_SHARED_MEMORY = 200 * 1024
# Starting and ending a program, in vocabulary tiles: what one more split costs.
TILES_PER_PROGRAM_OVERHEAD = 0.5
MAX_SPLITS = 512
ROWS_PER_JOIN = 16

# Above every column index: V is at most 2^31 - 1.
_NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def _maximum_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _best(values, indices, axis: tl.constexpr):
    """The largest value along ``axis``, a NaN above all, and the lowest index that has it."""
    best = tl.reduce(values, axis, _maximum_or_nan)
    chosen = (values == tl.expand_dims(best, axis)) | (values != values)
    return best, tl.min(tl.where(chosen, indices, _NO_COLUMN), axis=axis)


@triton.jit(do_not_specialize=["num_rows", "vocab_size", "tiles_per_split"])
def linear_argmax_kernel(
    hidden,  # [R, H]: pointer or descriptor
    weight,  # [V, H]: pointer or descriptor
    bias,  # [V], or anything
    best_value,  # [splits, R] float32
    best_index,  # [splits, R] int64
    num_rows,
    vocab_size,
    tiles_per_split,
    HIDDEN_SIZE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
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
    inner = tl.arange(0, INNER)
    if not DESCRIPTORS:
        clamped_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
        hidden_pointers = hidden + clamped_rows[:, None] * HIDDEN_SIZE + inner[None, :]

    value = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.zeros((ROWS,), tl.int32) + first_tile * COLUMNS
    for tile in tl.range(first_tile, last_tile, flatten=True):
        logits = tl.zeros((ROWS, COLUMNS), tl.float32)
        if DESCRIPTORS:
            first_column = tl.minimum(tile * COLUMNS, vocab_size - COLUMNS)
            columns = first_column + tl.arange(0, COLUMNS)
            for k in range(0, HIDDEN_SIZE, INNER):
                h = hidden.load([row_tile * ROWS, k])
                w = weight.load([first_column, k])
                logits = tl.dot(h, w.T, logits, input_precision="ieee")
        else:
            columns = tl.minimum(tile * COLUMNS + tl.arange(0, COLUMNS), vocab_size - 1)
            weight_pointers = weight + columns[None, :].to(tl.int64) * WEIGHT_STRIDE
            weight_pointers += inner[:, None]
            for k in range(0, HIDDEN_SIZE, INNER):
                if HIDDEN_SIZE % INNER == 0:
                    h = tl.load(hidden_pointers + k)
                    w = tl.load(weight_pointers + k)
                else:
                    h = tl.load(hidden_pointers + k, mask=inner[None, :] < HIDDEN_SIZE - k, other=0)
                    w = tl.load(weight_pointers + k, mask=inner[:, None] < HIDDEN_SIZE - k, other=0)
                logits = tl.dot(h, w, logits, input_precision="ieee")
        if HAS_BIAS:
            logits += tl.load(bias + columns)[None, :].to(tl.float32)
        tile_value, tile_index = _best(logits, columns[None, :], 1)
        better = (tile_value > value) | ((tile_value != tile_value) & (value == value))
        value = tl.where(better, tile_value, value)
        index = tl.where(better, tile_index, index)

    out = split.to(tl.int64) * num_rows + rows
    tl.store(best_value + out, value, mask=rows < num_rows)
    tl.store(best_index + out, index.to(tl.int64), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def join_splits_kernel(
    split_value,  # [splits, R] float32
    split_index,  # [splits, R] int64
    best_value,  # [R] float32
    best_index,  # [R] int64
    num_rows,
    num_splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The best of the splits of each row; splits lie in rising order of their columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    splits = tl.minimum(tl.arange(0, SPLITS), num_splits - 1).to(tl.int64)
    clamped_rows = tl.minimum(rows, num_rows - 1)
    at = splits[:, None] * num_rows + clamped_rows[None, :]
    values = tl.load(split_value + at)
    indices = tl.load(split_index + at).to(tl.int32)
    value, index = _best(values, indices, 0)
    tl.store(best_value + rows, value, mask=rows < num_rows)
    tl.store(best_index + rows, index.to(tl.int64), mask=rows < num_rows)


def choose_tiles(num_rows: int, dtype: torch.dtype, descriptors: bool) -> Tiles:
    """From the table above."""
    if dtype == torch.float32:
        return FLOAT32
    few = num_rows <= FEW_ROWS
    if descriptors:
        return SM90_FEW_ROWS if few else SM90_MANY_ROWS
    return SM80_FEW_ROWS if few else SM80_MANY_ROWS


def choose_tiles_per_split(num_row_tiles: int, num_column_tiles: int, num_programs: int) -> int:
    """Vocabulary tiles a program, so that the last of them ends as early as possible.

    Programs run ``num_programs`` at a time, so a choice takes (waves) x (tiles each + overhead).
    """

    def cost(tiles: int) -> tuple[float, int]:
        programs = num_row_tiles * triton.cdiv(num_column_tiles, tiles)
        waves = triton.cdiv(programs, num_programs)
        return waves * (tiles + TILES_PER_PROGRAM_OVERHEAD), -tiles

    fewest = triton.cdiv(num_column_tiles, MAX_SPLITS)
    splits = range(1, triton.cdiv(num_column_tiles, fewest) + 1)
    return min({triton.cdiv(num_column_tiles, split) for split in splits}, key=cost)


def _fits_descriptor(tensor: Tensor) -> bool:
    """Whether the hardware can copy tiles of it: 16-byte aligned rows."""
    stride = tensor.stride(0) * tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and stride % 16 == 0


def launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    tiles_per_split: int,
    descriptors: bool,
) -> tuple[Tensor, Tensor]:
    """The kernels with every choice made.

    Args:
        hidden: [R, H], contiguous, R >= 1. weight: [V, H], rows contiguous. bias: [V] or None.
        tiles: the tile of a program.
        tiles_per_split: vocabulary tiles a program walks.
        descriptors: copy tiles with the tensor memory accelerator (sm_90); needs 16-byte aligned
            rows and V of at least a tile.

    Returns:
        index int64 [R], value float32 [R].
    """
    num_rows, hidden_size = hidden.shape
    vocab_size = weight.shape[0]
    num_splits = triton.cdiv(triton.cdiv(vocab_size, tiles.columns), tiles_per_split)
    num_row_tiles = triton.cdiv(num_rows, tiles.rows)
    value = hidden.new_empty((num_splits, num_rows), dtype=torch.float32)
    index = hidden.new_empty((num_splits, num_rows), dtype=torch.int64)
    operands: tuple[Any, Any] = (hidden, weight)
    if descriptors:
        operands = (
            TensorDescriptor.from_tensor(hidden, [tiles.rows, tiles.inner]),
            TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.inner]),
        )
    linear_argmax_kernel[(num_row_tiles * num_splits,)](
        *operands,
        bias if bias is not None else value,
        value,
        index,
        num_rows,
        vocab_size,
        tiles_per_split,
        HIDDEN_SIZE=hidden_size,
        WEIGHT_STRIDE=weight.stride(0),
        HAS_BIAS=bias is not None,
        DESCRIPTORS=descriptors,
        **tiles.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_splits == 1:
        return index[0], value[0]
    best_value = hidden.new_empty((num_rows,), dtype=torch.float32)
    best_index = hidden.new_empty((num_rows,), dtype=torch.int64)
    join_splits_kernel[(triton.cdiv(num_rows, ROWS_PER_JOIN),)](
        value,
        index,
        best_value,
        best_index,
        num_rows,
        num_splits,
        ROWS=ROWS_PER_JOIN,
        SPLITS=triton.next_power_of_2(num_splits),
    )
    return best_index, best_value


@functools.cache
def _device(index: int) -> tuple[int, bool]:
    """Multiprocessors, and whether it runs the tiles of sm_90."""
    properties = torch.cuda.get_device_properties(index)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    sm90_tiles = properties.major >= 9 and shared >= LARGE_SHARED_MEMORY
    return properties.multi_processor_count, sm90_tiles


def linear_argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden [R, H], weight [V, H], bias [V] -> index int64 [R], value [R]."""
    num_rows, hidden_size = hidden.shape
    if hidden.dtype == torch.float64 or num_rows == 0 or hidden_size == 0:
        # Triton multiplies no float64 on tensor cores, and nothing is not worth a kernel.
        index, value = torch.ops.calm_kernels.linear_argmax.reference(hidden, weight, bias)
        return index, value
    hidden = hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    processors, runs_sm90_tiles = _device(hidden.device.index)
    descriptors = (
        runs_sm90_tiles
        and hidden.dtype != torch.float32
        and weight.shape[0] >= max(SM90_FEW_ROWS.columns, SM90_MANY_ROWS.columns)
        and _fits_descriptor(hidden)
        and _fits_descriptor(weight)
    )
    tiles = choose_tiles(num_rows, hidden.dtype, descriptors)
    tiles_per_split = choose_tiles_per_split(
        triton.cdiv(num_rows, tiles.rows),
        triton.cdiv(weight.shape[0], tiles.columns),
        processors * tiles.programs_per_processor,
    )
    with torch.cuda.device(hidden.device):
        return launch(hidden, weight, bias, tiles, tiles_per_split, descriptors)


_dispatch.register_triton("linear_argmax", linear_argmax)


def _instance(
    name: str,
    dtype: str,
    tiles: Tiles,
    hidden_size: int,
    has_bias: bool,
    descriptors: bool,
    capability: int = 90,
) -> Specialization:
    def operand(rows: int) -> str:
        return f"tensordesc<{dtype}[{rows}, {tiles.inner}]>" if descriptors else f"*{dtype}"

    constants = {
        "HIDDEN_SIZE": hidden_size,
        "WEIGHT_STRIDE": hidden_size,
        "HAS_BIAS": has_bias,
        "DESCRIPTORS": descriptors,
        **tiles.constants,
    }
    signature = {
        "hidden": operand(tiles.rows),
        "weight": operand(tiles.columns),
        "bias": f"*{dtype}" if has_bias else "*fp32",
        "best_value": "*fp32",
        "best_index": "*i64",
        "num_rows": "i32",
        "vocab_size": "i32",
        "tiles_per_split": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    pointers = () if descriptors else ("hidden", "weight")
    return Specialization(
        f"linear_argmax {name} {dtype} H={hidden_size}",
        linear_argmax_kernel,
        signature,
        constants,
        (*pointers, "bias", "best_value", "best_index"),
        tiles.num_warps,
        tiles.num_stages,
        tensor_cores=dtype != "fp32",
        capability=capability,
    )


def specializations() -> list[Specialization]:
    """The instances that CALM's autoencoder uses, and the edges."""
    return [
        _instance("many rows", "bf16", SM90_MANY_ROWS, 512, False, True),
        _instance("many rows, bias", "fp16", SM90_MANY_ROWS, 512, True, True),
        _instance("many rows, H masked", "bf16", SM90_MANY_ROWS, 520, False, True),
        _instance("few rows", "bf16", SM90_FEW_ROWS, 512, False, True),
        _instance("no descriptors, H masked", "bf16", SM80_MANY_ROWS, 520, True, False),
        _instance("many rows", "bf16", SM80_MANY_ROWS, 512, False, False, capability=80),
        _instance("few rows", "bf16", SM80_FEW_ROWS, 512, False, False, capability=80),
        _instance("multiply-adds", "fp32", FLOAT32, 512, True, False),
        Specialization(
            "linear_argmax join 32 splits",
            join_splits_kernel,
            {
                "split_value": "*fp32",
                "split_index": "*i64",
                "best_value": "*fp32",
                "best_index": "*i64",
                "num_rows": "i32",
                "num_splits": "i32",
                "ROWS": "constexpr",
                "SPLITS": "constexpr",
            },
            {"ROWS": ROWS_PER_JOIN, "SPLITS": 32},
            ("split_value", "split_index", "best_value", "best_index"),
            tensor_cores=False,
        ),
    ]
