"""The generative heads of the language model: one way to build, train and draw from each."""

from __future__ import annotations

import math

from torch import Tensor

from calm_kernels.models.configuration import CalmConfig
from calm_kernels.nn import diffusion_head, flow_head
from calm_kernels.nn.denoiser import DenoisingHead
from calm_kernels.nn.diffusion_head import DiffusionHead
from calm_kernels.nn.energy import EnergyLoss
from calm_kernels.nn.energy_head import EnergyHead
from calm_kernels.nn.flow_head import FlowHead

Head = EnergyHead | DenoisingHead
"""Each maps (hidden, num_samples, noise or seed) to latents and has ``noise_size`` uniforms a
draw, so that generation and evaluation do not ask which one it is."""


def make_head(config: CalmConfig) -> Head:
    """The head that a configuration names."""
    sizes = (config.hidden_size, config.latent_size)
    blocks, steps = config.num_mlp_layers, config.sampling_steps
    if config.head_type == "flow":
        steps = steps or flow_head.DEFAULT_STEPS
        return FlowHead(*sizes, blocks, steps, config.flow_solver)
    if config.head_type == "diffusion":
        steps = steps or diffusion_head.DEFAULT_STEPS
        return DiffusionHead(*sizes, blocks, steps, config.noise_schedule)
    return EnergyHead(*sizes, config.noise_size, blocks)


def training_loss(
    head: Head,
    energy_loss: EnergyLoss,
    num_samples: int,
    hidden: Tensor,
    mean: Tensor,
    log_std: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    first_position: int = 0,
) -> Tensor:
    """The loss of a head against the posterior of the next patch, averaged over positions.

    Args:
        energy_loss: of the energy head's samples; the other heads have their own loss.
        num_samples: N: samples, or draws of target, noise and time.
        hidden: [*, H].
        mean, log_std: [*, D].
        mask: bool [*], which positions count, or None for all.
        seed: of everything random.
        first_position: where the positions begin in a larger batch with one seed. What is drawn is
            what the larger batch draws there; only Monte Carlo targets are merely independent.
    """
    if isinstance(head, DenoisingHead):
        return head.loss(
            hidden, mean, log_std, num_samples=num_samples, mask=mask, seed=seed,
            first_position=first_position,
        )  # fmt: skip
    positions = hidden.shape[:-1]
    noise = head.draw_noise(
        math.prod(positions), num_samples, hidden.device, seed, first_position
    ).reshape(num_samples, *positions, -1)
    samples = head(hidden, num_samples, noise=noise)
    loss: Tensor = energy_loss(samples, mean, log_std, mask=mask, seed=seed + first_position)
    return loss
