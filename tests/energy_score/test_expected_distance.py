"""The closed form of the target term against exact values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from calm_kernels.reference.expected_distance import (
    CORRECTION_RULES,
    correction_nodes,
    exact_expected_distance_power,
    expected_distance_power,
    gamma_moment_ratio,
    series_coefficients,
    unit_mean_law,
)

ALPHAS = (0.01, 0.3, 0.5, 1.0, 1.37, 1.5, 1.99)
Laws = Callable[[int, int, int], tuple[Tensor, Tensor]]


def chi_square_moment(degrees: np.ndarray, a: float) -> np.ndarray:
    return 2.0**a * np.exp(special.gammaln(degrees / 2.0 + a) - special.gammaln(degrees / 2.0))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dimensions", [1, 2, 3, 8, 64, 700])
def test_exact_value_with_equal_spread_is_the_moment_of_a_noncentral_chi_law(
    dimensions: int, alpha: float
) -> None:
    generator = torch.Generator().manual_seed(dimensions)
    for std in (0.003, 0.7, 9.0):
        for size in (0.0, 0.3, 2.0):
            offset = torch.randn(dimensions, dtype=torch.float64, generator=generator) * std * size
            # A Poisson mixture of chi-square laws.
            rate = float(offset.square().sum()) / std**2 / 2.0
            k = np.arange(math.floor(rate + 20.0 * math.sqrt(rate) + 40.0))
            mixture = stats.poisson.pmf(k, rate) * chi_square_moment(
                dimensions + 2.0 * k, alpha / 2
            )
            expected = std**alpha * mixture.sum()
            actual = exact_expected_distance_power(
                offset, torch.full((dimensions,), std, dtype=torch.float64), alpha
            )
            assert abs(float(actual) / expected - 1.0) < 1e-10


def test_exact_value_in_one_dimension_is_the_mean_of_the_folded_normal() -> None:
    offset = torch.tensor([0.0, 0.01, 1.0, -3.0, 40.0], dtype=torch.float64)
    std = torch.tensor([1.0, 5.0, 0.5, 2.0, 0.3], dtype=torch.float64)
    folded = std * math.sqrt(2.0 / math.pi) * torch.exp(-0.5 * (offset / std) ** 2)
    folded += offset * torch.erf(offset / (std * math.sqrt(2.0)))
    actual = exact_expected_distance_power(offset[:, None], std[:, None], 1.0)
    torch.testing.assert_close(actual, folded, rtol=1e-10, atol=0.0)


def ruben_moment(offset: np.ndarray, std: np.ndarray, a: float, terms: int = 400) -> float:
    """E Q^a by Ruben's series: Q as a mixture of chi-square laws of D + 2k degrees of freedom."""
    weights = std**2
    scale = weights.min()
    ratio = 1.0 - scale / weights
    noncentral = (offset / std) ** 2
    k = np.arange(1, terms)[:, None]
    g = 0.5 * (ratio**k + k * noncentral * (scale / weights) * ratio ** (k - 1)).sum(axis=1)
    mixture = np.zeros(terms)
    mixture[0] = np.exp(-0.5 * noncentral.sum()) * np.sqrt(scale / weights).prod()
    for n in range(1, terms):
        mixture[n] = (g[:n][::-1] * mixture[:n]).sum() / n
    assert abs(mixture.sum() - 1.0) < 1e-12
    degrees = len(std) + 2.0 * np.arange(terms)
    return float(scale**a * (mixture * chi_square_moment(degrees, a)).sum())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_exact_value_with_uneven_spread_is_that_of_rubens_series(alpha: float) -> None:
    rng = np.random.default_rng(0)
    for dimensions in (2, 3, 5, 20):
        std = np.exp(rng.uniform(-0.4, 0.4, dimensions))
        offset = rng.normal(size=dimensions) * std
        expected = ruben_moment(offset, std, alpha / 2.0)
        actual = exact_expected_distance_power(
            torch.from_numpy(offset), torch.from_numpy(std), alpha
        )
        assert abs(float(actual) / expected - 1.0) < 1e-10


def test_gamma_moment_ratio_is_that_of_the_gamma_function() -> None:
    k = torch.logspace(math.log10(0.5), 3, 60, dtype=torch.float64)
    for a in (0.005, 0.25, 0.5, 0.75, 0.995):
        exact = torch.from_numpy(special.poch(k.numpy(), a)) * k**-a
        torch.testing.assert_close(gamma_moment_ratio(1.0 / k, a), exact, rtol=1e-11, atol=0.0)
        in_float32 = gamma_moment_ratio((1.0 / k).float(), a)
        torch.testing.assert_close(in_float32.double(), exact, rtol=2e-6, atol=0.0)


def test_series_coefficients_are_moments_of_the_gamma_law() -> None:
    k = torch.logspace(math.log10(5.0), 3, 40, dtype=torch.float64)
    for a in (0.005, 0.25, 0.5, 0.9):
        for j, coefficient in zip((3, 4), series_coefficients(1.0 / k, a), strict=True):
            # j-th derivative of q^a, averaged over the law with mean one, over j! and its a-moment.
            falling = math.prod(a - i for i in range(j)) / math.factorial(j)
            moments = special.gammaln(k.numpy() + a - j) - special.gammaln(k.numpy() + a)
            expected = falling * torch.from_numpy(np.exp(moments)) * k**j
            torch.testing.assert_close(coefficient, expected, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 5, 6, 7, 8, 24, 64, 128, 512])
def test_closed_form_is_within_4e_6_of_exact_everywhere_and_1e_6_nearly_everywhere(
    dimensions: int, random_laws: Laws
) -> None:
    offset, std = random_laws(dimensions, min(250, 30000 // dimensions), dimensions)
    errors = []
    for alpha in (*ALPHAS, 0.1 + 1.8 * (dimensions * 0.618 % 1.0)):
        exact = exact_expected_distance_power(offset, std, alpha)
        value = expected_distance_power(offset, std, alpha)
        in_float32 = expected_distance_power(offset.float(), std.float(), alpha)
        errors.append(((value - exact) / exact).abs())
        assert float(((in_float32.double() - value) / exact).abs().max()) < 1e-5
    error = torch.cat(errors)
    assert float(error.max()) < 4e-6
    assert float(error.quantile(0.9)) < 1e-6
    assert float(error.median()) < 1e-7


def test_every_correction_is_taken_and_needed(random_laws: Laws) -> None:
    offset, std = random_laws(24, 2000, 0)
    exact = exact_expected_distance_power(offset, std, 1.0)
    mu, law = unit_mean_law(offset, std)
    error = (mu.sqrt() * gamma_moment_ratio(law.rho, 0.5) / exact - 1.0).abs()
    nodes = correction_nodes(law, 0.5)
    for count in (0, *(rule.count for rule in CORRECTION_RULES)):
        assert (nodes == count).double().mean() > 0.1
        # Without its correction the Gamma law would miss the bound.
        assert float(error[nodes == count].max()) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thousands_of_dimensions_keep_the_bound(dtype: torch.dtype, random_laws: Laws) -> None:
    offset, std = random_laws(4096, 24, 5)
    exact = exact_expected_distance_power(offset, std, 1.5)
    value = expected_distance_power(offset.to(dtype), std.to(dtype), 1.5).double()
    assert float((value / exact - 1.0).abs().max()) < 1e-5


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 1.9])
def test_vanishing_spread_gives_the_plain_distance(alpha: float) -> None:
    offset = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    plain = offset.norm(dim=-1) ** alpha
    for std in (0.0, 1e-30, 1e-8, 1e-4):
        value = expected_distance_power(offset, torch.full((5,), std), alpha)
        torch.testing.assert_close(value, plain, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 1.9])
@pytest.mark.parametrize("unit", [1e-14, 1e-6, 1e6, 1e15])
def test_relative_error_does_not_depend_on_scale(
    alpha: float, unit: float, random_laws: Laws
) -> None:
    offset, std = (tensor.float() for tensor in random_laws(16, 200, 1))
    value = expected_distance_power(offset * unit, std * unit, alpha).double()
    expected = expected_distance_power(offset, std, alpha).double() * unit**alpha
    torch.testing.assert_close(value, expected, rtol=5e-6, atol=0.0)
