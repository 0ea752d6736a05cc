"""Models with random weights, of the sizes of the presets, and training steps of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm_kernels.bench.parameters import draw_parameters
from calm_kernels.bench.workload import Call, Case, Inputs, Outputs
from calm_kernels.models import Autoencoder, AutoencoderConfig, CalmConfig, EnergyTransformer
from calm_kernels.training.presets import preset

PATCH_SIZE = 4
VOCAB_SIZES = {"tiny": 258, "demo": 258, "paper": 128257}
POSTERIOR_STD = 0.3
"""About what the posteriors of a trained autoencoder have, in every dimension."""

Loss = Callable[[Any, Inputs], Tensor]


def autoencoder_config(name: str) -> AutoencoderConfig:
    """Sizes of a preset's autoencoder."""
    sizes = preset(name).autoencoder
    return AutoencoderConfig(
        vocab_size=VOCAB_SIZES[name],
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        latent_size=sizes.latent_size,
        patch_size=PATCH_SIZE,
    )


def language_model_config(name: str) -> CalmConfig:
    """Sizes of a preset's language model."""
    sizes = preset(name).energy
    return CalmConfig(
        vocab_size=VOCAB_SIZES[name],
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_mlp_layers=sizes.head_blocks,
        noise_size=sizes.noise_size,
        num_samples=sizes.num_samples,
        num_targets=sizes.num_targets,
        latent_size=preset(name).autoencoder.latent_size,
        patch_size=PATCH_SIZE,
    )


def make_autoencoder(
    name: str, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Autoencoder:
    """A preset's autoencoder; its posteriors are about as wide as a trained one's."""
    config = autoencoder_config(name)
    model = draw_parameters(Autoencoder(config), generator, dtype, device)
    last = model.encoder.hidden_to_latent
    with torch.no_grad():
        last.weight[config.latent_size :] *= 0.1
        last.bias[config.latent_size :] = math.log(POSTERIOR_STD)
    return model


def make_language_model(
    name: str, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> EnergyTransformer:
    """A preset's language model, with its autoencoder."""
    autoencoder = make_autoencoder(name, generator, dtype, device)
    model = EnergyTransformer(language_model_config(name), autoencoder=autoencoder)
    for module in (model.embed_proj, model.transformer, model.mlp_generator):
        draw_parameters(module, generator, dtype, device)
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return model


@dataclass(frozen=True)
class Products:
    """Multiplications that a model cannot do without; also its weights, tables left out."""

    encode: int
    """a patch, the first stage looked up"""
    decode_patch: int
    """a latent, up to the expansion"""
    decode_token: int
    """a token, without the head"""
    vocabulary: int
    """a token's logits; entries of the table of embeddings"""
    block: int
    """a token in the encoder's first stage"""
    backbone: int
    """a position, without attention's own"""
    head_position: int
    """what all samples of a position share"""
    head_sample: int


def products(name: str) -> Products:
    """Those of a preset's models."""
    ae, lm = autoencoder_config(name), language_model_config(name)
    hidden, width, noise = ae.hidden_size, lm.hidden_size, lm.noise_size
    block = 3 * hidden * ae.intermediate_size
    square = width * width
    layer = 4 * square + 3 * width * lm.intermediate_size
    return Products(
        encode=block + 2 * hidden * ae.latent_size,
        decode_patch=block + hidden * (ae.latent_size + PATCH_SIZE * hidden),
        decode_token=block,
        vocabulary=hidden * ae.vocab_size,
        block=block,
        backbone=lm.num_hidden_layers * layer + (2 * PATCH_SIZE + 2) * square,
        head_position=(1 + lm.num_mlp_layers) * square,
        head_sample=(1 + 5 * lm.num_mlp_layers) * square + width * (noise + lm.latent_size),
    )


def training_step(loss: Loss, names: tuple[str, ...]) -> Callable[[Case], Call]:
    """Forward, backward and AdamW; with bfloat16 under autocast, weights in float32.

    Every variant trains its own copy of the input ``model``. A call returns the loss and the
    gradients of some parameters by name, from before the update.
    """

    def prepare(case: Case) -> Call:
        trained: list[tuple[Any, torch.optim.Optimizer]] = []

        def call(inputs: Inputs) -> Outputs:
            if not trained:
                model = copy.deepcopy(inputs["model"]).train()
                parameters = [p for p in model.parameters() if p.requires_grad]
                trained.append((model, torch.optim.AdamW(parameters, lr=1e-4, fused=True)))
            model, optimizer = trained[0]
            optimizer.zero_grad()
            mixed = case.dtype == torch.bfloat16
            with torch.autocast(case.device.type, torch.bfloat16, enabled=mixed):
                value = loss(model, inputs)
            value.backward()
            gradients = [model.get_parameter(name).grad.clone() for name in names]
            optimizer.step()
            return (value.detach(), *gradients)

        return call

    return prepare


def exact_step(loss: Loss, names: tuple[str, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    """Loss and gradients of a formulation in float64."""
    model = copy.deepcopy(inputs["model"]).double().train()
    value = loss(model, inputs)
    parameters = [model.get_parameter(name) for name in names]
    return (value.detach(), *torch.autograd.grad(value, parameters))
