"""The energy score and its gradients in one forward pass: what the operators run.

The gradient of S in x_n is

    2/(N(N-1)) sum_{k != n} c(x_n - x_k) (x_n - x_k)  -  2/(N M) sum_m c(x_n - y_m) (x_n - y_m)

with c(r) = alpha ||r||^(alpha - 2): one more use of differences that the score needs anyway.
Positions are worked through in blocks, so that memory beyond inputs and results does not grow with
P or M.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from calm_kernels.reference.energy_score import compute_dtype, standard_normals
from calm_kernels.reference.expected_distance import power_of_square
from calm_kernels.reference.expected_distance_gradient import (
    expected_distance_power_with_gradients,
)

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Elements of one temporary: few enough for a CPU's cache, enough to fill a GPU."""


def _block_elements(device: torch.device) -> int:
    return BLOCK_ELEMENTS.get(device.type, 1 << 20)


def _position_blocks(samples: Tensor, num_targets: int) -> Iterator[slice]:
    num_samples, num_positions, size = samples.shape
    pairs = num_samples * (num_samples - 1) // 2
    step = max(1, _block_elements(samples.device) // (max(pairs, num_targets) * size))
    for start in range(0, num_positions, step):
        yield slice(start, min(start + step, num_positions))


def slope_of_power(square: Tensor, alpha: float) -> Tensor:
    """alpha square^(alpha/2 - 1): 0 at 0, NaN where ``square`` is not finite, never overflowing."""
    at_zero = square == 0
    slope = alpha * square.masked_fill(at_zero, 1.0) ** (alpha / 2.0 - 1.0)
    slope = slope.clamp_max(torch.finfo(slope.dtype).max).masked_fill(at_zero, 0.0)
    return slope.masked_fill(~square.isfinite(), math.nan)


def _add_pair_term(samples: Tensor, alpha: float, score: Tensor, grad: Tensor | None) -> None:
    """Add the mean over pairs of [N, P, D] to the score [P], its gradient to [N, P, D]."""
    num_samples = samples.shape[0]
    weight = 2.0 / (num_samples * (num_samples - 1))
    differences = [samples[n] - samples[n + 1 :] for n in range(num_samples - 1)]
    squares = torch.cat([difference.square().sum(-1) for difference in differences])
    score += weight * power_of_square(squares, alpha / 2.0).sum(0)
    if grad is None:
        return
    slopes = (weight * slope_of_power(squares, alpha)).unsqueeze(-1)
    for n, slope in enumerate(slopes.split(list(range(num_samples - 1, 0, -1)))):
        difference = differences[n].mul_(slope)
        grad[n] += difference.sum(0)
        grad[n + 1 :] -= difference


def _add_target_term(
    samples: Tensor,
    targets: Tensor,
    alpha: float,
    weight: float,
    score: Tensor,
    grad_samples: Tensor | None,
    grad_targets: Tensor | None,
) -> None:
    """Add weight * sum_{n,m} ||x_n - y_m||^alpha of [N, P, D] and [M, P, D], and its gradients."""
    for n, sample in enumerate(samples):
        difference = sample - targets
        square = difference.square().sum(-1)
        score += weight * power_of_square(square, alpha / 2.0).sum(0)
        if grad_samples is None and grad_targets is None:
            continue
        difference *= (weight * slope_of_power(square, alpha)).unsqueeze(-1)
        if grad_samples is not None:
            grad_samples[n] += difference.sum(0)
        if grad_targets is not None:
            grad_targets -= difference


def _add_monte_carlo_term(
    samples: Tensor,
    mean: Tensor,
    std: Tensor,
    seed: Tensor,
    positions: Tensor,
    alpha: float,
    num_targets: int,
    score: Tensor,
    grad_samples: Tensor | None,
    grad_mean: Tensor | None,
    grad_log_std: Tensor | None,
) -> None:
    weight = -2.0 / (samples.shape[0] * num_targets)
    needs_targets = grad_mean is not None or grad_log_std is not None
    step = max(1, _block_elements(samples.device) // mean.numel())
    for first in range(0, num_targets, step):
        count = min(step, num_targets - first)
        noise = standard_normals(seed, positions, first, count, mean.shape[-1], mean.dtype)
        noise *= std
        targets = mean + noise
        grad_targets = torch.zeros_like(targets) if needs_targets else None
        _add_target_term(samples, targets, alpha, weight, score, grad_samples, grad_targets)
        if grad_targets is not None and grad_mean is not None:
            grad_mean += grad_targets.sum(0)
        if grad_targets is not None and grad_log_std is not None:
            grad_log_std += (grad_targets * noise).sum(0)


def _add_closed_form_term(
    samples: Tensor,
    mean: Tensor,
    std: Tensor,
    alpha: float,
    score: Tensor,
    grad_samples: Tensor | None,
    grad_mean: Tensor | None,
    grad_log_std: Tensor | None,
) -> None:
    weight = -2.0 / samples.shape[0]
    needs_offset = grad_samples is not None or grad_mean is not None
    value, grad_offset, grad_log = expected_distance_power_with_gradients(
        samples - mean, std, alpha, needs_offset, grad_log_std is not None
    )
    score += weight * value.sum(0)
    if grad_samples is not None and grad_offset is not None:
        grad_samples.add_(grad_offset, alpha=weight)
    if grad_mean is not None and grad_offset is not None:
        grad_mean.sub_(grad_offset.sum(0), alpha=weight)
    if grad_log_std is not None and grad_log is not None:
        grad_log_std.add_(grad_log, alpha=weight)


class _Gradient:
    """A gradient under construction, in blocks of positions; empty, [0], if it is not needed."""

    def __init__(self, needed: bool, like: Tensor, dtype: torch.dtype) -> None:
        self.needed = needed
        self.dtype = dtype
        self.result = like.new_zeros(like.shape if needed else (0,))

    def block(self, positions: slice) -> Tensor | None:
        """Zeros of the computing dtype to add to: the result itself where it has that dtype."""
        if not self.needed:
            return None
        part = self.result[..., positions, :]
        return part if part.dtype == self.dtype else torch.zeros_like(part, dtype=self.dtype)

    def store(self, positions: slice, block: Tensor | None) -> None:
        if block is not None and block.dtype != self.result.dtype:
            self.result[..., positions, :] = block


def energy_score_with_gradients(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    seed: Tensor | None,
    alpha: float,
    estimator: str,
    num_targets: int,
    needs_samples: bool,
    needs_mean: bool,
    needs_log_std: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """samples [N, P, D], mean and log_std [P, D] -> score [P] and its gradients.

    A gradient has the shape and dtype of its tensor; one that is not needed is empty, [0].
    """
    dtype = compute_dtype(samples.dtype)
    score = samples.new_zeros(samples.shape[1], dtype=dtype)
    gradients = (
        _Gradient(needs_samples, samples, dtype),
        _Gradient(needs_mean, mean, dtype),
        _Gradient(needs_log_std, log_std, dtype),
    )
    for block in _position_blocks(samples, 1):
        x, m = samples[:, block].to(dtype), mean[block].to(dtype)
        std = log_std[block].to(dtype).exp()
        grads = [gradient.block(block) for gradient in gradients]
        _add_pair_term(x, alpha, score[block], grads[0])
        if estimator == "closed_form":
            _add_closed_form_term(x, m, std, alpha, score[block], *grads)
        else:
            assert seed is not None
            rows = torch.arange(block.start, block.stop, device=samples.device)
            _add_monte_carlo_term(x, m, std, seed, rows, alpha, num_targets, score[block], *grads)
        for gradient, grad in zip(gradients, grads, strict=True):
            gradient.store(block, grad)
    return score, gradients[0].result, gradients[1].result, gradients[2].result


def energy_score_from_targets_with_gradients(
    samples: Tensor, targets: Tensor, alpha: float, needs_samples: bool, needs_targets: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """samples [N, P, D], targets [M, P, D] -> score [P] and its gradients, as above."""
    num_samples, num_targets = samples.shape[0], targets.shape[0]
    dtype = compute_dtype(samples.dtype)
    score = samples.new_zeros(samples.shape[1], dtype=dtype)
    gradients = (
        _Gradient(needs_samples, samples, dtype),
        _Gradient(needs_targets, targets, dtype),
    )
    weight = -2.0 / (num_samples * num_targets)
    for block in _position_blocks(samples, num_targets):
        x, y = samples[:, block].to(dtype), targets[:, block].to(dtype)
        grads = [gradient.block(block) for gradient in gradients]
        _add_pair_term(x, alpha, score[block], grads[0])
        _add_target_term(x, y, alpha, weight, score[block], *grads)
        for gradient, grad in zip(gradients, grads, strict=True):
            gradient.store(block, grad)
    return score, gradients[0].result, gradients[1].result
