"""The stages of a run, built from a preset: autoencoder, language model, baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from calm_kernels import models
from calm_kernels.models.configuration import as_plain_dict
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.data import TokenData
from calm_kernels.training.errors import UserError
from calm_kernels.training.evaluation import (
    evaluate_autoencoder,
    evaluate_brier,
    evaluate_unigram,
)
from calm_kernels.training.presets import Optimization, Preset, as_settings, checked
from calm_kernels.training.progress import Reporter
from calm_kernels.training.runs import KINDS, load_model
from calm_kernels.training.stages import (
    Stage,
    StageOptions,
    StageResult,
    file_digest,
    run_stage,
    trained_settings,
)

RUNNING_SAMPLES = 8
"""Draws a position for BrierLM while training."""


def autoencoder_config(preset: Preset, data: TokenData) -> models.AutoencoderConfig:
    """The sizes of a preset's autoencoder for the tokens of some data."""
    sizes = preset.autoencoder
    return models.AutoencoderConfig(
        **_vocabulary(data),
        patch_size=preset.patch_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        latent_size=sizes.latent_size,
        num_encoder_layers=sizes.num_layers,
        num_decoder_layers=sizes.num_layers,
        init_scheme=preset.init_scheme,
    )


def energy_config(
    preset: Preset, data: TokenData, autoencoder: models.AutoencoderConfig
) -> models.CalmConfig:
    """The sizes of a preset's language model on an autoencoder, whose K and D it takes."""
    sizes, patch_size = preset.energy, autoencoder.patch_size
    return models.CalmConfig(
        **_vocabulary(data),
        patch_size=patch_size,
        latent_size=autoencoder.latent_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=max(2048, sizes.optimization.block_length // patch_size),
        num_mlp_layers=sizes.head_blocks,
        noise_size=sizes.noise_size,
        num_samples=sizes.num_samples,
        num_targets=sizes.num_targets,
        alpha=sizes.alpha,
        estimator=sizes.estimator,
        head_type=sizes.head_type,
        sampling_steps=sizes.sampling_steps,
        autoencoder_config=as_plain_dict(autoencoder),
        init_scheme=preset.init_scheme,
    )


def baseline_config(preset: Preset, data: TokenData) -> models.BaselineConfig:
    """The sizes of a preset's autoregressive baseline."""
    sizes = preset.baseline
    return models.BaselineConfig(
        **_vocabulary(data),
        patch_size=preset.patch_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=max(2048, sizes.optimization.block_length),
        init_scheme=preset.init_scheme,
    )


def _vocabulary(data: TokenData) -> dict[str, Any]:
    tokenizer = data.tokenizer
    return {
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _blocks(
    data: TokenData, optimization: Optimization, patch_size: int
) -> tuple[PackedBlocks, PackedBlocks]:
    checked(optimization, patch_size)
    length = optimization.block_length
    return (
        PackedBlocks(data.train, length, patch_size),
        PackedBlocks(data.validation, length, patch_size),
    )


def autoencoder_stage(run: Path, preset: Preset, data: TokenData, seed: int,
                      reporter: Reporter) -> Stage:  # fmt: skip
    """The stage that trains ``run/autoencoder``."""
    sizes = preset.autoencoder
    train, held = _blocks(data, sizes.optimization, preset.patch_size)
    chosen = preset.evaluation

    def build() -> Any:
        return models.Autoencoder(autoencoder_config(preset, data))

    def running(model: Any) -> Mapping[str, float]:
        result = evaluate_autoencoder(model, held, chosen.running_autoencoder_blocks)
        return {"token_accuracy": result.token_accuracy, "token_loss": result.loss}

    def final(model: Any) -> Mapping[str, Any]:
        return evaluate_autoencoder(
            model, held, chosen.autoencoder_blocks, reporter=reporter
        ).as_metrics()

    return Stage(
        kind="autoencoder",
        preset=preset.name,
        folder=run / "autoencoder",
        settings=trained_settings(
            "autoencoder", as_settings(sizes), seed, data=data.fingerprint,
            patch_size=preset.patch_size, init_scheme=preset.init_scheme,
        ),
        evaluation_settings={"blocks": chosen.autoencoder_blocks},
        optimization=sizes.optimization,
        tokenizer=data.tokenizer,
        blocks=train,
        build=build,
        running_evaluation=running,
        final_evaluation=final,
        cpu_bf16=preset.cpu_bf16,
    )  # fmt: skip


def _brier_stage(
    kind: str, run: Path, preset: Preset, data: TokenData, seed: int, reporter: Reporter,
    sizes: Any, inputs: dict[str, Any], build: Any,
) -> Stage:  # fmt: skip
    train, held = _blocks(data, sizes.optimization, preset.patch_size)
    chosen = preset.evaluation

    def running(model: Any) -> Mapping[str, float]:
        result = evaluate_brier(
            model, held, chosen.running_brier_blocks, num_samples=RUNNING_SAMPLES, seed=chosen.seed
        )
        brier = {f"brier_{n}": value for n, value in enumerate(result.brier, start=1)}
        error = result.brier_lm_standard_error
        return {"brier_lm": result.brier_lm, "brier_lm_standard_error": error, **brier}

    def final(model: Any) -> Mapping[str, Any]:
        result = evaluate_brier(
            model, held, chosen.brier_blocks, num_samples=chosen.brier_samples, seed=chosen.seed,
            reporter=reporter,
        )  # fmt: skip
        unigram = evaluate_unigram(
            data.train.frequencies(), held, chosen.brier_blocks, preset.patch_size
        )
        return {**result.as_metrics(), "unigram_brier_lm": unigram.brier_lm}

    return Stage(
        kind=kind,
        preset=preset.name,
        folder=run / kind,
        settings=trained_settings(
            kind, as_settings(sizes), seed, data=data.fingerprint, patch_size=preset.patch_size,
            init_scheme=preset.init_scheme, **inputs,
        ),
        evaluation_settings={
            "blocks": chosen.brier_blocks, "samples": chosen.brier_samples, "seed": chosen.seed,
        },
        optimization=sizes.optimization,
        tokenizer=data.tokenizer,
        blocks=train,
        build=build,
        running_evaluation=running,
        final_evaluation=final,
        cpu_bf16=preset.cpu_bf16,
    )  # fmt: skip


def energy_stage(run: Path, preset: Preset, data: TokenData, seed: int, reporter: Reporter,
                 autoencoder_folder: Path) -> Stage:  # fmt: skip
    """The stage that trains ``run/energy`` on a trained autoencoder.

    Raises:
        UserError: the autoencoder codes other tokens than the data holds.
    """
    sizes = preset.energy
    autoencoder = load_model("autoencoder", autoencoder_folder)
    if autoencoder.config.vocab_size != data.tokenizer.vocab_size:
        raise UserError(
            f"the autoencoder in {autoencoder_folder} has {autoencoder.config.vocab_size} token "
            f"ids, the data {data.tokenizer.vocab_size}: use the data it was trained on"
        )
    preset = replace(preset, patch_size=autoencoder.config.patch_size)

    def build() -> Any:
        config = energy_config(preset, data, autoencoder.config)
        model = models.EnergyTransformer(config, autoencoder=autoencoder)
        if sizes.embedding_std is not None:
            nn.init.normal_(model.transformer.embed_tokens.weight, std=sizes.embedding_std)
        return model

    inputs = {"autoencoder": file_digest(autoencoder_folder)}
    return _brier_stage("energy", run, preset, data, seed, reporter, sizes, inputs, build)


def baseline_stage(run: Path, preset: Preset, data: TokenData, seed: int,
                   reporter: Reporter) -> Stage:  # fmt: skip
    """The stage that trains ``run/baseline``."""
    sizes = preset.baseline

    def build() -> Any:
        return models.AutoregressiveBaseline(baseline_config(preset, data))

    return _brier_stage("baseline", run, preset, data, seed, reporter, sizes, {}, build)


def train(
    kind: str,
    run: Path,
    preset: Preset,
    data: TokenData,
    options: StageOptions,
    reporter: Reporter,
    autoencoder_folder: Path | None = None,
) -> StageResult:
    """Train one kind of model of a preset into a run folder, or reuse what is there.

    Raises:
        UserError, DiskFullError: as :func:`~calm_kernels.training.stages.run_stage`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "autoencoder":
        stage = autoencoder_stage(run, preset, data, options.seed, reporter)
    elif kind == "energy":
        folder = autoencoder_folder or run / "autoencoder"
        stage = energy_stage(run, preset, data, options.seed, reporter, folder)
    else:
        stage = baseline_stage(run, preset, data, options.seed, reporter)
    return run_stage(stage, options, reporter)
