"""RMSNorm as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from calm_kernels.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's layer by :func:`~calm_kernels.ops.rms_norm.rms_norm`, in the dtype of its input: no
    promotion to float32 under autocast.

    Args:
        hidden_size: H, of inputs [*, H].
        eps: added to the mean square.
    """

    eps: float

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), eps=self.eps)
