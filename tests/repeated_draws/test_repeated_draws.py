"""Draws that stay, against a dictionary of counts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

import calm_kernels
from calm_kernels.ops.repeated_draws import repeated_draws

BACKENDS = ["auto", "reference"]


def draws(
    num_draws: int, num_sequences: int, vocab_size: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some of the draws of some sequences, in groups that no two sequences share."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(num_draws * num_sequences, generator=generator)
    rows = rows[: len(rows) - len(rows) // 5].sort().values
    groups = torch.randint(0, 3, rows.shape, generator=generator)
    groups = (groups * num_sequences + rows % max(num_sequences, 1)) * 2**33
    tokens = torch.randint(0, vocab_size, rows.shape, generator=generator)
    fewest = torch.randint(1, 4, (num_sequences,), generator=generator)
    return rows, groups, tokens, fewest


def expected(rows: Tensor, groups: Tensor, tokens: Tensor, fewest: Tensor) -> tuple[list[int], ...]:
    pairs = list(zip(groups.tolist(), tokens.tolist(), strict=True))
    counts = Counter(pairs)
    needed = fewest.tolist()
    numbers = rows.tolist()
    kept = [
        i
        for i, (pair, row) in enumerate(zip(pairs, numbers, strict=True))
        if counts[pair] >= needed[row % len(needed)]
    ]
    return [numbers[i] for i in kept], [pairs.index(pairs[i]) for i in kept]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab_size", [1, 5, 300])
@pytest.mark.parametrize(
    ("num_draws", "num_sequences"), [(0, 3), (1, 1), (2, 1), (200, 1), (90, 7), (3, 400)]
)
def test_the_draws_that_stay(
    num_draws: int, num_sequences: int, vocab_size: int, backend: str
) -> None:
    arguments = draws(num_draws, num_sequences, vocab_size, seed=num_draws + vocab_size)
    with calm_kernels.backend(backend):
        kept = repeated_draws(*arguments)
    assert tuple(part.tolist() for part in kept) == expected(*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_and_tokens_are_told_apart_where_their_sums_are_equal(backend: str) -> None:
    """Numbers of which a sloppy key of both would make one."""
    tokens = torch.arange(1000) % 250
    groups = 4 * (999 - torch.arange(1000))
    arguments = (torch.arange(1000), groups, tokens, torch.tensor([2]))
    with calm_kernels.backend(backend):
        assert len(repeated_draws(*arguments)[0]) == 0
        arguments = (*arguments[:1], groups // 2000 * 2000, *arguments[2:])
        rows, kept_groups = repeated_draws(*arguments)
    assert len(rows) == 1000
    assert (rows.tolist(), kept_groups.tolist()) == expected(*arguments)


def test_wrong_arguments_are_named() -> None:
    rows, groups, tokens, fewest = draws(5, 2, 3, 0)
    for match, arguments in (
        ("rows: expected dtype", (rows.int(), groups, tokens, fewest)),
        ("groups: expected shape", (rows, groups[1:], tokens, fewest)),
        ("tokens: expected shape", (rows, groups, tokens.unsqueeze(0), fewest)),
        ("fewest: expected at least one", (rows, groups, tokens, fewest[:0])),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            repeated_draws(*arguments)


def test_the_operator_passes_opcheck() -> None:
    operators = torch.ops.calm_kernels.repeated_draws
    for overload in (operators.default, operators.reference):
        torch.library.opcheck(overload, draws(30, 3, 4, 1))
