"""Philox4x32-10 in integer PyTorch ops: the one random stream of the package.

Every backend draws the same words, because a word is a pure function of its coordinates:
key = the 64-bit seed (low word, high word), counter = (block, row low, row high, stream), and
element ``e`` of a row is word ``e % 4`` of block ``e // 4``. Nothing depends on grid size, thread
count or vector width.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW_32_BITS = 0xFFFFFFFF


class Stream(IntEnum):
    """Which consumer of randomness a word belongs to; two streams never share a word."""

    ENERGY_TARGETS = 0
    """row = position, element = m * D + d"""
    BATCH_TEMPERATURE = 1
    """row = sequence"""
    EXACT_TEMPERATURE = 2
    """row = sequence"""
    HEAD_NOISE = 3
    """row = position * N + sample"""
    TOKEN_DROPOUT = 4
    """row = patch, element = token within the patch"""
    LATENT = 5
    """row = patch; posterior noise, then latent dropout"""


def _multiply_high_low(multiplier: int, value: Tensor) -> tuple[Tensor, Tensor]:
    # int64 multiplication wraps modulo 2**64, so both halves of the 32x32 product are exact.
    product = value * multiplier
    return (product >> 32) & _LOW_32_BITS, product & _LOW_32_BITS


def philox_words(seed: Tensor, row: Tensor, block: Tensor, stream: int) -> Tensor:
    """Four 32-bit words for each (row, block).

    Args:
        seed: int64, one element.
        row: int64, any shape.
        block: int64 in [0, 2**32), broadcastable with ``row``.
        stream: a member of :class:`Stream`.

    Returns:
        int64 [*broadcast shape, 4], each value in [0, 2**32).
    """
    row, block = torch.broadcast_tensors(row, block)
    seed = seed.reshape(())
    key_0, key_1 = seed & _LOW_32_BITS, (seed >> 32) & _LOW_32_BITS
    c0, c1, c2 = block, row & _LOW_32_BITS, (row >> 32) & _LOW_32_BITS
    c3 = torch.full_like(row, int(stream))
    for i in range(_ROUNDS):
        if i > 0:
            key_0, key_1 = (key_0 + _WEYL_0) & _LOW_32_BITS, (key_1 + _WEYL_1) & _LOW_32_BITS
        high_0, low_0 = _multiply_high_low(_MULTIPLIER_0, c0)
        high_1, low_1 = _multiply_high_low(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _row_words(seed: Tensor, rows: Tensor, first: int, count: int, stream: int) -> Tensor:
    """Words of elements [first, first + count) of every row, rounded out to whole blocks."""
    blocks = torch.arange(first // 4, (first + count + 3) // 4, device=rows.device)
    words = philox_words(seed, rows.unsqueeze(-1), blocks, stream)
    return words.flatten(-2)


def to_uniform(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Words to uniforms in the open interval (0, 1): ((word >> 9) + 1/2) * 2**-23.

    The half step makes 24 significant bits, so the value is exact in float32: the same number on
    every backend and never 0 or 1 (with 24 bits of word, the top value would round to 1).
    """
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def uniform(
    seed: Tensor,
    rows: Tensor,
    count: int,
    stream: int,
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniforms in (0, 1): elements [first, first + count) of each row.

    Args:
        seed: int64, one element, on the device of ``rows``.
        rows: int64 [*], row numbers.
        count: elements per row.
        stream: a member of :class:`Stream`.
        first: the first element.
        dtype: floating dtype of the result (float32 and float64 hold the values exactly).

    Returns:
        [*, count]
    """
    words = _row_words(seed, rows, first, count, stream)
    skip = first % 4
    return to_uniform(words[..., skip : skip + count], dtype)


def normal(
    seed: Tensor,
    rows: Tensor,
    count: int,
    stream: int,
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals by Box-Muller on words (0, 1) and (2, 3) of each block.

    Arguments and result as :func:`uniform`.
    """
    u = to_uniform(_row_words(seed, rows, first, count, stream), dtype)
    u = u.unflatten(-1, (-1, 2))
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0]))
    angle = (2.0 * math.pi) * u[..., 1]
    pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    skip = first % 4
    return pair.flatten(-2)[..., skip : skip + count]
