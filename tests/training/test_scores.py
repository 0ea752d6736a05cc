"""Summaries of Brier scores against brute force and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from calm_kernels.training.scores import scored_tokens, summarize, unigram_brier

FREQUENCIES = np.array([0.5, 0.3, 0.15, 0.05])


def brute_force_brier(target: tuple[int, ...]) -> float:
    """2 P(y) - sum over all x of P(x)^2, over every n-gram."""
    probabilities = {
        ngram: float(np.prod(FREQUENCIES[list(ngram)]))
        for ngram in itertools.product(range(4), repeat=len(target))
    }
    return 2 * probabilities[target] - sum(p**2 for p in probabilities.values())


def test_unigram_scores_equal_the_sum_over_all_ngrams() -> None:
    tokens = np.random.default_rng(0).integers(0, 4, (3, 5, 4))
    result = unigram_brier(FREQUENCIES, tokens)
    means = [
        np.mean([brute_force_brier(tuple(position[:n])) for position in tokens.reshape(-1, 4)])
        for n in range(1, 5)
    ]
    np.testing.assert_allclose(result.brier, 100 * np.array(means), rtol=1e-12)
    expected = 100 * np.prod(np.maximum(means, 0)) ** 0.25
    np.testing.assert_allclose(result.brier_lm, expected, rtol=1e-12)
    assert result.positions == 15


def test_unigram_score_of_its_own_text_tends_to_the_sum_of_squares() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.choice(4, size=(200, 500, 4), p=FREQUENCIES)
    result = unigram_brier(FREQUENCIES, tokens)
    collision = np.sum(FREQUENCIES**2) ** np.arange(1, 5)
    error = np.array(result.brier_standard_error)
    assert np.all(np.abs(np.array(result.brier) - 100 * collision) < 5 * error)
    assert np.all(error > 0)


def test_equal_blocks_have_no_standard_error() -> None:
    sums = np.tile([4.0, 3.0, 2.0, 1.0], (6, 1))
    result = summarize(sums, np.full(6, 10), samples=8)
    np.testing.assert_allclose(result.brier, [40, 30, 20, 10])
    np.testing.assert_allclose(result.brier_lm, 100 * (0.4 * 0.3 * 0.2 * 0.1) ** 0.25)
    assert result.brier_lm_standard_error == pytest.approx(0, abs=1e-9)


def test_the_error_of_a_mean_is_that_of_the_block_means() -> None:
    sums = np.random.default_rng(2).uniform(0.5, 1.5, (40, 4)) * 20
    result = summarize(sums, np.full(40, 20), samples=8)
    expected = 100 * (sums / 20).std(axis=0, ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(result.brier_standard_error, expected, rtol=1e-9)


def test_the_error_of_brier_lm_is_its_spread_over_repeated_data() -> None:
    """300 data sets of 60 correlated blocks: the spread is known within 4%, one in 20 beyond 8%."""
    generator = np.random.default_rng(3)
    results = []
    for _ in range(300):
        common = generator.normal(0, 0.05, (60, 1))
        means = np.array([0.3, 0.2, 0.1, 0.1]) + common + generator.normal(0, 0.02, (60, 4))
        results.append(summarize(means * 50, np.full(60, 50), samples=8))
    spread = np.std([r.brier_lm for r in results])
    claimed = np.mean([r.brier_lm_standard_error for r in results])
    assert claimed == pytest.approx(spread, rel=0.15)


def test_positions_weigh_alike_whatever_their_block() -> None:
    sums = np.array([[1.0, 1, 1, 1], [9.0, 9, 9, 9], [0, 0, 0, 0]])
    result = summarize(sums, np.array([1, 19, 0]), samples=2)
    np.testing.assert_allclose(result.brier, 50.0)
    assert result.positions == 20


def test_a_negative_mean_makes_brier_lm_zero() -> None:
    sums = np.array([[1.0, 1, 1, -1], [1.0, 1, 1, -2]])
    assert summarize(sums, np.array([2, 2]), samples=2).brier_lm == 0.0


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no position to score"):
        summarize(np.zeros((2, 4)), np.zeros(2, dtype=np.int64), samples=2)


@pytest.mark.parametrize(
    ("patch_size", "starts"),
    [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (2, [2, 4, 6, 8]), (3, [3, 6]), (4, [4, 8]), (6, [6])],
)
def test_scored_positions_start_at_every_patch_but_the_first(
    patch_size: int, starts: list[int]
) -> None:
    found = scored_tokens(np.arange(24).reshape(2, 12), patch_size)
    assert found[0].tolist() == [list(range(s, s + 4)) for s in starts]
    assert found[1, :, 0].tolist() == [12 + s for s in starts]
