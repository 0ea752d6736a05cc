"""The diffusion head: noise is taken off the next latent step by step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels.nn.denoiser import DenoisingHead, TrainingDraws, normals_of
from calm_kernels.ops.random import philox_normal
from calm_kernels.reference.philox import Stream

SCHEDULES = ("cosine", "linear")
DEFAULT_STEPS = 100
TRAINING_STEPS = 1000
_LARGEST_BETA = 0.999
_COSINE_OFFSET = 0.008
_LINEAR_BETAS = (1e-4, 0.02)
_WORD_BITS = 23
_ROW_NUMBERS = 2
_STEP_SEED = 0x0D1FF


def signal_powers(schedule: str, steps: int) -> Tensor:
    """The share of the signal's power after each step of noise, float64 [steps], falling.

    ``"cosine"`` is that of Nichol and Dhariwal (arXiv 2102.09672), ``"linear"`` that of Ho et al.
    (arXiv 2006.11239) with its variances scaled to the number of steps.
    """
    if schedule == "cosine":
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        cosines = torch.cos((times + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2).square()
        betas = (1 - cosines[1:] / cosines[:-1]).clamp(max=_LARGEST_BETA)
    elif schedule == "linear":
        scale = TRAINING_STEPS / steps
        first, last = (scale * beta for beta in _LINEAR_BETAS)
        betas = torch.linspace(first, last, steps, dtype=torch.float64).clamp(max=_LARGEST_BETA)
    else:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}; got {schedule!r}")
    return torch.cumprod(1 - betas, dim=0)


class DiffusionHead(DenoisingHead):
    """Samples of the next latent by denoising diffusion.

    With signal power a_t, x_t = sqrt(a_t) x + sqrt(1 - a_t) noise. The loss is the mean squared
    error of the noise that the network finds in x_t, t uniform among 1000 steps. What the network
    gives is v = sqrt(a_t) noise - sqrt(1 - a_t) x, from which noise and x follow without a
    division: the error of the noise is sqrt(a_t) times that of v. A draw goes through evenly
    spaced steps, at each of which the posterior of x_{t-1} given x_t and x is sampled.

    Takes arguments as :class:`~calm_kernels.nn.EnergyHead` does. A draw is decided by D + 2
    uniforms: the first D make x_T, the others name the Philox row of the normals of later steps.

    Args:
        hidden_size: H.
        latent_size: D.
        num_blocks: blocks of the network.
        steps: of sampling, 1 to ``training_steps``.
        schedule: ``"cosine"`` or ``"linear"``, see :func:`signal_powers`.
        training_steps: of the schedule.

    Source: Li et al. (MAR, arXiv 2406.11838): network, cosine schedule of 1000 steps, 100 steps of
    sampling, no clipping. Departures: the network's output is v, and the variance of a step is not
    learned but that of the posterior, which leaves out what is unknown of x: 100 steps draw
    N(m, 0.3^2) with 6% too little spread, 1000 steps with less than 1%.
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        num_blocks: int = 4,
        steps: int = DEFAULT_STEPS,
        schedule: str = "cosine",
        training_steps: int = TRAINING_STEPS,
    ) -> None:
        _checks.at_least("training_steps", training_steps, 2)
        _checks.in_range("steps", steps, 1, training_steps)
        super().__init__(hidden_size, latent_size, num_blocks, latent_size + _ROW_NUMBERS)
        self.steps = steps
        self.schedule = schedule
        self.training_steps = training_steps
        signal_powers(schedule, training_steps)

    def sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        size, device = self.latent_size, noise.device
        powers = signal_powers(self.schedule, self.training_steps)
        chosen = torch.linspace(0, self.training_steps - 1, self.steps, dtype=torch.float64)
        if self.steps == 1:
            chosen = chosen + (self.training_steps - 1)
        numbers = chosen.round().long().tolist()
        x = normals_of(noise[..., :size])
        rows = _rows_of(noise[..., size:])
        seed = torch.full((1,), _STEP_SEED, dtype=torch.int64, device=device)
        blocks = (size + 3) // 4 * 4
        for i in range(self.steps - 1, -1, -1):
            power = float(powers[numbers[i]])
            previous = float(powers[numbers[i - 1]]) if i > 0 else 1.0
            times = torch.full((1, 1), numbers[i] / self.training_steps, device=device)
            v: Tensor = self.net(x, times, condition)
            clean = math.sqrt(power) * x - math.sqrt(1 - power) * v
            if i == 0:
                return clean
            kept = power / previous
            x = (
                math.sqrt(previous) * (1 - kept) / (1 - power) * clean
                + math.sqrt(kept) * (1 - previous) / (1 - power) * x
            )
            fresh = philox_normal(seed, rows, size, Stream.HEAD_NOISE, first=i * blocks)
            spread = math.sqrt((1 - kept) * (1 - previous) / (1 - power))
            x = x + spread * fresh.reshape(x.shape)
        return x

    def errors(self, condition: Tensor, draws: TrainingDraws) -> Tensor:
        device = draws.times.device
        powers = signal_powers(self.schedule, self.training_steps).to(device, draws.noise.dtype)
        numbers = (draws.times * self.training_steps).long().clamp_max(self.training_steps - 1)
        power = powers[numbers].unsqueeze(-1)
        signal, spread = power.sqrt(), (1 - power).sqrt()
        x = signal * draws.targets + spread * draws.noise
        v = self.net(x, numbers / self.training_steps, condition)
        exact = signal * draws.noise - spread * draws.targets
        squares: Tensor = (signal * (v - exact)).square()
        return squares.mean(dim=-1)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, schedule={self.schedule!r}"


def _rows_of(uniforms: Tensor) -> Tensor:
    """Row numbers, int64 [P * N], from two uniforms of 23 bits each."""
    words = ((uniforms.float() + 0.5) * 2.0**_WORD_BITS).long().reshape(-1, _ROW_NUMBERS)
    return (words[:, 0] << _WORD_BITS) + words[:, 1]
