"""``calm-kernels train autoencoder | energy | baseline``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from calm_kernels.cli import results
from calm_kernels.cli.console import make_reporter
from calm_kernels.training.data import TokenData, open_data, prepare_data
from calm_kernels.training.errors import UserError
from calm_kernels.training.files import read_json
from calm_kernels.training.presets import Preset, checked, with_overrides
from calm_kernels.training.presets import preset as find_preset
from calm_kernels.training.processes import check_processes, is_main_process, main_process_first
from calm_kernels.training.progress import Reporter
from calm_kernels.training.runs import DATA, STAGE, find_model, run_folder_of
from calm_kernels.training.stages import StageOptions
from calm_kernels.training.tokenizers import load_tokenizer


def run_autoencoder(arguments: argparse.Namespace) -> None:
    """Train an autoencoder."""
    _train_on_text("autoencoder", arguments)


def run_baseline(arguments: argparse.Namespace) -> None:
    """Train an autoregressive baseline."""
    _train_on_text("baseline", arguments)


def run_energy(arguments: argparse.Namespace) -> None:
    """Train a language model on a trained autoencoder."""
    _, folder = find_model(arguments.autoencoder, "autoencoder")
    record = read_json(folder / STAGE) or {}
    name = arguments.preset or record.get("preset")
    if name is None:
        raise UserError(f"{folder} does not say which preset it was trained with: pass --preset")
    preset = _overridden(find_preset(name), "energy", arguments)
    chosen = {"num_samples": arguments.num_samples, "alpha": arguments.alpha,
              "estimator": arguments.estimator, "head_type": arguments.head,
              "sampling_steps": arguments.sampling_steps}  # fmt: skip
    given = {name: value for name, value in chosen.items() if value is not None}
    preset = replace(preset, energy=replace(preset.energy, **given))
    _refuse_unread(preset.energy.head_type, given)
    source = run_folder_of(folder)
    output = arguments.output or source
    reporter = make_reporter()
    with main_process_first(arguments.cpu):
        data = _data_of_autoencoder(folder, source, output, preset, arguments.corpus, reporter)
    _run("energy", output, preset, data, arguments, reporter, folder)


def _refuse_unread(head: str, given: Mapping[str, Any]) -> None:
    """Refuse options that the chosen head would not read."""
    unread = ("sampling_steps",) if head == "energy" else ("alpha", "estimator")
    for name in unread:
        if name in given:
            raise UserError(
                f"--{name.replace('_', '-')} does not apply to the {head} head: leave it out, or "
                f"choose another --head"
            )


def _data_of_autoencoder(
    folder: Path, source: Path, output: Path, preset: Preset, corpus: str | None, reporter: Reporter
) -> TokenData:
    if corpus is None and output == source and (source / DATA).is_dir():
        return open_data(source / DATA)
    header = read_json(source / DATA / "data.json") or {}
    return prepare_data(
        output / DATA,
        corpus=corpus or header.get("corpus") or preset.corpus,
        tokenizer=load_tokenizer(folder),
        validation_fraction=preset.validation_fraction,
        report=reporter.message,
    )


def _train_on_text(kind: str, arguments: argparse.Namespace) -> None:
    preset = _overridden(find_preset(arguments.preset), kind, arguments)
    tokenizer = arguments.tokenizer or preset.tokenizer
    if tokenizer is None:
        raise UserError(
            f"preset {preset.name} has no tokenizer of its own: pass --tokenizer PATH of a "
            f"tokenizer.json (the paper uses Llama 3's)"
        )
    output = arguments.output or Path("runs") / preset.name
    reporter = make_reporter()
    with main_process_first(arguments.cpu):
        data = prepare_data(
            output / DATA,
            corpus=arguments.corpus or preset.corpus,
            tokenizer=tokenizer,
            validation_fraction=preset.validation_fraction,
            eos_token=arguments.eos_token,
            report=reporter.message,
        )
    _run(kind, output, preset, data, arguments, reporter)


def _overridden(preset: Preset, kind: str, arguments: argparse.Namespace) -> Preset:
    """The preset with the numbers given on the command line, checked before any work is done."""
    check_processes(arguments.fsdp)
    sizes = getattr(preset, kind)
    optimization = with_overrides(
        sizes.optimization,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        block_length=arguments.block_length,
        gradient_accumulation=arguments.accumulation,
        learning_rate=arguments.lr,
        warmup_steps=arguments.warmup_steps,
        save_every=arguments.save_every,
        evaluate_every=arguments.evaluate_every,
    )
    changes: dict[str, Any] = {kind: replace(sizes, optimization=optimization)}
    if getattr(arguments, "patch_size", None) is not None:
        if arguments.patch_size < 1:
            raise UserError(f"patch size: expected at least 1; got {arguments.patch_size}")
        changes["patch_size"] = arguments.patch_size
    preset = replace(preset, **changes)
    if kind != "energy":
        checked(optimization, preset.patch_size)
    return preset


def _run(
    kind: str,
    output: Path,
    preset: Preset,
    data: TokenData,
    arguments: argparse.Namespace,
    reporter: Reporter,
    autoencoder: Path | None = None,
) -> None:
    from calm_kernels.training.pipeline import train

    mode = "overwrite" if arguments.overwrite else "resume" if arguments.resume else "refuse"
    options = StageOptions(
        seed=arguments.seed, bf16=arguments.bf16, cpu=arguments.cpu, fsdp=arguments.fsdp,
        when_present=mode,
    )  # fmt: skip
    result = train(kind, output, preset, data, options, reporter, autoencoder)
    if is_main_process():
        cells = results.row(str(output), kind, result.parameters, result.metrics)
        title = f"{result.folder}: trained in {result.training_seconds:.0f} s"
        results.show(title, [cells])
