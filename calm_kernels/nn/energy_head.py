"""The energy head: uniform noise and a hidden state to a sample of the next latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calm_kernels import _checks
from calm_kernels.ops.energy_head import energy_head_block
from calm_kernels.ops.random import philox_uniform
from calm_kernels.reference.philox import Stream

_NORM_EPS = 1e-6


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class EnergyHeadBlock(nn.Module):
    """e + down(silu(gate) * up) with (gate, up) = MLP(cat(LayerNorm(e), c)).

    Parameters: ``in_ln``, ``linears.{0,2,4}``, ``down_proj``.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.linears = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, 2 * hidden_size),
        )
        self.down_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, e: Tensor, condition: Tensor) -> Tensor:
        """e [P, N, H], condition [P, H] -> [P, N, H]; see :func:`energy_head_block`."""
        layers = (self.in_ln, *list(self.linears)[::2], self.down_proj)
        weights: list[Any] = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        return energy_head_block(e, condition, *weights, eps=_NORM_EPS)


class EnergyHeadOutput(nn.Module):
    """LayerNorm and a two-layer MLP to the latent. Parameters: ``in_ln``, ``linears.{0,2}``."""

    def __init__(self, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.linears = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), ZeroLinear(hidden_size, latent_size)
        )

    def forward(self, e: Tensor) -> Tensor:
        """e [*, H] -> [*, D]"""
        latent: Tensor = self.linears(self.in_ln(e))
        return latent


class EnergyHead(nn.Module):
    """Samples of the next latent, given hidden states: an implicit generator.

    Noise, uniform in (-1/2, 1/2), goes through a stack of blocks that each read the hidden state.
    What depends on the hidden state alone is computed once per position and shared by all samples.
    Parameters: ``noise_embd``, ``hidden_embd``, ``norm_noise``, ``norm_hidden``,
    ``mlp_blocks.{i}``, ``final_layer``. The last layer starts at zero, so every sample does.

    Args:
        hidden_size: H.
        latent_size: D.
        noise_size: width of the noise vector.
        num_blocks: blocks in the stack.

    Source: arXiv 2510.27688, section 3; the shared conditioning is this package's.
    """

    def __init__(
        self, hidden_size: int, latent_size: int, noise_size: int = 64, num_blocks: int = 4
    ) -> None:
        super().__init__()
        self.noise_size = noise_size
        self.noise_embd = nn.Linear(noise_size, hidden_size)
        self.hidden_embd = nn.Linear(hidden_size, hidden_size)
        self.norm_noise = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.norm_hidden = nn.LayerNorm(hidden_size, eps=_NORM_EPS)
        self.mlp_blocks = nn.ModuleList(EnergyHeadBlock(hidden_size) for _ in range(num_blocks))
        self.final_layer = EnergyHeadOutput(hidden_size, latent_size)

    def draw_noise(
        self,
        num_positions: int,
        num_samples: int,
        device: torch.device,
        seed: int | Tensor | None,
        first_position: int = 0,
    ) -> Tensor:
        """Uniform noise, float32 [N, P, noise_size]; sample n of position p: Philox row p*N + n.

        Positions are counted from ``first_position``.
        """
        first, count = first_position * num_samples, num_positions * num_samples
        rows = torch.arange(first, first + count, device=device)
        noise = philox_uniform(seed, rows, self.noise_size, Stream.HEAD_NOISE) - 0.5
        return noise.reshape(num_positions, num_samples, -1).transpose(0, 1)

    def forward(
        self,
        hidden: Tensor,
        num_samples: int,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Draw ``num_samples`` latents for every hidden state.

        Args:
            hidden: floating [*, H].
            num_samples: N >= 1.
            noise: floating [N, *, noise_size] to use in place of random noise.
            seed: of the noise: int, int64 tensor of one element, or None to draw one from torch's
                generator. Unused when ``noise`` is given.

        Returns:
            [N, *, D], differentiable in ``hidden``, ``noise`` and the parameters.

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape, ``num_samples`` below 1.
        """
        _checks.tensor("hidden", hidden, _checks.FLOAT_DTYPES, ("*", self.hidden_embd.in_features))
        _checks.at_least("num_samples", num_samples, 1)
        positions = hidden.shape[:-1]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if noise is None:
            noise = self.draw_noise(hidden.shape[0], num_samples, hidden.device, seed)
        else:
            expected = (num_samples, *positions, self.noise_size)
            _checks.tensor("noise", noise, _checks.FLOAT_DTYPES, expected)
            noise = noise.reshape(num_samples, -1, self.noise_size)
        # The samples of a position lie together from here on: it shares its condition with them.
        noise = noise.transpose(0, 1).to(self.noise_embd.weight.dtype)
        condition = self.norm_hidden(self.hidden_embd(hidden))
        e = self.norm_noise(self.noise_embd(noise))
        for block in self.mlp_blocks:
            e = block(e, condition)
        latents: Tensor = self.final_layer(e)
        return latents.transpose(0, 1).reshape(num_samples, *positions, latents.shape[-1])
