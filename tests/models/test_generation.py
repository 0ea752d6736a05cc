"""Generation: batches, ragged prompts, ends inside a patch, samplers, bad input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calm_kernels.models import EnergyTransformer
from calm_kernels.models.draws import Drawer
from calm_kernels.models.patch_sampler import PatchSampler
from calm_kernels.models.sequences import seed_of_step

MakeEnergyTransformer = Callable[..., EnergyTransformer]


def prompt(length: int, seed: int = 0, vocab_size: int = 22) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
    return tokens


def next_patches(model: EnergyTransformer, context: list[int], count: int) -> Tensor:
    """Many draws of the patch after a context of whole patches, [count, K]."""
    patches = torch.tensor([context]).unflatten(1, (-1, model.config.patch_size))
    with torch.no_grad():
        hidden = model.hidden_states(patches)[:, -1]
        sampler = PatchSampler(Drawer(model, count), hidden, 12345, 1, 1, "batch")
        return sampler.draw(torch.tensor([0]), 0, count)[0]


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_sequences_hold_prompt_and_as_many_new_tokens_as_asked(
    make_model: MakeEnergyTransformer, patch_size: int, extra: int
) -> None:
    model = make_model(patch_size)
    prompts = [prompt(2 * patch_size + extra, 1), prompt(patch_size, 2)]
    output = model.generate(
        prompts, max_new_tokens=11, temperature=0.5, num_candidates=20, max_draws=40, seed=3
    )
    assert output.prompt_lengths.tolist() == [len(p) for p in prompts]
    assert output.lengths.tolist() == [len(p) + 11 for p in prompts]
    for row, tokens in enumerate(prompts):
        assert output.sequences[row, : len(tokens)].tolist() == tokens
        assert len(output.new_tokens(row)) == 11
    assert output.sequences.shape == (2, 11 + max(map(len, prompts)))
    assert output.sequences.min() >= 0 and output.sequences.max() < 23
    assert not output.finished.any()


def test_cached_generation_equals_running_the_whole_sequence_again(
    make_model: MakeEnergyTransformer,
) -> None:
    model = make_model(4).double()
    tokens = prompt(12)
    output = model.generate([tokens], max_new_tokens=16, temperature=0.5, num_candidates=30, seed=9)
    with torch.no_grad():
        for step in range(4):
            hidden = model.hidden_states(torch.tensor([tokens]).unflatten(1, (-1, 4)))[:, -1]
            sampler = PatchSampler(
                Drawer(model, 30), hidden, seed_of_step(9, step), 30, 30, "batch"
            )
            choice = sampler.sample([0], torch.tensor([0.5], dtype=torch.float64), [[]])
            tokens = tokens + choice[0].tokens
    assert output.sequences[0].tolist() == tokens
    assert output.mean_draws.tolist() == [30.0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sequence_of_a_batch_equals_the_same_sequence_alone(
    make_model: MakeEnergyTransformer, temperature: float
) -> None:
    model = make_model(4).double()
    short, long = prompt(5, 1), prompt(18, 2)
    options: dict[str, Any] = {
        "max_new_tokens": 14,
        "temperature": temperature,
        "num_candidates": 25,
        "max_draws": 200,
        "seed": 4,
    }
    for prompts in ([short, long], [long, short]):
        together = model.generate(prompts, **options)
        alone = model.generate(prompts[:1], **options)
        length = int(alone.lengths[0])
        assert together.sequences[0, :length].tolist() == alone.sequences[0].tolist()
        assert together.mean_draws[0] == alone.mean_draws[0]


def test_identical_prompts_of_a_batch_get_their_own_noise(
    make_model: MakeEnergyTransformer,
) -> None:
    output = make_model(4).generate([prompt(8)] * 6, max_new_tokens=16, seed=1)
    assert len({tuple(row) for row in output.sequences.tolist()}) > 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_side_is_no_part_of_a_prompt(
    make_model: MakeEnergyTransformer, side: str
) -> None:
    model = make_model(4, pad_token_id=22)
    prompts = [prompt(9, 1), prompt(4, 2)]
    filling = [[22] * (9 - len(p)) for p in prompts]
    rows = [f + p if side == "left" else p + f for p, f in zip(prompts, filling, strict=True)]
    ids = torch.tensor(rows)
    expected = model.generate(prompts, max_new_tokens=8, seed=2).sequences
    assert torch.equal(model.generate(ids, max_new_tokens=8, seed=2).sequences, expected)
    mask, other_padding = (ids != 22).long(), ids.masked_fill(ids == 22, 5)
    masked = model.generate(other_padding, mask, max_new_tokens=8, seed=2)
    assert torch.equal(masked.sequences, expected)
    assert masked.sequences[1, 12:].tolist() == [22] * 5


@pytest.mark.parametrize("sampler", ["batch", "exact"])
def test_seed_fixes_the_tokens(make_model: MakeEnergyTransformer, sampler: Any) -> None:
    model = make_model(2)

    def run(seed: int | Tensor | None) -> list[int]:
        output = model.generate(
            [prompt(7)],
            max_new_tokens=12,
            temperature=0.7,
            num_candidates=10,
            sampler=sampler,
            seed=seed,
        )
        tokens: list[int] = output.sequences[0].tolist()
        return tokens

    assert run(5) == run(5) == run(torch.tensor([5]))
    assert run(5) != run(6)
    torch.manual_seed(3)
    first = run(None)
    torch.manual_seed(3)
    assert run(None) == first


def two_sample_statistic(a: Counter[Any], b: Counter[Any]) -> float:
    """Chi-square of two samples of draws, as standard deviations above its mean."""
    total_a, total_b = sum(a.values()), sum(b.values())
    statistic, degrees = 0.0, -1
    for key in a | b:
        count = a[key] + b[key]
        if count < 10:
            continue
        degrees += 1
        for observed, total in ((a[key], total_a), (b[key], total_b)):
            expected = count * total / (total_a + total_b)
            statistic += (observed - expected) ** 2 / expected
    return (statistic - degrees) / (2 * max(degrees, 1)) ** 0.5


def test_ragged_prompt_is_continued_by_the_conditional_law(
    make_model: MakeEnergyTransformer,
) -> None:
    model = make_model(2)
    context = prompt(4, 5)
    draws = [tuple(patch) for patch in next_patches(model, context, 20_000).tolist()]
    (first, count), *_ = Counter(patch[0] for patch in draws).most_common()
    assert count < 19_000
    conditional = Counter(patch[1] for patch in draws if patch[0] == first)
    assert len(conditional) > 1
    ragged = [[*context, first]] * 1500
    output = model.generate(ragged, max_new_tokens=1, seed=1)
    assert output.prompt_matched.all() and (output.mean_draws > 1).any()
    seconds = Counter(output.sequences[:, 5].tolist())
    assert two_sample_statistic(conditional, seconds) < 5
    # The unconditional law of the second token is another one, and would be noticed.
    unconditional = Counter(patch[1] for patch in draws)
    assert two_sample_statistic(unconditional, seconds) > 10


@pytest.mark.parametrize("sampler", ["batch", "exact"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_prompt_that_no_draw_continues_is_cut_anew_and_reported(
    make_model: MakeEnergyTransformer, sampler: Any, temperature: float
) -> None:
    model = make_model(4, eos_token_id=22).double()
    context = prompt(8, 5)
    draws = next_patches(model, context, 3000)
    first = int(draws[:, 0].mode().values)
    never = next(t for t in range(22) if not ((draws[:, 0] == first) & (draws[:, 1] == t)).any())
    ragged = [*context, first, never]
    options: dict[str, Any] = {
        "max_new_tokens": 10,
        "temperature": temperature,
        "num_candidates": 50,
        "sampler": sampler,
        "max_draws": 400,
        "seed": 1,
    }
    output = model.generate([ragged, context], **options)
    assert output.prompt_matched.tolist() == [False, True]
    assert output.sequences[0, :10].tolist() == ragged
    anew = model.generate([ragged[2:]], **options)
    assert anew.prompt_matched.all()
    assert output.new_tokens(0) == anew.new_tokens(0)
    assert output.mean_draws[0] > anew.mean_draws[0]
    # A prompt shorter than a patch is filled up in front, by the boundary of documents.
    drawn = set(next_patches(model, [22] * 4, 3000)[:, 0].tolist())
    never = next(t for t in range(22) if t not in drawn)
    output = model.generate([[never]], **options)
    assert output.prompt_matched.tolist() == [False]
    filled = model.generate([[22, 22, 22, never]], **options)
    assert output.new_tokens(0) == filled.new_tokens(0)


@pytest.mark.parametrize("sampler", ["batch", "exact"])
def test_ragged_prompt_at_a_temperature_begins_as_given(
    make_model: MakeEnergyTransformer, sampler: Any
) -> None:
    model = make_model(2)
    context = prompt(4, 5)
    first = int(next_patches(model, context, 500)[:, 0].mode().values)
    output = model.generate(
        [[*context, first]] * 3,
        max_new_tokens=5,
        temperature=0.5,
        num_candidates=40,
        sampler=sampler,
        seed=1,
    )
    assert output.prompt_matched.all() and output.accepted.all()
    assert output.sequences[:, 4].tolist() == [first] * 3
    assert output.lengths.tolist() == [10] * 3


def test_tokens_after_an_end_inside_a_patch_are_dropped(
    make_model: MakeEnergyTransformer,
) -> None:
    model = make_model(4, pad_token_id=22)
    prompts = [prompt(8, seed) for seed in range(12)]
    free = model.generate(prompts, max_new_tokens=24, seed=6)
    rows = [free.new_tokens(row) for row in range(12)]
    # A token that ends some sequences but not all, at least one of them inside a patch.
    ends = [
        token
        for token in range(22)
        if not all(token in row for row in rows)
        and any(token in row and row.index(token) % 4 != 3 for row in rows)
    ]
    end = max(ends, key=lambda token: sum(token in row for row in rows))
    model.config.eos_token_id = [end]
    output = model.generate(prompts, max_new_tokens=24, seed=6)
    assert output.finished.tolist() == [end in row for row in rows]
    for row, tokens in enumerate(rows):
        expected = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert len(output.new_tokens(row)) == len(expected)
        assert set(output.sequences[row, int(output.lengths[row]) :].tolist()) <= {22}
        assert output.new_tokens(row) == expected


def test_end_token_of_the_prompt_does_not_stop_it(make_model: MakeEnergyTransformer) -> None:
    model = make_model(4, eos_token_id=21)
    output = model.generate([[21, 1, 2, 3, 21, 5]], max_new_tokens=2, seed=1)
    assert output.lengths.tolist() == [8] or bool(output.finished[0])
    assert output.sequences[0, :6].tolist() == [21, 1, 2, 3, 21, 5]


def test_prompt_of_less_than_a_patch_follows_a_boundary(make_model: MakeEnergyTransformer) -> None:
    model = make_model(4, eos_token_id=21)
    options: dict[str, Any] = {"max_new_tokens": 8, "seed": 3}
    empty = model.generate([[]], **options)
    assert empty.prompt_lengths.tolist() == [0]
    after_boundary = model.generate([[21] * 4], **options)
    assert empty.new_tokens(0) == after_boundary.new_tokens(0)
    short = model.generate([[5]], **options)
    assert short.new_tokens(0) == model.generate([[21] * 4 + [5]], **options).new_tokens(0)
    model.config.bos_token_id = 20
    begun = model.generate([[]], **options)
    assert begun.new_tokens(0) == model.generate([[20] * 4], **options).new_tokens(0)
    model.config.bos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match="prompt 0 is shorter than a patch"):
        model.generate([[5]], **options)


def test_exact_sampler_follows_the_sharpened_law(make_model: MakeEnergyTransformer) -> None:
    model = make_model(1)
    context = prompt(3, 7)
    frequencies = Counter(next_patches(model, context, 50_000)[:, 0].tolist())
    sharp = {token: (count / 50_000) ** 2 for token, count in frequencies.items()}
    total = sum(sharp.values())
    output = model.generate(
        [context] * 2000, max_new_tokens=1, temperature=0.5, sampler="exact", seed=8
    )
    assert output.accepted.all()
    chosen = Counter(output.sequences[:, 3].tolist())
    reference = Counter({t: round(2_000_000 * p / total) for t, p in sharp.items()})
    assert two_sample_statistic(reference, chosen) < 5
    assert two_sample_statistic(Counter({t: 40 * c for t, c in frequencies.items()}), chosen) > 10


def test_spent_budget_is_reported(make_model: MakeEnergyTransformer) -> None:
    model = make_model(4)
    output = model.generate(
        [prompt(8)] * 3,
        max_new_tokens=4,
        temperature=0.25,
        num_candidates=10,
        sampler="exact",
        max_draws=4,
        seed=1,
    )
    assert not output.accepted.any()
    assert output.mean_draws.tolist() == [14.0] * 3
    assert (output.sequences >= 0).all()


def test_every_sequence_may_have_its_own_temperature(make_model: MakeEnergyTransformer) -> None:
    model = make_model(2)
    prompts = [prompt(4)] * 200
    temperature = torch.tensor([0.1, 1.0]).repeat(100)
    output = model.generate(
        prompts, max_new_tokens=2, temperature=temperature, num_candidates=60, seed=2
    )
    cold = {tuple(row) for row in output.sequences[::2, 4:].tolist()}
    warm = {tuple(row) for row in output.sequences[1::2, 4:].tolist()}
    assert len(cold) <= 3 < len(warm)


def test_new_tokens_are_reported_as_they_come(make_model: MakeEnergyTransformer) -> None:
    model = make_model(4)
    parts: list[list[list[int]]] = []
    output = model.generate(
        [prompt(9), prompt(4, 1)], max_new_tokens=10, max_draws=200, seed=1, on_patch=parts.append
    )
    assert [len(part[1]) for part in parts] == [4, 4, 2]
    assert [len(part[0]) for part in parts] == [3, 4, 3]
    for row in range(2):
        assert [t for part in parts for t in part[row]] == output.new_tokens(row)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"input_ids": []}, "at least one prompt"),
        (ValueError, {"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, "at least one prompt"),
        (ValueError, {"input_ids": [[1, 2, 3, 23]]}, r"\[0, 23\); got 23 in prompt 0"),
        (ValueError, {"input_ids": [[1, 2, 3, -1]]}, "-1"),
        (TypeError, {"input_ids": torch.zeros(1, 4)}, "dtype"),
        (ValueError, {"input_ids": torch.tensor([[1, 22, 3, 4]])}, "prompt 0.*between"),
        (ValueError, {"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        (ValueError, {"input_ids": [[1]], "attention_mask": torch.ones(1, 1)}, "attention_mask"),
        (ValueError, {"max_new_tokens": 0}, "max_new_tokens"),
        (ValueError, {"temperature": 0.0}, "0 < T <= 1"),
        (ValueError, {"temperature": 1.5}, "0 < T <= 1"),
        (TypeError, {"temperature": "hot"}, "temperature"),
        (ValueError, {"temperature": torch.tensor([0.5, 0.5])}, "temperature"),
        (ValueError, {"num_candidates": 0}, "num_candidates"),
        (ValueError, {"sampler": "best"}, "sampler.*batch, exact"),
        (ValueError, {"max_draws": 0}, "max_draws"),
        (TypeError, {"seed": "x"}, "seed"),
    ],
)
def test_bad_input_is_named(
    make_model: MakeEnergyTransformer,
    error: type[Exception],
    arguments: dict[str, Any],
    message: str,
) -> None:
    valid = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "max_new_tokens": 4}
    with pytest.raises(error, match=message):
        make_model(4, pad_token_id=22).generate(**{**valid, **arguments})
