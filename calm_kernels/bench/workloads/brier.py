"""``brier``: the U-statistic of the Brier score of S draws a position."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from calm_kernels.bench.checks import RELATIVE
from calm_kernels.bench.variants import compiled, eager, package
from calm_kernels.bench.workload import (
    Case,
    Check,
    Cost,
    Inputs,
    Outputs,
    Setting,
    Workload,
    register,
)
from calm_kernels.ops.brier import brier_scores

OFFICIAL = Setting({"S": 8, "P": 8188, "K": 4}, torch.int64)
SMALL = Setting({"S": 3, "P": 50, "K": 4}, torch.int64)
NUM_TOKENS = 4
"""Few, so that prefixes of every length agree often."""
BOUND = 4e-7


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    shape = (case.size("S") + 1, case.size("P"), case.size("K"))
    vocabulary = torch.randint(0, 2**17, (NUM_TOKENS,), generator=generator, device=case.device)
    picks = torch.randint(0, NUM_TOKENS, shape, generator=generator, device=case.device)
    draws = vocabulary[picks]
    return {"samples": draws[1:].contiguous(), "target": draws[0].contiguous()}


def plain(inputs: Inputs) -> Tensor:
    """All pairs of draws, prefix by prefix."""
    samples, target = inputs["samples"], inputs["target"]
    num_samples = samples.shape[0]
    scores = []
    for n in range(1, samples.shape[2] + 1):
        prefix = samples[..., :n]
        hits = (prefix == target[:, :n]).all(-1).float().mean(0)
        equal = (prefix.unsqueeze(1) == prefix.unsqueeze(0)).all(-1).float().sum((0, 1))
        scores.append(2.0 * hits - (equal - num_samples) / (num_samples * (num_samples - 1)))
    return torch.stack(scores, dim=-1)


def operator(inputs: Inputs) -> Tensor:
    return brier_scores(inputs["samples"], inputs["target"])


def exact(case: Case, inputs: Inputs) -> Tensor:
    """In float64 from prefixes that are numbered, so that one comparison is one of integers."""
    samples, target = inputs["samples"], inputs["target"]
    num_samples = samples.shape[0]
    scores = []
    for n in range(1, samples.shape[2] + 1):
        prefixes = torch.cat((target.unsqueeze(0), samples))[..., :n].flatten(0, 1)
        _, numbers = torch.unique(prefixes, dim=0, return_inverse=True)
        truth, drawn = numbers.reshape(num_samples + 1, -1).tensor_split([1])
        hits = (drawn == truth).sum(0)
        ordered_pairs = sum((drawn == drawn.roll(i, 0)).sum(0) for i in range(1, num_samples))
        scores.append(
            2.0 * hits.double() / num_samples
            - torch.as_tensor(ordered_pairs).double() / (num_samples * (num_samples - 1))
        )
    return torch.stack(scores, dim=-1)


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """The largest error of any score; scores are of order 1."""
    if outputs.shape != exact.shape:
        return Check(math.inf, BOUND, RELATIVE)
    return Check(float((outputs.double() - exact).abs().max()), BOUND, RELATIVE)


def cost(case: Case) -> Cost:
    """Ids read, scores written; every pair of draws and every draw with the truth compared."""
    num_samples, positions, patch_size = (case.size(name) for name in "SPK")
    comparisons = num_samples * (num_samples + 1) // 2 * positions * patch_size
    return Cost(positions * patch_size * (8 * (num_samples + 1) + 4), comparisons)


register(
    Workload(
        name="brier",
        summary="Brier-1..4 of S draws a position",
        settings={"small": (SMALL,), "cpu": (OFFICIAL,), "cuda": (OFFICIAL,)},
        make_inputs=make_inputs,
        variants=(eager(plain), compiled(plain), *package(operator, ("brier_scores",))),
        exact=exact,
        check=check,
        cost=cost,
    )
)
