"""``lm-step``: one whole training step of the language model."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from calm_kernels.bench import checks, plain
from calm_kernels.bench.models import (
    PATCH_SIZE,
    language_model_config,
    make_language_model,
    products,
    training_step,
)
from calm_kernels.bench.workload import (
    Case,
    Check,
    Cost,
    Inputs,
    Outputs,
    Setting,
    Variant,
    Workload,
    register,
)
from calm_kernels.models import EnergyTransformer
from calm_kernels.reference.energy_score import energy_score

GRADIENTS = ("embed_proj.0.weight", "mlp_generator.mlp_blocks.0.down_proj.weight")
BOUND = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Relative error of loss and gradients after a whole network forward and back."""
TARGETS_FOR_VARIANCE = 16


def _setting(name: str, batch: int, length: int, dtype: torch.dtype) -> Setting:
    return Setting({"preset": name, "B": batch, "L": length}, dtype)


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    name = str(case.shape["preset"])
    return {"model": make_language_model(name, generator, torch.float32, case.device)}


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    """Tokens and a seed, and the seed's head noise as the plain formulation takes it."""
    model: EnergyTransformer = state["model"]
    config = model.config
    shape = (case.size("B"), case.size("L"))
    ids = torch.randint(0, config.vocab_size, shape, generator=generator, device=case.device)
    seed = torch.randint(0, 2**62, (1,), generator=generator, device=case.device)
    positions = shape[0] * (shape[1] // PATCH_SIZE - 1)
    noise = model.mlp_generator.draw_noise(positions, config.num_samples, case.device, seed)
    return {"ids": ids, "seed": seed, "noise": noise}


def plain_loss(model: EnergyTransformer, inputs: Inputs) -> Tensor:
    """The unfolded encoder, a hidden state for every sample, distances to M random targets."""
    patches = inputs["ids"].unflatten(1, (-1, PATCH_SIZE))
    return plain.language_model_loss(model, patches, inputs["noise"])


def package_loss(model: EnergyTransformer, inputs: Inputs) -> Tensor:
    loss: Tensor = model(inputs["ids"], seed=inputs["seed"]).loss
    return loss


def exact(case: Case, inputs: Inputs) -> tuple[tuple[Tensor, ...], float]:
    """In float64: loss and gradients for infinitely many targets; standard error of the loss for
    as many as the plain formulation draws."""
    model = copy.deepcopy(inputs["model"]).double()
    patches = inputs["ids"].unflatten(1, (-1, PATCH_SIZE))
    hidden = plain.hidden_states(model, patches[:, :-1]).flatten(0, 1)
    with torch.no_grad():
        mean, log_std = plain.encode(model.ae_model.encoder, patches[:, 1:].flatten(0, 1))
    samples = plain.head(model.mlp_generator, hidden, inputs["noise"].double())
    loss = -energy_score(samples, mean, log_std).mean()
    gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in GRADIENTS])
    with torch.no_grad():
        distances = torch.stack([
            (samples - (mean + log_std.exp() * torch.randn_like(mean))).norm(dim=-1).mean(dim=0)
            for _ in range(TARGETS_FOR_VARIANCE)
        ])  # fmt: skip
    variance = 4.0 * float(distances.var(dim=0).sum()) / model.config.num_targets
    return (loss.detach(), *gradients), math.sqrt(variance) / len(mean)


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    return checks.largest_relative_error(outputs, exact[0], BOUND[case.dtype])


def check_in_law(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """Random targets: the loss against its mean. Under autocast, whose rounding is many standard
    errors, within rounding."""
    (loss, *_), error = exact
    if case.dtype == torch.bfloat16:
        return checks.largest_relative_error(outputs[:1], (loss,), BOUND[case.dtype])
    z = abs(float(outputs[0]) - float(loss)) / error
    return Check(z, checks.LARGEST_Z, checks.STANDARD_ERRORS)


def cost(case: Case) -> Cost:
    """Weights, gradients and both moments read and all but the gradients written once. Three passes
    of every matmul, one of the frozen encoder, whose first stage is looked up; attention's own
    products are left out.
    """
    name = str(case.shape["preset"])
    config, each = language_model_config(name), products(name)
    positions = case.size("B") * (case.size("L") // PATCH_SIZE - 1)
    head = each.head_position + config.num_samples * each.head_sample
    weights = each.backbone + each.head_position + each.head_sample
    weights += config.vocab_size * config.hidden_size
    operations = positions * (3 * (each.backbone + head) + each.encode)
    return Cost(7 * 4 * weights, 2 * operations, case.dtype)


register(
    Workload(
        name="lm-step",
        summary="training step of the language model: forward, backward, AdamW",
        settings={
            "small": (_setting("tiny", 3, 32, torch.float32),),
            "cpu": (
                _setting("demo", 12, 256, torch.float32),
                _setting("demo", 12, 256, torch.bfloat16),
            ),
            "cuda": (_setting("paper", 4, 8192, torch.bfloat16),),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(
            Variant("eager", "eager", training_step(plain_loss, GRADIENTS), check=check_in_law),
            Variant(
                "compiled",
                "compiled",
                lambda case: training_step(torch.compile(plain_loss, dynamic=False), GRADIENTS)(
                    case
                ),
                check=check_in_law,
            ),
            Variant("ours", "ours", training_step(package_loss, GRADIENTS)),
        ),
        exact=exact,
        check=check,
        cost=cost,
    )
)
