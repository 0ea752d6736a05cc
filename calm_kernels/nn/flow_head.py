"""The flow-matching head: an ordinary differential equation from noise to the next latent."""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels.nn.denoiser import DenoisingHead, TrainingDraws, normals_of

SOLVERS = ("midpoint", "euler")
DEFAULT_STEPS = 10


class FlowHead(DenoisingHead):
    """Samples of the next latent by flow matching along straight lines.

    With noise x_0 and target x_1, x_t = (1 - t) x_0 + t x_1; the network learns the velocity
    x_1 - x_0 given x_t, t ~ U(0, 1) and the hidden state, in mean squared error. A draw starts at
    a normal and follows the velocity from t = 0 to 1 in equal steps. Takes arguments as
    :class:`~calm_kernels.nn.EnergyHead` does; a draw is decided by D uniforms.

    Args:
        hidden_size: H.
        latent_size: D.
        num_blocks: blocks of the network.
        steps: of the solver.
        solver: ``"midpoint"`` (two evaluations a step) or ``"euler"`` (one).

    Source: Lipman et al., "Flow matching for generative modeling" (arXiv 2210.02747), the optimal
    transport path without a least noise; network as in the diffusion head. The solver and its
    number of steps are this package's choice.
    """

    def __init__(
        self,
        hidden_size: int,
        latent_size: int,
        num_blocks: int = 4,
        steps: int = DEFAULT_STEPS,
        solver: str = "midpoint",
    ) -> None:
        _checks.at_least("steps", steps, 1)
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}; got {solver!r}")
        super().__init__(hidden_size, latent_size, num_blocks, noise_size=latent_size)
        self.steps = steps
        self.solver = solver

    def sample(self, condition: Tensor, noise: Tensor) -> Tensor:
        x, step = normals_of(noise), 1.0 / self.steps

        def velocity(at: Tensor, time: float) -> Tensor:
            times = torch.full((1, 1), time, device=x.device)
            moved: Tensor = self.net(at, times, condition)
            return moved

        for i in range(self.steps):
            slope = velocity(x, i * step)
            if self.solver == "midpoint":
                slope = velocity(x + 0.5 * step * slope, (i + 0.5) * step)
            x = x + step * slope
        return x

    def errors(self, condition: Tensor, draws: TrainingDraws) -> Tensor:
        t = draws.times.unsqueeze(-1)
        x = (1 - t) * draws.noise + t * draws.targets
        velocity = self.net(x, draws.times, condition)
        squares: Tensor = (velocity - (draws.targets - draws.noise)).square()
        return squares.mean(dim=-1)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, solver={self.solver!r}"
