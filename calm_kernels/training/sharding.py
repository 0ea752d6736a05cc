"""Fully sharded training (FSDP2): every process keeps a part of the weights, of their gradients and
of the optimizer's state.

A unit's weights are gathered before its forward pass, so that operators see whole tensors, and let
go after it. Checkpoints hold whole tensors in the Trainer's usual files: they do not depend on how
many processes wrote them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from calm_kernels.models.checkpoint import read_weights
from calm_kernels.nn import GatedFFN
from calm_kernels.nn.denoiser import DenoiserBlock
from calm_kernels.nn.energy_head import EnergyHeadBlock
from calm_kernels.training.optimizer import Combined

UNITS = (LlamaDecoderLayer, EnergyHeadBlock, DenoiserBlock, GatedFFN)
"""Layers gathered one at a time: whatever reads their weights does so inside their ``forward``. The
rest of a model (embeddings, which may be tied, and projections) is one more unit, gathered as long
as a step lasts."""
ENTRANCES = ("evaluate_brier",)
"""Methods beside ``forward`` through which a model's weights are used."""


def shard(model: nn.Module, device: torch.device) -> None:
    """Share a model's trained parameters out among all processes, in place.

    Frozen ones stay whole in every process: the autoencoder inside a language model is small, and
    its folded tables must see weights that stay where they are. Weights are kept and gathered in
    float32, and autocast casts them as in one process.
    """
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    units = [
        module
        for module in model.modules()
        if isinstance(module, UNITS) and not frozen.issuperset(module.parameters())
    ]
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=frozen)
    for name in ENTRANCES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Fill a sharded model with a checkpoint's whole weights; tied ones are in the file once."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, read_weights(checkpoint), options=options)


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with whole tensors, on the CPU. Every process must call it."""

    def whole(tensor: DTensor) -> torch.Tensor:
        return tensor.full_tensor().cpu()

    state: dict[str, Any] = tree_map_only(DTensor, whole, optimizer.state_dict())
    return state


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer over sharded parameters from a ``state_dict`` with whole tensors."""
    combined = isinstance(optimizer, Combined)
    parts = optimizer.parts if combined else (optimizer,)
    for part, saved in zip(parts, state["parts"] if combined else (state,), strict=True):
        parameters = [p for group in part.param_groups for p in group["params"]]
        for index, values in saved["state"].items():
            for name, value in values.items():
                if value.shape == parameters[index].shape:
                    values[name] = _share_of(value, parameters[index])
    optimizer.load_state_dict(state)


def _share_of(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that every process has, cut as a parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).clone()
