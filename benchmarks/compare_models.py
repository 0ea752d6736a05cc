"""CALM at several patch sizes and the autoregressive baseline at equal training operations.

    OMP_NUM_THREADS=1 python benchmarks/compare_models.py runs/comparison \\
        --output docs/model_comparison.md

Trains, into one run folder each: for every patch size K an autoencoder and a language model on it,
and a baseline of the same backbone. All language models get as many floating-point operations
(calm_kernels/models/flops.py) as the preset's own at its own K and steps. Spending them on fewer
steps of the same text would leave the models of small K with a fourth of the updates; so the batch
is scaled instead, to about equal operations a step, which for CALM also means equally many
predicted patches; warm-up and schedule follow the steps. The autoencoders get the preset's steps
and text whatever K.

Then scores all of them on the same positions of the same held-out text, and writes a Markdown page
and, beside it, the plot of the same name. What is there and was made with the same settings is
reused, what was interrupted continues.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

from calm_kernels.cli.console import make_reporter
from calm_kernels.models import flops
from calm_kernels.training import pipeline
from calm_kernels.training.data import TokenData, prepare_data
from calm_kernels.training.files import read_json, write_json
from calm_kernels.training.presets import EvaluationSettings, Optimization, Preset, preset
from calm_kernels.training.progress import Reporter
from calm_kernels.training.runs import DATA
from calm_kernels.training.stages import StageOptions

SECONDS = "cpu_seconds.json"
DURING_TRAINING = EvaluationSettings(autoencoder_blocks=512, brier_blocks=8, brier_samples=2)
"""Scores of a stage are for its record only: the comparison scores all models alike."""


@dataclass(frozen=True)
class Entrant:
    """One language model of the comparison and the folder it is trained in."""

    kind: str
    run: Path
    preset: Preset


def step_flops(kind: str, chosen: Preset, data: TokenData, optimization: Optimization) -> int:
    """Operations of one training step of a preset's language model."""
    config: flops.ModelConfig
    if kind == "baseline":
        config = pipeline.baseline_config(chosen, data)
    else:
        autoencoder = pipeline.autoencoder_config(chosen, data)
        config = pipeline.energy_config(chosen, data, autoencoder)
    step = flops.training_step(config, optimization.batch_size, optimization.block_length)
    return step.total * optimization.gradient_accumulation


def at_equal_flops(kind: str, chosen: Preset, data: TokenData, step: int, steps: int) -> Preset:
    """A preset whose language model trains for about ``step * steps`` operations.

    Args:
        kind: ``"energy"`` or ``"baseline"``.
        chosen: the preset, at the patch size wanted.
        data: names the vocabulary.
        step: operations of a step to come close to by the size of the batch.
        steps: number of such steps.
    """
    sizes = getattr(chosen, kind)
    given: Optimization = sizes.optimization
    block = step_flops(kind, chosen, data, replace(given, batch_size=1))
    batch_size = max(1, round(step / block))
    own_steps = max(1, round(step * steps / (block * batch_size)))
    optimization = replace(
        given,
        batch_size=batch_size,
        steps=own_steps,
        warmup_steps=round(given.warmup_steps * own_steps / given.steps),
        evaluate_every=own_steps + 1,
    )
    changed = {kind: replace(sizes, optimization=optimization)}
    return replace(chosen, evaluation=DURING_TRAINING, **changed)


def entrants(folder: Path, arguments: argparse.Namespace, data: TokenData) -> list[Entrant]:
    """The language models to compare, all at the operations of the preset's own."""
    chosen = preset(arguments.preset)
    steps = arguments.steps or chosen.energy.optimization.steps
    step = step_flops("energy", chosen, data, chosen.energy.optimization)
    if arguments.autoencoder_steps is not None:
        shorter = replace(chosen.autoencoder.optimization, steps=arguments.autoencoder_steps)
        chosen = replace(chosen, autoencoder=replace(chosen.autoencoder, optimization=shorter))
    found = []
    for patch_size in arguments.patch_sizes:
        own = at_equal_flops("energy", replace(chosen, patch_size=patch_size), data, step, steps)
        found.append(Entrant("energy", folder / f"k{patch_size}", own))
    own = at_equal_flops("baseline", chosen, data, step, steps)
    return [*found, Entrant("baseline", folder / "baseline", own)]


def make_data(run: Path, chosen: Preset, corpus: str | None, reporter: Reporter) -> TokenData:
    assert chosen.tokenizer is not None, "the preset needs a tokenizer of its own"
    return prepare_data(
        run / DATA,
        corpus=corpus or chosen.corpus,
        tokenizer=chosen.tokenizer,
        validation_fraction=chosen.validation_fraction,
        report=reporter.message,
    )


def train(entrant: Entrant, corpus: str | None, options: StageOptions, reporter: Reporter) -> None:
    """Train what an entrant consists of, and keep the processor time of each part."""
    data = make_data(entrant.run, entrant.preset, corpus, reporter)
    for kind in ("autoencoder", "energy") if entrant.kind == "energy" else ("baseline",):
        optimization = getattr(entrant.preset, kind).optimization
        reporter.message(
            f"{entrant.run.name} {kind}: {optimization.steps} steps of "
            f"{optimization.batch_size} x {optimization.block_length} tokens"
        )
        started = time.process_time()
        result = pipeline.train(kind, entrant.run, entrant.preset, data, options, reporter)
        if not result.reused:
            seconds = {**(read_json(entrant.run / SECONDS) or {})}
            seconds[kind] = time.process_time() - started
            write_json(entrant.run / SECONDS, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="RUNS", help="folder of the runs")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=[1, 2, 4], metavar="K")
    parser.add_argument("--steps", type=int, help="of the preset's own language model (its own)")
    parser.add_argument("--autoencoder-steps", type=int, help="(the preset's)")
    parser.add_argument("--corpus", help="text file or folder (the preset's)")
    parser.add_argument("--seed", type=int, default=0, help="of all trainings (%(default)s)")
    parser.add_argument("--output", type=Path, help="Markdown file; the plot lies beside it")
    arguments = parser.parse_args()
    reporter = make_reporter()
    chosen = preset(arguments.preset)
    data = make_data(arguments.folder, chosen, arguments.corpus, reporter)
    options = StageOptions(seed=arguments.seed, cpu=True, when_present="automatic")
    compared = entrants(arguments.folder, arguments, data)
    for entrant in compared:
        train(entrant, arguments.corpus, options, reporter)


if __name__ == "__main__":
    main()
