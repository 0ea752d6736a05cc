from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from calm_kernels import backend
from calm_kernels.ops.temperature_sampling import batch_temperature_sample
from calm_kernels.reference import temperature_sampling as reference
from calm_kernels.reference.philox import Stream

OPERATOR = torch.ops.calm_kernels.batch_temperature_sample
FALSE_ALARM = 1e-6
TEMPERATURES = [1.0, 0.95, 0.8, 0.7, 0.5, 0.4, 0.37, 1 / 3, 0.3, 0.1, 0.01]


def chi_square_p_value(observed: torch.Tensor, law: np.ndarray) -> float:
    """Of outcome numbers [B] under a law over outcomes; rare outcomes are pooled."""
    counts = np.bincount(observed.numpy(), minlength=len(law)).astype(float)
    expected = law * counts.sum()
    rare = expected < 10
    if counts[expected < 1e-9].any():
        return 0.0
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0
    return float(stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


def weights_of_counts(counts: list[int], temperature: float) -> list[float]:
    """The weights of the specification, from Gamma functions and an explicit fallback cascade."""
    b = 1 / temperature
    b = round(b) if abs(b - round(b)) < 1e-9 * b else b
    whole = math.floor(b)

    def weight(c: int, b: float) -> float:
        if c < math.floor(b):
            return 0.0
        log = math.lgamma(c + 1) - math.lgamma(c - b + 1) - math.lgamma(b + 1)
        theta = (math.floor(b) - 0.5) / (b - 0.5) if c == math.floor(b) else 1.0
        return math.exp(log) * theta

    for m in (b, *range(whole, 0, -1)):
        weights = [weight(c, m) for c in counts]
        if any(weights):
            return weights
    raise AssertionError("a patch that was drawn has weight at m = 1")


def binomial_weights(counts: torch.Tensor, temperature: float) -> torch.Tensor:
    """The implementation's weights of counts [outcomes of the draws, patches]."""
    b = torch.full((counts.shape[0],), 1 / temperature, dtype=torch.float64)
    table = reference.vote_weights(int(counts[0].sum()), counts.amax(dim=1), b)
    return table.gather(1, (counts - 1).clamp_min(0)) * (counts > 0)


def power_weights(counts: torch.Tensor, temperature: float) -> torch.Tensor:
    """A plausible mistake: empirical frequencies raised to 1/T."""
    return counts.double() ** (1 / temperature)


def law_of_vote(
    law: np.ndarray, num_draws: int, temperature: float, weights=binomial_weights
) -> np.ndarray:
    """Law of the chosen patch with ``num_draws`` draws, by enumerating all counts."""
    bars = itertools.combinations(range(num_draws + len(law) - 1), len(law) - 1)
    edges = np.array([(-1, *bar, num_draws + len(law) - 1) for bar in bars])
    counts = np.diff(edges, axis=1) - 1
    probability = stats.multinomial.pmf(counts, num_draws, law)
    share = weights(torch.from_numpy(counts), temperature).numpy()
    return probability @ (share / share.sum(axis=1, keepdims=True))


def powered(law: np.ndarray, temperature: float) -> np.ndarray:
    power = law ** (1 / temperature)
    return power / power.sum()


def as_patches(outcomes: torch.Tensor, patch_size: int = 3) -> torch.Tensor:
    """Outcome numbers as patches that differ in their last id only."""
    return torch.cat((torch.full((*outcomes.shape, patch_size - 1), 7), outcomes[..., None]), -1)


def letters(text: str, batch_size: int) -> torch.Tensor:
    outcomes = torch.tensor([ord(letter) - ord("A") for letter in text])
    return as_patches(outcomes).expand(batch_size, -1, -1)


def test_the_papers_example_gives_a_three_times_as_often_as_b() -> None:
    tokens = batch_temperature_sample(letters("ACADBEAFBG", 100_000), 0.5, seed=1)
    law = np.array([3 / 4, 1 / 4, 0, 0, 0, 0, 0])
    assert torch.equal(tokens[:, :2], torch.full_like(tokens[:, :2], 7))
    assert chi_square_p_value(tokens[:, -1], law) > FALSE_ALARM
    # Weights proportional to the squared counts would give 9/13, and the test would notice.
    squares = np.array([9 / 13, 4 / 13, 0, 0, 0, 0, 0])
    assert chi_square_p_value(tokens[:, -1], squares) < FALSE_ALARM


def test_the_draw_is_the_specified_function_of_counts_and_seed() -> None:
    generator = torch.Generator().manual_seed(3)
    seed = torch.tensor([2**40 + 5])
    for num_draws, patch_size, alphabet in (
        (1, 1, 2),
        (2, 2, 2),
        (7, 1, 3),
        (30, 3, 2),
        (60, 8, 1),
    ):
        shape = (40, num_draws, patch_size)
        tokens = torch.randint(0, alphabet + 1, shape, generator=generator)
        rows = torch.arange(40)
        u = reference.wide_uniform(seed, rows, torch.zeros(40).long(), 1, Stream.BATCH_TEMPERATURE)
        for temperature in TEMPERATURES:
            patches, counts, distinct = batch_temperature_sample(
                tokens, temperature, seed=seed, return_counts=True
            )
            for b in range(40):
                seen = Counter(tuple(patch) for patch in tokens[b].tolist())
                weights = weights_of_counts(list(seen.values()), temperature)
                running = np.cumsum(weights)
                index = int(np.searchsorted(running, float(u[b]) * running[-1], side="right"))
                expected = list(seen)[index]
                assert tuple(patches[b].tolist()) == expected
                assert int(counts[b]) == seen[expected]
                assert int(distinct[b]) == len(seen)


@pytest.mark.parametrize("num_draws", [1, 2, 13, 200, 4096])
@pytest.mark.parametrize("power", [1, 2, 3, 13, 2048, 10**9])
def test_weights_are_binomial_coefficients_where_one_over_t_is_an_integer(
    num_draws: int, power: int
) -> None:
    for largest in {1, (num_draws + 1) // 2, num_draws}:
        exponent = torch.tensor([power], dtype=torch.float64)
        table = reference.vote_weights(num_draws, torch.tensor([largest]), exponent)[0] * 2.0**-40
        reached = min(power, largest)  # the fallback cascade stops at the largest count
        top = math.comb(largest, reached)
        for c in {1, 2, reached - 1, reached, reached + 1, largest - 1, largest} & {
            *range(1, largest + 1)
        }:
            assert float(table[c - 1]) == pytest.approx(math.comb(c, reached) / top, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.999, 0.8, 0.7, 0.4, 0.37, 0.3, 0.03])
@pytest.mark.parametrize("largest", [1, 2, 3, 10, 200])
def test_weights_are_gamma_quotients_where_it_is_not(temperature: float, largest: int) -> None:
    exponent = torch.tensor([1 / temperature], dtype=torch.float64)
    table = reference.vote_weights(200, torch.tensor([largest]), exponent)[0, :largest]
    expected = torch.tensor(weights_of_counts(list(range(1, largest + 1)), temperature))
    expected = expected.double() / expected.max()
    torch.testing.assert_close(table * 2.0**-40, expected, atol=1e-6, rtol=1e-6)


def test_weights_are_continuous_in_temperature() -> None:
    b = torch.tensor([1, 2, 3, 7], dtype=torch.float64)
    largest = torch.full((4,), 12)
    at = reference.vote_weights(12, largest, b)
    for side in (1 - 1e-7, 1 + 1e-7):
        near = reference.vote_weights(12, largest, (b * side).clamp_min(1.0))
        torch.testing.assert_close(near, at, atol=2.0**40 * 1e-5, rtol=0)


def test_just_below_one_draws_that_occur_once_keep_their_share() -> None:
    tokens = batch_temperature_sample(letters("AABCDEFGHI", 20_000), 0.999, seed=5)
    share = (tokens[:, -1] == 0).double().mean()
    assert 0.18 < share < 0.22


LAWS = {
    "zipf": np.array([12, 6, 4, 3]) / 25,
    "near-degenerate": np.array([0.97, 0.01, 0.01, 0.01]),
    "flat": np.full(4, 0.25),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.5, 0.37, 0.3])
def test_the_chosen_patch_follows_the_enumerated_law(law: np.ndarray, temperature: float) -> None:
    num_draws, batch_size = 6, 100_000
    generator = torch.Generator().manual_seed(17)
    draws = torch.multinomial(
        torch.from_numpy(law), batch_size * num_draws, replacement=True, generator=generator
    )
    tokens = as_patches(draws.view(batch_size, num_draws), patch_size=2)
    chosen = batch_temperature_sample(tokens, temperature, seed=23)[:, -1]
    assert chi_square_p_value(chosen, law_of_vote(law, num_draws, temperature)) > FALSE_ALARM
    if law.max() > law.min() and temperature < 1:
        wrong = law_of_vote(law, num_draws, temperature, power_weights)
        assert chi_square_p_value(chosen, wrong) < FALSE_ALARM


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


@pytest.mark.parametrize("temperature", [0.9, 0.7, 0.5, 0.37])
@pytest.mark.parametrize("name", ["zipf", "near-degenerate"])
def test_the_bias_shrinks_with_the_number_of_draws(temperature: float, name: str) -> None:
    law = LAWS[name]
    target = powered(law, temperature)
    biases = [distance(law_of_vote(law, n, temperature), target) for n in (4, 12, 36)]
    assert biases[0] > biases[1] > biases[2]
    assert biases[2] < biases[0] / 2


def test_temperature_one_has_no_bias_and_picks_each_draw_evenly() -> None:
    law = LAWS["zipf"]
    assert distance(law_of_vote(law, 5, 1.0), law) < 1e-9
    tokens = as_patches(torch.arange(5)).expand(100_000, -1, -1)
    chosen = batch_temperature_sample(tokens, 1.0, seed=2)[:, -1]
    assert chi_square_p_value(chosen, np.full(5, 0.2)) > FALSE_ALARM


def test_a_tiny_temperature_picks_evenly_among_the_most_frequent() -> None:
    for temperature in (1e-3, 1e-300, 5e-324):
        tokens = batch_temperature_sample(letters("ABCBCADEF", 50_000), temperature, seed=2)
        law = np.array([1 / 3, 1 / 3, 1 / 3, 0, 0, 0])
        assert chi_square_p_value(tokens[:, -1], law) > FALSE_ALARM


@pytest.mark.parametrize("temperature", [1 / 3, 0.1, 0.2, 1 / 7])
def test_reciprocals_of_integers_mean_the_integer(temperature: float) -> None:
    power = round(1 / temperature)
    # Two patches, power and power - 1 times: the second has no weight at exactly 1/T = power.
    tokens = letters("A" * power + "B" * (power - 1), 2000)
    for given in (
        temperature,
        math.nextafter(temperature, 0),
        math.nextafter(temperature, 1),
        torch.full((2000,), temperature),
        torch.full((2000,), temperature, dtype=torch.float64),
    ):
        assert int(batch_temperature_sample(tokens, given, seed=1)[:, -1].sum()) == 0


def test_each_sequence_has_its_own_temperature_and_row() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (60, 9, 2), generator=generator)
    temperature = torch.tensor([1.0, 0.5, 0.37], dtype=torch.float64).repeat(20)
    mixed = batch_temperature_sample(tokens, temperature, seed=4)
    for one in (1.0, 0.5, 0.37):
        uniform = batch_temperature_sample(tokens, one, seed=4)
        assert torch.equal(mixed[temperature == one], uniform[temperature == one])
    assert torch.equal(batch_temperature_sample(tokens[:7], temperature[:7], seed=4), mixed[:7])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("patch_size", range(1, 9))
def test_patches_that_differ_in_one_id_are_different(dtype: torch.dtype, patch_size: int) -> None:
    top = 2**31 - 1 if dtype == torch.int32 else 2**31
    common = torch.full((patch_size,), top, dtype=dtype)
    others = common.repeat(patch_size, 1) - torch.eye(patch_size, dtype=dtype)
    tokens = torch.cat((others, common[None], others, common[None], common[None]))
    patches, count, distinct = batch_temperature_sample(
        tokens.expand(50, -1, -1), 1 / 3, seed=0, return_counts=True
    )
    assert patches.dtype == dtype
    assert torch.equal(patches, common.expand(50, -1))
    assert count.tolist() == [3] * 50
    assert distinct.tolist() == [patch_size + 1] * 50


def test_no_arithmetic_of_ids_confuses_patches() -> None:
    # Permutations, equal sums and products, ids equal modulo 2^32 and 2^31, shifted digits.
    patches = [
        *itertools.permutations((1, 2, 3, 4)),
        *((i, 10 - i, 0, 0) for i in range(11)),
        (2**32 + 1, 2, 3, 4),
        (2**31 + 1, 2, 3, 4),
        (-1, 2, 3, 4),
        (2**63 - 1, 2, 3, 4),
        (0, 0, 2**16, 0),
        (0, 2**16, 0, 0),
    ]
    tokens = torch.tensor([*patches, patches[5]]).expand(10, -1, -1)
    result, _, distinct = batch_temperature_sample(tokens, 0.5, seed=0, return_counts=True)
    assert distinct.tolist() == [len(patches)] * 10
    assert torch.equal(result, torch.tensor(patches[5]).expand(10, -1))


def test_one_draw_is_returned_whatever_the_temperature() -> None:
    tokens = torch.tensor([[[5]], [[2**31]]])
    for temperature in TEMPERATURES:
        assert torch.equal(batch_temperature_sample(tokens, temperature), tokens[:, 0])


def test_an_empty_batch_gives_an_empty_result() -> None:
    result, count, distinct = batch_temperature_sample(
        torch.zeros(0, 5, 4, dtype=torch.int32), torch.zeros(0), seed=1, return_counts=True
    )
    assert result.shape == (0, 4)
    assert result.dtype == torch.int32
    assert count.shape == distinct.shape == (0,)


def test_the_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, 2, (23, 12, 3), generator=torch.Generator().manual_seed(1))
    with backend("reference"):
        with_one_chunk = batch_temperature_sample(tokens, 0.5, seed=9)
        monkeypatch.setattr(reference, "_COMPARISONS_PER_CHUNK", 500)
        assert torch.equal(batch_temperature_sample(tokens, 0.5, seed=9), with_one_chunk)


def test_many_draws_are_counted() -> None:
    outcomes = torch.randint(0, 50, (1, 4096), generator=torch.Generator().manual_seed(1))
    patch, count, distinct = batch_temperature_sample(
        as_patches(outcomes), 1e-6, seed=0, return_counts=True
    )
    counts = torch.bincount(outcomes[0])
    assert int(count) == int(counts.max()) == int(counts[patch[0, -1]])
    assert int(distinct) == 50


def test_the_seed_decides_and_none_follows_torchs_generator() -> None:
    tokens = torch.randint(0, 20, (500, 10, 2), generator=torch.Generator().manual_seed(1))
    first = batch_temperature_sample(tokens, 0.9, seed=6)
    assert torch.equal(batch_temperature_sample(tokens, 0.9, seed=torch.tensor([6])), first)
    assert not torch.equal(batch_temperature_sample(tokens, 0.9, seed=7), first)
    torch.manual_seed(3)
    drawn = batch_temperature_sample(tokens, 0.9)
    assert not torch.equal(batch_temperature_sample(tokens, 0.9), drawn)
    torch.manual_seed(3)
    assert torch.equal(batch_temperature_sample(tokens, 0.9), drawn)


def test_a_non_contiguous_input_is_read_right_and_left_alone() -> None:
    tokens = torch.randint(0, 3, (4, 6, 20), generator=torch.Generator().manual_seed(1))
    view = tokens.permute(2, 1, 0)
    before = tokens.clone()
    result = batch_temperature_sample(view, 0.5, seed=1)
    assert torch.equal(result, batch_temperature_sample(view.contiguous(), 0.5, seed=1))
    result.zero_()
    assert torch.equal(tokens, before)


def test_the_operator_passes_opcheck() -> None:
    seed = torch.tensor([1])
    for shape, dtype in (
        ((3, 5, 2), torch.int64),
        ((0, 4, 1), torch.int32),
        ((2, 1, 1), torch.int64),
    ):
        tokens = torch.randint(0, 2, shape, dtype=dtype)
        exponent = torch.rand(shape[0], dtype=torch.float64) * 3 + 1
        for rows in (torch.arange(shape[0]) * 3, None):
            torch.library.opcheck(OPERATOR.reference, (tokens, exponent, rows, seed))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_rows_left_out_are_numbered_from_zero(name: str) -> None:
    tokens = torch.arange(512).reshape(1, 512, 1).expand(6, 512, 1)
    with backend(name):
        chosen = batch_temperature_sample(tokens, 1.0, seed=3)
        numbered = batch_temperature_sample(tokens, 1.0, seed=3, rows=torch.arange(6))
        others = batch_temperature_sample(tokens, 1.0, seed=3, rows=torch.arange(1, 7))
    assert torch.equal(chosen, numbered)
    assert not torch.equal(chosen, others)


def test_the_choice_depends_on_the_row_of_the_stream_and_not_on_the_place_in_the_batch() -> None:
    tokens = torch.arange(512).reshape(1, 512, 1).expand(6, 512, 1)
    rows = torch.tensor([5, 0, 5, 2**40, 0, 1])
    chosen = batch_temperature_sample(tokens, 1.0, seed=3, rows=rows).squeeze(1)
    alone = torch.stack(
        [batch_temperature_sample(tokens[:1], 1.0, seed=3, rows=row.reshape(1))[0] for row in rows]
    )
    assert torch.equal(chosen, alone.squeeze(1))
    assert chosen[0] == chosen[2] and chosen[1] == chosen[4]
    assert chosen.unique().numel() == 4


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_and_eager_agree(dynamic: bool) -> None:
    def sample(tokens: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        mixed, count, _ = batch_temperature_sample(
            tokens, temperature, seed=seed, return_counts=True
        )
        return mixed * 2 + batch_temperature_sample(tokens, 0.37, seed=5) + count[:, None]

    compiled = torch.compile(sample, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 6, 2), (5, 9, 3)):
        tokens = torch.randint(0, 2, shape, generator=generator)
        temperature = torch.rand(shape[0], generator=generator).clamp_min(0.1)
        arguments = (tokens, temperature, torch.tensor([3]))
        assert torch.equal(compiled(*arguments), sample(*arguments))


TOKENS = torch.zeros(2, 3, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokens", "temperature", "seed", "error", "message"),
    [
        (TOKENS[0], 0.5, 0, ValueError, r"tokens: expected shape \[B, N, K\]; got \[3, 4\]"),
        (TOKENS.float(), 0.5, 0, TypeError, "tokens: expected dtype int64, int32; got float32"),
        (TOKENS[:, :0], 0.5, 0, ValueError, r"tokens.shape\[1\]: expected at least 1 draw"),
        (TOKENS[..., :0], 0.5, 0, ValueError, r"tokens.shape\[2\]: expected at least 1 token"),
        (TOKENS, 0.0, 0, ValueError, "temperature: expected 0 < T <= 1; got 0.0"),
        (TOKENS, -0.5, 0, ValueError, "temperature: expected 0 < T <= 1; got -0.5"),
        (TOKENS, 1.5, 0, ValueError, "temperature: expected 0 < T <= 1; got 1.5"),
        (TOKENS, math.nan, 0, ValueError, "temperature: expected 0 < T <= 1; got nan"),
        (TOKENS, True, 0, TypeError, "temperature: expected a float .*; got bool"),
        (TOKENS, "0.5", 0, TypeError, "temperature: expected a float .*; got str"),
        (TOKENS, torch.ones(3), 0, ValueError, r"temperature: expected shape \[2\]; got \[3\]"),
        (TOKENS, torch.ones(()), 0, ValueError, r"temperature: expected shape \[2\]; got \[\]"),
        (TOKENS, torch.ones(2).half(), 0, TypeError, "temperature: expected dtype .*float16"),
        (TOKENS, torch.tensor([0.5, 0.0]), 0, ValueError, "temperature: .*everywhere"),
        (TOKENS, torch.tensor([0.5, math.nan]), 0, ValueError, "temperature: .*everywhere"),
        (TOKENS, torch.ones(2, device="meta"), 0, ValueError, "temperature: expected device cpu"),
        (TOKENS, 0.5, "x", TypeError, "seed: expected"),
        (TOKENS.tolist(), 0.5, 0, TypeError, "tokens: expected a torch.Tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(tokens, temperature, seed, error, message: str) -> None:
    with pytest.raises(error, match=message):
        batch_temperature_sample(tokens, temperature, seed=seed)
