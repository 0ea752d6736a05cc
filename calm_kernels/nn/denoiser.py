"""The network and the random numbers that the flow and the diffusion head share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calm_kernels import _checks
from calm_kernels.nn.energy_head import ZeroLinear
from calm_kernels.ops.random import philox_normal, philox_uniform
from calm_kernels.reference.philox import Stream

TIME_FREQUENCIES = 256
TIME_SCALE = 1000.0
"""Times in [0, 1] are embedded as if they were numbers of 1000 steps."""
_SLOWEST = 1e-4
_NORM_EPS = 1e-6
_LARGEST_UNIFORM = 1.0 - 2.0**-23


def embed_times(times: Tensor) -> Tensor:
    """Cosines and sines of times [*] at geometric frequencies: float32 [*, 256]."""
    half = TIME_FREQUENCIES // 2
    exponents = torch.arange(half, device=times.device, dtype=torch.float32) / half
    angles = TIME_SCALE * times.float().unsqueeze(-1) * _SLOWEST**exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class DenoiserBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), the three made of the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = ZeroLinear(width, 3 * width)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """x [P, N, W]; activated, silu of the condition, [P, N or 1, W]."""
        shift, scale, gate = self.modulation(activated).chunk(3, dim=-1)
        step: Tensor = self.mlp(_modulated(self.in_ln(x), shift, scale))
        result: Tensor = x + gate * step
        return result


class Denoiser(nn.Module):
    """A residual MLP over noisy latents, modulated by their time and by the hidden state.

    The residual steps and the output start at zero. Parameters: ``input_proj``, ``time_embed``,
    ``cond_embed``, ``blocks.{i}``, ``norm_out``, ``modulation_out``, ``output_proj``.

    Args:
        hidden_size: H, also the width of the network.
        latent_size: D.
        num_blocks: residual blocks.

    Source: Li et al., "Autoregressive image generation without vector quantization" (MAR,
    arXiv 2406.11838), appendix: its denoising MLP.
    """

    def __init__(self, hidden_size: int, latent_size: int, num_blocks: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(latent_size, hidden_size)
        self.time_embed = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.cond_embed = nn.Linear(hidden_size, hidden_size)
        self.blocks = nn.ModuleList(DenoiserBlock(hidden_size) for _ in range(num_blocks))
        self.norm_out = nn.LayerNorm(hidden_size, eps=_NORM_EPS, elementwise_affine=False)
        self.modulation_out = ZeroLinear(hidden_size, 2 * hidden_size)
        self.output_proj = ZeroLinear(hidden_size, latent_size)

    def condition(self, hidden: Tensor) -> Tensor:
        """What depends on the position alone: hidden [P, H] -> [P, 1, H]."""
        embedded: Tensor = self.cond_embed(hidden.to(self.cond_embed.weight.dtype))
        return embedded.unsqueeze(1)

    def forward(self, latents: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """latents [P, N, D], times in [0, 1] of shape [P, N] or [1, 1], condition [P, 1, H]
        -> float32 (float64 for a float64 network) [P, N, D]."""
        dtype = self.input_proj.weight.dtype
        activated = F.silu(condition + self.time_embed(embed_times(times).to(dtype)))
        x = self.input_proj(latents.to(dtype))
        for block in self.blocks:
            x = block(x, activated)
        shift, scale = self.modulation_out(activated).chunk(2, dim=-1)
        result: Tensor = self.output_proj(_modulated(self.norm_out(x), shift, scale))
        return result if result.dtype == torch.float64 else result.float()


def normals_of(uniforms: Tensor) -> Tensor:
    """Uniforms in (-1/2, 1/2) to standard normals, element by element, in float32 at least."""
    wide = uniforms if uniforms.dtype == torch.float64 else uniforms.float()
    bounded = (2.0 * wide).clamp(-_LARGEST_UNIFORM, _LARGEST_UNIFORM)
    return math.sqrt(2.0) * torch.erfinv(bounded)


@dataclass(frozen=True)
class TrainingDraws:
    """What a position's loss is averaged over, each [P, N, ...]."""

    targets: Tensor
    """draws of the posterior, [P, N, D]"""
    noise: Tensor
    """standard normals, [P, N, D]"""
    times: Tensor
    """uniforms in (0, 1), [P, N]"""


def training_draws(
    mean: Tensor,
    log_std: Tensor,
    num_samples: int,
    seed: int | Tensor | None,
    first_position: int = 0,
) -> TrainingDraws:
    """N draws for each of P positions from mean, log_std [P, D], in float32 at least.

    Targets use the stream of the energy loss's targets (row = position), noise and times that of
    the head's noise (row = position * N + draw). Positions are counted from ``first_position``.
    """
    positions, size = mean.shape
    seed = _checks.seed_tensor(seed, mean.device)
    own = torch.arange(first_position, first_position + positions, device=mean.device)
    first, count = first_position * num_samples, positions * num_samples
    rows = torch.arange(first, first + count, device=mean.device)
    spread = philox_normal(seed, own, num_samples * size, Stream.ENERGY_TARGETS)
    noise = philox_normal(seed, rows, size, Stream.HEAD_NOISE)
    # The next whole block of the row, so that a time shares no word with the noise.
    after = (size + 3) // 4 * 4
    times = philox_uniform(seed, rows, 1, Stream.HEAD_NOISE, first=after)
    if mean.dtype != torch.float64:
        mean, log_std = mean.float(), log_std.float()
    spread = spread.reshape(positions, num_samples, size)
    return TrainingDraws(
        mean.unsqueeze(1) + log_std.exp().unsqueeze(1) * spread,
        noise.reshape(positions, num_samples, size),
        times.reshape(positions, num_samples),
    )


class DenoisingHead(nn.Module):
    """What the flow and the diffusion head have in common: arguments, noise, the loss's average.

    Args:
        hidden_size, latent_size, num_blocks: of the :class:`Denoiser`.
        noise_size: uniforms that decide a draw.
    """

    def __init__(
        self, hidden_size: int, latent_size: int, num_blocks: int, noise_size: int
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.latent_size = latent_size
        self.noise_size = noise_size
        self.net = Denoiser(hidden_size, latent_size, num_blocks)

    def draw_noise(
        self, num_positions: int, num_samples: int, device: torch.device, seed: int | Tensor | None
    ) -> Tensor:
        """Uniform noise, float32 [N, P, noise_size]; sample n of position p: Philox row p*N + n."""
        rows = torch.arange(num_positions * num_samples, device=device)
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
            noise: floating [N, *, noise_size] in (-1/2, 1/2) to use in place of random noise.
            seed: of the noise: int, int64 tensor of one element, or None to draw one from torch's
                generator. Unused when ``noise`` is given.

        Returns:
            float32 [N, *, D] (float64 for a float64 network).

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape, ``num_samples`` below 1.
        """
        _checks.tensor("hidden", hidden, _checks.FLOAT_DTYPES, ("*", self.hidden_size))
        _checks.at_least("num_samples", num_samples, 1)
        positions = hidden.shape[:-1]
        hidden = hidden.reshape(-1, self.hidden_size)
        if noise is None:
            noise = self.draw_noise(hidden.shape[0], num_samples, hidden.device, seed)
        else:
            expected = (num_samples, *positions, self.noise_size)
            _checks.tensor("noise", noise, _checks.FLOAT_DTYPES, expected)
            noise = noise.reshape(num_samples, -1, self.noise_size)
        latents = self.sample(self.net.condition(hidden), noise.transpose(0, 1))
        return latents.transpose(0, 1).reshape(num_samples, *positions, -1)

    def loss(
        self,
        hidden: Tensor,
        mean: Tensor,
        log_std: Tensor,
        *,
        num_samples: int,
        mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        first_position: int = 0,
    ) -> Tensor:
        """The training loss against Gaussian targets, averaged over positions and draws.

        Args:
            hidden: floating [*, H].
            mean, log_std: floating [*, D]: the target's law, as the energy loss takes it.
            num_samples: draws of target, noise and time for each position, at least 1.
            mask: bool [*], True where a position counts; what lies elsewhere touches nothing.
            seed: int, int64 tensor of one element, or None to draw one from torch's generator.
            first_position: where the positions begin in a larger batch with one seed.

        Returns:
            scalar float32 (float64 for float64); 0 if no position counts.

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape or device, ``num_samples`` below 1.
        """
        _checks.tensor("hidden", hidden, _checks.FLOAT_DTYPES, ("*", self.hidden_size))
        _checks.at_least("num_samples", num_samples, 1)
        positions = hidden.shape[:-1]
        for name, value in (("mean", mean), ("log_std", log_std)):
            _checks.tensor(name, value, _checks.FLOAT_DTYPES, (*positions, self.latent_size))
        _checks.same_device(hidden=hidden, mean=mean, log_std=log_std, mask=mask)
        if mask is not None:
            _checks.tensor("mask", mask, (torch.bool,), positions)
            outside = ~mask.unsqueeze(-1)
            hidden, mean, log_std = (t.masked_fill(outside, 0.0) for t in (hidden, mean, log_std))
        flat = [t.reshape(-1, t.shape[-1]) for t in (hidden, mean, log_std)]
        draws = training_draws(flat[1], flat[2], num_samples, seed, first_position)
        error = self.errors(self.net.condition(flat[0]), draws).mean(dim=1)
        if mask is None:
            return error.sum() / max(error.numel(), 1)
        counted = mask.reshape(-1)
        return torch.where(counted, error, 0.0).sum() / counted.sum().clamp_min(1)

    def sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Latents [P, N, D] of a condition [P, 1, H] and uniform noise [P, N, noise_size]."""
        raise NotImplementedError

    def errors(self, condition: Tensor, draws: TrainingDraws) -> Tensor:
        """The loss of every draw, [P, N]."""
        raise NotImplementedError
