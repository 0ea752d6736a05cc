"""The energy loss of CALM as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calm_kernels import _checks
from calm_kernels.ops.energy_score import Estimator, energy_score


class EnergyLoss(nn.Module):
    """Negative energy score, averaged over positions.

    Args:
        alpha: exponent of the distance, in (0, 2).
        estimator: ``"closed_form"`` or ``"monte_carlo"``, see :func:`calm_kernels.energy_score`.
        num_targets: draws of ``"monte_carlo"``.
    """

    def __init__(
        self, alpha: float = 1.0, estimator: Estimator = "closed_form", num_targets: int = 100
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.estimator: Estimator = estimator
        self.num_targets = num_targets

    def forward(
        self,
        samples: Tensor,
        mean: Tensor,
        log_std: Tensor,
        mask: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar: float32 (float64 for float64).

        Args:
            samples: [N, *, D], N >= 2 draws of the model.
            mean, log_std: [*, D], the Gaussian target.
            mask: bool [*], True where a position counts. What lies elsewhere, NaN included, touches
                neither the loss nor any gradient.
            seed: of ``"monte_carlo"``, see :func:`calm_kernels.energy_score`.

        Without any position that counts the loss is 0.

        Raises:
            TypeError, ValueError: as :func:`calm_kernels.energy_score`; mask of another shape,
                dtype or device.
        """
        if mask is not None:
            _check_mask(mask, mean)
            outside = ~mask.unsqueeze(-1)
            samples = samples.masked_fill(outside, 0.0)
            mean, log_std = mean.masked_fill(outside, 0.0), log_std.masked_fill(outside, 0.0)
        score = energy_score(
            samples,
            mean,
            log_std,
            alpha=self.alpha,
            estimator=self.estimator,
            num_targets=self.num_targets,
            seed=seed,
        )
        if mask is None:
            return -score.sum() / max(score.numel(), 1)
        return -torch.where(mask, score, 0.0).sum() / mask.sum().clamp_min(1)

    def extra_repr(self) -> str:
        settings = f"alpha={self.alpha}, estimator={self.estimator!r}"
        if self.estimator == "monte_carlo":
            settings += f", num_targets={self.num_targets}"
        return settings


def _check_mask(mask: Tensor, mean: Tensor) -> None:
    _checks.tensor("mean", mean, _checks.FLOAT_DTYPES, ("*", "D"))
    _checks.tensor("mask", mask, (torch.bool,), mean.shape[:-1])
    _checks.same_device(mean=mean, mask=mask)
    _checks.same_device(mean=mean, mask=mask)
