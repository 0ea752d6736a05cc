"""The demo's language model under three energy losses: time, memory and BrierLM side by side.

    python benchmarks/compare_losses.py runs/demo --steps 250

Takes data and autoencoder of a finished demo run and trains a fresh language model for the same
steps on the same batches from the same seed with each loss, each in a process of its own:

eager         every difference to M = 100 drawn targets materialised: the plain formulation
monte_carlo   the package's operator with M = 100 draws
closed_form   the package's operator, no draws

Prints a Markdown table. Step times are medians over all steps after the first ten; memory is the
process's peak resident size.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from calm_kernels import models
from calm_kernels.bench.workloads.energy import plain
from calm_kernels.training import presets
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.data import open_data
from calm_kernels.training.evaluation import evaluate_brier
from calm_kernels.training.optimizer import make_optimizer, native_bf16

LOSSES = ("eager", "monte_carlo", "closed_form")
NUM_TARGETS = 100
SKIPPED_STEPS = 10


class EagerLoss(nn.Module):
    """The plain formulation in the place of the package's loss."""

    def forward(
        self,
        samples: Tensor,
        mean: Tensor,
        log_std: Tensor,
        mask: Tensor | None = None,
        seed: Any = None,
    ) -> Tensor:
        assert mask is None or bool(mask.all()), "packed blocks have no padding"
        score = plain(
            {
                "samples": samples.float().flatten(1, -2),
                "mean": mean.float().flatten(0, -2),
                "log_std": log_std.float().flatten(0, -2),
                "num_targets": NUM_TARGETS,
            }
        )
        return -score.mean()


def build_model(run: Path, loss: str, seed: int) -> models.EnergyTransformer:
    """A fresh language model of the run's own configuration on its autoencoder."""
    sizes = presets.preset("demo").energy
    config = models.CalmConfig.from_pretrained(run / "energy")
    config.estimator = "closed_form" if loss == "eager" else loss
    config.num_targets = NUM_TARGETS
    torch.manual_seed(seed)
    autoencoder = models.Autoencoder.from_pretrained(run / "autoencoder")
    model = models.EnergyTransformer(config, autoencoder=autoencoder)
    if sizes.embedding_std is not None:
        nn.init.normal_(model.transformer.embed_tokens.weight, std=sizes.embedding_std)
    if loss == "eager":
        model.energy_loss = EagerLoss()
    return model


def train(run: Path, loss: str, steps: int, seed: int) -> dict[str, Any]:
    """One training; returns its row of the table."""
    optimization = presets.preset("demo").energy.optimization
    data = open_data(run / "data")
    blocks = PackedBlocks(data.train, optimization.block_length, 4)
    held_out = PackedBlocks(data.validation, optimization.block_length, 4)
    model = build_model(run, loss, seed).train()
    optimizer = make_optimizer(model, optimization)
    schedule = get_cosine_schedule_with_warmup(optimizer, optimization.warmup_steps, steps)
    order = torch.Generator().manual_seed(seed)
    bf16 = native_bf16(torch.device("cpu"))
    seconds = []
    for _ in range(steps):
        chosen = torch.randint(len(blocks), (optimization.batch_size,), generator=order)
        ids = torch.stack([blocks.block(int(i)) for i in chosen]).long()
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = model(input_ids=ids).loss
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimization.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    scores = evaluate_brier(model.eval(), held_out, 128, num_samples=8, seed=1)
    return {
        "loss": loss,
        "ms_per_step": 1e3 * statistics.median(seconds[SKIPPED_STEPS:]),
        "peak_mib": peak,
        "bf16": bf16,
        "threads": torch.get_num_threads(),
        **scores.as_metrics(),
    }


def table(rows: list[dict[str, Any]], steps: int, seed: int) -> str:
    lines = [
        "| loss | ms a step | peak memory, MiB | BrierLM, held out | Brier-1, 2, 3, 4 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        briers = ", ".join(f"{row[f'brier_{n}']:.3g}" for n in (1, 2, 3, 4))
        lines.append(
            f"| {row['loss']} | {row['ms_per_step']:.0f} | {row['peak_mib']:.0f} | "
            f"{row['brier_lm']:.2f} ± {row['brier_lm_standard_error']:.2f} | {briers} |"
        )
    first = rows[0]
    precision = "bf16 autocast" if first["bf16"] else "float32"
    lines += [
        "",
        f"{steps} steps of 12 x 64 patches, N = 4, M = {NUM_TARGETS}, seed {seed}, {precision}, "
        f"{first['threads']} CPU threads, torch {torch.__version__}; memory is that of the whole "
        "process, interpreter and libraries included.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished demo run")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss", choices=LOSSES, help="only this one; prints its row as JSON")
    parser.add_argument("--output", type=Path, help="file to write the table to as well")
    arguments = parser.parse_args()
    if arguments.loss:
        print(json.dumps(train(arguments.run, arguments.loss, arguments.steps, arguments.seed)))
        return
    rows = []
    for loss in LOSSES:
        command = [sys.executable, __file__, str(arguments.run), "--loss", loss]
        command += ["--steps", str(arguments.steps), "--seed", str(arguments.seed)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    text = table(rows, arguments.steps, arguments.seed)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
