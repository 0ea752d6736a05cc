"""The energy head: uniform noise and a hidden state to a sample of the next latent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from calm_kernels import _checks
from calm_kernels._modules import computes_alone
from calm_kernels.ops.energy_head import (
    energy_head_block,
    energy_head_first_block,
    why_not_first_block,
)
from calm_kernels.ops.energy_head_output import energy_head_output, why_not_output
from calm_kernels.ops.random import philox_uniform
from calm_kernels.reference.philox import Stream

_NORM_EPS = 1e-6


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


_PLAIN = (nn.LayerNorm, nn.Linear, nn.Sequential, nn.SiLU, ZeroLinear)


def _weights(layers: Iterable[Any]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]


def _are_plain(*layers: nn.Module) -> bool:
    """Whether layers are as they are made here, and their weights all that they do."""

    def is_plain(layer: nn.Module) -> bool:
        if isinstance(layer, nn.LayerNorm) and layer.eps != _NORM_EPS:
            return False
        return type(layer) in _PLAIN and getattr(layer, "bias", layer) is not None

    return computes_alone(*layers) and all(is_plain(layer) for layer in layers)


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
        return energy_head_block(e, condition, *_weights(self.layers()), eps=_NORM_EPS)

    def layers(self) -> list[Any]:
        """Those with weights, in the order of :func:`energy_head_block`."""
        return [self.in_ln, *list(self.linears)[::2], self.down_proj]


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
        if _are_plain(self.in_ln, self.linears, *self.linears):
            layers: list[Any] = [self.in_ln, *list(self.linears)[::2]]
            weights = _weights(layers)
            if why_not_output(weights) is None:
                return energy_head_output(e, *weights, eps=_NORM_EPS)
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
        latents: Tensor = self.final_layer(self._through_blocks(noise, condition))
        return latents.transpose(0, 1).reshape(num_samples, *positions, latents.shape[-1])

    def _through_blocks(self, noise: Tensor, condition: Tensor) -> Tensor:
        """noise [P, N, E], condition [P, H] -> what the last layers read, [P, N, H]."""
        blocks: list[Any] = list(self.mlp_blocks)
        e = self._first_folded(noise, condition)
        if e is None:
            e = self.norm_noise(self.noise_embd(noise))
        else:
            blocks = blocks[1:]
        for block in blocks:
            e = block(e, condition)
        return e

    def _first_folded(self, noise: Tensor, condition: Tensor) -> Tensor | None:
        """What the first block makes of noise, if ``energy_head_first_block`` serves."""
        if not self.mlp_blocks:
            return None
        block: Any = self.mlp_blocks[0]
        layers = (self.noise_embd, self.norm_noise, *block.layers())
        if not computes_alone(block) or not _are_plain(block.linears, *block.linears, *layers):
            return None
        weights = _weights(layers)
        if why_not_first_block(noise, weights) is not None:
            return None
        return energy_head_first_block(noise, condition, weights, eps=_NORM_EPS)
