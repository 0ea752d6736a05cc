"""What the host executor must catch, on kernels that are wrong on purpose."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

SEEDS = range(8)


def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(3 * 64).astype(np.float32)


@pytest.mark.parametrize("kind", ["block", "warp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_reduction_is_right_in_every_thread_order(
    simt: ModuleType, kind: str, seed: int
) -> None:
    expected = values().reshape(3, 64).astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(simt.self_test_sum(values(), kind, seed), expected, rtol=1e-5)


def test_a_missing_barrier_shows_in_every_shuffled_thread_order(simt: ModuleType) -> None:
    expected = values().reshape(3, 64).astype(np.float64).sum(axis=1)
    for seed in SEEDS:
        wrong = simt.self_test_sum(values(), "block_without_barriers", seed)
        assert not np.allclose(wrong, expected, rtol=1e-3)


def test_shared_memory_starts_poisoned(simt: ModuleType) -> None:
    assert simt.self_test_fault("read_before_write", 0xA5) == 0xA5
    assert simt.self_test_fault("read_before_write", 0x7F) == 0x7F


def test_a_barrier_that_can_never_be_passed_is_an_error_and_not_a_hang(simt: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="can never go on: 32 threads wait at __syncthreads"):
        simt.self_test_fault("divergent_barrier", 0)
