"""Scores against definitions, exact expectations and each other, on every backend that serves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from calm_kernels.ops.energy_score import energy_score, energy_score_from_targets
from calm_kernels.reference.expected_distance import exact_expected_distance_power
from calm_kernels.reference.philox import Stream, normal

pytestmark = pytest.mark.usefixtures("backend")

BruteForce = Callable[[Tensor, Tensor, float], Tensor]
Laws = Callable[[int, int, int], tuple[Tensor, Tensor]]
ALPHAS = (0.3, 1.0, 1.7)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gaussian_case(
    num_samples: int, positions: tuple[int, ...], size: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    samples = randn(num_samples, *positions, size, seed=seed)
    mean = randn(*positions, size, seed=seed + 1)
    return samples, mean, 0.5 * randn(*positions, size, seed=seed + 2) - 0.7


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("num_samples", "num_targets", "size"), [(2, 1, 1), (3, 4, 7), (9, 2, 33)])
def test_explicit_targets_score_as_defined(
    num_samples: int, num_targets: int, size: int, alpha: float, brute_force: BruteForce
) -> None:
    samples = randn(num_samples, 5, size, seed=0)
    targets = randn(num_targets, 5, size, seed=1)
    expected = brute_force(samples, targets, alpha)
    actual = energy_score_from_targets(samples, targets, alpha=alpha)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    in_float32 = energy_score_from_targets(samples.float(), targets.float(), alpha=alpha)
    assert in_float32.dtype == torch.float32
    torch.testing.assert_close(in_float32.double(), expected, rtol=0.0, atol=1e-5 * size)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1, 2, 5, 16, 64, 131])
def test_closed_form_is_the_exact_expectation_over_the_target(
    size: int, alpha: float, random_laws: Laws
) -> None:
    offset, std = random_laws(size, 80, 100 + size)
    mean = randn(80, size, seed=3)
    samples = torch.stack([mean + offset, mean + 0.3 * offset, mean - offset])
    target = exact_expected_distance_power(samples - mean, std, alpha).mean(0)
    pairs = sum(
        (samples[n] - samples[k]).norm(dim=-1) ** alpha / 3.0 for n in range(3) for k in range(n)
    )
    scale = pairs + 2.0 * target
    actual = energy_score(samples, mean, std.log(), alpha=alpha)
    assert float(((actual - (pairs - 2.0 * target)) / scale).abs().max()) < 1e-5
    # What rounding the inputs alone does to a distance is no error of the score.
    inputs = [tensor.float() for tensor in (samples, mean, std.log())]
    in_float32 = energy_score(*inputs, alpha=alpha).double()
    of_rounded = energy_score(*(tensor.double() for tensor in inputs), alpha=alpha)
    assert float(((in_float32 - of_rounded) / scale).abs().max()) < 1e-5


def test_float32_keeps_the_bound_over_thousands_of_dimensions(random_laws: Laws) -> None:
    offset, std = (tensor.float() for tensor in random_laws(4096, 24, 5))
    samples, mean = torch.stack([offset, offset]), torch.zeros_like(offset)
    log_std = std.log()
    exact = exact_expected_distance_power(offset, log_std.double().exp(), 1.5)
    actual = energy_score(samples, mean, log_std, alpha=1.5).double() / -2.0
    assert float((actual / exact - 1.0).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_monte_carlo_draws_the_words_of_its_philox_stream(
    dtype: torch.dtype, brute_force: BruteForce
) -> None:
    num_targets, size = 5, 7
    inputs = [tensor.to(dtype) for tensor in gaussian_case(3, (2, 3), size)]
    samples, mean, log_std = inputs
    seed = torch.tensor([2**40 + 17])
    noise = normal(seed, torch.arange(6), num_targets * size, Stream.ENERGY_TARGETS, dtype=dtype)
    targets = torch.stack(
        [
            mean.reshape(6, size)
            + log_std.exp().reshape(6, size) * noise[:, m * size : (m + 1) * size]
            for m in range(num_targets)
        ]
    )
    expected = brute_force(samples.reshape(3, 6, size), targets, 1.2).reshape(2, 3)
    actual = energy_score(
        samples,
        mean,
        log_std,
        alpha=1.2,
        estimator="monte_carlo",
        num_targets=num_targets,
        seed=2**40 + 17,
    )
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_monte_carlo_agrees_with_the_closed_form_within_four_standard_errors(alpha: float) -> None:
    # Positions that are alike but for their draws: their spread is the standard error.
    positions = 1000
    samples, mean, log_std = (
        tensor.expand(*tensor.shape[:-2], positions, 6) for tensor in gaussian_case(4, (1,), 6)
    )
    draws = energy_score(
        samples, mean, log_std, alpha=alpha, estimator="monte_carlo", num_targets=50, seed=3
    )
    closed = energy_score(samples[:, :1], mean[:1], log_std[:1], alpha=alpha)
    standard_error = float(draws.std()) / math.sqrt(positions)
    assert abs(float(draws.mean() - closed)) < 4.0 * standard_error
    # The power of this test: spread 5% too large would be seen.
    wrong = energy_score(samples[:, :1], mean[:1], log_std[:1] + 0.05, alpha=alpha)
    assert abs(float(draws.mean() - wrong)) > 4.0 * standard_error


def test_the_same_seed_gives_the_same_score_and_another_seed_another() -> None:
    inputs = gaussian_case(2, (4,), 3)

    def score(seed: int | Tensor | None) -> Tensor:
        return energy_score(*inputs, estimator="monte_carlo", num_targets=3, seed=seed)

    assert torch.equal(score(5), score(torch.tensor([5])))
    assert (score(5) != score(6)).all()
    torch.manual_seed(0)
    first = score(None)
    assert (score(None) != first).all()
    torch.manual_seed(0)
    assert torch.equal(score(None), first)


def test_positions_are_numbered_over_all_leading_dimensions() -> None:
    samples, mean, log_std = gaussian_case(3, (2, 5), 4)
    whole = energy_score(samples, mean, log_std, estimator="monte_carlo", num_targets=4, seed=1)
    flat = energy_score(
        samples.reshape(3, 10, 4),
        mean.reshape(10, 4),
        log_std.reshape(10, 4),
        estimator="monte_carlo",
        num_targets=4,
        seed=1,
    )
    assert whole.shape == (2, 5)
    assert torch.equal(whole.flatten(), flat)


@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_long_inputs_score_as_their_parts_do(estimator: str) -> None:
    """Blocks of positions leave no seam, whatever their size."""
    samples, mean, log_std = (tensor.float() for tensor in gaussian_case(6, (1500,), 64))
    options = {"estimator": estimator, "num_targets": 2, "seed": 0}
    whole = energy_score(samples, mean, log_std, **options)  # type: ignore[arg-type]
    # Monte Carlo numbers positions from the first, so a part must start there.
    part = energy_score(samples[:, :700], mean[:700], log_std[:700], **options)  # type: ignore[arg-type]
    torch.testing.assert_close(whole[:700], part, rtol=1e-6, atol=1e-6)


def test_no_leading_dimension_and_no_position() -> None:
    samples, mean, log_std = gaussian_case(3, (1,), 4)
    single = energy_score(samples[:, 0], mean[0], log_std[0])
    assert single.shape == ()
    assert torch.equal(single, energy_score(samples, mean, log_std)[0])
    targets = samples + 1.0
    assert energy_score_from_targets(samples[:, 0], targets[:, 0]).shape == ()
    for estimator in ("closed_form", "monte_carlo"):
        empty = energy_score(samples[:, :0], mean[:0], log_std[:0], estimator=estimator)
        assert empty.shape == (0,)
    assert energy_score_from_targets(samples[:, :0], targets[:, :0]).shape == (0,)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_low_precision_inputs_are_computed_in_float32(dtype: torch.dtype, estimator: str) -> None:
    inputs = [tensor.to(dtype) for tensor in gaussian_case(4, (6,), 40)]
    options = {"estimator": estimator, "num_targets": 5, "seed": 0, "alpha": 0.8}
    actual = energy_score(*inputs, **options)  # type: ignore[arg-type]
    expected = energy_score(*(tensor.float() for tensor in inputs), **options)  # type: ignore[arg-type]
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_explicit_targets_are_computed_in_float32(dtype: torch.dtype) -> None:
    samples, targets = randn(4, 6, 40, seed=0).to(dtype), randn(3, 6, 40, seed=1).to(dtype)
    actual = energy_score_from_targets(samples, targets)
    expected = energy_score_from_targets(samples.float(), targets.float())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def strided(tensor: Tensor, kind: str) -> Tensor:
    if kind == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "gapped":
        return torch.stack([tensor, tensor + 1.0], dim=-1)[..., 0]
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("kind", ["transposed", "gapped", "positions_first"])
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_strided_inputs_score_as_contiguous_ones(kind: str, estimator: str) -> None:
    inputs = gaussian_case(3, (4, 5), 6)
    options = {"estimator": estimator, "num_targets": 3, "seed": 0}
    views = [strided(tensor, kind) for tensor in inputs]
    assert not any(view.is_contiguous() for view in views)
    expected = energy_score(*inputs, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(energy_score(*views, **options), expected, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]
    explicit = energy_score_from_targets(views[0], views[0][:2] + 1.0)
    expected = energy_score_from_targets(inputs[0], inputs[0][:2] + 1.0)
    torch.testing.assert_close(explicit, expected, rtol=1e-12, atol=1e-12)


def test_expanded_inputs_score_as_their_copies() -> None:
    samples, mean, log_std = gaussian_case(3, (4,), 5)
    shared = log_std[:1].expand(4, 5)
    actual = energy_score(samples, mean, shared)
    assert torch.equal(actual, energy_score(samples, mean, shared.clone()))


@pytest.mark.parametrize(
    ("which", "value"),
    # log_std = -inf is the law without spread, see below.
    [(i, v) for i in range(3) for v in (math.nan, math.inf, -math.inf) if (i, v) != (2, -math.inf)],
)
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_a_value_that_is_not_finite_makes_its_own_position_nan(
    which: int, estimator: str, value: float
) -> None:
    inputs = gaussian_case(3, (4,), 5)
    options = {"estimator": estimator, "num_targets": 3, "seed": 0}
    clean = energy_score(*inputs, **options)  # type: ignore[arg-type]
    inputs[which][..., 2, 1] = value
    score = energy_score(*inputs, **options)  # type: ignore[arg-type]
    assert score[2].isnan()
    others = torch.tensor([0, 1, 3])
    assert torch.equal(score[others], clean[others])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_an_explicit_value_that_is_not_finite_makes_its_own_position_nan(
    which: int, value: float
) -> None:
    inputs = [randn(3, 4, 5, seed=0), randn(2, 4, 5, seed=1)]
    clean = energy_score_from_targets(*inputs)
    inputs[which][1, 2, 1] = value
    score = energy_score_from_targets(*inputs)
    assert score[2].isnan()
    others = torch.tensor([0, 1, 3])
    assert torch.equal(score[others], clean[others])


@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_log_std_of_minus_infinity_is_the_target_without_spread(estimator: str) -> None:
    samples, mean, log_std = gaussian_case(3, (4,), 5)
    score = energy_score(
        samples, mean, torch.full_like(log_std, -math.inf), estimator=estimator, num_targets=2
    )
    expected = energy_score_from_targets(samples, mean.unsqueeze(0))
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("form", ["closed_form", "monte_carlo", "explicit"])
def test_the_true_law_scores_best_among_forecasts(form: str, alpha: float) -> None:
    positions, size = 800, 3
    mean = torch.zeros(positions, size, dtype=torch.float64)
    log_std = torch.zeros_like(mean)
    noise = randn(12, positions, size, seed=0)
    truth = randn(4, positions, size, seed=1)
    scores = {}
    for shift in (-0.5, -0.25, 0.0, 0.25, 0.5):
        for spread in (0.5, 0.75, 1.0, 1.33, 2.0):
            forecast = shift + spread * noise
            if form == "explicit":
                score = energy_score_from_targets(forecast, truth, alpha=alpha)
            else:
                score = energy_score(
                    forecast, mean, log_std, alpha=alpha, estimator=form, num_targets=4, seed=0
                )
            scores[shift, spread] = float(score.mean())
    assert max(scores, key=scores.__getitem__) == (0.0, 1.0)
