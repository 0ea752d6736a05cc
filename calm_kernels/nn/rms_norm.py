"""RMSNorm as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from calm_kernels.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's layer, in the dtype of its input: under autocast no promotion to float32.

    On GPUs torch's own kernel runs, on CPUs, where torch composes it of many passes, ``rms_norm``.

    Args:
        hidden_size: H, of inputs [*, H].
        eps: added to the mean square.
    """

    eps: float

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.device.type == "cpu":
            return rms_norm(x, weight, eps=self.eps)
        return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)
