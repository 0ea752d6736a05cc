"""The CUDA kernels of temperature sampling, on the host executor, return the reference's values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from calm_kernels.reference import temperature_sampling as reference

sys.path.insert(0, str(Path(__file__).parents[1] / "temperature_sampling"))

from patch_collisions import with_one_hash

ROWS = np.array([0, 7, 2**33, -5, 1, 3, 4], dtype=np.int64)
TEMPERATURES = (1.0, 0.8, 0.5, 0.37, 0.1)
# (B, N, K): single draws and ids, less and more draws than threads, the usual size, the most.
SHAPES = [
    (3, 1, 1),
    (2, 2, 64),
    (4, 9, 3),
    (2, 127, 2),
    (2, 129, 1),
    (3, 200, 4),
    (2, 513, 5),
    (1, 8192, 2),
]


def assert_vote_equals_the_reference(
    simt: ModuleType, tokens: np.ndarray, exponent: np.ndarray, seed: int, order: int, poison: int
) -> None:
    # Sequences of one draw go without rows.
    rows = ROWS[: len(tokens) if tokens.shape[1] > 1 else 0]
    vote = simt.vote_int64 if tokens.dtype == np.int64 else simt.vote_int32
    got = vote(tokens, exponent, rows, seed, order, poison)
    expected = reference.batch_temperature_sample(
        torch.from_numpy(tokens),
        torch.from_numpy(exponent),
        torch.from_numpy(rows) if rows.size else None,
        torch.tensor([seed]),
    )
    for one, two in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, two.numpy())


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("law", ["zipf", "near-degenerate", "all-distinct"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_vote_equals_the_reference(
    simt: ModuleType, shape: tuple[int, int, int], law: str, dtype: type
) -> None:
    batch_size, num_draws, _ = shape
    random = np.random.default_rng(num_draws)
    top = np.iinfo(np.int32).max if dtype == np.int32 else 2**45
    if law == "all-distinct":
        outcome = np.arange(batch_size * num_draws).reshape(batch_size, num_draws)
    else:
        sharpness = 1.5 if law == "zipf" else 9.0
        outcome = random.zipf(sharpness, (batch_size, num_draws)).clip(max=1000)
    tokens = np.full(shape, top, dtype=dtype)
    tokens[..., -1] -= outcome.astype(dtype)
    for i in range(2 if num_draws < 8192 else 1):
        # Neighbouring shapes and the two rounds start at different temperatures.
        exponent = 1 / np.roll(TEMPERATURES, num_draws + 3 * i)[:batch_size]
        assert_vote_equals_the_reference(simt, tokens, exponent, 2**40 + i, i, (0xA5, 0xFF)[i])


def test_the_vote_takes_a_temperature_for_each_sequence_and_strided_draws(
    simt: ModuleType,
) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 3, (40, 6, 2)).transpose(1, 0, 2)
    exponent = np.array([1.0, 1.3, 2.0, 3.7, 11.0, 2.0**53])
    for seed in range(6):
        assert_vote_equals_the_reference(simt, tokens, exponent, seed, seed, 0xA5)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_different_patches_of_one_hash_are_told_apart(simt: ModuleType, patch_size: int) -> None:
    patches = with_one_hash(60, patch_size)
    tokens = np.repeat(patches, np.arange(60) % 4 + 1, axis=0)
    tokens = np.random.default_rng(0).permutation(tokens)[None]
    for order, exponent in enumerate((1.0, 2.7, 4.0)):
        assert_vote_equals_the_reference(simt, tokens, np.array([exponent]), 5, order, 0xFF)


def test_the_most_draws_fit_the_shared_memory_of_every_chip(simt: ModuleType) -> None:
    assert simt.vote_shared_bytes(8192) <= 98 * 1024
    assert simt.vote_shared_bytes(200) <= 4 * 1024


def rounds(dtype: type, patch_size: int, num_draws: int) -> Iterator[tuple]:
    """Arguments of rounds that follow each other; a block is left partly empty."""
    random = np.random.default_rng(patch_size)
    b = 1 / np.array([*TEMPERATURES, 0.6, 0.3])
    num_equal = np.floor(b).astype(np.int64)
    candidate = np.full((7, patch_size), -1, dtype=dtype)
    progress = reference.exact_temperature_start(7, torch.device("cpu")).numpy()
    top = np.iinfo(np.int32).max if dtype == np.int32 else 2**45
    for _ in range(4):
        draws = np.full((7, num_draws, patch_size), top, dtype=dtype)
        draws[..., -1] -= (random.random((7, num_draws)) ** 3 * 4).astype(dtype)
        arguments = (draws, candidate, progress, num_equal, b - num_equal, ROWS)
        yield arguments
        candidate, progress = expected_step(*arguments, 12345, 3 * num_draws + 1)


def expected_step(*arguments) -> tuple[np.ndarray, np.ndarray]:
    *arrays, seed, max_draws = arguments
    candidate, progress = reference.exact_temperature_step(
        *map(torch.from_numpy, arrays), torch.tensor([seed]), max_draws
    )
    return candidate.numpy(), progress.numpy()


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("patch_size", [1, 4, 64])
@pytest.mark.parametrize("num_draws", [0, 1, 3, 40, 100])
def test_the_exact_step_equals_the_reference(
    simt: ModuleType, dtype: type, patch_size: int, num_draws: int
) -> None:
    step = simt.exact_step_int64 if dtype == np.int64 else simt.exact_step_int32
    for order, arguments in enumerate(rounds(dtype, patch_size, num_draws)):
        got = step(*arguments, 12345, 3 * num_draws + 1, order)
        expected = expected_step(*arguments, 12345, 3 * num_draws + 1)
        for one, two in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, two)
