"""BrierLM's ingredients: unbiased Brier-1..4 of the text after each patch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from calm_kernels.models.draws import Drawer
from calm_kernels.models.rollout import Rollout
from calm_kernels.models.sequences import as_int_seed, seed_of_step
from calm_kernels.ops.brier import brier_lm, brier_rates, brier_scores

if TYPE_CHECKING:
    from calm_kernels.models.energy_transformer import EnergyTransformer

NGRAMS = 4


@dataclass(frozen=True)
class BrierScores:
    """Scores of single positions: unbiased and noisy, to be averaged.

    Attributes:
        scores: float32 [n, 4]; column j-1 is Brier-j. Higher is better, 1 is the best.
        positions: int64 [n, 2]: the sequence, and the index of the n-gram's first token.
    """

    scores: Tensor
    positions: Tensor

    def mean(self) -> Tensor:
        """Brier-1..4, float64 [4]."""
        return self.scores.double().mean(dim=0)

    def brier_lm(self) -> Tensor:
        """BrierLM of these positions, float64 scalar in 0..100."""
        return brier_lm(self.scores)


def patches_of_ngram(patch_size: int) -> int:
    """How many patches the longest n-gram covers: ceil(4/K)."""
    return -(-NGRAMS // patch_size)


def num_starts(num_patches: int, patch_size: int, every: int = 1) -> int:
    """Positions whose n-grams lie within a sequence.

    Any patch but the first may start one, or one in ``every``: patches ``every``, ``2 * every``...

    Raises:
        ValueError: there is none.
    """
    chain = patches_of_ngram(patch_size)
    if num_patches < every + chain:
        raise ValueError(
            f"input_ids: expected at least {every + chain} patches of {patch_size} tokens, so that "
            f"{NGRAMS} tokens follow the first {every * patch_size}; got {num_patches}"
        )
    return (num_patches - chain) // every


def patches_of_stride(stride: int | None, patch_size: int) -> int:
    """Patches from one start of an n-gram to the next, where starts lie ``stride`` tokens apart.

    Raises:
        ValueError: not a multiple of the patch size.
    """
    if stride is None:
        return 1
    if stride < 1 or stride % patch_size:
        raise ValueError(
            f"stride: expected a multiple of the patch size {patch_size}; got {stride}"
        )
    return stride // patch_size


def select(scores: Tensor, counted: Tensor | None, patch_size: int, every: int = 1) -> BrierScores:
    """Keep the positions whose patches all count.

    Args:
        scores: [B, m, 4] of the n-grams that start at patches every, 2 * every, ..., m * every.
        counted: which patches count, bool [B, n], or None for all.
    """
    batch_size, starts = scores.shape[:2]
    patches = _patches_started(starts, every, scores.device)
    keep = torch.ones((batch_size, starts), dtype=torch.bool, device=scores.device)
    if counted is not None:
        for offset in range(patches_of_ngram(patch_size)):
            keep &= counted[:, patches + offset]
    rows, indices = keep.nonzero(as_tuple=True)
    positions = torch.stack((rows, patches[indices] * patch_size), dim=1)
    return BrierScores(scores[keep], positions)


def _patches_started(starts: int, every: int, device: torch.device) -> Tensor:
    return torch.arange(1, starts + 1, device=device) * every


def score_patches(
    model: EnergyTransformer,
    patches: Tensor,
    counted: Tensor | None,
    num_samples: int,
    seed: int | Tensor | None,
    stride: int | None = None,
) -> BrierScores:
    """Score a sampler of patches; see :meth:`EnergyTransformer.evaluate_brier`.

    Args:
        patches: token ids [B, n, K].
        counted: which patches count, bool [B, n], or None for all.
        num_samples: draws S for each position and patch.
        seed: of all draws.
        stride: tokens from one n-gram's start to the next; K if None.
    """
    patch_size = patches.shape[2]
    every = patches_of_stride(stride, patch_size)
    starts = num_starts(patches.shape[1], patch_size, every)
    started = _patches_started(starts, every, patches.device)
    base_seed, step = as_int_seed(seed), 0
    drawer = Drawer(model, patches.shape[0] * starts * num_samples)

    def draw(hidden: Tensor) -> Tensor:
        nonlocal step
        rows, shape = hidden.flatten(0, 1), hidden.shape[:2]
        noise = model.mlp_generator.draw_noise(
            len(rows), num_samples, rows.device, seed_of_step(base_seed, step)
        )
        step += 1
        return drawer.patches(rows, noise).reshape(num_samples, *shape, -1)

    truth = patches[:, 1:]
    if patch_size >= NGRAMS:
        hidden, truth = model.hidden_states(patches[:, :-1]), truth[:, started - 1]
        draws = draw(hidden[:, started - 1]).to(truth.dtype)
        scores = brier_scores(draws.flatten(1, 2), truth.flatten(0, 1), max_ngram=NGRAMS)
        return select(scores.unflatten(0, truth.shape[:2]), counted, patch_size, every)

    cache = DynamicCache(config=model.config)
    hidden = model.hidden_states(patches[:, :-1], cache=cache)
    rollout = Rollout(model.hidden_states, cache, started, model.config)

    def follow(path: Tensor) -> Tensor:
        return draw(rollout.extend(path))

    scores = chain_scores(draw(hidden), truth, starts, follow, every)
    return select(scores, counted, patch_size, every)


def chain_scores(
    draws: Tensor,
    truth: Tensor,
    starts: int,
    follow: Callable[[Tensor], Tensor],
    every: int = 1,
) -> Tensor:
    """Brier-1..4 where an n-gram covers several patches, each step drawn S >= 2 times.

    With patches y_1 y_2 ... after a context, Brier-n is 2 P(y) - sum_x P(x)^2 over n-grams x.

    - P(y) = prod_j P(y_j | y_<j): a product of hit rates at successive positions of the true text.
      Their draws are independent, so the mean of the product is the product of the means.
    - sum_x P(x)^2 is the chance that two independent continuations coincide. One of the draws
      becomes a path x; the share of the *others* that agree with it estimates P(x_1) without bias;
      given x_1 fresh draws take its place, and so on; the last patch takes the share of coinciding
      pairs. The factors are independent given the path, and E_x[P(x_1)] = sum_x P(x_1)^2.

    Args:
        draws: of every position of the text, [S, B, n-1, K]; position p predicts ``truth[:, p]``.
        truth: [B, n-1, K].
        starts: m, the number of n-grams.
        every: they start at positions every - 1, 2 * every - 1, ..., m * every - 1.
        follow: given the path's next patch [B, m, K], draws of the one after it, [S, B, m, K].

    Returns:
        float32 [B, m, 4]
    """
    patch_size = truth.shape[2]
    hit_rates, pair_rates = _rates(draws, truth)
    first = _patches_started(starts, every, draws.device) - 1
    pair_rates = pair_rates[:, first]
    likelihood = together = torch.ones_like(pair_rates[..., 0])
    current = draws[:, :, first]
    scores = []
    chain = math.ceil(NGRAMS / patch_size)
    for j in range(chain):
        width = min(patch_size, NGRAMS - j * patch_size)
        hits = hit_rates[:, first + j]
        hit = likelihood.unsqueeze(-1) * hits[..., :width]
        collision = together.unsqueeze(-1) * pair_rates[..., :width]
        scores.append(2.0 * hit - collision)
        if j + 1 < chain:
            likelihood = likelihood * hits[..., -1]
            path = current[0]
            together = together * (current[1:] == path).all(dim=-1).float().mean(dim=0)
            current = follow(path)
            pair_rates = _rates(current, path)[1]
    return torch.cat(scores, dim=-1)


def _rates(draws: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Rates of hits and of coinciding pairs: draws [S, B, m, K], truth [B, m, K] -> [B, m, K]."""
    draws, truth = draws.flatten(1, 2), truth.to(draws.dtype)
    rates = brier_rates(draws, truth.flatten(0, 1), max_ngram=truth.shape[-1])
    hit_rates, pair_rates = (rate.unflatten(0, truth.shape[:-1]) for rate in rates)
    return hit_rates, pair_rates
