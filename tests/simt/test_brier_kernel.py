from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from calm_kernels.reference import brier

# (S, P, K, n): several rounds of votes, a partial round, a single pair, prefixes shorter than K.
SHAPES = [(8, 11, 4, 4), (2, 1, 1, 1), (3, 5, 7, 4), (33, 3, 2, 2), (9, 2, 8, 8), (12, 4, 40, 40)]


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("seed", "poison"), [(0, 0xA5), (1, 0x00), (2, 0xFF)])
def test_the_cuda_kernel_equals_the_reference(
    simt: ModuleType, dtype: type, shape: tuple[int, int, int, int], seed: int, poison: int
) -> None:
    num_samples, positions, patch_size, ngrams = shape
    random = np.random.default_rng(seed)
    samples = random.integers(0, 2, (num_samples, positions, patch_size)).astype(dtype)
    target = random.integers(0, 2, (positions, patch_size)).astype(dtype)
    inputs = (torch.from_numpy(samples), torch.from_numpy(target), ngrams)
    expected = (brier.brier_scores(*inputs), *brier.brier_rates(*inputs))
    for blocks in (1, 2, 7):
        results = simt.brier(samples, target, ngrams, blocks, seed, poison)
        for result, value in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, value.numpy(), rtol=1e-6, atol=1e-7)


def test_ids_that_differ_only_in_high_bits_are_different(simt: ModuleType) -> None:
    samples = np.array([[[1]], [[1 + 2**32]], [[1]]], dtype=np.int64)
    scores, _, _ = simt.brier(samples, np.array([[1]], dtype=np.int64), 1, 1, 0, 0)
    np.testing.assert_allclose(scores, [[2 / 3 * 2 - 1 / 3]], rtol=1e-6)
