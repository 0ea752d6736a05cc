"""Properties with analytic answers, over inputs that hypothesis chooses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calm_kernels.ops.energy_score import energy_score, energy_score_from_targets

pytestmark = pytest.mark.usefixtures("backend")

sizes = st.tuples(
    st.integers(2, 5),  # samples
    st.integers(1, 4),  # targets
    st.integers(1, 3),  # positions
    st.integers(1, 40),  # dimensions
)
alphas = st.floats(0.05, 1.95)
seeds = st.integers(0, 2**31)
# The fixture only names the backend, which is the same for every example.
examples = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def draw(size: tuple[int, int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """samples [N, P, D], targets [M, P, D], mean and log_std [P, D]."""
    num_samples, _, positions, dimensions = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    samples, targets = normal(num_samples, positions, dimensions), normal(*size[1:])
    return samples, targets, normal(positions, dimensions), 0.7 * normal(positions, dimensions)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@given(size=sizes, alpha=alphas, seed=seeds)
@examples
def test_translation_changes_nothing(
    size: tuple[int, int, int, int], alpha: float, seed: int
) -> None:
    samples, targets, mean, log_std = draw(size, seed)
    shift = 3.0 * mean.roll(1, 0) + 1.0
    for estimator in ("closed_form", "monte_carlo"):
        options = {"alpha": alpha, "estimator": estimator, "num_targets": size[1], "seed": seed}
        expected = energy_score(samples, mean, log_std, **options)  # type: ignore[arg-type]
        close(energy_score(samples + shift, mean + shift, log_std, **options), expected)  # type: ignore[arg-type]
    expected = energy_score_from_targets(samples, targets, alpha=alpha)
    close(energy_score_from_targets(samples + shift, targets + shift, alpha=alpha), expected)


@given(size=sizes, alpha=alphas, seed=seeds)
@examples
def test_rotation_changes_nothing(size: tuple[int, int, int, int], alpha: float, seed: int) -> None:
    samples, targets, mean, log_std = draw(size, seed)
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size[-1], size[-1], dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(square).Q
    expected = energy_score_from_targets(samples, targets, alpha=alpha)
    close(energy_score_from_targets(samples @ rotation, targets @ rotation, alpha=alpha), expected)
    # A Gaussian target keeps its form under rotation where its spread is the same everywhere.
    even = log_std[:, :1].expand_as(log_std)
    expected = energy_score(samples, mean, even, alpha=alpha)
    # The error of the approximation is no invariant, its bound is.
    close(energy_score(samples @ rotation, mean @ rotation, even, alpha=alpha), expected, 1e-5)


@given(size=sizes, alpha=alphas, seed=seeds, scale=st.floats(1e-3, 1e3))
@examples
def test_scaling_by_c_scales_the_score_by_c_to_the_alpha(
    size: tuple[int, int, int, int], alpha: float, seed: int, scale: float
) -> None:
    samples, targets, mean, log_std = draw(size, seed)
    log_scale = torch.tensor(scale, dtype=torch.float64).log()
    for estimator in ("closed_form", "monte_carlo"):
        options = {"alpha": alpha, "estimator": estimator, "num_targets": size[1], "seed": seed}
        expected = energy_score(samples, mean, log_std, **options)  # type: ignore[arg-type]
        scaled = energy_score(scale * samples, scale * mean, log_std + log_scale, **options)  # type: ignore[arg-type]
        close(scaled / scale**alpha, expected)
    expected = energy_score_from_targets(samples, targets, alpha=alpha)
    scaled = energy_score_from_targets(scale * samples, scale * targets, alpha=alpha)
    close(scaled / scale**alpha, expected)


@given(size=sizes, alpha=alphas, seed=seeds)
@examples
def test_order_of_samples_targets_positions_and_dimensions_does_not_matter(
    size: tuple[int, int, int, int], alpha: float, seed: int
) -> None:
    samples, targets, mean, log_std = draw(size, seed)
    closed = energy_score(samples, mean, log_std, alpha=alpha)
    close(energy_score(samples.flip(0), mean, log_std, alpha=alpha), closed)
    close(energy_score(samples.flip(-1), mean.flip(-1), log_std.flip(-1), alpha=alpha), closed)
    close(energy_score(samples.flip(1), mean.flip(0), log_std.flip(0), alpha=alpha).flip(0), closed)
    explicit = energy_score_from_targets(samples, targets, alpha=alpha)
    close(energy_score_from_targets(samples.roll(1, 0), targets.flip(0), alpha=alpha), explicit)


@given(size=sizes, alpha=alphas, seed=seeds)
@examples
def test_the_score_against_many_targets_is_the_mean_over_single_ones(
    size: tuple[int, int, int, int], alpha: float, seed: int
) -> None:
    samples, targets, _, _ = draw(size, seed)
    single = [energy_score_from_targets(samples, y.unsqueeze(0), alpha=alpha) for y in targets]
    close(energy_score_from_targets(samples, targets, alpha=alpha), torch.stack(single).mean(0))


@given(size=sizes, alpha=alphas, seed=seeds)
@examples
def test_the_score_of_many_samples_is_the_mean_over_pairs_of_them(
    size: tuple[int, int, int, int], alpha: float, seed: int
) -> None:
    samples, _, mean, log_std = draw(size, seed)
    pairs = [
        energy_score(samples[[n, k]], mean, log_std, alpha=alpha)
        for n in range(size[0])
        for k in range(n)
    ]
    close(energy_score(samples, mean, log_std, alpha=alpha), torch.stack(pairs).mean(0))


@given(size=sizes, alpha=alphas, seed=seeds)
@examples
def test_gradients_obey_translation_and_scaling(
    size: tuple[int, int, int, int], alpha: float, seed: int
) -> None:
    samples, targets, mean, log_std = (tensor.requires_grad_() for tensor in draw(size, seed))
    score = energy_score(samples, mean, log_std, alpha=alpha)
    by_samples, by_mean, by_log_std = torch.autograd.grad(score.sum(), (samples, mean, log_std))
    close(by_samples.sum(0), -by_mean)
    # Euler's identity of a function that scales with exponent alpha.
    euler = (samples * by_samples).sum((0, -1)) + (mean * by_mean + by_log_std).sum(-1)
    close(euler, alpha * score)
    score = energy_score_from_targets(samples, targets, alpha=alpha)
    by_samples, by_targets = torch.autograd.grad(score.sum(), (samples, targets))
    close(by_samples.sum(0), -by_targets.sum(0))
    close((samples * by_samples).sum((0, -1)) + (targets * by_targets).sum((0, -1)), alpha * score)


@given(alpha=alphas, seed=seeds)
@examples
def test_monte_carlo_approaches_the_closed_form_as_its_targets_grow(
    alpha: float, seed: int
) -> None:
    samples, _, mean, log_std = draw((2, 1, 3, 6), seed)
    closed = energy_score(samples, mean, log_std, alpha=alpha)
    scale = 2.0 * ((samples - mean).square().sum(-1) + log_std.exp().square().sum(-1)).mean(0)
    for num_targets in (16, 256, 4096):
        drawn = energy_score(
            samples,
            mean,
            log_std,
            alpha=alpha,
            estimator="monte_carlo",
            num_targets=num_targets,
            seed=seed,
        )
        # ||x - y||^alpha varies by less than its scale: this is over four standard errors.
        bound = 4.0 * scale ** (alpha / 2.0) / num_targets**0.5
        assert bool(((drawn - closed).abs() < bound).all())
