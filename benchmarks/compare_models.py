"""CALM at several patch sizes and the autoregressive baseline at equal training operations.

    OMP_NUM_THREADS=1 python benchmarks/compare_models.py runs/comparison \\
        --output docs/model_comparison.md

Trains, into one run folder each: for every patch size K an autoencoder and a language model on it,
and a baseline of the same backbone. All language models get as many floating-point operations
(calm_kernels/models/flops.py) as the preset's own at its own K and steps. Spending them on fewer
steps of the same text would leave the models of small K a fourth of the updates; so the batch is
scaled instead, to about equal operations a step, which for CALM also means equally many predicted
patches (``--batch text`` keeps the batch of text and scales the steps). Warm-up and schedule follow
the steps. The autoencoders get the preset's steps and text whatever K.

Then scores all of them on the same positions of the same held-out text, scores the baseline once
more as a sampler whose probabilities nobody knows, as CALM is scored, and writes a Markdown page
and, beside it, the plot of the same name. What is there and was made with the same settings is
reused, what was interrupted continues.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from calm_kernels.cli import results
from calm_kernels.cli.console import count, make_reporter
from calm_kernels.models import AutoregressiveBaseline, flops
from calm_kernels.models.brier import BrierScores, score_patches
from calm_kernels.models.inputs import to_patches
from calm_kernels.training import pipeline
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.comparison import Compared, Scoring, compare
from calm_kernels.training.comparison_plot import labels_of, plot_comparison
from calm_kernels.training.data import TokenData, prepare_data
from calm_kernels.training.evaluation import evaluate_brier
from calm_kernels.training.files import read_json, write_json, write_text
from calm_kernels.training.optimizer import native_bf16
from calm_kernels.training.presets import EvaluationSettings, Optimization, Preset, preset
from calm_kernels.training.progress import Reporter
from calm_kernels.training.runs import DATA, load_model
from calm_kernels.training.scores import BrierResult
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


def at_equal_flops(
    kind: str, chosen: Preset, data: TokenData, step: int, steps: int, same_text: bool
) -> Preset:
    """A preset whose language model trains for about ``step * steps`` operations.

    Args:
        kind: ``"energy"`` or ``"baseline"``.
        chosen: the preset, at the patch size wanted.
        data: names the vocabulary.
        step: operations of a step to come close to by the size of the batch.
        steps: number of such steps.
        same_text: keep the preset's batch, whatever a step then costs.
    """
    sizes = getattr(chosen, kind)
    given: Optimization = sizes.optimization
    block = step_flops(kind, chosen, data, replace(given, batch_size=1))
    batch_size = given.batch_size if same_text else max(1, round(step / block))
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
    same_text = arguments.batch == "text"
    step = step_flops("energy", chosen, data, chosen.energy.optimization)
    if arguments.autoencoder_steps is not None:
        shorter = replace(chosen.autoencoder.optimization, steps=arguments.autoencoder_steps)
        chosen = replace(chosen, autoencoder=replace(chosen.autoencoder, optimization=shorter))
    cases = [("energy", f"k{k}", replace(chosen, patch_size=k)) for k in arguments.patch_sizes]
    return [
        Entrant(kind, folder / name, at_equal_flops(kind, own, data, step, steps, same_text))
        for kind, name, own in (*cases, ("baseline", "baseline", chosen))
    ]


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


class BlackBox:
    """A baseline that shows nothing but draws, scored as a patch model of K = 1.

    Takes the place of the language model in :func:`~calm_kernels.models.brier.score_patches`: a
    draw of the head is a token, by inversion of the next token's law at the head's uniform noise.
    """

    def __init__(self, baseline: AutoregressiveBaseline) -> None:
        self._baseline = baseline
        self.config, self.device = baseline.config, baseline.device
        self.mlp_generator = self
        self.ae_model = SimpleNamespace(decoder=SimpleNamespace(decode=lambda tokens: tokens))

    def hidden_states(self, patches: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        """Of patches [B, n, 1], as the language model's."""
        return self._baseline.hidden_states(patches.squeeze(-1), *arguments, **settings)

    def draw_noise(
        self, num_positions: int, num_samples: int, device: torch.device, seed: int
    ) -> Tensor:
        """Uniforms, [S, P, 1]."""
        generator = torch.Generator().manual_seed(seed % 2**63)
        shape = (num_samples, num_positions, 1)
        return torch.rand(shape, dtype=torch.float64, generator=generator).to(device)

    def __call__(self, hidden: Tensor, num_samples: int, noise: Tensor) -> Tensor:
        """Tokens [S, P, 1] for hidden states [P, H]."""
        cumulative = self._baseline.lm_head(hidden).double().softmax(dim=-1).cumsum(dim=-1)
        thresholds = noise.squeeze(-1).t() * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, thresholds.contiguous(), right=True)
        return drawn.clamp_max(cumulative.shape[1] - 1).t().unsqueeze(-1)

    def evaluate_brier(
        self, ids: Tensor, num_samples: int, seed: int, stride: int | None = None
    ) -> BrierScores:
        """As of the language model."""
        patches = to_patches(ids, None, 1, self.config.vocab_size)
        return score_patches(self, patches, None, num_samples, seed, stride)  # type: ignore[arg-type]


def score_by_draws(run: Path, data: TokenData, row: Compared, scoring: Scoring) -> BrierResult:
    """The baseline of a row scored by draws alone, on the same positions."""
    model = BlackBox(load_model("baseline", run / "baseline"))
    length, stride = row.metrics["block_length"], row.metrics["stride"]
    held_out = PackedBlocks(data.validation, length, stride)
    return evaluate_brier(
        model, held_out, scoring.blocks, num_samples=scoring.samples, seed=scoring.seed,
        stride=stride,
    )  # fmt: skip


def training_table(compared: Sequence[Entrant], rows: Sequence[Compared]) -> str:
    """How every language model was trained, and what its tokens cost without their decode."""
    columns = (
        "model", "steps", "tokens a step", "tokens in all", "FLOPs", "of its autoencoder",
        "CPU seconds", "of its autoencoder", "FLOPs a token without decode",
    )  # fmt: skip
    cells = []
    for entrant, row, label in zip(compared, rows, labels_of(rows), strict=True):
        given: Optimization = getattr(entrant.preset, entrant.kind).optimization
        tokens = given.batch_size * given.block_length
        seconds = read_json(entrant.run / SECONDS) or {}
        cost = row.cost
        cells.append([
            label, str(given.steps), str(tokens), count(tokens * given.steps),
            _operations(cost.training), _operations(cost.autoencoder_training),
            _seconds(seconds.get(entrant.kind)), _seconds(seconds.get("autoencoder")),
            _operations(cost.per_token_without_decode),
        ])  # fmt: skip
    return results.markdown(columns, cells, left=1)


def _operations(number: float | None) -> str:
    return "" if number is None else count(round(number))


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f}"


def page(
    compared: Sequence[Entrant],
    rows: Sequence[Compared],
    by_draws: BrierResult,
    arguments: argparse.Namespace,
) -> str:
    """The Markdown page."""
    models = [row for row in rows if row.kind != "autoencoder"]
    command = f"python benchmarks/compare_models.py RUNS --output {arguments.output}"
    if arguments.preset != "demo" or arguments.steps or arguments.autoencoder_steps:
        command += " ..."
    plot = arguments.output.with_suffix(".png").name
    return f"""# CALM and the autoregressive baseline at equal training operations

Made by `{command}`. What it shows is told in [training](training.md).

![BrierLM against FLOPs]({plot})

{results.markdown(*results.comparison_table(rows))}
{results.comparison_notes(rows)} {_scored(rows)}

## Training

{training_table(compared, models)}
{_conditions(arguments)} CPU seconds are processor time, a short scoring included. FLOPs a token \
without decode: at temperature 1 if the latent drawn were not decoded, as the published counts of \
CALM have it.

## The same question for all

The baseline's BrierLM above uses its probabilities. Scored by draws alone, as CALM with K = 1 is: \
{by_draws.brier_lm:.2f} ± {by_draws.brier_lm_standard_error:.2f} (Brier-1..4: \
{", ".join(f"{value:.2f}" for value in by_draws.brier)}).
"""


def _conditions(arguments: argparse.Namespace) -> str:
    threads = torch.get_num_threads()
    bf16 = preset(arguments.preset).cpu_bf16 and native_bf16(torch.device("cpu"))
    same = "operations" if arguments.batch == "flops" else "text"
    return (
        f"Preset `{arguments.preset}`, seed {arguments.seed} for each, about the same {same} a "
        f"step, {'bf16 autocast' if bf16 else 'float32'}, {threads} CPU "
        f"thread{'s' * (threads > 1)}, torch {torch.__version__}."
    )


def _scored(rows: Sequence[Compared]) -> str:
    first = next(row for row in rows if row.kind != "autoencoder")
    return (
        f"{first.metrics['samples']} draws a position; standard errors: jackknife over blocks, of "
        "one training each."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="RUNS", help="folder of the runs")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=[1, 2, 4], metavar="K")
    parser.add_argument("--steps", type=int, help="of the preset's own language model (its own)")
    parser.add_argument("--autoencoder-steps", type=int, help="(the preset's)")
    parser.add_argument(
        "--batch", choices=("flops", "text"), default="flops",
        help="what a step has in common: its operations or its text (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--corpus", help="text file or folder (the preset's)")
    parser.add_argument("--blocks", type=int, default=256, help="held-out blocks to score")
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
    scoring = Scoring(blocks=arguments.blocks, cpu=True)
    rows = compare([entrant.run for entrant in compared], scoring, reporter)
    results.show_comparison("BrierLM and FLOPs", rows, results.comparison_notes(rows))
    if arguments.output is not None:
        baseline = compared[-1].run
        by_draws = score_by_draws(baseline, data, rows[-1], scoring)
        write_text(arguments.output, page(compared, rows, by_draws, arguments))
        caption = f"preset {arguments.preset}, {arguments.blocks} held-out blocks"
        plot_comparison(rows, arguments.output.with_suffix(".png"), caption)


if __name__ == "__main__":
    main()
