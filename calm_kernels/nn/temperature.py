"""Temperature sampling as a layer: one call shape for both methods."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from calm_kernels.ops.temperature_sampling import (
    DEFAULT_MAX_DRAWS,
    Draw,
    batch_temperature_sample,
    exact_temperature_sample,
)

METHODS = ("batch", "exact")


class TemperatureSampler(nn.Module):
    """Draws one patch per sequence at a temperature from a sampler of patches.

    Args:
        temperature: T in (0, 1], or a tensor of one temperature per sequence.
        method: ``"batch"``, a vote among ``num_candidates`` draws (fixed cost, biased), or
            ``"exact"`` (exactly P_T, cost depends on the law).
        num_candidates: draws per sequence of the batch method.
        round_size, num_rounds, max_draws: as :func:`calm_kernels.exact_temperature_sample`.

    Raises:
        ValueError: unknown method. Everything else is checked by the call.
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        method: Literal["batch", "exact"] = "batch",
        *,
        num_candidates: int = 200,
        round_size: int | None = None,
        num_rounds: int | None = None,
        max_draws: int = DEFAULT_MAX_DRAWS,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
        self.temperature = temperature
        self.method = method
        self.num_candidates = num_candidates
        self.round_size = round_size
        self.num_rounds = num_rounds
        self.max_draws = max_draws

    def forward(
        self,
        draw: Draw,
        batch_size: int,
        *,
        seed: int | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample.

        Args:
            draw: ``draw(active_rows, count)`` returns draws [A, count, K] for the sequences
                ``active_rows`` (int64 [A]).
            batch_size: number of sequences B.
            seed: int, int64 tensor of one element, or None to draw one from torch's generator.
            device: where the sequences live; None for the CPU, or that of a tensor temperature
                or seed.

        Returns:
            tokens [B, K]; draws consumed, int64 [B]; accepted, bool [B] (all True with "batch").
        """
        if self.method == "exact":
            return exact_temperature_sample(
                draw,
                batch_size,
                self.temperature,
                round_size=self.round_size,
                num_rounds=self.num_rounds,
                max_draws=self.max_draws,
                seed=seed,
                device=device,
            )
        if device is None:
            given = next((t for t in (self.temperature, seed) if isinstance(t, Tensor)), None)
            device = torch.device("cpu") if given is None else given.device
        rows = torch.arange(batch_size, device=device)
        candidates = draw(rows, self.num_candidates)
        tokens = batch_temperature_sample(candidates, self.temperature, seed=seed)
        num_draws = torch.full_like(rows, candidates.shape[1])
        return tokens, num_draws, torch.ones_like(rows, dtype=torch.bool)

    def extra_repr(self) -> str:
        text = f"temperature={self.temperature}, method={self.method!r}"
        if self.method == "batch":
            return f"{text}, num_candidates={self.num_candidates}"
        rounds = f"round_size={self.round_size}, num_rounds={self.num_rounds}"
        return f"{text}, {rounds}, max_draws={self.max_draws}"
