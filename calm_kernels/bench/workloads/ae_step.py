"""``ae-step``: one whole training step of the autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calm_kernels.bench import checks, plain
from calm_kernels.bench.models import (
    PATCH_SIZE,
    autoencoder_config,
    exact_step,
    make_autoencoder,
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
from calm_kernels.models import Autoencoder, AutoencoderConfig
from calm_kernels.ops.random import philox_normal, philox_uniform
from calm_kernels.reference.philox import Stream

GRADIENTS = ("encoder.embed_tokens.weight", "decoder.expand_layer.weight")
BOUND = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Relative error of loss and gradients after a whole network forward and back, in float32 or under
autocast. The dropped mass of the cross entropy's gradient comes on top."""


def _setting(name: str, batch: int, length: int, dtype: torch.dtype) -> Setting:
    return Setting({"preset": name, "B": batch, "L": length}, dtype)


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    return {
        "model": make_autoencoder(str(case.shape["preset"]), generator, torch.float32, case.device)
    }


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    """Tokens and a seed, and the seed's random numbers as the plain formulation takes them."""
    config: AutoencoderConfig = state["model"].config
    shape = (case.size("B"), case.size("L"))
    ids = torch.randint(0, config.vocab_size, shape, generator=generator, device=case.device)
    seed = torch.randint(0, 2**62, (1,), generator=generator, device=case.device)
    rows = torch.arange(ids.numel() // PATCH_SIZE, device=case.device)
    size, rate = config.latent_size, config.ae_dropout
    first = size + -size % 4
    return {
        "ids": ids,
        "seed": seed,
        "kept_tokens": philox_uniform(seed, rows, PATCH_SIZE, Stream.TOKEN_DROPOUT) >= rate,
        "noise": philox_normal(seed, rows, size, Stream.LATENT),
        "kept_latents": philox_uniform(seed, rows, size, Stream.LATENT, first=first) >= rate,
    }


def plain_loss(model: Autoencoder, inputs: Inputs) -> Tensor:
    """Every token through both first stages' blocks, all logits; random numbers for free."""
    ids = inputs["ids"].reshape(-1, PATCH_SIZE)
    random = (inputs[name] for name in ("kept_tokens", "noise", "kept_latents"))
    return plain.autoencoder_loss(model, ids, *random)


def package_loss(model: Autoencoder, inputs: Inputs) -> Tensor:
    loss: Tensor = model(inputs["ids"], seed=inputs["seed"]).loss
    return loss


def exact(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    return exact_step(plain_loss, GRADIENTS, inputs)


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    bound = BOUND[case.dtype] + inputs["model"].config.drop_mass
    return checks.largest_relative_error(outputs, exact, bound)


def cost(case: Case) -> Cost:
    """Weights, gradients and both moments read and all but the gradients written once. Three passes
    of every matmul; the encoder's first stage once a token of the vocabulary, if those are fewer.
    """
    name = str(case.shape["preset"])
    config, each = autoencoder_config(name), products(name)
    tokens = case.size("B") * case.size("L")
    squeeze = PATCH_SIZE * config.hidden_size**2
    per_patch = each.encode + squeeze + each.decode_patch
    weights = each.block + per_patch + each.decode_token + each.vocabulary
    operations = min(tokens, config.vocab_size) * each.block
    operations += tokens * (each.decode_token + each.vocabulary) + tokens // PATCH_SIZE * per_patch
    return Cost(7 * 4 * weights, 6 * operations, case.dtype)


register(
    Workload(
        name="ae-step",
        summary="training step of the autoencoder: forward, backward, AdamW",
        settings={
            "small": (_setting("tiny", 3, 16, torch.float32),),
            "cpu": (
                _setting("demo", 16, 128, torch.float32),
                _setting("demo", 16, 128, torch.bfloat16),
            ),
            "cuda": (_setting("paper", 8, 2048, torch.bfloat16),),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(
            Variant("eager", "eager", training_step(plain_loss, GRADIENTS)),
            Variant(
                "compiled",
                "compiled",
                lambda case: training_step(torch.compile(plain_loss, dynamic=False), GRADIENTS)(
                    case
                ),
            ),
            Variant("ours", "ours", training_step(package_loss, GRADIENTS)),
        ),
        exact=exact,
        check=check,
        cost=cost,
    )
)
