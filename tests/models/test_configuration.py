"""Configurations: old files, new files, bad values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calm_kernels.models import AutoencoderConfig, BaselineConfig, CalmConfig

WRITTEN_BY_TRANSFORMERS_4 = {
    "architectures": ["EnergyTransformer"],
    "attention_bias": False,
    "beta": 0.75,
    "head_dim": 64,
    "hidden_act": "silu",
    "model_type": "llama",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000.0,
    "something_unknown": {"a": 1},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
}


def test_rope_settings_load_from_both_generations_of_files() -> None:
    old = CalmConfig(**WRITTEN_BY_TRANSFORMERS_4)
    new = CalmConfig(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert old.rope_parameters == new.rope_parameters
    assert CalmConfig().rope_parameters["rope_theta"] == 10_000.0


def test_unknown_keys_are_kept_and_beta_is_another_name_of_alpha() -> None:
    config = CalmConfig(**WRITTEN_BY_TRANSFORMERS_4)
    assert config.alpha == config.beta == 0.75
    assert config.something_unknown == {"a": 1}
    assert "beta" not in config.to_dict()


@pytest.mark.parametrize(
    "config",
    [
        CalmConfig(alpha=1.5, num_samples=5, autoencoder_config={"latent_size": 3}),
        AutoencoderConfig(token_dropout=0.25, patch_size=8),
        BaselineConfig(patch_size=2, eos_token_id=[1, 2]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configuration_survives_a_file(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    ours, theirs = config.to_dict(), loaded.to_dict()
    assert {**ours, "transformers_version": None} == {**theirs, "transformers_version": None}


def test_autoencoder_is_tied_whatever_the_file_says() -> None:
    assert AutoencoderConfig(tie_word_embeddings=False).tie_word_embeddings


@pytest.mark.parametrize(
    ("config_class", "values", "message"),
    [
        (CalmConfig, {"alpha": 2.0}, "alpha"),
        (CalmConfig, {"alpha": 0.0}, "alpha"),
        (CalmConfig, {"num_samples": 1}, "num_samples.*pair"),
        (CalmConfig, {"estimator": "magic"}, "estimator.*closed_form"),
        (CalmConfig, {"init_scheme": "magic"}, "init_scheme"),
        (CalmConfig, {"patch_size": 0}, "patch_size"),
        (CalmConfig, {"latent_size": -1}, "latent_size"),
        (AutoencoderConfig, {"num_encoder_layers": 3}, "num_encoder_layers"),
        (AutoencoderConfig, {"num_decoder_layers": 0}, "num_decoder_layers"),
        (AutoencoderConfig, {"ae_dropout": 1.0}, "ae_dropout"),
        (AutoencoderConfig, {"token_dropout": -0.1}, "token_dropout"),
        (AutoencoderConfig, {"drop_mass": 1.0}, "drop_mass"),
        (AutoencoderConfig, {"vocab_size": 0}, "vocab_size"),
        (BaselineConfig, {"patch_size": 0}, "patch_size"),
    ],
)
def test_bad_values_are_named(config_class: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**values)
