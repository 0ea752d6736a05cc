from __future__ import annotations

import itertools
import math

import pytest
import torch

import calm_kernels
from calm_kernels import _native, brier_lm, brier_rates, brier_scores

OPERATOR = torch.ops.calm_kernels.brier_scores
NATIVE = _native.serves("calm_kernels::brier_scores", "cpu")
BACKENDS = ["reference", "native"] if NATIVE else ["reference"]
FLOAT32_ROUNDING = 4e-7  # a few roundings of values up to 2


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest):
    with calm_kernels.backend(request.param):
        yield request.param


def random_draws(
    num_samples: int, positions: int, patch_size: int, dtype: torch.dtype = torch.int64
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * num_samples + 10 * positions + patch_size)
    shape = (num_samples + 1, positions, patch_size)
    # Few ids, so that prefixes of every length agree often.
    draws = torch.randint(0, 3, shape, generator=generator).clamp_max(1).to(dtype)
    return draws[1:], draws[0]


def by_pairs(samples: torch.Tensor, target: torch.Tensor, max_ngram: int) -> torch.Tensor:
    """The U-statistic from its definition, in fp64."""
    num_samples, positions, patch_size = samples.shape
    scores = torch.zeros(positions, min(patch_size, max_ngram), dtype=torch.float64)
    for p, n in itertools.product(range(positions), range(1, scores.shape[1] + 1)):
        prefixes = [tuple(samples[i, p, :n].tolist()) for i in range(num_samples)]
        hits = sum(prefix == tuple(target[p, :n].tolist()) for prefix in prefixes)
        equal = sum(a == b for a, b in itertools.combinations(prefixes, 2))
        scores[p, n - 1] = 2 * hits / num_samples - equal / math.comb(num_samples, 2)
    return scores


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("patch_size", range(1, 9))
@pytest.mark.parametrize("num_samples", [2, 3, 8, 33])
def test_scores_equal_the_definition(num_samples: int, patch_size: int, dtype: torch.dtype) -> None:
    samples, target = random_draws(num_samples, 7, patch_size, dtype)
    scores = brier_scores(samples, target)
    assert scores.dtype == torch.float32
    assert scores.shape == (7, min(patch_size, 4))
    expected = by_pairs(samples, target, 4)
    torch.testing.assert_close(scores.double(), expected, atol=FLOAT32_ROUNDING, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("num_samples", "patch_size"), [(2, 1), (3, 2), (8, 3), (33, 4), (5, 7)])
def test_rates_equal_the_definition(num_samples: int, patch_size: int, dtype: torch.dtype) -> None:
    samples, target = random_draws(num_samples, 7, patch_size, dtype)
    hit_rates, pair_rates = brier_rates(samples, target, max_ngram=5)
    assert hit_rates.shape == pair_rates.shape == (7, min(patch_size, 5))
    for p, n in itertools.product(range(7), range(1, hit_rates.shape[1] + 1)):
        prefixes = [tuple(samples[i, p, :n].tolist()) for i in range(num_samples)]
        hits = sum(prefix == tuple(target[p, :n].tolist()) for prefix in prefixes)
        equal = sum(a == b for a, b in itertools.combinations(prefixes, 2))
        assert hit_rates[p, n - 1].item() == pytest.approx(hits / num_samples, rel=1e-6)
        pairs = math.comb(num_samples, 2)
        assert pair_rates[p, n - 1].item() == pytest.approx(equal / pairs, rel=1e-6)


def test_rates_make_the_score() -> None:
    samples, target = random_draws(6, 50, 4)
    hit_rates, pair_rates = brier_rates(samples, target)
    expected = 2 * hit_rates - pair_rates
    torch.testing.assert_close(
        brier_scores(samples, target), expected, atol=FLOAT32_ROUNDING, rtol=0
    )


def test_rates_need_two_draws() -> None:
    samples, target = random_draws(1, 3, 2)
    with pytest.raises(ValueError, match="expected at least 2 draws"):
        brier_rates(samples, target)


@pytest.mark.parametrize("max_ngram", [1, 2, 3, 5, 6, 9])
def test_max_ngram_limits_the_prefixes_that_are_scored(max_ngram: int) -> None:
    samples, target = random_draws(5, 6, 6)
    scores = brier_scores(samples, target, max_ngram=max_ngram)
    expected = by_pairs(samples, target, max_ngram)
    torch.testing.assert_close(scores.double(), expected, atol=FLOAT32_ROUNDING, rtol=0)


def test_two_draws_give_the_papers_estimator() -> None:
    samples, target = random_draws(2, 200, 4)
    agree = {
        name: (a == b).cumprod(-1)
        for name, a, b in (
            ("1y", samples[0], target),
            ("2y", samples[1], target),
            ("12", samples[0], samples[1]),
        )
    }
    expected = (agree["1y"] + agree["2y"] - agree["12"]).float()
    assert torch.equal(brier_scores(samples, target), expected)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_scores_are_unbiased(num_samples: int) -> None:
    patches = list(itertools.product(range(2), repeat=2))
    law = torch.tensor([0.5, 0.25, 0.2, 0.05], dtype=torch.float64)
    tuples = list(itertools.product(range(4), repeat=num_samples))
    samples = torch.tensor([[patches[x] for x in draws] for draws in tuples]).transpose(0, 1)
    probability = law[torch.tensor(tuples)].prod(dim=1)
    first = law.view(2, 2).sum(dim=1)
    for y, patch in enumerate(patches):
        target = torch.tensor(patch).expand(len(tuples), -1)
        mean = probability @ brier_scores(samples, target).double()
        exact = [2 * first[patch[0]] - (first**2).sum(), 2 * law[y] - (law**2).sum()]
        torch.testing.assert_close(mean, torch.stack(exact), atol=FLOAT32_ROUNDING, rtol=0)


def test_certain_and_right_scores_one_certain_and_wrong_scores_minus_one() -> None:
    target = torch.tensor([[4, 5, 6, 7, 8]])
    wrong = torch.tensor([[4, 5, 9, 7, 8]])
    assert brier_scores(target.expand(6, -1, -1), target).tolist() == [[1.0] * 4]
    assert brier_scores(wrong.expand(6, -1, -1), target).tolist() == [[1.0, 1.0, -1.0, -1.0]]


def test_ids_are_compared_in_full() -> None:
    target = torch.tensor([[2**31, 2**40 + 1, -1, 2**62]])
    near = torch.tensor([[2**31, 1, -1, 2**62]])
    assert brier_scores(torch.stack((target, target)), target).tolist() == [[1.0] * 4]
    assert brier_scores(torch.stack((near, near)), target).tolist() == [[1.0, -1.0, -1.0, -1.0]]


def test_no_position_gives_no_score() -> None:
    samples, target = random_draws(3, 0, 4)
    assert brier_scores(samples, target).shape == (0, 4)


def test_non_contiguous_inputs_are_read_right_and_left_alone() -> None:
    samples, target = random_draws(6, 5, 4)
    expected = brier_scores(samples, target)
    strided = samples.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous()
    target_strided = target.t().contiguous().t()
    assert torch.equal(brier_scores(strided, target_strided), expected)
    assert torch.equal(strided, samples)


def test_the_order_of_the_draws_does_not_matter() -> None:
    samples, target = random_draws(8, 50, 4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(brier_scores(samples[order], target), brier_scores(samples, target))


def test_many_positions_equal_those_of_the_reference() -> None:
    samples, target = random_draws(8, 5000, 4)
    scores = brier_scores(samples, target)
    with calm_kernels.backend("reference"):
        expected = brier_scores(samples, target)
    torch.testing.assert_close(scores, expected, atol=FLOAT32_ROUNDING, rtol=0)


def test_the_operator_passes_opcheck(backend: str) -> None:
    overload = OPERATOR.default if backend == "native" else OPERATOR.reference
    for shape in ((2, 3, 4), (3, 0, 2), (5, 2, 1)):
        torch.library.opcheck(overload, (*random_draws(*shape), 4))
    torch.library.opcheck(overload, (*random_draws(4, 3, 6, torch.int32), 5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_and_eager_agree(dynamic: bool) -> None:
    def mean_score(samples: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return brier_lm(brier_scores(samples, target)) + brier_scores(samples, target).sum()

    compiled = torch.compile(mean_score, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((8, 30, 4), (5, 17, 4)):
        samples, target = random_draws(*shape)
        assert torch.equal(compiled(samples, target), mean_score(samples, target))


def test_brier_lm_is_a_hundred_for_ones_and_zero_where_a_mean_is_not_positive() -> None:
    assert brier_lm(torch.ones(4)).item() == 100.0
    assert brier_lm(torch.ones(3, 5, 4)).item() == 100.0
    for n, value in itertools.product(range(4), (0.0, -0.25)):
        means = torch.full((4,), 0.5)
        means[n] = value
        assert brier_lm(means).item() == 0.0


def test_two_negative_means_do_not_make_a_positive_score() -> None:
    assert brier_lm(torch.tensor([-0.5, -0.5, 0.5, 0.5])).item() == 0.0


def test_brier_lm_is_the_geometric_mean_of_the_averages() -> None:
    means = torch.tensor([0.2, 0.04, 0.01, 0.001], dtype=torch.float64)
    deviation = torch.tensor([[1.0], [-3.0], [2.0]], dtype=torch.float64)
    exact = 100 * math.exp(sum(math.log(x) for x in means.tolist()) / 4)
    for scores in (means, means + deviation, (means + deviation)[:, None]):
        result = brier_lm(scores)
        assert result.dtype == torch.float64
        assert result.shape == ()
        assert result.item() == pytest.approx(exact, rel=1e-12)


def test_brier_lm_averages_in_double_precision() -> None:
    scores = torch.zeros(1_000_000, 4)
    scores[:, :] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    exact = 100 * math.prod(float(x) for x in scores[0].double()) ** 0.25
    assert brier_lm(scores).item() == pytest.approx(exact, rel=1e-9)


SAMPLES = torch.zeros(3, 5, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("samples", "target", "max_ngram", "error", "message"),
    [
        (SAMPLES[:1], SAMPLES[0], 4, ValueError, r"samples.shape\[0\]: expected at least 2 draws"),
        (SAMPLES[..., :0], SAMPLES[0, :, :0], 4, ValueError, r"samples.shape\[2\]: .*at least 1"),
        (SAMPLES[0], SAMPLES[0], 4, ValueError, r"samples: expected shape \[S, P, K\]"),
        (SAMPLES, SAMPLES[0, :4], 4, ValueError, r"target: expected shape \[5, 4\]; got \[4, 4\]"),
        (SAMPLES.float(), SAMPLES[0], 4, TypeError, "samples: expected dtype int64, int32"),
        (SAMPLES, SAMPLES[0].int(), 4, TypeError, "target: expected dtype int64"),
        (SAMPLES, SAMPLES[0].to("meta"), 4, ValueError, "target: expected device cpu"),
        (SAMPLES, SAMPLES[0], 0, ValueError, "max_ngram: expected at least 1; got 0"),
        (SAMPLES, SAMPLES[0], 2.0, TypeError, "max_ngram: expected an int, got float"),
        (SAMPLES, None, 4, TypeError, "target: expected a torch.Tensor, got NoneType"),
    ],
)
def test_wrong_arguments_are_named(samples, target, max_ngram, error, message: str) -> None:
    with pytest.raises(error, match=message):
        brier_scores(samples, target, max_ngram=max_ngram)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"scores: expected shape \[\*, 4\]; got \[3\]"),
        (torch.zeros(0, 4), ValueError, "scores: expected at least one position; got none"),
        (torch.zeros(4, dtype=torch.int64), TypeError, "scores: expected dtype float32"),
    ],
)
def test_brier_lm_names_wrong_scores(scores: torch.Tensor, error, message: str) -> None:
    with pytest.raises(error, match=message):
        brier_lm(scores)
