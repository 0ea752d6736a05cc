"""``calm-kernels evaluate``: trained models, scored on held-out text, in one table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from calm_kernels.cli import results
from calm_kernels.cli.console import make_reporter
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.data import TokenData, open_data
from calm_kernels.training.errors import UserError
from calm_kernels.training.files import read_json
from calm_kernels.training.presets import EvaluationSettings
from calm_kernels.training.processes import is_main_process, join_processes
from calm_kernels.training.progress import Reporter
from calm_kernels.training.runs import DATA, STAGE, load_model, models_in, run_folder_of

DEFAULT_PATCHES = 64
"""Patches a block, where the training does not say."""


def run(arguments: argparse.Namespace) -> None:
    """Score every model of every run and print one table."""
    defaults = EvaluationSettings()
    blocks = defaults.brier_blocks if arguments.blocks is None else arguments.blocks
    samples = defaults.brier_samples if arguments.samples is None else arguments.samples
    if blocks < 1:
        raise UserError(f"blocks: expected at least 1; got {blocks}")
    if samples < 2:
        raise UserError(f"samples: expected at least 2 (a pair is needed); got {samples}")
    found = [(run, kind, folder) for run in arguments.runs
             for kind, folder in models_in(run).items()]  # fmt: skip
    join_processes(arguments.cpu)
    reporter = make_reporter()
    scored = []
    for run_folder, kind, folder in found:
        reporter.message(f"{folder}")
        data = open_data(arguments.data or run_folder_of(folder) / DATA)
        scored.append(
            (run_folder, kind, *_score(kind, folder, data, blocks, samples, arguments, reporter))
        )
    if not is_main_process():
        return
    if arguments.json:
        print(json.dumps([
            {"run": str(run_folder), "model": kind, "parameters": parameters, **metrics}
            for run_folder, kind, parameters, metrics in scored
        ], indent=2))  # fmt: skip
        return
    rows = [results.row(str(r), kind, parameters, m) for r, kind, parameters, m in scored]
    results.show(f"held-out text, {blocks} blocks, {samples} draws a position", rows)


def _score(
    kind: str,
    folder: Path,
    data: TokenData,
    count: int,
    samples: int,
    arguments: argparse.Namespace,
    reporter: Reporter,
) -> tuple[int, dict[str, Any]]:
    """(trained parameters, metrics)."""
    import torch

    from calm_kernels.training import evaluation

    model = load_model(kind, folder)
    if model.config.vocab_size != data.tokenizer.vocab_size:
        raise UserError(
            f"{folder} knows {model.config.vocab_size} token ids, the data in {data.folder} has "
            f"{data.tokenizer.vocab_size}: give the data of its training with --data"
        )
    if torch.cuda.is_available() and not arguments.cpu:
        model.to("cuda")
    patch_size = int(model.config.patch_size)
    settings = (read_json(folder / STAGE) or {}).get("settings", {})
    length = settings.get("optimization", {}).get("block_length", DEFAULT_PATCHES * patch_size)
    held_out = PackedBlocks(data.validation, length, patch_size)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    if kind == "autoencoder":
        reconstruction = evaluation.evaluate_autoencoder(model, held_out, count, reporter=reporter)
        return sum(trained), reconstruction.as_metrics()
    result = evaluation.evaluate_brier(
        model, held_out, count, num_samples=samples, seed=arguments.seed, reporter=reporter
    )
    unigram = evaluation.evaluate_unigram(data.train.frequencies(), held_out, count, patch_size)
    return sum(trained), {**result.as_metrics(), "unigram_brier_lm": unigram.brier_lm}
