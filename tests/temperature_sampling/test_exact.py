from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from calm_kernels.ops import temperature_sampling as ops
from calm_kernels.ops.temperature_sampling import exact_temperature_sample
from calm_kernels.reference import philox
from calm_kernels.reference import temperature_sampling as reference
from calm_kernels.reference.philox import Stream
from calm_kernels.reference.temperature_sampling import Progress

OPERATOR = torch.ops.calm_kernels.exact_temperature_step
FALSE_ALARM = 1e-6
TEMPERATURES = [1.0, 0.8, 0.7, 0.5, 0.4, 1 / 3, 0.3]
ZIPF = 1 / np.arange(1.0, 7.0)
LAWS = {"zipf": ZIPF / ZIPF.sum(), "near-degenerate": np.array([0.9, 0.05, 0.03, 0.02])}
# An exponent wrong by this factor is one that the chi-square test notices at every temperature.
WRONG_EXPONENT = {"zipf": 0.95, "near-degenerate": 0.75}
BATCH_SIZE = 100_000


def parts(temperature: float) -> tuple[float, int, float]:
    """b = 1/T, its floor n and its fraction a."""
    b = 1 / temperature
    b = float(round(b)) if abs(b - round(b)) < 1e-9 else b
    return b, math.floor(b), b - math.floor(b)


def powered(law: np.ndarray, b: float) -> np.ndarray:
    return law**b / (law**b).sum()


def as_patches(outcomes: torch.Tensor) -> torch.Tensor:
    """Outcome numbers as patches of three ids that differ in the last one only."""
    return torch.cat((torch.full((*outcomes.shape, 2), 7), outcomes[..., None]), dim=-1)


def sampler(law: np.ndarray, seed: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Independent draws of a law over patches."""
    generator = torch.Generator().manual_seed(seed)
    cdf = torch.from_numpy(law.cumsum())
    cdf[-1] = 1.0

    def draw(active: torch.Tensor, count: int) -> torch.Tensor:
        u = torch.rand(len(active), count, dtype=torch.float64, generator=generator)
        return as_patches(torch.searchsorted(cdf, u))

    return draw


def replayed(law: np.ndarray) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Draws that are a function of sequence and draw number, whatever the rounds are."""
    cdf = torch.from_numpy(law.cumsum())
    position = 0

    def draw(active: torch.Tensor, count: int) -> torch.Tensor:
        nonlocal position
        seed = torch.tensor([77])
        u = philox.uniform(seed, active, count, 9, first=position, dtype=torch.float64)
        position += count
        return as_patches(torch.searchsorted(cdf, u).clamp_max(len(law) - 1))

    return draw


def p_value(outcomes: torch.Tensor, law: np.ndarray) -> float:
    counts = np.bincount(outcomes.numpy(), minlength=len(law))
    expected = law * len(outcomes)
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return float(stats.chisquare(counts, expected).pvalue)


def expected_draws(law: np.ndarray, temperature: float) -> float:
    b, n, a = parts(temperature)
    moments = sum((law**j).sum() for j in range(1, n))
    return float((1 + moments + ((law ** (b - 1)).sum() if a else 0)) / (law**b).sum())


def draws_of_theorem_2(law: np.ndarray, temperature: float) -> float:
    b, n, a = parts(temperature)
    return float((n + ((law ** (b - 1)).sum() if a else 0)) / (law**b).sum())


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_law_is_the_powered_law_and_the_cost_is_the_formula(
    name: str, temperature: float
) -> None:
    law = LAWS[name]
    tokens, num_draws, accepted = exact_temperature_sample(
        sampler(law, seed=5), BATCH_SIZE, temperature, seed=6
    )
    b, n, _ = parts(temperature)
    assert bool(accepted.all())
    assert p_value(tokens[:, -1], powered(law, b)) > FALSE_ALARM
    assert p_value(tokens[:, -1], powered(law, b * WRONG_EXPONENT[name])) < FALSE_ALARM

    mean, error = num_draws.double().mean(), num_draws.double().std() / math.sqrt(BATCH_SIZE)
    assert abs(mean - expected_draws(law, temperature)) <= 4 * error + 1e-12
    if n <= 2:
        assert expected_draws(law, temperature) == pytest.approx(
            draws_of_theorem_2(law, temperature)
        )
    else:
        assert mean + 4 * error < draws_of_theorem_2(law, temperature)


def test_the_uniform_of_each_trial_is_used_as_specified_step_by_step() -> None:
    law, seed = LAWS["zipf"], torch.tensor([31])
    batch_size, count, max_draws = 60, 90, 25
    exponent = torch.tensor([1.0, 2.0, 3.0, 1.25, 2.5, 3.3]).double().repeat(10)
    rows = torch.arange(batch_size) * 2**30
    draws = sampler(law, seed=1)(rows, count)
    candidate, progress = OPERATOR.reference(
        draws,
        torch.zeros(batch_size, 3, dtype=torch.int64),
        reference.exact_temperature_start(batch_size, torch.device("cpu")),
        exponent.floor().long(),
        exponent - exponent.floor(),
        rows,
        seed,
        max_draws,
    )
    uniforms = reference.wide_uniform(
        seed, rows, torch.zeros_like(rows), count, Stream.EXACT_TEMPERATURE
    )
    outcomes = {"accepted": 0, "exhausted": 0}
    for s in range(batch_size):
        n = int(exponent[s])
        a = float(exponent[s]) - n
        u = iter(uniforms[s].tolist())
        stream = iter(draws[s, :max_draws].tolist())
        used_draws = used_uniforms = 0
        result = None
        try:
            while result is None:
                used_draws += 1
                x = next(stream)
                attempt_failed = False
                for _ in range(n - 1):
                    used_draws += 1
                    if next(stream) != x:
                        attempt_failed = True
                        break
                if attempt_failed:
                    continue
                i = 1
                while a > 0:
                    used_draws += 1
                    if next(stream) == x:
                        break
                    used_uniforms += 1
                    if next(u) < a / i:
                        attempt_failed = True
                        break
                    i += 1
                if not attempt_failed:
                    result = x
        except StopIteration:
            used_draws -= 1
        outcomes["exhausted" if result is None else "accepted"] += 1
        assert int(progress[s, Progress.ACCEPTED]) == (result is not None)
        assert int(progress[s, Progress.NUM_DRAWS]) == used_draws
        assert int(progress[s, Progress.NUM_UNIFORMS]) == used_uniforms
        if result is not None:
            assert candidate[s].tolist() == result
    assert min(outcomes.values()) >= 5


@pytest.mark.parametrize("max_draws", [60, 20_000])
def test_the_result_is_the_same_for_every_round_size(max_draws: int) -> None:
    batch_size = 60
    temperature = torch.tensor(TEMPERATURES[:6], dtype=torch.float64).repeat(10)
    results = [
        exact_temperature_sample(
            replayed(LAWS["zipf"]),
            batch_size,
            temperature,
            round_size=round_size,
            max_draws=max_draws,
            seed=8,
        )
        for round_size in (None, 1, 2, 7, 64, 1000)
    ]
    tokens, num_draws, accepted = results[0]
    assert bool(accepted.all()) == (max_draws > 1000)
    assert bool((num_draws[~accepted] == max_draws).all())
    assert bool((tokens[~accepted] == -1).all())
    assert bool((tokens[accepted] >= 0).all())
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_a_mismatch_as_the_next_candidate_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator = ops._exact_temperature_step

    def reuse(device, draws, candidate, progress, *rest):
        candidate, progress = operator(device, draws, candidate, progress, *rest)
        ended = (progress[:, Progress.MATCHES] == 0) & (progress[:, Progress.ACCEPTED] == 0)
        progress[ended, Progress.MATCHES] = 1
        return torch.where(ended[:, None], draws[:, 0], candidate), progress

    monkeypatch.setattr(ops, "_exact_temperature_step", reuse)
    tokens, _, _ = exact_temperature_sample(
        sampler(LAWS["zipf"], seed=5), BATCH_SIZE // 4, 0.5, round_size=1, seed=6
    )
    assert p_value(tokens[:, -1], powered(LAWS["zipf"], 2.0)) < FALSE_ALARM


def test_a_factory_with_the_wrong_odds_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = ops._exact_temperature_step

    def lenient(device, draws, candidate, progress, num_equal, fraction, *rest):
        return operator(device, draws, candidate, progress, num_equal, 0.8 * fraction, *rest)

    monkeypatch.setattr(ops, "_exact_temperature_step", lenient)
    tokens, _, _ = exact_temperature_sample(sampler(LAWS["zipf"], seed=5), BATCH_SIZE, 0.7, seed=6)
    assert p_value(tokens[:, -1], powered(LAWS["zipf"], 1 / 0.7)) < FALSE_ALARM


def test_temperature_one_accepts_the_first_draw() -> None:
    draws = torch.arange(40).view(4, 5, 2)
    tokens, num_draws, accepted = exact_temperature_sample(
        lambda active, count: draws[active, :count], 4, 1.0, round_size=5
    )
    assert torch.equal(tokens, draws[:, 0])
    assert num_draws.tolist() == [1] * 4
    assert bool(accepted.all())


def test_each_sequence_has_its_own_temperature() -> None:
    law = LAWS["zipf"]
    temperature = torch.tensor([1.0, 0.7, 0.5, 1 / 3]).repeat(20_000)
    tokens, num_draws, _ = exact_temperature_sample(
        sampler(law, seed=3), 80_000, temperature, seed=4
    )
    for t in (1.0, 0.7, 0.5, 1 / 3):
        group = (temperature - t).abs() < 1e-6
        assert p_value(tokens[group][:, -1], powered(law, 1 / t)) > FALSE_ALARM
        draws = num_draws[group].double()
        error = draws.std() / math.sqrt(20_000)
        assert abs(draws.mean() - expected_draws(law, t)) <= 4 * error + 1e-12
    assert bool((num_draws[temperature == 1.0] == 1).all())


def test_with_an_integer_power_a_budget_does_not_bias_the_accepted() -> None:
    law = LAWS["zipf"]
    tokens, num_draws, accepted = exact_temperature_sample(
        sampler(law, seed=3), BATCH_SIZE, 1 / 3, max_draws=6, seed=4
    )
    assert 1000 < int(accepted.sum()) < BATCH_SIZE // 2
    assert bool((tokens[~accepted] == -1).all())
    assert bool((num_draws[~accepted] == 6).all())
    assert int(num_draws.max()) == 6
    assert p_value(tokens[accepted][:, -1], powered(law, 3.0)) > FALSE_ALARM


def test_with_a_fractional_power_a_budget_favours_frequent_patches_among_the_accepted() -> None:
    # Two draws at 1/T = 1.25 accept exactly when they are equal: the accepted follow P^2.
    law = LAWS["zipf"]
    tokens, _, accepted = exact_temperature_sample(
        sampler(law, seed=3), BATCH_SIZE, 0.8, max_draws=2, seed=4
    )
    assert abs(accepted.double().mean() - (law**2).sum()) < 5 * 0.5 / math.sqrt(BATCH_SIZE)
    assert p_value(tokens[accepted][:, -1], powered(law, 2.0)) > FALSE_ALARM
    assert p_value(tokens[accepted][:, -1], powered(law, 1.25)) < FALSE_ALARM


def test_only_waiting_sequences_are_drawn_for_and_never_beyond_the_budget() -> None:
    calls: list[tuple[list[int], int]] = []
    draw = sampler(LAWS["zipf"], seed=1)

    def record(active: torch.Tensor, count: int) -> torch.Tensor:
        calls.append((active.tolist(), count))
        return draw(active, count)

    _, num_draws, accepted = exact_temperature_sample(record, 30, 0.5, max_draws=37, seed=0)
    assert calls[0] == (list(range(30)), 2)
    assert [count for _, count in calls[:4]] == [2, 4, 8, 16]
    assert sum(count for _, count in calls) <= 37
    for (before, _), (after, _) in itertools.pairwise(calls):
        assert after == sorted(after)
        assert set(after) < set(before) or after == before
    drawn = 0
    for rows, count in calls:
        waiting = ((num_draws > drawn) & (num_draws > 0)).nonzero().squeeze(1).tolist()
        assert rows == waiting
        drawn += count
    assert bool((accepted | (num_draws == 37)).all())


def test_budget_seventeen_and_round_size_five_end_at_seventeen_draws() -> None:
    counts: list[int] = []

    def never_equal(active: torch.Tensor, count: int) -> torch.Tensor:
        start = sum(counts)
        counts.append(count)
        return torch.arange(start, start + count)[None, :, None].expand(len(active), -1, -1)

    tokens, num_draws, accepted = exact_temperature_sample(
        never_equal, 3, 0.5, round_size=5, max_draws=17
    )
    assert counts == [5, 5, 5, 2]
    assert tokens.tolist() == [[-1]] * 3
    assert num_draws.tolist() == [17] * 3
    assert not bool(accepted.any())


def test_an_accepted_or_exhausted_sequence_ignores_the_rest_of_its_round() -> None:
    start = reference.exact_temperature_start(3, torch.device("cpu"))
    draws = torch.tensor([[5, 5, 6, 6], [1, 2, 3, 3], [1, 2, 2, 9]])[..., None]
    candidate, progress = OPERATOR.reference(
        draws,
        torch.zeros(3, 1, dtype=torch.int64),
        start,
        torch.full((3,), 2),
        torch.zeros(3, dtype=torch.float64),
        torch.arange(3),
        torch.tensor([0]),
        3,
    )
    assert progress[:, Progress.ACCEPTED].tolist() == [1, 0, 0]
    assert progress[:, Progress.NUM_DRAWS].tolist() == [2, 3, 3]
    assert candidate[0].tolist() == [5]
    again = OPERATOR.reference(
        draws,
        candidate,
        progress,
        torch.full((3,), 2),
        torch.zeros(3, dtype=torch.float64),
        torch.arange(3),
        torch.tensor([0]),
        3,
    )
    assert torch.equal(again[0], candidate)
    assert torch.equal(again[1], progress)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("patch_size", range(1, 9))
def test_patches_that_differ_in_one_id_are_different(dtype: torch.dtype, patch_size: int) -> None:
    top = 2**31 - 1 if dtype == torch.int32 else 2**31
    patch = torch.full((patch_size,), top, dtype=dtype)
    others = patch.repeat(patch_size, 1) - torch.eye(patch_size, dtype=dtype)
    pairs = torch.stack((others, patch.expand(patch_size, -1)), dim=1).flatten(0, 1)
    stream = torch.cat((pairs, patch[None], patch[None]))[None]
    tokens, num_draws, accepted = exact_temperature_sample(
        lambda active, count: stream[:, :count], 1, 0.5, round_size=stream.shape[1]
    )
    assert tokens.dtype == dtype
    assert torch.equal(tokens[0], patch)
    assert int(num_draws) == 2 * patch_size + 2
    assert bool(accepted)


def test_an_empty_batch_gives_an_empty_result_of_the_samplers_patch_size() -> None:
    for temperature in (0.5, torch.zeros(0)):
        tokens, num_draws, accepted = exact_temperature_sample(
            sampler(LAWS["zipf"], seed=0), 0, temperature
        )
        assert tokens.shape == (0, 3)
        assert num_draws.shape == accepted.shape == (0,)
        assert accepted.dtype == torch.bool


def test_the_seed_decides_and_none_follows_torchs_generator() -> None:
    def sample(seed: int | torch.Tensor | None) -> torch.Tensor:
        return exact_temperature_sample(replayed(LAWS["zipf"]), 300, 0.7, seed=seed)[1]

    assert torch.equal(sample(5), sample(torch.tensor([5])))
    assert not torch.equal(sample(5), sample(6))
    torch.manual_seed(1)
    first = sample(None)
    assert not torch.equal(sample(None), first)
    torch.manual_seed(1)
    assert torch.equal(sample(None), first)


def test_the_operator_passes_opcheck() -> None:
    for batch_size, count, dtype in ((4, 6, torch.int64), (0, 3, torch.int32), (2, 0, torch.int64)):
        progress = reference.exact_temperature_start(batch_size, torch.device("cpu"))
        arguments = (
            torch.randint(0, 2, (batch_size, count, 2), dtype=dtype),
            torch.zeros(batch_size, 2, dtype=dtype),
            progress,
            torch.ones(batch_size, dtype=torch.int64),
            torch.rand(batch_size, dtype=torch.float64),
            torch.arange(batch_size),
            torch.tensor([3]),
            100,
        )
        torch.library.opcheck(OPERATOR.reference, arguments)


@pytest.mark.parametrize("temperature", [0.7, 0.5, 0.3])
def test_fixed_rounds_accept_the_same_patches_after_the_same_draws(temperature: float) -> None:
    law = LAWS["zipf"]
    budget = 4 * 3
    free = exact_temperature_sample(
        replayed(law), 500, temperature, round_size=5, max_draws=budget, seed=4
    )
    fixed = exact_temperature_sample(
        replayed(law), 500, temperature, round_size=4, num_rounds=3, seed=4
    )
    assert 0 < int(free[2].sum()) < 500, "both outcomes must occur"
    for one, other in zip(free, fixed, strict=True):
        assert torch.equal(one, other)


def test_fixed_rounds_ask_for_all_sequences_so_many_times_and_keep_the_budget() -> None:
    asked = []
    draw = sampler(LAWS["near-degenerate"], 5)

    def recording(active: torch.Tensor, count: int) -> torch.Tensor:
        asked.append((active.tolist(), count))
        return draw(active, count)

    tokens, num_draws, accepted = exact_temperature_sample(
        recording, 40, 0.5, round_size=3, num_rounds=4, max_draws=7, seed=1
    )
    assert asked == [(list(range(40)), 3)] * 4
    assert int(num_draws.max()) <= 7
    assert torch.equal(tokens[:, 0] == -1, ~accepted)


def test_fixed_rounds_of_no_sequence_give_an_empty_result() -> None:
    draw = sampler(LAWS["zipf"], 5)
    tokens, _, _ = exact_temperature_sample(draw, 0, 0.5, round_size=3, num_rounds=2)
    assert tokens.shape == (0, 3)
