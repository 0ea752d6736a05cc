"""Muon for the matrices between hidden layers, AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calm_kernels.training.presets import Optimization

MOMENTUM = 0.95
MATCHED_TO_ADAMW = "match_rms_adamw"
"""Scales Muon's updates to the size of AdamW's (arXiv 2502.16982): one learning rate and one weight
decay serve both."""

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
    muon = torch.optim.Muon(
        hidden,
        lr=optimization.learning_rate,
        weight_decay=optimization.weight_decay,
        momentum=MOMENTUM,
        adjust_lr_fn=MATCHED_TO_ADAMW,
    )
    return Combined(muon, adamw)


def _hidden_matrices(model: nn.Module) -> list[Tensor]:
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and not name.endswith(NOT_HIDDEN)
    ]
