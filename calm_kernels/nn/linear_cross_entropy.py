"""Cross entropy of a linear layer's logits, as a loss module."""

from __future__ import annotations

from torch import Tensor, nn

from calm_kernels.ops.linear_cross_entropy import LinearCrossEntropyInfo, linear_cross_entropy


class LinearCrossEntropyLoss(nn.Module):
    """CE(hidden @ weight.T + bias, target) without the logits.

    Args:
        ignore_index: rows with this target count for nothing.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.
        drop_mass: how much of a row's probability its gradient may leave out in training mode; 0
            is exact, as gradients in evaluation mode always are.
        return_info: return (loss, :class:`~calm_kernels.ops.LinearCrossEntropyInfo`).

    See :func:`calm_kernels.linear_cross_entropy`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        drop_mass: float = 0.0,
        return_info: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.drop_mass = drop_mass
        self.return_info = return_info

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, LinearCrossEntropyInfo]:
        """hidden [*, H], weight [V, H], target [*], bias [V] -> the reduced loss (and info)."""
        return linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            drop_mass=self.drop_mass if self.training else 0.0,
            return_info=self.return_info,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"drop_mass={self.drop_mass}"
        )
