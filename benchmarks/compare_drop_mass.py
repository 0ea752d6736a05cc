"""The same autoencoder trained with every row's gradient exact, and with the certified sparse one.

    python benchmarks/compare_drop_mass.py runs/small --steps 600 --output docs/drop_mass.md

Takes the data of a run of the ``small`` preset and trains its autoencoder anew for each way, from
the same seed on the same batches, each in a process of its own:

plain   logits stored, torch's cross_entropy on them: the plain formulation
exact   the package's operator, drop_mass 0
sparse  the package's operator, drop_mass 1e-3

Prints a Markdown table: the median time of a step after the first ten, the share of rows that took
the sparse path in the last steps, and the token accuracy on held-out text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from calm_kernels.models import Autoencoder
from calm_kernels.ops import LinearCrossEntropyInfo
from calm_kernels.training import presets
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.data import open_data
from calm_kernels.training.evaluation import evaluate_autoencoder
from calm_kernels.training.optimizer import make_optimizer

DROP_MASS = {"plain": 0.0, "exact": 0.0, "sparse": 1e-3}
SKIPPED_STEPS = 10
HELD_OUT_BLOCKS = 512


class PlainLoss(nn.Module):
    """Logits stored, in the place of the package's loss."""

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor
    ) -> tuple[Tensor, LinearCrossEntropyInfo]:
        logits = hidden @ weight.t()
        count = torch.tensor(len(target))
        info = LinearCrossEntropyInfo(
            logits.detach().argmax(-1) == target, count, torch.zeros_like(count), torch.zeros(())
        )
        return F.cross_entropy(logits, target), info


class Watched(nn.Module):
    """Notes the share of sparse rows of every call."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.shares: list[float] = []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, LinearCrossEntropyInfo]:
        loss, info = self.loss(*inputs)
        self.shares.append(float(info.num_sparse_rows) / float(info.num_rows))
        return loss, info


def train(run: Path, way: str, steps: int, seed: int) -> dict[str, Any]:
    """One training; returns its row of the table."""
    optimization = presets.preset("small").autoencoder.optimization
    data = open_data(run / "data")
    blocks, held_out = (
        PackedBlocks(part, optimization.block_length, 4) for part in (data.train, data.validation)
    )
    config = Autoencoder.config_class.from_pretrained(run / "autoencoder")
    config.drop_mass = DROP_MASS[way]
    torch.manual_seed(seed)
    model = Autoencoder(config).train()
    watched = Watched(PlainLoss() if way == "plain" else model.cross_entropy)
    model.cross_entropy = watched
    optimizer = make_optimizer(model, optimization)
    schedule = get_cosine_schedule_with_warmup(optimizer, optimization.warmup_steps, steps)
    order = torch.Generator().manual_seed(seed)
    seconds = []
    for step in range(steps):
        chosen = torch.randint(len(blocks), (optimization.batch_size,), generator=order)
        ids = torch.stack([blocks.block(int(i)) for i in chosen]).long()
        start = time.perf_counter()
        model(input_ids=ids, seed=seed * steps + step).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optimization.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    shares = watched.shares[-max(1, steps // 10) :]
    model.cross_entropy = watched.loss
    result = evaluate_autoencoder(model.eval(), held_out, HELD_OUT_BLOCKS)
    return {
        "way": way,
        "ms_per_step": 1e3 * statistics.median(seconds[SKIPPED_STEPS:]),
        "sparse": statistics.mean(shares),
        "threads": torch.get_num_threads(),
        **result.as_metrics(),
    }


def table(rows: list[dict[str, Any]], steps: int, seeds: list[int]) -> str:
    lines = [
        "| loss | seed | ms a step | sparse rows at the end | token accuracy, held out |",
        "|---|---|---|---|---|",
        *(
            f"| {row['way']} | {row['seed']} | {row['ms_per_step']:.0f} "
            f"| {100 * row['sparse']:.1f}% "
            f"| {100 * row['token_accuracy']:.3f}% |"
            for row in rows
        ),
        "",
        f"{steps} steps of 2048 tokens, V = 4096, H = 256, float32, seeds "
        f"{', '.join(map(str, seeds))}, {rows[0]['threads']} CPU thread(s), torch "
        f"{torch.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of the small preset")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", choices=DROP_MASS, nargs="+", default=list(DROP_MASS))
    parser.add_argument("--row", action="store_true", help="one way and seed, its row as JSON")
    parser.add_argument("--output", type=Path, help="file to write the table to as well")
    arguments = parser.parse_args()
    if arguments.row:
        (way,), (seed,) = arguments.ways, arguments.seeds
        print(json.dumps({"seed": seed, **train(arguments.run, way, arguments.steps, seed)}))
        return
    rows = []
    for seed in arguments.seeds:
        for way in arguments.ways:
            command = [sys.executable, __file__, str(arguments.run), "--row", "--ways", way]
            command += ["--seeds", str(seed), "--steps", str(arguments.steps)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(run.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    text = table(rows, arguments.steps, arguments.seeds)
    print(text)
    if arguments.output is not None:
        title = "# Training an autoencoder with exact and with certified sparse gradients\n\n"
        arguments.output.write_text(title + text, encoding="utf-8")


if __name__ == "__main__":
    main()
