"""Brier-n of a patch sampler from draws alone: the specification.

Brier(P, y) = 2 P(y) - sum_x P(x)^2 with the first n tokens of a patch as one outcome. With S draws
x_1..x_S of the same distribution the U-statistic

    2/S sum_i 1{x_i = y}  -  2/(S(S-1)) sum_{i<j} 1{x_i = x_j}

is unbiased for it and has less variance than the two-draw estimator of arXiv 2510.27688, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def brier_scores(samples: Tensor, target: Tensor, max_ngram: int = 4) -> Tensor:
    """samples int64 [S, P, K], target int64 [P, K] -> float32 [P, min(K, max_ngram)]."""
    num_samples, _, patch_size = samples.shape
    ngrams = min(patch_size, max_ngram)
    samples, target = samples[..., :ngrams], target[..., :ngrams]
    # Prefixes of length n agree when all of their first n tokens do.
    hits = (samples == target).cumprod(dim=-1).sum(dim=0)
    pairs = torch.zeros_like(hits)
    for i in range(num_samples):
        pairs += (samples[i] == samples[i + 1 :]).cumprod(dim=-1).sum(dim=0)
    scale = 2.0 / num_samples
    scores = hits.double() * scale - pairs.double() * (scale / (num_samples - 1))
    return scores.float()
