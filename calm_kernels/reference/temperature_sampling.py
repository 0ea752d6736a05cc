"""Temperature sampling from draws alone: the specification.

Target: P_T(x) = P(x)^b / Z_T over whole patches, b = 1/T >= 1, where only draws x ~ P can be had.
Two methods (arXiv 2510.27688, section 5): a vote among N draws, and an exact state machine that
consumes a stream of draws. Patches are compared token by token; nothing is hashed.

**Vote.** Among N draws let c_x be the number of times patch x occurs and C the largest of these.
One patch is drawn with weight

    w(c_x),  w(c) = prod_{j=c+1..C} f(j),
    f(j) = max(0, 1 - b/j), times theta = (floor(b) - 1/2) / (b - 1/2) at j = floor(b) + 1.

- Integer b (theta = 1): w(c) is proportional to the binomial C(c, b) on c >= b, and if no patch
  occurs b times, w is 1 for the most frequent ones and 0 for the others: the paper's Algorithm 2,
  whose fallbacks b-1, b-2, ..., 1 stop at C, where C(c, C) is 1 for c = C and nothing else.
- Real b: w(c) is proportional to Gamma(c+1) / Gamma(c-b+1) on c > floor(b), the same binomial with
  Gamma functions, and continues to c = floor(b), the last count where that quotient is positive.
  Without this term a temperature just below 1 would ignore every patch that was drawn once.
- theta corrects the rare patches. If the number of patches with probability above p grows like
  p^-s, they receive their share of P_T from theta = (floor(b)-s)/(b-s): with t(c) = Gamma(c-s) /
  Gamma(c-b+1), the total weight of a count, t(c) = g(c+1) - g(c) for g(c) = Gamma(c-s) /
  (Gamma(c-b) (b-s)), so that the sum from floor(b)+1 on misses g(floor(b)+1) = theta t(floor(b)).
  s = 1/2 is the middle of its range (0, 1).

w is continuous in T, needs no special function and cannot overflow. It is rounded to multiples of
2^-40, which makes sums over up to 8192 draws exact in float64: every order of summation, and so
every backend, gives the same draw.

**Uniforms.** Uniform number e of a row joins words 2e and 2e+1 of its Philox stream (their upper
26 bits each): ((upper * 2^26 + lower) + 1/2) * 2^-52, exact in float64 and inside (0, 1).
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from calm_kernels.reference.philox import Stream, philox_words

_WEIGHT_UNIT = 2.0**-40
_COMPARISONS_PER_CHUNK = 2**24
_TAIL_EXPONENT = 0.5


def wide_uniform(seed: Tensor, rows: Tensor, first: Tensor, count: int, stream: int) -> Tensor:
    """Uniforms of 52 bits: numbers first[r] .. first[r] + count - 1 of each row.

    Args:
        seed: int64, one element.
        rows: int64 [R].
        first: int64 [R], the number of each row's first uniform.
        count: uniforms per row.
        stream: a member of :class:`Stream`.

    Returns:
        float64 [R, count]
    """
    block = (first // 2).unsqueeze(-1) + torch.arange(count // 2 + 1, device=rows.device)
    words = philox_words(seed, rows.unsqueeze(-1), block, stream).flatten(-2) >> 6
    upper, lower = words[..., 0::2], words[..., 1::2]
    values: Tensor = (((upper << 26) | lower).double() + 0.5) * 2.0**-52
    position = (first % 2).unsqueeze(-1) + torch.arange(count, device=rows.device)
    return torch.gather(values, -1, position)


def vote_weights(num_draws: int, largest: Tensor, exponent: Tensor) -> Tensor:
    """Weight of a patch by how often it was drawn, in multiples of 2^-40.

    Args:
        num_draws: N.
        largest: int64 [B], the largest count of each sequence, 1..N.
        exponent: float64 [B], b = 1/T.

    Returns:
        float64 [B, N], integers up to 2^40; column c-1 belongs to patches drawn c times and is
        meaningful for c up to ``largest``.
    """
    b = exponent.clamp_max(num_draws + 1).unsqueeze(-1)  # larger b differ in nothing
    j = torch.arange(2, num_draws + 1, device=exponent.device, dtype=torch.float64)
    whole = b.floor()
    theta = (whole - _TAIL_EXPONENT) / (b - _TAIL_EXPONENT)
    factor = ((j - b) / j).clamp_min(0.0)
    factor = torch.where(j == whole + 1, factor * theta, factor)
    factor = torch.where(j <= largest.unsqueeze(-1), factor, 1.0)
    from_the_top = torch.cat((factor, torch.ones_like(b)), dim=-1).flip(-1).cumprod(-1).flip(-1)
    return (from_the_top / _WEIGHT_UNIT).round()


def _count_equal(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [B, N, K] -> how often each draw's patch occurs; whether this is its first. [B, N]"""
    num_draws = tokens.shape[1]
    earlier = torch.ones(num_draws, num_draws, dtype=torch.bool, device=tokens.device).tril(-1)
    counts, is_first = [], []
    for chunk in tokens.split(max(1, _COMPARISONS_PER_CHUNK // num_draws**2)):
        equal = chunk[:, :, None, 0] == chunk[:, None, :, 0]
        for k in range(1, tokens.shape[2]):
            equal &= chunk[:, :, None, k] == chunk[:, None, :, k]
        counts.append(equal.sum(-1))
        is_first.append(~(equal & earlier).any(-1))
    return torch.cat(counts), torch.cat(is_first)


def batch_temperature_sample(
    tokens: Tensor, exponent: Tensor, rows: Tensor | None, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The vote.

    The distinct patches in the order of their first occurrence, weights w_1, w_2, ... of sum W:
    the draw is the first one with w_1 + ... + w_i > u * W, u the first uniform of the sequence's
    row in stream BATCH_TEMPERATURE.

    Args:
        tokens: int64 or int32 [B, N, K].
        exponent: float64 [B], b = 1/T.
        rows: int64 [B], each sequence's row of the stream; None is 0..B-1.
        seed: int64 [1].

    Returns:
        the patches [B, K]; how often each occurs among its draws, int64 [B]; the number of
        distinct patches, int64 [B].
    """
    batch_size, num_draws, patch_size = tokens.shape
    if rows is None:
        rows = torch.arange(batch_size, device=tokens.device)
    counts, is_first = _count_equal(tokens)
    weights = vote_weights(num_draws, counts.amax(dim=1), exponent).gather(1, counts - 1)
    running = (weights * is_first).cumsum(dim=1)

    u = wide_uniform(seed, rows, torch.zeros_like(rows), 1, Stream.BATCH_TEMPERATURE)
    chosen = (running <= u * running[:, -1:]).sum(dim=1, keepdim=True)
    patches = tokens.gather(1, chosen.unsqueeze(-1).expand(-1, 1, patch_size)).squeeze(1)
    return patches, counts.gather(1, chosen).squeeze(1), is_first.sum(dim=1)


class Progress(IntEnum):
    """Columns of the integer state of a sequence in the exact method."""

    MATCHES = 0
    """equal draws in a row so far; 0 = no candidate"""
    TRIAL = 1
    """number i of the next trial of the Bernoulli factory, from 1"""
    NUM_DRAWS = 2
    """draws consumed since the start"""
    NUM_UNIFORMS = 3
    """uniforms consumed since the start"""
    ACCEPTED = 4
    """1 when the candidate is the result"""


def exact_temperature_start(batch_size: int, device: torch.device) -> Tensor:
    """The state before the first draw: int64 [B, 5], columns as :class:`Progress`."""
    progress = torch.zeros(batch_size, len(Progress), dtype=torch.int64, device=device)
    progress[:, Progress.TRIAL] = 1
    return progress


def exact_temperature_step(
    draws: Tensor,
    candidate: Tensor,
    progress: Tensor,
    num_equal: Tensor,
    fraction: Tensor,
    rows: Tensor,
    seed: Tensor,
    max_draws: int,
) -> tuple[Tensor, Tensor]:
    """Feed a round of R draws to the state machine of each sequence, in order.

    With n = floor(1/T), a = 1/T - n, p = P(candidate), a sequence

    1. collects n equal draws in a row, probability p^(n-1) given the first; a draw that differs
       ends the attempt at once;
    2. with a > 0, draws on: trial i accepts if the draw equals the candidate; otherwise the
       attempt ends with probability a/i (u * i < a), and trial i+1 follows. This accepts with
       probability p^a (Mendo, "An asymptotically optimal Bernoulli factory for certain functions
       that can be expressed as power series", 2019).

    An attempt that ends is followed by the next one, from the next draw. A sequence that has
    accepted, or has consumed ``max_draws`` draws, ignores what remains of its round.

    Args:
        draws: int64 or int32 [A, R, K].
        candidate: the same dtype [A, K]; any value where there is no candidate.
        progress: int64 [A, 5], columns as :class:`Progress`.
        num_equal, fraction: n, int64 [A], and a, float64 [A].
        rows: int64 [A], the sequences' rows in stream EXACT_TEMPERATURE.
        seed: int64 [1].
        max_draws: draws that a sequence may consume in all.

    Returns:
        candidate and progress after the round.
    """
    matches, trial, num_draws, num_uniforms, accepted = progress.unbind(-1)
    accepted = accepted > 0
    first_uniform = num_uniforms
    uniforms = wide_uniform(seed, rows, num_uniforms, draws.shape[1], Stream.EXACT_TEMPERATURE)
    candidate = candidate.clone()
    for draw in draws.unbind(1):
        live = ~accepted & (num_draws < max_draws)
        in_factory = matches == num_equal
        starts = matches == 0
        equal = starts | (draw == candidate).all(dim=-1)
        flips = live & in_factory & ~equal
        u = uniforms.gather(1, (num_uniforms - first_uniform).unsqueeze(-1)).squeeze(-1)
        ends = live & ~equal & (~in_factory | (u * trial < fraction))

        candidate = torch.where((live & starts).unsqueeze(-1), draw, candidate)
        matches = torch.where(live & equal & ~in_factory, matches + 1, matches)
        accepted = accepted | (
            live & equal & (in_factory | (matches == num_equal) & (fraction == 0))
        )
        trial = torch.where(flips, trial + 1, trial)
        matches = torch.where(ends, 0, matches)
        trial = torch.where(ends, 1, trial)
        num_uniforms = num_uniforms + flips
        num_draws = num_draws + live
    state = (matches, trial, num_draws, num_uniforms, accepted.to(torch.int64))
    return candidate, torch.stack(state, dim=-1)
