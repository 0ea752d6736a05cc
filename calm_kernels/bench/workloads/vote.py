"""``vote``: batch temperature sampling, one patch of N draws for each of B sequences."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from calm_kernels.bench import checks
from calm_kernels.bench.variants import eager, package
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
from calm_kernels.ops.temperature_sampling import batch_temperature_sample
from calm_kernels.reference.philox import Stream
from calm_kernels.reference.temperature_sampling import wide_uniform

NUM_PATCHES = 1000
"""Distinct patches of the law that is drawn from, Zipf with exponent 1."""


def _settings(batches: tuple[int, ...], draws: int) -> tuple[Setting, ...]:
    return tuple(
        Setting({"B": batch, "N": draws, "K": 4, "T": temperature}, torch.int64)
        for temperature in (0.5, 0.37)
        for batch in batches
    )


def zipf(device: torch.device) -> Tensor:
    """Probabilities of the patches."""
    weights = 1.0 / torch.arange(1, NUM_PATCHES + 1, dtype=torch.float64, device=device)
    return weights / weights.sum()


def patch_table(case: Case, generator: torch.Generator) -> Tensor:
    """The patches themselves, int64 [NUM_PATCHES, K], all different."""
    shape = (NUM_PATCHES, case.size("K"))
    table = torch.randint(0, 2**17, shape, generator=generator, device=case.device)
    table[:, -1] = torch.arange(NUM_PATCHES, device=case.device)
    return table


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    return {"table": patch_table(case, generator), "temperature": float(case.shape["T"])}


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    shape = (case.size("B"), case.size("N"))
    ranks = torch.multinomial(
        zipf(case.device), shape[0] * shape[1], replacement=True, generator=generator
    )
    seed = torch.randint(0, 2**62, (1,), generator=generator, device=case.device)
    return {"tokens": state["table"][ranks.reshape(shape)], "seed": seed}


def plain(inputs: Inputs) -> Tensor:
    """One Counter a sequence, weights C(count, 1/T) with a fallback to smaller exponents."""
    tokens, wanted = inputs["tokens"], round(1.0 / inputs["temperature"])
    chosen = []
    for draws in tokens.tolist():
        counts = Counter(tuple(patch) for patch in draws)
        for exponent in range(wanted, 0, -1):
            weights = {p: math.comb(c, exponent) for p, c in counts.items() if c >= exponent}
            if weights:
                break
        pick = torch.multinomial(torch.tensor(list(weights.values()), dtype=torch.float64), 1)
        chosen.append(list(weights)[int(pick)])
    return torch.tensor(chosen, dtype=tokens.dtype, device=tokens.device)


def only_integers(case: Case) -> str | None:
    exponent = 1.0 / float(case.shape["T"])
    if exponent == round(exponent):
        return None
    return "the paper's vote is for T = 1, 1/2, 1/3, ... alone"


def operator(inputs: Inputs) -> Tensor:
    return batch_temperature_sample(inputs["tokens"], inputs["temperature"], seed=inputs["seed"])


def weights_of(counts: Counter[tuple[int, ...]], exponent: float) -> list[float]:
    """The specified weight of every patch, in the order of first occurrence, largest count 1."""
    whole = math.floor(exponent)

    def factor(j: int) -> float:
        shrink = (whole - 0.5) / (exponent - 0.5) if j == whole + 1 else 1.0
        return max(0.0, 1.0 - exponent / j) * shrink

    largest = max(counts.values())
    return [
        math.prod(factor(j) for j in range(count + 1, largest + 1)) for count in counts.values()
    ]


def exact(case: Case, inputs: Inputs) -> Tensor:
    """The choice of the seed's uniforms, by exact sums in plain Python."""
    tokens = inputs["tokens"]
    rows = torch.arange(len(tokens), device=tokens.device)
    uniforms = wide_uniform(
        inputs["seed"], rows, torch.zeros_like(rows), 1, Stream.BATCH_TEMPERATURE
    )
    chosen = []
    for draws, u in zip(tokens.tolist(), uniforms.flatten().tolist(), strict=True):
        counts = Counter(tuple(patch) for patch in draws)
        weights = weights_of(counts, 1.0 / inputs["temperature"])
        threshold, running = u * math.fsum(weights), 0.0
        for patch, weight in zip(counts, weights, strict=True):
            running += weight
            if running > threshold:
                chosen.append(patch)
                break
    return torch.tensor(chosen, dtype=tokens.dtype, device=tokens.device)


def exact_law(case: Case, inputs: Inputs) -> list[tuple[Counter[tuple[int, ...]], float, float]]:
    """For each sequence the counts, and mean and variance of the count of the chosen patch."""
    laws = []
    for draws in inputs["tokens"].tolist():
        counts = Counter(tuple(patch) for patch in draws)
        weights = weights_of(counts, 1.0 / inputs["temperature"])
        total = math.fsum(weights)
        pairs = list(zip(counts.values(), weights, strict=True))
        mean = math.fsum(c * w for c, w in pairs) / total
        variance = math.fsum((c - mean) ** 2 * w for c, w in pairs) / total
        laws.append((counts, mean, variance))
    return laws


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    return checks.share_of_mismatches(outputs, exact)


def check_in_law(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """Choices of its own: the counts of the chosen patches against their mean."""
    deviation = variance = 0.0
    for patch, (counts, mean, row_variance) in zip(outputs.tolist(), exact, strict=True):
        count = counts.get(tuple(patch))
        if count is None:
            return Check(math.inf, checks.LARGEST_Z, checks.STANDARD_ERRORS)
        deviation += count - mean
        variance += row_variance
    z = abs(deviation) / math.sqrt(variance) if variance > 0.0 else abs(deviation)
    return Check(z, checks.LARGEST_Z, checks.STANDARD_ERRORS)


def cost(case: Case) -> Cost:
    """Draws read, patches written; each draw compared with one of its kind at least."""
    batch, draws, patch_size = (case.size(name) for name in "BNK")
    return Cost(8 * batch * patch_size * (draws + 1), batch * draws * patch_size)


register(
    Workload(
        name="vote",
        summary="batch temperature sampling among N draws",
        settings={
            "small": _settings((3,), 20),
            "cpu": _settings((1, 64, 1024), 200),
            "cuda": _settings((1, 64, 1024), 200),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(
            eager(plain, missing=only_integers, exact=exact_law, check=check_in_law),
            *package(operator, ("batch_temperature_sample",)),
        ),
        exact=exact,
        check=check,
        cost=cost,
    )
)
