"""The energy score of N samples against a Gaussian or against explicit targets: the specification.

For samples x_1..x_N and targets y of one position, 0 < alpha < 2,

    S = 1/(N(N-1)) sum_{n != k} ||x_n - x_k||^alpha  -  2/N sum_n E ||x_n - y||^alpha

with the expectation over explicit targets, over Monte Carlo draws of y ~ N(mean, exp(log_std)^2),
or over that law itself in closed form (:mod:`calm_kernels.reference.expected_distance`). S is
strictly proper and higher is better; it is at most zero in expectation, a loss is -S.

Conventions every backend shares: distances come from direct differences; a zero distance has zero
gradient for every alpha; a position with a score that is not finite scores NaN, and so do its
gradients; log_std = -inf is the law without spread.

Source: Gneiting and Raftery, "Strictly proper scoring rules" (2007), section 4.3; arXiv 2510.27688.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels.reference.expected_distance import expected_distance_power, power_of_square
from calm_kernels.reference.philox import Stream, normal


def pair_term(samples: Tensor, alpha: float) -> Tensor:
    """Mean of ||x_n - x_k||^alpha over the pairs n != k: samples [N, *, D] -> [*]."""
    num_samples = samples.shape[0]
    total = samples.new_zeros(samples.shape[1:-1])
    for n in range(num_samples - 1):
        square = (samples[n] - samples[n + 1 :]).square().sum(-1)
        total = total + power_of_square(square, alpha / 2.0).sum(0)
    return total * (2.0 / (num_samples * (num_samples - 1)))


def target_term(samples: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """Mean of ||x_n - y_m||^alpha over n and m: [N, *, D], [M, *, D] -> [*]."""
    total = samples.new_zeros(samples.shape[1:-1])
    for sample in samples:
        square = (sample - targets).square().sum(-1)
        total = total + power_of_square(square, alpha / 2.0).sum(0)
    return total / (samples.shape[0] * targets.shape[0])


def standard_normals(
    seed: Tensor, positions: Tensor, first: int, count: int, size: int, dtype: torch.dtype
) -> Tensor:
    """Noise of ``count`` Monte Carlo targets from ``first`` on: int64 [P] -> [count, P, D].

    Philox stream ENERGY_TARGETS, row = position, element m * D + d.
    """
    noise = normal(
        seed, positions, count * size, Stream.ENERGY_TARGETS, first=first * size, dtype=dtype
    )
    return noise.reshape(*positions.shape, count, size).movedim(-2, 0)


def monte_carlo_targets(mean: Tensor, log_std: Tensor, num_targets: int, seed: Tensor) -> Tensor:
    """Draws of N(mean, exp(log_std)^2): [*, D] -> [M, *, D]; positions are numbered row by row."""
    size = mean.shape[-1]
    positions = torch.arange(mean[..., 0].numel(), device=mean.device)
    noise = standard_normals(seed, positions, 0, num_targets, size, mean.dtype)
    return mean + log_std.exp() * noise.reshape(num_targets, *mean.shape)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 computes in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def energy_score(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    alpha: float = 1.0,
    estimator: str = "closed_form",
    num_targets: int = 100,
    seed: Tensor | None = None,
) -> Tensor:
    """samples [N, *, D], mean and log_std [*, D] -> [*], float32 (float64 for float64).

    ``seed`` (int64, one element) is needed for ``"monte_carlo"`` alone. Differentiable twice.
    """
    dtype = compute_dtype(samples.dtype)
    samples, mean, log_std = samples.to(dtype), mean.to(dtype), log_std.to(dtype)
    if estimator == "closed_form":
        distances = expected_distance_power(samples - mean, log_std.exp(), alpha)
        target = distances.mean(0)
    else:
        assert seed is not None
        target = target_term(samples, monte_carlo_targets(mean, log_std, num_targets, seed), alpha)
    return pair_term(samples, alpha) - 2.0 * target


def energy_score_from_targets(samples: Tensor, targets: Tensor, *, alpha: float = 1.0) -> Tensor:
    """samples [N, *, D], targets [M, *, D] -> [*], float32 (float64 for float64)."""
    dtype = compute_dtype(samples.dtype)
    samples, targets = samples.to(dtype), targets.to(dtype)
    return pair_term(samples, alpha) - 2.0 * target_term(samples, targets, alpha)
