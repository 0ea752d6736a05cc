"""Parts of a batch, computed apart with one seed, see the noise that the whole batch would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

SEED, LENGTH = 7, 20
PARTS = ((0, 2), (2, 3), (3, 6))


def assert_parts_average_to_the_whole(model: Any, vocab_size: int) -> None:
    """Positions count alike, so the whole loss is the parts' mean by number of sequences."""
    ids = torch.randint(0, vocab_size, (6, LENGTH))
    model.train()
    whole = model(ids, seed=SEED).loss
    parts = [model(ids[a:b], seed=SEED, first_sequence=a).loss * (b - a) / 6 for a, b in PARTS]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-6)
    alike = [model(ids[a:b], seed=SEED).loss * (b - a) / 6 for a, b in PARTS]
    assert abs(sum(alike) - whole) > 1e-4


@pytest.mark.parametrize("head_type", ["energy", "flow", "diffusion"])
def test_parts_of_a_language_models_batch_average_to_the_whole(
    make_energy_transformer: Any, head_type: str
) -> None:
    model = make_energy_transformer(head_type=head_type)
    assert_parts_average_to_the_whole(model, model.config.vocab_size)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.3, 0.3)])
def test_parts_of_an_autoencoders_batch_average_to_the_whole(
    make_autoencoder: Any, rates: tuple[float, float]
) -> None:
    model = make_autoencoder(ae_dropout=rates[0], token_dropout=rates[1])
    assert_parts_average_to_the_whole(model, model.config.vocab_size)


def test_monte_carlo_targets_of_another_part_are_other_draws(make_energy_transformer: Any) -> None:
    model = make_energy_transformer(estimator="monte_carlo", num_targets=3)
    ids = torch.randint(0, model.config.vocab_size, (1, LENGTH))
    losses = {model(ids, seed=SEED, first_sequence=first).loss.item() for first in range(5)}
    assert len(losses) == 5
