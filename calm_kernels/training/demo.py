"""The whole of CALM on real text: data, autoencoder, language model, scores, samples."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calm_kernels.training import environment
from calm_kernels.training.data import prepare_data
from calm_kernels.training.errors import UserError
from calm_kernels.training.files import read_json, write_json, write_text
from calm_kernels.training.pipeline import train
from calm_kernels.training.plot import plot_run
from calm_kernels.training.presets import Preset, as_settings
from calm_kernels.training.progress import Reporter
from calm_kernels.training.runs import DATA
from calm_kernels.training.sampling import generate_text
from calm_kernels.training.stages import StageOptions, StageResult, digest, file_digest

METRICS = "metrics.json"
SAMPLE = "sample.txt"
PLOT = "training.png"
_BRIER = ("brier_lm", "brier_lm_standard_error", "brier_1", "brier_2", "brier_3", "brier_4")


@dataclass(frozen=True)
class DemoResult:
    """What a demo run left in its folder."""

    run: Path
    metrics: dict[str, Any]
    sample: str
    reused: tuple[str, ...]


def run_demo(run: Path, preset: Preset, options: StageOptions, reporter: Reporter) -> DemoResult:
    """Train and score an autoencoder and a language model, and let it write.

    What a former run of the same settings has finished is reused, and what it began is continued.
    Writes ``metrics.json``, ``training.png`` and ``sample.txt``.

    Raises:
        UserError: the preset lacks a tokenizer, or as the stages. DiskFullError: no space.
    """
    started = time.perf_counter()
    if preset.tokenizer is None:
        raise UserError(
            f"preset {preset.name} needs a tokenizer.json: use `calm-kernels train autoencoder "
            f"--preset {preset.name} --tokenizer PATH`"
        )
    if options.when_present != "overwrite":
        options = replace(options, when_present="automatic")
    data = prepare_data(
        run / DATA,
        corpus=preset.corpus,
        tokenizer=preset.tokenizer,
        validation_fraction=preset.validation_fraction,
        report=reporter.message,
    )
    data_seconds = time.perf_counter() - started
    autoencoder = train("autoencoder", run, preset, data, options, reporter)
    energy = train("energy", run, preset, data, options, reporter, autoencoder.folder)
    sample, sample_seconds, sample_key, sample_reused = _sample(
        run, preset, data.tokenizer, energy, options, reporter
    )
    reused = [stage.kind for stage in (autoencoder, energy) if stage.reused]
    reused += ["data"] * data.reused + ["sample"] * sample_reused
    seconds = {
        "data": data_seconds,
        "autoencoder_training": autoencoder.training_seconds,
        "autoencoder_evaluation": autoencoder.evaluation_seconds,
        "energy_training": energy.training_seconds,
        "energy_evaluation": energy.evaluation_seconds,
        "sample": sample_seconds,
    }
    metrics = _metrics(preset, options, autoencoder, energy, seconds, reused)
    metrics["sample_fingerprint"] = sample_key
    metrics["seconds_this_run"] = time.perf_counter() - started
    if not reused:
        metrics["seconds"] = metrics["seconds_this_run"]
    elif sample_reused:
        metrics["seconds"] = (read_json(run / METRICS) or metrics)["seconds"]
    write_text(run / SAMPLE, sample)
    write_json(run / METRICS, metrics)
    plot_run(run, _caption(preset, metrics))
    return DemoResult(run, metrics, sample, tuple(reused))


def _sample(
    run: Path, preset: Preset, tokenizer: Any, energy: StageResult, options: StageOptions,
    reporter: Reporter,
) -> tuple[str, float, str, bool]:  # fmt: skip
    """(text, seconds it took, fingerprint, whether it was there already)."""
    settings = preset.sample
    key = digest(
        {"model": file_digest(energy.folder), "seed": options.seed, **as_settings(settings)}
    )
    old = read_json(run / METRICS) or {}
    if old.get("sample_fingerprint") == key and (run / SAMPLE).is_file():
        reporter.message(f"sample: reusing {run / SAMPLE} (same model and settings)")
        text = (run / SAMPLE).read_text(encoding="utf-8")
        return text, float(old["stage_seconds"]["sample"]), key, True
    started = time.perf_counter()
    patches = -(-settings.max_new_tokens // preset.patch_size)
    reporter.begin("generating", patches)
    done = 0

    def on_text(row: int, text: str) -> None:
        nonlocal done
        done += row == 0
        reporter.step(min(done, patches))

    texts = generate_text(
        energy.model,
        tokenizer,
        settings.prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        num_candidates=settings.num_candidates,
        seed=options.seed,
        on_text=on_text,
    )
    reporter.end()
    header = (
        f"temperature {settings.temperature}, {settings.num_candidates} candidates, "
        f"seed {options.seed}; the prompt stands before the bar\n"
    )
    body = "".join(
        f"\n{prompt}|{text.text}\n" for prompt, text in zip(settings.prompts, texts, strict=True)
    )
    return header + body, time.perf_counter() - started, key, False


def _metrics(
    preset: Preset,
    options: StageOptions,
    autoencoder: StageResult,
    energy: StageResult,
    seconds: dict[str, float],
    reused: list[str],
) -> dict[str, Any]:
    device = str(energy.model.device.type)
    return {
        "preset": preset.name,
        "ae_token_accuracy": autoencoder.metrics["token_accuracy"],
        **{name: energy.metrics[name] for name in _BRIER},
        "unigram_brier_lm": energy.metrics["unigram_brier_lm"],
        "seconds": sum(seconds.values()),
        "stage_seconds": seconds,
        "reused": reused,
        "ae_held_out_tokens": autoencoder.metrics["tokens"],
        "brier_positions": energy.metrics["positions"],
        "brier_samples": energy.metrics["samples"],
        "ae_parameters": autoencoder.parameters,
        "lm_parameters": energy.parameters,
        "seed": options.seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "backends": {
            name: state["serves"] for name, state in environment.operators(device).items()
        },
        "versions": environment.versions(),
    }


def _caption(preset: Preset, metrics: dict[str, Any]) -> str:
    where = f"{metrics['threads']} CPU threads" if metrics["device"] == "cpu" else "one GPU"
    return (
        f"preset {preset.name}, corpus {preset.corpus}, K = {preset.patch_size}, {where}, "
        f"torch {metrics['versions']['torch']}, seed {metrics['seed']}, "
        f"{metrics['seconds']:.0f} s in all"
    )
