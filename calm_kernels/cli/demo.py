"""``calm-kernels demo``: all of CALM on real text, in minutes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from calm_kernels.cli.console import make_reporter, print_table
from calm_kernels.training.presets import preset as find_preset
from calm_kernels.training.stages import StageOptions


def run(arguments: argparse.Namespace) -> None:
    """Train, score, sample; print what came of it."""
    chosen = find_preset(arguments.preset)
    if arguments.corpus is not None:
        chosen = replace(chosen, corpus=arguments.corpus)
    from calm_kernels.training.demo import METRICS, PLOT, SAMPLE, run_demo

    folder = arguments.output or Path("runs") / chosen.name
    options = StageOptions(
        seed=arguments.seed,
        bf16=arguments.bf16,
        cpu=arguments.cpu,
        when_present="overwrite" if arguments.overwrite else "automatic",
    )
    result = run_demo(folder, chosen, options, make_reporter())
    metrics = result.metrics
    rows = [
        ("autoencoder token accuracy, held out", f"{100 * metrics['ae_token_accuracy']:.3f} %"),
        (
            "BrierLM, held out (0 to 100)",
            f"{metrics['brier_lm']:.2f} ± {metrics['brier_lm_standard_error']:.2f}",
        ),
        ("BrierLM of the unigram model", f"{metrics['unigram_brier_lm']:.3f}"),
        (
            "Brier-1, 2, 3, 4",
            ", ".join(f"{metrics[f'brier_{n}']:.3g}" for n in range(1, 5)),
        ),
        ("seconds for data, training, scores, sample", f"{metrics['seconds']:.0f}"),
        ("seconds of this command", f"{metrics['seconds_this_run']:.0f}"),
        ("reused from before", ", ".join(result.reused) or "nothing"),
    ]
    print_table(f"CALM demo in {folder}", ("what", "value"), rows)
    print(f"\n{result.sample}")
    print(f"see {folder / METRICS}, {folder / PLOT}, {folder / SAMPLE}", file=sys.stderr)
