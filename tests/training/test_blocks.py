"""Packing: every token once, in order, aligned to patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_kernels.training.blocks import PackedBlocks, collate
from calm_kernels.training.data import TokenData, TokenFile
from calm_kernels.training.errors import UserError


def token_file(count: int) -> TokenFile:
    from pathlib import Path

    return TokenFile(Path("tokens.bin"), np.arange(count, dtype=np.uint16), 1 << 16)


@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 400))
def test_blocks_are_the_file_cut_at_multiples_of_the_length(
    patch_size: int, patches: int, count: int
) -> None:
    length = patch_size * patches
    if count < length:
        with pytest.raises(UserError, match="less than one block"):
            PackedBlocks(token_file(count), length, patch_size)
        return
    blocks = PackedBlocks(token_file(count), length, patch_size)
    assert len(blocks) == count // length
    joined = torch.cat([blocks.block(i) for i in range(len(blocks))])
    assert joined.tolist() == list(range(count - count % length))


def test_an_item_has_int64_ids_and_equal_labels(data: TokenData) -> None:
    blocks = PackedBlocks(data.train, 64, 4)
    item = blocks[3]
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])
    assert item["input_ids"].tolist() == data.train.tokens[192:256].tolist()
    batch = collate([blocks[0], blocks[2]])
    assert batch["input_ids"].shape == (2, 64)
    assert torch.equal(batch["labels"][1], blocks[2]["input_ids"])


@pytest.mark.parametrize(("length", "patch_size"), [(10, 4), (3, 4), (0, 4), (8, 0)])
def test_a_length_that_patches_do_not_divide_is_an_error(length: int, patch_size: int) -> None:
    with pytest.raises(UserError, match="is not a multiple of the patch size"):
        PackedBlocks(token_file(100), length, patch_size)


def test_an_index_past_the_end_is_an_error() -> None:
    blocks = PackedBlocks(token_file(100), 10, 5)
    with pytest.raises(IndexError):
        blocks.block(10)


@given(st.integers(1, 50), st.integers(1, 60))
def test_spread_indices_are_distinct_and_cover_the_file(available: int, count: int) -> None:
    blocks = PackedBlocks(token_file(available * 4), 4, 4)
    chosen = blocks.spread(count)
    assert len(chosen) == len(set(chosen)) == min(count, available)
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] < available
    gaps = np.diff([*chosen, available])
    assert gaps.max() - gaps.min() <= 1
