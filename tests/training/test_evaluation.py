"""Held-out scores of real models on the positions they should be scored on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from calm_kernels.models import (
    Autoencoder,
    AutoencoderConfig,
    AutoregressiveBaseline,
    BaselineConfig,
    CalmConfig,
    EnergyTransformer,
)
from calm_kernels.training import evaluation
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.data import TokenData
from calm_kernels.training.scores import scored_tokens

VOCABULARY: dict[str, Any] = {"vocab_size": 258, "eos_token_id": 256, "pad_token_id": 257}


def autoencoder(patch_size: int) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(
        AutoencoderConfig(
            **VOCABULARY, hidden_size=16, intermediate_size=24, latent_size=8,
            patch_size=patch_size, init_scheme="width_scaled",
        )
    ).eval()  # fmt: skip


def language_model(kind: str, patch_size: int) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "patch_size": patch_size, "init_scheme": "width_scaled",
    }  # fmt: skip
    if kind == "baseline":
        return AutoregressiveBaseline(BaselineConfig(**VOCABULARY, **sizes)).eval()
    config = CalmConfig(**VOCABULARY, **sizes, latent_size=8, noise_size=4, num_mlp_layers=1)
    return EnergyTransformer(config, autoencoder(patch_size)).eval()


def test_token_accuracy_is_the_share_of_tokens_reconstructed(
    data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = autoencoder(4)
    blocks = PackedBlocks(data.validation, 32, 4)
    monkeypatch.setattr(evaluation, "AUTOENCODER_BATCH", 5 * 32)
    result = evaluation.evaluate_autoencoder(model, blocks, 12)
    ids = torch.stack([blocks.block(i) for i in blocks.spread(12)])
    with torch.no_grad():
        mean, _ = model.encode(ids)
        right = (model.decode(mean).reshape(12, 32) == ids).double().mean()
        logits = model.decode_logits(mean).reshape(-1, 258)
        loss = torch.nn.functional.cross_entropy(logits, ids.flatten())
    assert result.token_accuracy == pytest.approx(float(right), abs=1e-12)
    assert 0 < result.token_accuracy < 1
    assert result.loss == pytest.approx(float(loss), rel=1e-4)
    assert result.tokens == 12 * 32


@pytest.mark.parametrize("kind", ["energy", "baseline"])
@pytest.mark.parametrize("patch_size", [2, 4])
def test_brier_counts_the_positions_that_the_unigram_model_is_scored_on(
    data: TokenData, kind: str, patch_size: int
) -> None:
    torch.manual_seed(1)
    model = language_model(kind, patch_size)
    blocks = PackedBlocks(data.validation, 24, patch_size)
    result = evaluation.evaluate_brier(model, blocks, 6, num_samples=3, seed=2)
    unigram = evaluation.evaluate_unigram(data.train.frequencies(), blocks, 6, patch_size)
    ids = np.stack([blocks.block(i).numpy() for i in blocks.spread(6)])
    assert result.positions == unigram.positions == scored_tokens(ids, patch_size).shape[1] * 6
    assert result.samples == 3


def test_brier_is_the_mean_over_all_positions_whatever_the_batch(
    data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline's Brier-1 is exact, so batches of any size must agree on it."""
    torch.manual_seed(1)
    model = language_model("baseline", 4)
    blocks = PackedBlocks(data.validation, 24, 4)
    one = evaluation.evaluate_brier(model, blocks, 7, num_samples=2, seed=2)
    monkeypatch.setattr(evaluation, "BRIER_BATCH", 3 * 24 * 2)
    many = evaluation.evaluate_brier(model, blocks, 7, num_samples=2, seed=2)
    assert many.brier[0] == pytest.approx(one.brier[0], rel=1e-5)
    assert many.brier_standard_error[0] == pytest.approx(one.brier_standard_error[0], rel=1e-4)
    ids = torch.stack([blocks.block(i) for i in blocks.spread(7)])
    with torch.no_grad():
        p = model(ids).logits.double().softmax(-1)
    at = torch.arange(4, 24, 4)
    hits = p[:, at - 1].gather(-1, ids[:, at, None]).squeeze(-1)
    expected = (2 * hits - p[:, at - 1].square().sum(-1)).mean()
    assert one.brier[0] == pytest.approx(100 * float(expected), rel=1e-5)


def test_the_same_seed_gives_the_same_scores_and_touches_no_global_generator(
    data: TokenData,
) -> None:
    model = language_model("energy", 4)
    blocks = PackedBlocks(data.validation, 24, 4)
    state = torch.get_rng_state()
    scores: Callable[[int], Any] = lambda seed: evaluation.evaluate_brier(  # noqa: E731
        model, blocks, 5, num_samples=4, seed=seed
    )
    assert scores(1) == scores(1)
    assert torch.equal(torch.get_rng_state(), state)
