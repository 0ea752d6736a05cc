"""``energy``: the energy score of a training step, forward and the gradient of the samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from calm_kernels.bench import checks
from calm_kernels.bench.variants import compiled, eager, package
from calm_kernels.bench.workload import (
    Case,
    Check,
    Cost,
    Growth,
    Inputs,
    Outputs,
    Setting,
    Workload,
    register,
)
from calm_kernels.ops.energy_score import Estimator, energy_score
from calm_kernels.reference.energy_score_gradient import energy_score_with_gradients

CPU = Setting({"P": 512, "N": 8, "M": 100, "D": 128})
CUDA = Setting({"P": 8188, "N": 8, "M": 100, "D": 128}, torch.bfloat16)
SMALL = Setting({"P": 64, "N": 4, "M": 20, "D": 16})


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    return {"num_targets": case.size("M")}


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    """Posteriors as an autoencoder's, standard deviation about 0.3, and samples near them."""
    positions, size = case.size("P"), case.size("D")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    mean = normal(positions, size)
    log_std = math.log(0.3) + 0.1 * normal(positions, size)
    samples = mean + 0.5 * normal(case.size("N"), positions, size)
    seed = torch.randint(0, 2**62, (1,), generator=generator, device=case.device)
    return {
        "samples": samples.to(case.dtype).requires_grad_(),
        "mean": mean.to(case.dtype),
        "log_std": log_std.to(case.dtype),
        "seed": seed,
    }


def plain(inputs: Inputs) -> Tensor:
    """Distances between all pairs and to all drawn targets, materialised."""
    samples, mean, log_std = inputs["samples"], inputs["mean"], inputs["log_std"]
    num_samples = samples.shape[0]
    pairs = torch.linalg.vector_norm(samples.unsqueeze(1) - samples.unsqueeze(0), dim=-1)
    spread = pairs.sum((0, 1)) / (num_samples * (num_samples - 1))
    noise = torch.randn(inputs["num_targets"], *mean.shape, device=mean.device)
    targets = mean + log_std.exp() * noise
    distances = torch.linalg.vector_norm(samples.unsqueeze(1) - targets.unsqueeze(0), dim=-1)
    score: Tensor = spread - 2.0 * distances.mean((0, 1))
    return score


def closed_form(inputs: Inputs) -> Tensor:
    samples, mean, log_std = (inputs[name] for name in ("samples", "mean", "log_std"))
    return energy_score(samples, mean, log_std)


def monte_carlo(inputs: Inputs) -> Tensor:
    return energy_score(
        inputs["samples"],
        inputs["mean"],
        inputs["log_std"],
        estimator="monte_carlo",
        num_targets=inputs["num_targets"],
        seed=inputs["seed"],
    )


def _in_float64(inputs: Inputs, estimator: Estimator) -> tuple[Tensor, Tensor]:
    """Score and gradient of the samples from the specification."""
    samples, mean, log_std = (
        inputs[name].detach().double() for name in ("samples", "mean", "log_std")
    )
    seed, num_targets = inputs["seed"], inputs["num_targets"]
    score, gradient, _, _ = energy_score_with_gradients(
        samples, mean, log_std, seed, 1.0, estimator, num_targets, True, False, False
    )
    return score, gradient


def exact_closed_form(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return _in_float64(inputs, "closed_form")


def exact_monte_carlo(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """On the very draws of the seed."""
    return _in_float64(inputs, "monte_carlo")


def check_values(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """Scores to float32 rounding, gradients to that of their dtype."""
    score = checks.relative_error(outputs[0], exact[0])
    gradient = checks.relative_error(outputs[1], exact[1])
    # One number for both: the gradient's error in units of its own bound.
    bound = checks.ROUNDING[torch.float32]
    scaled = gradient * bound / checks.ROUNDING[outputs[1].dtype]
    worst = math.nan if math.isnan(score + scaled) else max(score, scaled)
    return Check(worst, bound, checks.RELATIVE)


def check_in_law(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """Draws of its own: the mean of the score, and of the gradient along x - mean."""
    if outputs[1].shape != exact[1].shape:
        return Check(math.inf, checks.LARGEST_Z, checks.STANDARD_ERRORS)
    direction = (inputs["samples"] - inputs["mean"]).detach().double()
    slopes = [(gradient.double() * direction).sum((0, 2)) for gradient in (outputs[1], exact[1])]
    z = (checks.paired_z(outputs[0], exact[0]), checks.paired_z(slopes[0], slopes[1]))
    return Check(max(z), checks.LARGEST_Z, checks.STANDARD_ERRORS)


def _bytes(case: Case) -> int:
    """Samples, mean and log_std read, scores and the gradient of the samples written."""
    width = torch.empty(0, dtype=case.dtype).element_size()
    elements = case.size("P") * case.size("D")
    return width * elements * (2 * case.size("N") + 2) + 4 * case.size("P")


def _pair_operations(case: Case) -> int:
    """Difference, square, two sums and a scaling, three operations each way."""
    num_samples = case.size("N")
    return 3 * num_samples * (num_samples - 1) * case.size("P") * case.size("D")


def cost_closed_form(case: Case) -> Cost:
    """Beside the pairs, two moments of each sample and their gradient."""
    moments = 16 * case.size("N") * case.size("P") * case.size("D")
    return Cost(_bytes(case), _pair_operations(case) + moments)


def cost_monte_carlo(case: Case) -> Cost:
    """Beside the pairs, N M distances and their gradient; about 30 operations a normal number."""
    elements = case.size("M") * case.size("P") * case.size("D")
    operations = (6 * case.size("N") + 30) * elements
    return Cost(_bytes(case), _pair_operations(case) + operations)


def _gradients(case: Case) -> tuple[str, ...]:
    return ("samples",)


register(
    Workload(
        name="energy",
        summary="energy score of N samples, forward and gradient (paper: M drawn targets)",
        settings={"small": (SMALL,), "cpu": (CPU,), "cuda": (CUDA,)},
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(
            eager(plain, _gradients, check=check_in_law, cost=cost_monte_carlo),
            compiled(plain, _gradients, check=check_in_law, cost=cost_monte_carlo),
            *package(
                monte_carlo,
                ("energy_score",),
                _gradients,
                "monte_carlo",
                exact=exact_monte_carlo,
                cost=cost_monte_carlo,
            ),
            *package(closed_form, ("energy_score",), _gradients, "closed_form"),
        ),
        exact=exact_closed_form,
        check=check_values,
        cost=cost_closed_form,
        growth=Growth(
            base={
                "small": Setting({"P": 16, "N": 4, "M": 64, "D": 8}),
                "cpu": Setting({"P": 128, "N": 8, "M": 100, "D": 128}),
                "cuda": Setting({"P": 2048, "N": 8, "M": 100, "D": 128}, torch.bfloat16),
            },
            axes=("P", "N", "M", "D"),
            variants=("eager", "native", "reference"),
        ),
    )
)
