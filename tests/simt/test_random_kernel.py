from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from calm_kernels.reference import philox

ROWS = np.array([0, 1, 7, 2**32 + 5, -3], dtype=np.int64)


@pytest.mark.parametrize(("count", "first"), [(1, 0), (7, 0), (5, 2), (64, 61), (3, 4 * 2**20 + 1)])
@pytest.mark.parametrize("seed", [0, 12345, -(2**62) + 7])
def test_the_cuda_kernels_draw_the_words_of_the_reference(
    simt: ModuleType, count: int, first: int, seed: int
) -> None:
    seed_tensor, rows = torch.tensor([seed]), torch.from_numpy(ROWS)
    uniform = philox.uniform(seed_tensor, rows, count, 3, first=first)
    normal = philox.normal(seed_tensor, rows, count, 3, first=first, dtype=torch.float64)
    for blocks in (1, 3):
        got = simt.philox_uniform(seed, ROWS, count, first, 3, blocks, seed & 7)
        np.testing.assert_array_equal(got, uniform.numpy())
        got = simt.philox_normal(seed, ROWS, count, first, 3, blocks, seed & 7)
        np.testing.assert_allclose(got, normal.numpy(), rtol=1e-6, atol=2e-6)
