"""Patch-aligned blocks of a token file, as a torch dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from calm_kernels.training.data import TokenFile
from calm_kernels.training.errors import UserError


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """Block i holds tokens [i L, (i+1) L) of the file; a shorter rest at the end is left out.

    Blocks begin at a multiple of the patch size, so the same text always falls into the same
    patches. There is no padding inside, so the labels are the ids.
    """

    def __init__(self, file: TokenFile, block_length: int, patch_size: int) -> None:
        """View a token file as blocks.

        Raises:
            UserError: the patch size does not divide the block length, or the file is shorter than
                one block.
        """
        if patch_size < 1 or block_length < 1 or block_length % patch_size:
            raise UserError(
                f"block length {block_length} is not a multiple of the patch size {patch_size}: "
                f"choose, for example, {max(1, block_length // max(1, patch_size)) * patch_size}"
            )
        self.file = file
        self.block_length = block_length
        self.patch_size = patch_size
        self._count = len(file.tokens) // block_length
        if self._count == 0:
            raise UserError(
                f"{file.path.name} has {len(file.tokens)} tokens, less than one block of "
                f"{block_length}: give more text or a shorter block"
            )

    def __len__(self) -> int:
        return self._count

    def block(self, index: int) -> Tensor:
        """The ids of a block, int64 [block_length]."""
        if not 0 <= index < self._count:
            raise IndexError(f"block {index} of {self._count}")
        start = index * self.block_length
        part = self.file.tokens[start : start + self.block_length]
        return torch.from_numpy(part.astype(np.int64))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.block(index)
        return {"input_ids": ids, "labels": ids}

    def spread(self, count: int) -> list[int]:
        """``count`` block indices spread evenly over the file, or all if there are fewer."""
        if count >= self._count:
            return list(range(self._count))
        return [index * self._count // count for index in range(count)]


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack blocks to a batch [B, L]."""
    ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids, "labels": ids}
