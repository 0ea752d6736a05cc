"""``exact``: exact temperature sampling over a sampler that draws from a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from calm_kernels.bench.workloads.vote import patch_table, zipf
from calm_kernels.ops.temperature_sampling import Draw, exact_temperature_sample

DRAWS_AT_A_TIME = 64
"""Of the plain formulation: one draw a call would time the sampler and nothing else."""


def _settings(batch: int) -> tuple[Setting, ...]:
    return tuple(
        Setting({"B": batch, "K": 4, "T": temperature}, torch.int64) for temperature in (0.5, 0.7)
    )


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    table, law = patch_table(case, generator), zipf(case.device)

    def draw(rows: Tensor, count: int) -> Tensor:
        ranks = torch.multinomial(law, rows.shape[0] * count, replacement=True)
        return table[ranks].reshape(rows.shape[0], count, -1)

    return {
        "draw": draw,
        "batch_size": case.size("B"),
        "temperature": float(case.shape["T"]),
        "device": case.device,
    }


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    seed = torch.randint(0, 2**62, (1,), generator=generator, device=case.device)
    return {"seed": seed}


def _stream(draw: Draw, device: torch.device) -> Iterator[tuple[int, ...]]:
    row = torch.zeros(1, dtype=torch.int64, device=device)
    while True:
        yield from (tuple(patch) for patch in draw(row, DRAWS_AT_A_TIME)[0].tolist())


def plain(inputs: Inputs) -> Tensor:
    """Algorithm 1 of the paper, one sequence at a time."""
    whole = math.floor(1.0 / inputs["temperature"])
    fraction = 1.0 / inputs["temperature"] - whole
    coin = torch.Generator().manual_seed(int(inputs["seed"]))
    chosen = []
    for _ in range(inputs["batch_size"]):
        draws = _stream(inputs["draw"], inputs["device"])
        chosen.append(_plain_sequence(draws, whole, fraction, coin))
    return torch.tensor(chosen, dtype=torch.int64, device=inputs["device"])


def _plain_sequence(
    draws: Iterator[tuple[int, ...]], whole: int, fraction: float, coin: torch.Generator
) -> tuple[int, ...]:
    while True:
        first, *others = (next(draws) for _ in range(whole))
        if any(other != first for other in others):
            continue
        if fraction == 0.0:
            return first
        trial = 1
        while True:
            if next(draws) == first:
                return first
            if float(torch.rand((), generator=coin)) < fraction / trial:
                break
            trial += 1


def operator(inputs: Inputs) -> tuple[Tensor, ...]:
    return exact_temperature_sample(
        inputs["draw"],
        inputs["batch_size"],
        inputs["temperature"],
        seed=inputs["seed"],
        device=inputs["device"],
    )


def exact(case: Case, inputs: Inputs) -> tuple[Tensor, float, float]:
    """Every patch's place in [0, 1] by P^(1/T) / Z, most frequent first; mean and variance."""
    sharpened = zipf(case.device) ** (1.0 / float(case.shape["T"]))
    sharpened /= sharpened.sum()
    place = sharpened.cumsum(0) - 0.5 * sharpened
    mean = float((sharpened * place).sum())
    return place, mean, float((sharpened * (place - mean) ** 2).sum())


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """The mean place of the results; bounded, so nearly normal. A patch's last id is its rank."""
    place, mean, variance = exact
    tokens = outputs[0] if isinstance(outputs, tuple) else outputs
    ranks = tokens[:, -1]
    if int(ranks.min()) < 0 or int(ranks.max()) >= len(place):
        return Check(math.inf, checks.LARGEST_Z, checks.STANDARD_ERRORS)
    z = abs(float(place[ranks].mean()) - mean) / math.sqrt(variance / len(tokens))
    return Check(z, checks.LARGEST_Z, checks.STANDARD_ERRORS)


def expected_draws(temperature: float) -> float:
    """Draws a sequence needs on average, attempts ended at the first draw that differs."""
    law, exponent = zipf(torch.device("cpu")), 1.0 / temperature
    whole = math.floor(exponent)
    powers = [float((law**j).sum()) for j in range(1, whole)]
    if exponent > whole:
        powers.append(float((law ** (exponent - 1.0)).sum()))
    return (1.0 + sum(powers)) / float((law**exponent).sum())


def cost(case: Case) -> Cost:
    """The draws that are consumed on average, read and compared once."""
    draws = math.ceil(case.size("B") * expected_draws(float(case.shape["T"])))
    return Cost(8 * case.size("K") * (draws + case.size("B")), draws * case.size("K"))


register(
    Workload(
        name="exact",
        summary="exact temperature sampling, a Zipf table as the sampler",
        settings={"small": _settings(16), "cpu": _settings(64), "cuda": _settings(64)},
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(eager(plain), *package(operator, ("exact_temperature_step",))),
        exact=exact,
        check=check,
        cost=cost,
    )
)
