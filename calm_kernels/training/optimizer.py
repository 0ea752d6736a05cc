"""Muon for the matrices between hidden layers, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from calm_kernels.training.presets import Optimization

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Odd quintic a x + b x^3 + c x^5 whose iteration brings singular values in (0, 1] close to 1."""
NEWTON_SCHULZ_STEPS = 5
UPDATE_SCALE = 0.2
"""Root mean square of an update's entries at learning rate 1: about that of AdamW's updates, so
that one learning rate and one weight decay serve both."""

NOT_HIDDEN = (
    "hidden_to_latent",
    "latent_to_hidden",
    "lm_head",
    "noise_embd",
    "mlp_generator.final_layer.linears.2",
    "mlp_generator.net.input_proj",
    "mlp_generator.net.time_embed.0",
    "mlp_generator.net.output_proj",
)
"""Linear layers at the rim of a model: their inputs or outputs are no hidden vectors."""
NO_DECAY_BELOW = 2
"""Tensors of fewer dimensions (norms, biases) have no weight decay."""


def native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matmuls run in hardware on a device, not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def orthogonalize(matrices: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Bring all singular values of each matrix close to 1: [n, r, c] -> same, r <= c.

    Source: Newton-Schulz iteration; Jordan et al., "Muon: an optimizer for hidden layers" (2024).
    """
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrices / (torch.linalg.matrix_norm(matrices.float(), keepdim=True) + 1e-7).to(
        matrices.dtype
    )
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest (semi-)orthogonal matrix as the update.

    Matrices of one shape are orthogonalised together, in bfloat16 where the hardware has it.

    Args:
        params: matrices, or groups of them.
        lr: learning rate, on AdamW's scale.
        weight_decay: decoupled.
        momentum: of the gradient's average; the update looks one step ahead (Nesterov).

    Source: Jordan et al. (2024); the scale of the update is that of Liu et al., arXiv 2502.16982.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = MOMENTUM,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        shapes = {p.dim() for group in self.param_groups for p in group["params"]}
        if shapes - {2}:
            raise ValueError("params: expected matrices; give other tensors to AdamW")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for parameters in by_shape.values():
                self._step_of_shape(parameters, group)
        return loss

    def _step_of_shape(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        averages = []
        for parameter in parameters:
            state = self.state[parameter]
            if "average" not in state:
                state["average"] = torch.zeros_like(parameter)
            averages.append(state["average"])
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, averages, momentum))
        rows, columns = ahead.shape[1:]
        if rows > columns:
            ahead = ahead.mT
        dtype = torch.bfloat16 if native_bf16(ahead.device) else torch.float32
        update = orthogonalize(ahead.to(dtype)).to(parameters[0].dtype)
        if rows > columns:
            update = update.mT
        scale = UPDATE_SCALE * max(rows, columns) ** 0.5
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-lr * scale)


class Combined(torch.optim.Optimizer):
    """Several optimizers that step together and save as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for g in part.param_groups for p in g["params"]], {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parts' own groups, so that a schedule reaches them."""
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Ignored: the groups are the parts'."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Ignored: the groups are the parts'."""

    def step(self, closure: Any = None) -> Any:
        """Step every part."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear every part's gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the parts' states."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def make_optimizer(model: nn.Module, optimization: Optimization) -> torch.optim.Optimizer:
    """The optimizer of a stage, over the parameters that are trained.

    ``adamw``: AdamW; embeddings and matrices decay, vectors do not. ``muon``: Muon for the linear
    layers between hidden vectors, AdamW without decay for the rest.
    """
    hidden = _hidden_matrices(model) if optimization.optimizer == "muon" else []
    ids = {id(parameter) for parameter in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    matrices = [p for p in rest if p.dim() >= NO_DECAY_BELOW]
    vectors = [p for p in rest if p.dim() < NO_DECAY_BELOW]
    decay = 0.0 if hidden else optimization.weight_decay
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=optimization.learning_rate,
        betas=(optimization.beta1, optimization.beta2),
        fused=True,
    )
    if not hidden:
        return adamw
    muon = Muon(hidden, lr=optimization.learning_rate, weight_decay=optimization.weight_decay)
    return Combined(muon, adamw)


def _hidden_matrices(model: nn.Module) -> list[Tensor]:
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and not name.endswith(NOT_HIDDEN)
    ]
