"""Brier-n of a patch sampler from draws alone: the specification.

Brier(P, y) = 2 P(y) - sum_x P(x)^2 with the first n tokens of a patch as one outcome. With S draws
x_1..x_S of the same distribution the U-statistic

    2/S sum_i 1{x_i = y}  -  2/(S(S-1)) sum_{i<j} 1{x_i = x_j}

is unbiased for it and has less variance than the two-draw estimator of arXiv 2510.27688, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _count(samples: Tensor, target: Tensor, max_ngram: int) -> tuple[Tensor, Tensor]:
    """#{x_i = y} and #{i<j: x_i = x_j}, int64 [P, n] each."""
    ngrams = min(target.shape[1], max_ngram)
    samples, target = samples[..., :ngrams], target[..., :ngrams]
    # Prefixes of length n agree when all of their first n tokens do.
    hits = (samples == target).cumprod(dim=-1).sum(dim=0)
    pairs = torch.zeros_like(hits)
    for i in range(samples.shape[0]):
        pairs += (samples[i] == samples[i + 1 :]).cumprod(dim=-1).sum(dim=0)
    return hits, pairs


def brier_scores(samples: Tensor, target: Tensor, max_ngram: int = 4) -> Tensor:
    """samples int64 [S, P, K], target int64 [P, K] -> float32 [P, min(K, max_ngram)]."""
    hits, pairs = _count(samples, target, max_ngram)
    num_samples = samples.shape[0]
    scale = 2.0 / num_samples
    scores = hits.double() * scale - pairs.double() * (scale / (num_samples - 1))
    return scores.float()


def brier_rates(samples: Tensor, target: Tensor, max_ngram: int = 4) -> tuple[Tensor, Tensor]:
    """#{x_i = y} / S and #{i<j: x_i = x_j} / (S(S-1)/2): float32 [P, min(K, max_ngram)] each."""
    hits, pairs = _count(samples, target, max_ngram)
    num_samples = samples.shape[0]
    hit_rates = hits.double() / num_samples
    pair_rates = (2 * pairs).double() / (num_samples * (num_samples - 1.0))
    return hit_rates.float(), pair_rates.float()
