"""Sampling whole patches at a temperature when the model can only be drawn from.

Target: P_T(x) = P(x)^(1/T) / Z_T, Z_T = sum_x P(x)^(1/T). The laws, the weights and the random
numbers are specified in ``calm_kernels.reference.temperature_sampling``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import temperature_sampling as reference
from calm_kernels.reference.temperature_sampling import Progress

DEFAULT_MAX_DRAWS = 65536
LARGEST_AUTOMATIC_ROUND = 256
UNACCEPTED_TOKEN = -1

# 1/T this close to an integer, relatively, is that integer, so that 0.1 means 10 and 1/3 means 3.
# A float32 temperature is itself rounded, so its tolerance is float32's.
_INTEGER_TOLERANCE = {torch.float64: 1e-9, torch.float32: torch.finfo(torch.float32).eps}
_LARGEST_EXPONENT = 2.0**53

Draw = Callable[[Tensor, int], Tensor]


def _batch_fake(
    tokens: Tensor, exponent: Tensor, rows: Tensor | None, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, _, patch_size = tokens.shape
    return (
        tokens.new_empty((batch_size, patch_size)),
        tokens.new_empty((batch_size,), dtype=torch.int64),
        tokens.new_empty((batch_size,), dtype=torch.int64),
    )


def _step_fake(
    draws: Tensor,
    candidate: Tensor,
    progress: Tensor,
    num_equal: Tensor,
    fraction: Tensor,
    rows: Tensor,
    seed: Tensor,
    max_draws: int,
) -> tuple[Tensor, Tensor]:
    return (
        draws.new_empty((draws.shape[0], draws.shape[2])),
        draws.new_empty((draws.shape[0], len(Progress)), dtype=torch.int64),
    )


_batch_temperature_sample = define(
    "batch_temperature_sample",
    "(Tensor tokens, Tensor exponent, Tensor? rows, Tensor seed) -> (Tensor, Tensor, Tensor)",
    reference=reference.batch_temperature_sample,
    fake=_batch_fake,
)

_exact_temperature_step = define(
    "exact_temperature_step",
    "(Tensor draws, Tensor candidate, Tensor progress, Tensor num_equal, Tensor fraction, "
    "Tensor rows, Tensor seed, int max_draws) -> (Tensor, Tensor)",
    reference=reference.exact_temperature_step,
    fake=_step_fake,
)


def _exponent(
    temperature: float | Tensor, batch_size: int, device: torch.device, check_values: bool
) -> Tensor:
    """1/T of each sequence, float64 [B], after checking T."""
    if isinstance(temperature, Tensor):
        _checks.tensor("temperature", temperature, tuple(_INTEGER_TOLERANCE), (batch_size,))
        if temperature.device != device:
            raise ValueError(
                f"temperature: expected device {device}; got {temperature.device}; "
                "move it with .to()"
            )
        if check_values and not bool(((temperature > 0) & (temperature <= 1)).all()):
            raise ValueError(
                f"temperature: expected 0 < T <= 1 everywhere; got {temperature.tolist()}; "
                "drawing from P itself is T = 1"
            )
    else:
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(
                "temperature: expected a float or a tensor of one temperature per sequence; "
                f"got {type(temperature).__name__}"
            )
        if not 0.0 < temperature <= 1.0:
            raise ValueError(
                f"temperature: expected 0 < T <= 1; got {temperature}; "
                "drawing from P itself is T = 1"
            )
        b = min(1.0 / temperature, _LARGEST_EXPONENT)
        nearest = round(b)
        b = nearest if abs(b - nearest) <= _INTEGER_TOLERANCE[torch.float64] * b else b
        return torch.full((batch_size,), b, dtype=torch.float64, device=device)
    exponent = (1.0 / temperature.double()).clamp_max(_LARGEST_EXPONENT)
    whole = exponent.round()
    tolerance = _INTEGER_TOLERANCE[temperature.dtype]
    return torch.where((exponent - whole).abs() <= tolerance * exponent, whole, exponent)


@overload
def batch_temperature_sample(
    tokens: Tensor,
    temperature: float | Tensor,
    *,
    seed: int | Tensor | None = ...,
    rows: Tensor | None = ...,
    return_counts: Literal[False] = ...,
) -> Tensor: ...


@overload
def batch_temperature_sample(
    tokens: Tensor,
    temperature: float | Tensor,
    *,
    seed: int | Tensor | None = ...,
    rows: Tensor | None = ...,
    return_counts: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def batch_temperature_sample(
    tokens: Tensor,
    temperature: float | Tensor,
    *,
    seed: int | Tensor | None = None,
    rows: Tensor | None = None,
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """One patch per sequence at temperature T, by a vote among N draws.

    A patch that occurs c times is chosen with weight C(c, 1/T), continued to real 1/T; if none
    occurs floor(1/T) times, one of the most frequent is chosen evenly. Biased at finite N (rare
    patches are missed), exact as N grows; T = 1 picks a draw uniformly.

    Args:
        tokens: N >= 1 independent draws of a patch of K >= 1 ids for each of B sequences,
            int64 or int32 [B, N, K], any ids. Time and memory grow as B N^2 K on the reference, as
            B N K in the native kernels; the CUDA kernel takes up to 8192 draws.
        temperature: T in (0, 1], or a float32 or float64 tensor [B]. Values of a tensor are
            checked on the CPU and outside torch.compile.
        seed: int, int64 tensor of one element, or None to draw one from torch's generator.
        rows: row of the random stream for each sequence, int64 [B]; default 0..B-1. With one seed,
            sequences of the same row share their random numbers.
        return_counts: also return how often the chosen patch occurs among its N draws, int64 [B],
            and the number of distinct patches among them, int64 [B].

    Returns:
        the patches, dtype of ``tokens``, [B, K]; a copy. No gradient, no host synchronisation.

    Raises:
        TypeError: wrong dtype or type. ValueError: wrong shape, no draw, T outside (0, 1],
            devices differ.

    Source: arXiv 2510.27688, Algorithm 2 (T = 1/n); real 1/T is this package's.
    """
    _checks.tensor("tokens", tokens, _checks.INTEGER_DTYPES, ("B", "N", "K"))
    _checks.at_least("tokens.shape[1]", tokens.shape[1], 1, " draw per sequence")
    _checks.at_least("tokens.shape[2]", tokens.shape[2], 1, " token per patch")
    device = tokens.device
    check_values = device.type == "cpu" and not torch.compiler.is_compiling()
    exponent = _exponent(temperature, tokens.shape[0], device, check_values)
    seed = _checks.seed_tensor(seed, device)
    if rows is not None:
        _check_stream_rows(rows, tokens.shape[0], device)
    patches, count, num_distinct = _batch_temperature_sample(device, tokens, exponent, rows, seed)
    return (patches, count, num_distinct) if return_counts else patches


def _check_stream_rows(rows: Tensor, batch_size: int, device: torch.device) -> None:
    _checks.tensor("rows", rows, (torch.int64,), (batch_size,))
    if rows.device != device:
        raise ValueError(f"rows: expected device {device}; got {rows.device}; move it with .to()")


def _checked_draws(draws: object, num_rows: int, count: int, like: Tensor | None) -> Tensor:
    """What ``draw`` returned, if it is what it must be; ``like`` is what it returned first."""
    patch_size: int | str = "K" if like is None else like.shape[2]
    dtypes = _checks.INTEGER_DTYPES if like is None else (like.dtype,)
    _checks.tensor("result of draw", draws, dtypes, (num_rows, count, patch_size))
    assert isinstance(draws, Tensor)
    _checks.at_least("result of draw: shape[2]", draws.shape[2], 1, " token per patch")
    return draws


def exact_temperature_sample(
    draw: Draw,
    batch_size: int,
    temperature: float | Tensor,
    *,
    round_size: int | None = None,
    num_rounds: int | None = None,
    max_draws: int = DEFAULT_MAX_DRAWS,
    seed: int | Tensor | None = None,
    rows: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One patch per sequence distributed exactly as P_T, from as many draws as that takes.

    Sequences that have not accepted yet are asked for together, a round of draws at a time; each
    consumes its own draws in order, so ``round_size`` trades calls of ``draw`` against unused draws
    and changes nothing else.

    A sequence needs (1 + sum_{j=1..n-1} S_j + [a>0] S_{1/T-1}) / Z_T draws on average, with
    S_j = sum_x P(x)^j, n = floor(1/T), a = 1/T - n.

    Args:
        draw: ``draw(active_rows, count)`` returns ``count`` fresh independent draws for each of
            the sequences ``active_rows`` (int64 [A], ascending, on ``device``): int64 or int32
            [A, count, K] on ``device``, K >= 1. Called at least once, even for ``batch_size`` 0.
        batch_size: B >= 0.
        temperature: T in (0, 1], or a float32 or float64 tensor [B].
        round_size: draws per sequence and call. None starts with ceil(1/T), the fewest that can be
            accepted, and doubles up to 256.
        num_rounds: exactly so many rounds of ``round_size`` draws for all sequences, accepted or
            not, without looking at results in between: no host synchronisation on ``device``, so
            that it can be captured in a CUDA graph if ``draw`` can (values of a temperature tensor
            are then checked on the CPU only). None: rounds until all have accepted or spent their
            budget, for the sequences that still wait.
        max_draws: draws a sequence may consume.
        seed: int, int64 tensor of one element, or None to draw one from torch's generator.
        rows: row of the random stream for each sequence, int64 [B]; default 0..B-1.
        device: where the sequences live; None takes it from ``temperature`` or ``seed`` if that
            is a tensor, else the CPU.

    Returns:
        tokens [B, K], the dtype of the draws, filled with -1 where not accepted; number of draws
        consumed, int64 [B], draws left over in the last round not counted; accepted, bool [B],
        False where ``max_draws`` draws did not suffice. No gradient.

        Among *accepted* sequences the law is P_T unless the budget ran out often. With integer 1/T
        it is P_T even then; otherwise frequent patches are overrepresented among them, because
        a rare candidate takes more draws to accept. Repeat the unaccepted with a larger
        budget; dropping them is a bias.

    Raises:
        TypeError: wrong dtype or type, also of what ``draw`` returns. ValueError: wrong shape,
            T outside (0, 1], ``max_draws`` below ceil(1/T), ``num_rounds`` without ``round_size``,
            devices differ.

    Source: arXiv 2510.27688, Algorithm 1, with attempts ended at the first draw that differs.
    """
    if not callable(draw):
        raise TypeError(f"draw: expected a function, got {type(draw).__name__}")
    _checks.at_least("batch_size", batch_size, 0)
    _checks.at_least("max_draws", max_draws, 1)
    if round_size is not None:
        _checks.at_least("round_size", round_size, 1)
    if num_rounds is not None:
        _checks.at_least("num_rounds", num_rounds, 1)
        if round_size is None:
            raise ValueError("round_size: expected a number of draws with num_rounds; got None")
    if device is None:
        given = next((t for t in (temperature, seed) if isinstance(t, Tensor)), None)
        device = torch.device("cpu") if given is None else given.device
    device = torch.device(device)

    values_at_hand = num_rounds is None or device.type == "cpu"
    b = _exponent(temperature, batch_size, device, check_values=values_at_hand)
    if rows is None:
        rows = torch.arange(batch_size, device=device)
    else:
        _check_stream_rows(rows, batch_size, device)
    fewest = int(b.max().ceil()) if batch_size > 0 and values_at_hand else 1
    _checks.at_least("max_draws", max_draws, fewest, " = ceil(1/T), or none can be accepted")
    run = _Rounds(draw, b, rows, _checks.seed_tensor(seed, device), max_draws)
    if num_rounds is not None and round_size is not None:
        return run.fixed(num_rounds, round_size)
    first = min(fewest, LARGEST_AUTOMATIC_ROUND) if round_size is None else round_size
    return run.until_accepted(first, LARGEST_AUTOMATIC_ROUND if round_size is None else round_size)


class _Rounds:
    """Rounds of draws for sequences with exponents ``b`` = 1/T, float64 [B].

    Rounds hand on draws [A, count, K] to the operator, which advances one state a sequence.
    """

    def __init__(self, draw: Draw, b: Tensor, rows: Tensor, seed: Tensor, max_draws: int) -> None:
        self._draw = draw
        self._num_equal = b.floor().to(torch.int64)
        self._fraction = b - b.floor()
        self._rows = rows
        self._seed = seed
        self._max_draws = max_draws
        self._all = torch.arange(b.shape[0], device=b.device)
        self._first: Tensor | None = None

    def fixed(self, num_rounds: int, round_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """``num_rounds`` rounds for all sequences; nothing is read back."""
        candidate: Tensor | None = None
        progress = reference.exact_temperature_start(len(self._all), self._all.device)
        for _ in range(num_rounds):
            candidate, progress = self._round(self._all, round_size, candidate, progress)
        assert candidate is not None
        accepted = progress[:, Progress.ACCEPTED] > 0
        tokens = candidate.where(accepted.unsqueeze(1), UNACCEPTED_TOKEN)
        return tokens, progress[:, Progress.NUM_DRAWS].clone(), accepted

    def until_accepted(self, count: int, largest: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rounds of ``count`` draws, doubling up to ``largest``, for those that still wait."""
        active = self._all
        progress = reference.exact_temperature_start(len(active), active.device)
        final_progress = progress.clone()
        candidate = tokens = None
        num_drawn = 0
        while True:
            count = min(count, self._max_draws - num_drawn)
            candidate, progress = self._round(active, count, candidate, progress)
            if tokens is None:
                tokens = torch.full_like(candidate, UNACCEPTED_TOKEN)
            num_drawn += count
            final_progress[active] = progress
            accepted = progress[:, Progress.ACCEPTED] > 0
            tokens[active[accepted]] = candidate[accepted]
            waiting = (~accepted).nonzero().squeeze(1)
            if waiting.numel() == 0 or num_drawn == self._max_draws:
                break
            active, candidate, progress = active[waiting], candidate[waiting], progress[waiting]
            count = min(2 * count, largest)
        num_draws = final_progress[:, Progress.NUM_DRAWS].clone()
        return tokens, num_draws, final_progress[:, Progress.ACCEPTED] > 0

    def _round(
        self, active: Tensor, count: int, candidate: Tensor | None, progress: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw for some sequences and advance them: candidates [A, K] and progress [A, columns]."""
        draws = _checked_draws(self._draw(active, count), active.shape[0], count, self._first)
        if draws.device != active.device:
            raise ValueError(
                f"result of draw: expected device {active.device}; got {draws.device}; "
                "pass device= to exact_temperature_sample"
            )
        if self._first is None:
            self._first = draws
        if candidate is None:
            candidate = draws.new_full((active.shape[0], draws.shape[2]), UNACCEPTED_TOKEN)
        laws = [self._num_equal, self._fraction, self._rows]
        if active is not self._all:
            laws = [law[active] for law in laws]
        result: tuple[Tensor, Tensor] = _exact_temperature_step(
            active.device, draws, candidate, progress, *laws, self._seed, self._max_draws
        )
        return result
