from __future__ import annotations

import pytest
import torch
from scipy import stats

from calm_kernels import backend
from calm_kernels.ops.temperature_sampling import batch_temperature_sample
from calm_kernels.reference import temperature_sampling as reference

FALSE_ALARM = 1e-6


def test_wide_uniforms_join_two_words_and_are_independent_of_slicing() -> None:
    seed, rows = torch.tensor([5]), torch.tensor([0, 9, 2**33])
    from_zero = reference.wide_uniform(seed, rows, torch.zeros_like(rows), 12, 2)
    words = reference.philox_words(seed, rows[:, None], torch.arange(6), 2).flatten(1) >> 6
    exact = ((words[:, 0::2] * 2**26 + words[:, 1::2]).double() + 0.5) / 2**52
    assert torch.equal(from_zero, exact)
    first = torch.tensor([1, 4, 7])
    part = reference.wide_uniform(seed, rows, first, 5, 2)
    for r in range(3):
        assert torch.equal(part[r], from_zero[r, first[r] : first[r] + 5])
    many = reference.wide_uniform(seed, torch.arange(400), torch.zeros(400).long(), 250, 2)
    assert stats.kstest(many.flatten().numpy(), "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize(("word", "expected"), [(0, 2.0**-53), (2**32 - 1, 1 - 2.0**-53)])
def test_wide_uniforms_of_extreme_words_stay_inside_the_open_interval(
    monkeypatch: pytest.MonkeyPatch, word: int, expected: float
) -> None:
    def extreme(seed, row, block, stream):
        shape = torch.broadcast_shapes(row.shape, block.shape)
        return torch.full((*shape, 4), word)

    monkeypatch.setattr(reference, "philox_words", extreme)
    zero = torch.zeros(1, dtype=torch.int64)
    assert reference.wide_uniform(zero, zero, zero, 2, 1).tolist() == [[expected, expected]]
    # Even these choose a patch that has weight: the first or the last of the heaviest.
    tokens = torch.tensor([2, 0, 1, 0, 1, 9]).view(1, 6, 1)
    with backend("reference"):
        chosen = batch_temperature_sample(tokens, 0.5, seed=0)
    assert int(chosen) == (0 if word == 0 else 1)
