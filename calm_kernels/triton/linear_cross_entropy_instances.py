"""Which instances of the linear cross entropy's kernels are compiled ahead of time."""

from __future__ import annotations

import dataclasses
from typing import Any

from calm_kernels.reference.linear_cross_entropy import CAPACITY
from calm_kernels.triton.linear_cross_entropy_backward import (
    compact_kernel,
    gradient_kernel,
    residual_kernel,
)
from calm_kernels.triton.linear_cross_entropy_forward import split_kernel
from calm_kernels.triton.linear_cross_entropy_join import SPLITS_PER_STEP, join_kernel
from calm_kernels.triton.linear_cross_entropy_lists import (
    COEFFICIENTS_PER_PROGRAM,
    ENTRIES_PER_STEP,
    coefficient_kernel,
    sparse_rows_kernel,
)
from calm_kernels.triton.linear_cross_entropy_tiles import (
    BY_DESCRIPTORS,
    BY_THREADS,
    FLOAT32,
    Tiles,
)
from calm_kernels.triton.specialization import Specialization

_BUFFERS = {
    "target": "*i64",
    "split_top": "*fp32",
    "split_total": "*fp32",
    "target_logit": "*fp32",
    "target_is_first": "*u8",
    "candidate_columns": "*i32",
    "candidate_logits": "*fp32",
    "num_candidates": "*i32",
    "loss": "*fp32",
    "correct": "*u8",
    "final_top": "*fp32",
    "final_total": "*fp32",
    "top": "*fp32",
    "total": "*fp32",
    "list_columns": "*i32",
    "list_probabilities": "*fp32",
    "list_length": "*i32",
    "dropped": "*fp32",
    "rank": "*i64",
    "dense_rows": "*i32",
    "num_dense": "*i64",
    "row_scale": "*fp32",
    "global_scale": "*fp32",
    "keys": "*i32",
    "order": "*i64",
    "coefficients": "*fp32",
    "tile_starts": "*i64",
    "grad_hidden": "*fp32",
    "log_significance": "fp32",
    "least_probability": "fp32",
    "drop_mass": "fp32",
}
_OPERANDS = ("hidden", "weight", "bias", "dense_hidden", "residual")
_MULTIPLES_OF_16 = ("first_column", "chunk", "columns_per_split", "num_entries")


_TILED = {
    "hidden_tiles": ("rows", "inner"),
    "weight_tiles": ("columns", "inner"),
    "residual_rows": ("rows", "inner"),
}
"""Arguments that may be descriptors, and the tiles that they describe, kernel by kernel."""
_TILED_BY_KERNEL = {
    "residual_kernel": {"dense_hidden": ("rows", "inner"), "weight": ("columns", "inner")},
    "gradient_kernel": {
        "residual": ("inner", "columns"),
        "dense_hidden": ("inner", "columns"),
        "weight": ("inner", "columns"),
    },
}


_ONE_WARP = ("join_kernel", "compact_kernel")


def _instance(
    name: str, kernel: Any, dtype: str, tiles: Tiles | None, grad: str = "fp32", **constants: Any
) -> Specialization:
    tiled: dict[str, str] = {}
    num_warps = 1 if kernel.fn.__name__ in _ONE_WARP else 4
    if tiles is not None:
        gradients = kernel is gradient_kernel
        num_warps = tiles.gradient_warps if gradients else tiles.num_warps
        constants |= tiles.constants
        shapes = _TILED | _TILED_BY_KERNEL.get(kernel.fn.__name__, {})
        for argument, (rows, columns) in shapes.items():
            shape = f"{getattr(tiles, rows)}, {getattr(tiles, columns)}"
            described = constants.get("DESCRIPTORS", False)
            tiled[argument] = f"tensordesc<{dtype}[{shape}]>" if described else f"*{dtype}"
    types = {**_BUFFERS, **dict.fromkeys(_OPERANDS, f"*{dtype}")}
    types |= dict.fromkeys(("grad_weight", "grad_bias"), f"*{grad}")
    types |= tiled
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    aligned = tuple(
        argument
        for argument, kind in signature.items()
        if (kind.startswith("*") and argument != "num_dense") or argument in _MULTIPLES_OF_16
    )
    return Specialization(
        f"linear_cross_entropy {name} {dtype}",
        kernel,
        signature,
        constants,
        aligned,
        num_warps,
        tiles.num_stages if tiles is not None else 3,
        tensor_cores=tiles is not None and dtype != "fp32",
    )


def _tiles(dtype: str, hidden_size: int) -> Tiles:
    if dtype == "fp32":
        return FLOAT32
    return BY_DESCRIPTORS if hidden_size % 8 == 0 else BY_THREADS


def _split(name: str, dtype: str, hidden_size: int, lists: bool, bias: bool) -> Specialization:
    tiles = _tiles(dtype, hidden_size)
    return _instance(
        f"forward{name} H={hidden_size}",
        split_kernel,
        dtype,
        tiles,
        HIDDEN_SIZE=hidden_size,
        HAS_BIAS=bias,
        DESCRIPTORS=tiles == BY_DESCRIPTORS,
        LISTS=lists,
        CAPACITY=CAPACITY,
    )


def _residual(name: str, dtype: str, hidden_size: int, bias: bool) -> Specialization:
    tiles = _tiles(dtype, hidden_size)
    return _instance(
        f"residual{name} H={hidden_size}",
        residual_kernel,
        dtype,
        tiles,
        HIDDEN_SIZE=hidden_size,
        HAS_BIAS=bias,
        DESCRIPTORS=tiles == BY_DESCRIPTORS,
    )


def _gradient(
    name: str, dtype: str, hidden_size: int, lists: bool, bias: bool, grad_dtype: str = "fp32"
) -> Specialization:
    tiles = _tiles(dtype, hidden_size)
    return _instance(
        f"gradients{name} H={hidden_size}",
        gradient_kernel,
        dtype,
        tiles,
        grad_dtype,
        HIDDEN_SIZE=hidden_size,
        CAPACITY=CAPACITY,
        LISTS=lists,
        DESCRIPTORS=tiles == BY_DESCRIPTORS,
        WANT_WEIGHT=True,
        WANT_BIAS=bias,
    )


def specializations() -> list[Specialization]:
    """The instances that CALM's autoencoder uses, and the edges."""
    by_threads = [
        _split(" with lists, bias, H masked", "bf16", 516, True, True),
        _residual(", bias, H masked", "bf16", 516, True),
        _gradient(" with lists, bias, H masked", "bf16", 516, True, True),
    ]
    return [
        *by_threads,
        *(dataclasses.replace(each, capability=80) for each in by_threads),
        _split(" with lists", "bf16", 512, True, False),
        _split("", "bf16", 512, False, False),
        _split(" with lists, bias", "fp16", 512, True, True),
        _split(" with lists, bias", "fp32", 512, True, True),
        _residual("", "bf16", 512, False),
        _residual(", bias", "fp16", 512, True),
        _residual(", bias", "fp32", 512, True),
        _gradient(" with lists", "bf16", 512, True, False),
        _gradient("", "bf16", 512, False, False),
        _gradient(" with lists, 16-bit results, bias", "fp16", 512, True, True, "fp16"),
        _gradient(" with lists, bias", "fp32", 512, True, True),
        _instance(
            "join 2 splits",
            join_kernel,
            "fp32",
            None,
            LISTS=True,
            CAPACITY=CAPACITY,
            SPLITS=2,
            STEP=2,
        ),
        _instance(
            "join 512 splits",
            join_kernel,
            "fp32",
            None,
            LISTS=True,
            CAPACITY=CAPACITY,
            SPLITS=512,
            STEP=SPLITS_PER_STEP,
        ),
        _instance(
            "compact H=512", compact_kernel, "bf16", None, HIDDEN_SIZE=512, ROWS=128, BLOCK=512
        ),
        _instance(
            "coefficients",
            coefficient_kernel,
            "fp32",
            None,
            CAPACITY=CAPACITY,
            BLOCK=COEFFICIENTS_PER_PROGRAM,
        ),
        _instance(
            "sparse rows H=512",
            sparse_rows_kernel,
            "bf16",
            None,
            HIDDEN_SIZE=512,
            CAPACITY=CAPACITY,
            BLOCK=512,
            STEP=ENTRIES_PER_STEP,
        ),
    ]
