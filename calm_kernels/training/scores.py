"""BrierLM of held-out text with its standard error, and the unigram model's exact BrierLM."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NGRAMS = 4
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BrierResult:
    """Brier-1..4 and BrierLM, each times 100, with standard errors."""

    brier_lm: float
    brier_lm_standard_error: float
    brier: tuple[float, float, float, float]
    brier_standard_error: tuple[float, float, float, float]
    positions: int
    samples: int

    def as_metrics(self) -> dict[str, Any]:
        """Flat names for metrics files: ``brier_lm``, ``brier_1`` and so on."""
        metrics: dict[str, Any] = {
            "brier_lm": self.brier_lm,
            "brier_lm_standard_error": self.brier_lm_standard_error,
        }
        for n, (value, error) in enumerate(
            zip(self.brier, self.brier_standard_error, strict=True), start=1
        ):
            metrics[f"brier_{n}"] = value
            metrics[f"brier_{n}_standard_error"] = error
        return {**metrics, "positions": self.positions, "samples": self.samples}


@dataclass(frozen=True)
class AutoencoderResult:
    """Reconstruction of held-out text."""

    token_accuracy: float
    loss: float
    tokens: int

    def as_metrics(self) -> dict[str, Any]:
        return asdict(self)


def geometric_mean(means: Floats) -> Floats:
    """BrierLM of mean scores, [*, 4] -> [*]."""
    result: Floats = 100.0 * np.prod(np.maximum(means, 0.0), axis=-1) ** (1 / NGRAMS)
    return result


def summarize(sums: Floats, counts: npt.NDArray[np.int64], samples: int) -> BrierResult:
    """Scores from per-block sums, with errors from the jackknife over blocks.

    Positions of one block share their context, so blocks, not positions, are the independent
    units. BrierLM is not linear in the scores; leaving out one block at a time carries the blocks'
    scatter through it.

    Args:
        sums: sum over a block's positions of Brier-1..4, [blocks, 4].
        counts: positions that counted, [blocks].
        samples: draws a position, for the record.

    Raises:
        ValueError: no position counted.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    blocks, total = len(counts), int(counts.sum())
    if total == 0:
        raise ValueError("no position to score: give blocks with at least two whole patches")
    means = sums.sum(axis=0) / total
    left_out = (sums.sum(axis=0) - sums) / np.maximum(total - counts, 1)[:, None]
    replicates = np.concatenate([100.0 * left_out, geometric_mean(left_out)[:, None]], axis=1)
    spread = np.sqrt((blocks - 1) * replicates.var(axis=0)) if blocks > 1 else np.full(5, np.nan)
    b1, b2, b3, b4 = (100.0 * means).tolist()
    e1, e2, e3, e4, error = spread.tolist()
    return BrierResult(
        float(geometric_mean(means)), error, (b1, b2, b3, b4), (e1, e2, e3, e4), total, samples
    )


def unigram_brier(frequencies: Floats, tokens: npt.NDArray[np.integer[Any]]) -> BrierResult:
    """The exact scores of the model that draws every token from fixed frequencies.

    Its Brier-n at y_1..y_n is 2 prod_j p(y_j) - (sum_v p_v^2)^n; nothing is sampled.

    Args:
        frequencies: p, [V], summing to one.
        tokens: the four tokens of each position, [blocks, positions, 4].

    Source: the strictly proper Brier score of arXiv 2510.27688, section 4, for independent tokens.
    """
    likelihood = np.cumprod(frequencies[tokens], axis=-1)
    collision = np.sum(frequencies**2) ** np.arange(1, NGRAMS + 1)
    scores = 2 * likelihood - collision
    counts = np.full(len(tokens), tokens.shape[1], dtype=np.int64)
    return summarize(scores.sum(axis=1), counts, samples=0)


def scored_tokens(
    blocks: npt.NDArray[np.integer[Any]], stride: int
) -> npt.NDArray[np.integer[Any]]:
    """The four tokens scored at each position of blocks, [B, L] -> [B, positions, 4].

    Positions are the multiples of the stride but 0, as long as the stretches of that length that
    four tokens reach into lie within the block. With the stride K they are the starts of patches.
    """
    reached = -(-NGRAMS // stride)
    starts = np.arange(1, blocks.shape[1] // stride - reached + 1) * stride
    return blocks[:, starts[:, None] + np.arange(NGRAMS)]
