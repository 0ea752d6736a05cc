"""The CUDA kernels of the patch codec, on the host executor, return the reference's values."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from calm_kernels.reference import patch_codec as reference

# Dtype, and whether rows are read 16 bytes at a time or an element at a time.
READS = [
    *((dtype, wide) for dtype in (torch.float32, torch.bfloat16, torch.float16) for wide in (0, 1)),
    (torch.float64, 0),
]
# (P, K, V): a token alone, less and more tokens than a tile, more than a block of tiles.
SHAPES = [(1, 1, 1), (5, 3, 7), (33, 4, 9), (33, 9, 50)]
# Row widths: less than a warp's columns, odd ones, and more than a warp's.
NARROW, WIDE = (1, 7, 35, 8), (8, 24, 264, 40)


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A matrix as rows of bytes."""
    return tensor.contiguous().view(torch.uint8).numpy()


def tensor_of(rows: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rows).view(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def token_ids(patches: int, patch_size: int, vocab: int) -> Tensor:
    """Some ids are frequent, some do not occur."""
    generator = torch.Generator().manual_seed(patches)
    spread = torch.rand(patches, patch_size, generator=generator) ** 3
    return (spread * vocab).long()


# Blocks of a grid: with less than the tokens need, the kernel strides.
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("unit", [2, 16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_embed_flatten_equals_the_reference(
    simt: ModuleType, dropout: float, unit: int, ids_dtype: torch.dtype, blocks: int
) -> None:
    embed = simt.embed_flatten_int64 if ids_dtype == torch.int64 else simt.embed_flatten_int32
    for order, (patches, patch_size, vocab) in enumerate(SHAPES):
        hidden = NARROW[order] if unit == 2 else WIDE[order]
        ids = token_ids(patches, patch_size, vocab)
        table = normal(vocab, hidden, dtype=torch.bfloat16)
        seed = 2**40 + order if dropout else None
        rows, used = embed(
            ids.to(ids_dtype).numpy(), bytes_of(table), unit, dropout, seed, blocks, order
        )
        expected, expected_used = reference.embed_flatten(
            ids, table, dropout, None if seed is None else torch.tensor([seed])
        )
        flat = tensor_of(rows, torch.bfloat16).reshape(patches, -1)
        assert torch.equal(flat, expected)
        assert torch.equal(torch.from_numpy(used), expected_used)


def gradient(
    simt: ModuleType, grad_flat: Tensor, ids: Tensor, vocab: int, wide: bool, order: int
) -> Tensor:
    dtype = grad_flat.dtype
    keys, places = ids.flatten().to(torch.int32).sort(stable=True)
    rows = bytes_of(grad_flat.reshape(ids.numel(), -1))
    run = getattr(simt, f"embed_gradient_{name_of(dtype)}")
    poison = (0xA5, 0xFF)[order % 2]
    return tensor_of(
        run(rows, keys.numpy(), places.numpy(), vocab, bool(wide), order, poison), dtype
    )


def assert_summed_in_full(result: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """One rounding to the result's dtype, and those of a sum in float32."""
    dtype = result.dtype
    own = 0.5001 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    wide = 1e-14 if dtype == torch.float64 else 1e-6
    assert ((result.double() - exact).abs() <= own * exact.abs() + wide * magnitude).all()


@pytest.mark.parametrize(("dtype", "wide"), READS)
def test_the_embedding_gradient_equals_the_exact_sum(
    simt: ModuleType, dtype: torch.dtype, wide: bool
) -> None:
    for order, (patches, patch_size, vocab) in enumerate(SHAPES):
        hidden = WIDE[order] if wide else NARROW[order]
        ids = token_ids(patches, patch_size, vocab)
        grad_flat = normal(patches, patch_size * hidden, dtype=dtype, seed=order)
        terms = grad_flat.double().reshape(-1, hidden)
        exact, magnitude = torch.zeros(2, vocab, hidden, dtype=torch.float64)
        exact.index_add_(0, ids.flatten(), terms)
        magnitude.index_add_(0, ids.flatten(), terms.abs())
        result = gradient(simt, grad_flat, ids, vocab, wide, order)
        assert_summed_in_full(result, exact, magnitude)
        if order == 2:
            assert torch.equal(gradient(simt, grad_flat, ids, vocab, wide, order + 9), result)


# Runs of equal ids that end before, at and after the borders of tiles of 32 tokens; one that is a
# whole tile; ones that begin and end in the middle of tiles with many between.
@pytest.mark.parametrize(
    "lengths",
    [[32, 32], [31, 1, 1, 31], [31, 2, 31], [5, 59, 32], [1, 94, 1], [10, 330, 3], [64, 1], [33]],
    ids=str,
)
def test_ids_across_tiles_are_summed_once(simt: ModuleType, lengths: list[int]) -> None:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    # Integers, so that every order of summation gives the same.
    grad_flat = torch.arange(len(ids) * 8).remainder(13).float().reshape(-1, 8)
    expected = torch.zeros(len(lengths) + 1, 8).index_add_(0, ids, grad_flat)
    for order, wide in enumerate((False, True)):
        result = gradient(simt, grad_flat, ids, len(lengths) + 1, wide, order)
        assert torch.equal(result, expected)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("dtype", "wide"), READS)
def test_the_folded_gather_equals_the_reference(
    simt: ModuleType, dtype: torch.dtype, ids_dtype: torch.dtype, wide: bool
) -> None:
    run = getattr(simt, f"gather_sum_{name_of(dtype)}")
    for order, (patches, patch_size, vocab) in enumerate(SHAPES):
        hidden = WIDE[order] if wide else NARROW[order]
        ids = token_ids(patches, patch_size, vocab)
        tables = normal(patch_size, vocab, hidden, dtype=dtype)
        bias = normal(hidden, dtype=dtype, seed=1)
        arguments = (
            ids.to(ids_dtype).numpy(),
            bytes_of(tables.flatten(0, 1)),
            bytes_of(bias[None]),
            vocab,
            bool(wide),
            1 + order % 2,
            order,
        )
        result = tensor_of(run(*arguments), dtype)
        assert torch.equal(result, reference.folded_squeezed_gather(ids, tables, bias))


@pytest.mark.parametrize("bad", [-1, 7, 2**31 - 1])
def test_an_id_outside_the_vocabulary_stops_the_kernel(simt: ModuleType, bad: int) -> None:
    ids = np.full((5, 3), 6, dtype=np.int64)
    ids[3, 1] = bad
    rows = bytes_of(torch.ones(7, 8))
    tables, bias = bytes_of(torch.ones(3 * 7, 8)), bytes_of(torch.ones(1, 8))
    with pytest.raises(IndexError, match="outside of the vocabulary"):
        simt.embed_flatten_int64(ids, rows, 16, 0.0, None, 1, 0)
    with pytest.raises(IndexError, match="outside of the vocabulary"):
        simt.gather_sum_float32(ids, tables, bias, 7, True, 1, 0)
    with pytest.raises(IndexError, match="outside of the vocabulary"):
        gradient(simt, torch.ones(15, 8), torch.from_numpy(ids), 7, True, 0)
