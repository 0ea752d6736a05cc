"""The gated feed-forward block with its norm and residual, as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from calm_kernels.ops.gated_ffn import gated_ffn


class Projections(nn.Module):
    """Holds the three matrices under the names that checkpoints use."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)


class GatedFFN(nn.Module):
    """x + down(silu(gate(n)) * up(n)) with n = RMSNorm(x): one Block of the autoencoder.

    Parameters: ``mlp.gate_proj.weight``, ``mlp.up_proj.weight``, ``mlp.down_proj.weight``,
    ``layernorm.weight``.

    Args:
        hidden_size: H, the width of x.
        intermediate_size: I, the width between.
        eps: added to the mean square in the norm.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.mlp = Projections(hidden_size, intermediate_size)
        self.layernorm = nn.RMSNorm(hidden_size, eps=eps)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [*, H] -> [*, H]; see :func:`calm_kernels.gated_ffn`."""
        return gated_ffn(
            x,
            self.layernorm.weight,
            self.mlp.gate_proj.weight,
            self.mlp.up_proj.weight,
            self.mlp.down_proj.weight,
            eps=self.eps,
        )
