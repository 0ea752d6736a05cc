from __future__ import annotations

import pytest
import torch

from calm_kernels.nn.temperature import TemperatureSampler
from calm_kernels.ops.temperature_sampling import (
    batch_temperature_sample,
    exact_temperature_sample,
)


def draws(active: torch.Tensor, count: int) -> torch.Tensor:
    """Few different patches, the same ones for the same call."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 2, (32, count, 2), generator=generator)[active]


def test_the_batch_method_votes_among_its_candidates() -> None:
    layer = TemperatureSampler(0.5, num_candidates=11)
    tokens, num_draws, accepted = layer(draws, 32, seed=3)
    rows = torch.arange(32)
    assert torch.equal(tokens, batch_temperature_sample(draws(rows, 11), 0.5, seed=3))
    assert num_draws.tolist() == [11] * 32
    assert accepted.dtype == torch.bool
    assert bool(accepted.all())


def test_the_exact_method_runs_within_its_budget() -> None:
    temperature = torch.linspace(0.3, 1.0, 32)
    layer = TemperatureSampler(temperature, "exact", round_size=3, max_draws=9)
    result = layer(draws, 32, seed=3)
    expected = exact_temperature_sample(draws, 32, temperature, round_size=3, max_draws=9, seed=3)
    for one, two in zip(result, expected, strict=True):
        assert torch.equal(one, two)
    assert not bool(result[2].all())


def test_the_layer_has_no_state_and_shows_its_settings() -> None:
    assert not TemperatureSampler(0.7).state_dict()
    assert "temperature=0.7, method='batch', num_candidates=200" in repr(TemperatureSampler(0.7))
    assert "method='exact', round_size=None" in repr(TemperatureSampler(0.7, "exact"))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method: expected one of batch, exact; got 'greedy'"):
        TemperatureSampler(0.5, "greedy")  # type: ignore[arg-type]


def test_the_exact_method_runs_fixed_rounds() -> None:
    layer = TemperatureSampler(0.5, "exact", round_size=4, num_rounds=2)
    result = layer(draws, 32, seed=3)
    expected = exact_temperature_sample(draws, 32, 0.5, round_size=4, num_rounds=2, seed=3)
    for one, two in zip(result, expected, strict=True):
        assert torch.equal(one, two)
    assert "round_size=4, num_rounds=2" in repr(layer)
