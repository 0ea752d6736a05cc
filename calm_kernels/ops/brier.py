"""Brier scores of a patch sampler from draws alone, and BrierLM."""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import brier as reference

MAX_NGRAM = 64


def _fake(samples: Tensor, target: Tensor, max_ngram: int) -> Tensor:
    ngrams = min(target.shape[1], max_ngram)
    return samples.new_empty((target.shape[0], ngrams), dtype=torch.float32)


_brier_scores = define(
    "brier_scores",
    "(Tensor samples, Tensor target, int max_ngram) -> Tensor",
    reference=reference.brier_scores,
    fake=_fake,
)


_brier_rates = define(
    "brier_rates",
    "(Tensor samples, Tensor target, int max_ngram) -> (Tensor hit_rates, Tensor pair_rates)",
    reference=reference.brier_rates,
    fake=lambda *inputs: (_fake(*inputs), _fake(*inputs)),
)


def _check(samples: Tensor, target: Tensor, max_ngram: int) -> torch.device:
    _checks.tensor("samples", samples, _checks.INTEGER_DTYPES, ("S", "P", "K"))
    _checks.tensor("target", target, _checks.INTEGER_DTYPES, samples.shape[1:])
    _checks.same_dtype(samples=samples, target=target)
    device = _checks.same_device(samples=samples, target=target)
    _checks.at_least("samples.shape[0]", samples.shape[0], 2, " draws (a pair is needed)")
    _checks.at_least("samples.shape[2]", samples.shape[2], 1, " token per patch")
    _checks.in_range("max_ngram", max_ngram, 1, MAX_NGRAM)
    return device


def brier_scores(samples: Tensor, target: Tensor, *, max_ngram: int = 4) -> Tensor:
    """Unbiased Brier-1..n of each position, from S draws of the model.

    Brier-n takes the first n tokens of a patch as one outcome: 2 P(y) - sum_x P(x)^2, estimated
    by the U-statistic 2/S #{x_i = y} - 2/(S(S-1)) #{i<j: x_i = x_j}. Higher is better, 1 is the
    best, and a single position's estimate may be negative: average before use.

    Args:
        samples: token ids, int64 or int32 [S, P, K]: S >= 2 independent draws for P patches.
        target: the true token ids, same dtype and device, [P, K].
        max_ngram: longest prefix scored, 1 to 64.

    Returns:
        float32 [P, min(K, max_ngram)]; column n-1 is Brier-n. No gradient.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, fewer than two draws, devices differ.

    Source: arXiv 2510.27688, section 4 (two draws); the U-statistic is this package's.
    """
    device = _check(samples, target, max_ngram)
    result: Tensor = _brier_scores(device, samples, target, max_ngram)
    return result


def brier_rates(samples: Tensor, target: Tensor, *, max_ngram: int = 4) -> tuple[Tensor, Tensor]:
    """The two halves of the U-statistic: how often draws are right, and how often they coincide.

    Unbiased for P(y) and sum_x P(x)^2 of the first n tokens; Brier-n is 2 hit_rates - pair_rates.
    An n-gram that runs over several patches takes products of such rates along its path, so it
    needs them one by one.

    Args:
        samples: token ids, int64 or int32 [S, P, K]: S >= 2 independent draws for P patches.
        target: the true token ids, same dtype and device, [P, K].
        max_ngram: longest prefix, 1 to 64.

    Returns:
        hit_rates: share of the draws whose first n tokens are the target's; float32
            [P, min(K, max_ngram)].
        pair_rates: share of the S(S-1)/2 pairs that agree in their first n tokens, same shape.
        No gradient.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, fewer than two draws, devices differ.

    Source: arXiv 2510.27688, section 4; the U-statistic is this package's.
    """
    device = _check(samples, target, max_ngram)
    hit_rates, pair_rates = _brier_rates(device, samples, target, max_ngram)
    return hit_rates, pair_rates


def brier_lm(scores: Tensor) -> Tensor:
    """BrierLM: 100 * (prod of max(Brier-n, 0) for n = 1..4)^(1/4).

    Args:
        scores: floating [*, 4]; Brier-1..4 of positions (averaged here) or their means [4].

    Returns:
        float64 scalar, 0 to 100, higher is better.

    Raises:
        ValueError: the last dimension is not 4, or there is no position to average.

    Source: arXiv 2510.27688, section 4.
    """
    _checks.tensor("scores", scores, _checks.FLOAT_DTYPES, ("*", 4))
    if scores.numel() == 0:
        raise ValueError("scores: expected at least one position; got none")
    means = scores.double().reshape(-1, 4).mean(dim=0).clamp_min(0.0)
    return 100.0 * means.prod().pow(0.25)
