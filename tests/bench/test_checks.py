from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from calm_kernels.bench import checks
from calm_kernels.bench.checks import LARGEST_Z, Check, paired_z, relative_error


def test_a_check_passes_up_to_its_bound_and_never_for_nan() -> None:
    assert Check(0.5, 0.5, "").passed
    assert not Check(0.51, 0.5, "").passed
    assert not Check(math.nan, 0.5, "").passed
    assert not Check(math.inf, 0.5, "").passed


def test_the_relative_error_is_that_of_the_whole_vector() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert relative_error(exact, exact) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), exact))


def test_a_result_of_another_shape_is_infinitely_wrong() -> None:
    exact = torch.ones(4)
    assert relative_error(torch.ones(4, 1), exact) == math.inf
    assert checks.share_of_mismatches(torch.ones(3), exact).error == math.inf
    assert paired_z(torch.ones(3), exact) == math.inf


def test_a_nan_among_several_results_fails_wherever_it_stands() -> None:
    good, bad = torch.ones(2), torch.full((2,), math.nan)
    for results in ([good, bad], [bad, good]):
        assert not checks.largest_relative_error(results, [good, good], 1.0).passed


def test_mismatches_are_counted() -> None:
    exact = torch.arange(8)
    assert checks.share_of_mismatches(exact.clone(), exact).passed
    wrong = exact.clone()
    wrong[3] = 0
    assert checks.share_of_mismatches(wrong, exact).error == 1 / 8


@pytest.mark.parametrize("count", [4, 16, 512])
def test_z_is_the_normal_quantile_of_students_t(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    exact = torch.full((count,), 100.0, dtype=torch.float64)
    for shift in (0.5, 2.0):
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        difference = noise + shift * math.sqrt(16 / count)
        t = stats.ttest_1samp(difference.numpy(), 0.0)
        expected = stats.norm.isf(t.pvalue / 2)
        assert paired_z(exact + difference, exact) == pytest.approx(expected, rel=0.02)


def test_z_accepts_noise_and_sees_a_bias_below_the_noise_of_one_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.full((4000,), 3.0, dtype=torch.float64)
    for _ in range(20):
        noise = 0.3 * torch.randn(4000, generator=generator, dtype=torch.float64)
        assert paired_z(exact + noise, exact) < LARGEST_Z
        assert paired_z(exact + noise + 0.05, exact) > LARGEST_Z


def test_z_is_infinite_for_results_that_are_nothing_but_noise() -> None:
    exact = torch.randn(100, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(100, generator=torch.Generator().manual_seed(1))
    assert paired_z(noise, exact) == math.inf
    assert paired_z(torch.full((100,), math.nan), exact) == math.inf


def test_z_of_equal_values_is_zero_and_of_a_constant_shift_infinite() -> None:
    exact = torch.full((9,), 4.0)
    assert paired_z(exact, exact) == 0.0
    assert paired_z(exact + 0.25, exact) == math.inf
