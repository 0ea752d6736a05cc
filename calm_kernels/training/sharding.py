"""Fully sharded training (FSDP2): every process keeps a part of the weights, of their gradients and
of the optimizer's state.

A unit's weights are gathered before its forward pass, so that operators see whole tensors, and let
go after it. Checkpoints hold whole tensors in the Trainer's usual files: they do not depend on how
many processes wrote them.

The Trainer's own ``fsdp`` is not used: Accelerate shards on GPUs only, cuts models where they are
not cut here, and writes checkpoints that nothing else resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from calm_kernels.nn import GatedFFN
from calm_kernels.nn.denoiser import DenoiserBlock
from calm_kernels.nn.energy_head import EnergyHeadBlock
from calm_kernels.training.optimizer import Combined
from calm_kernels.training.trainer import CalmTrainer

UNITS = (LlamaDecoderLayer, EnergyHeadBlock, DenoiserBlock, GatedFFN)
"""Layers gathered one at a time: whatever reads their weights does so inside their ``forward``. The
rest of a model (embeddings, which may be tied, and projections) is one more unit, gathered as long
as a step lasts."""
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
"""The Trainer's names of these files in a checkpoint."""
ENTRANCES = ("evaluate_brier",)
"""Methods beside ``forward`` through which a model's weights are used."""


class Sharded(nn.Module):
    """A model whose trained parameters are shared out among all processes, in place.

    Frozen parameters stay whole in every process: the autoencoder inside a language model is small,
    and its folded tables must see weights that stay where they are. Weights are kept and gathered
    in float32, and autocast casts them as in one process.

    Args:
        model: the same in every process, on the device it is to be trained on.
        autocast: makes the context of a forward pass.
    """

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]):
        super().__init__()
        self.module: Any = model
        self._autocast = autocast
        frozen = {p for p in model.parameters() if not p.requires_grad}
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        with self._autocast():
            return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in this context leave gradients to a later one to reduce."""
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """A sharded model's ``state_dict`` with whole tensors, on the CPU of rank 0.

    Every process must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights:  # tied ones have become several tensors
            weights[name] = weights[first.setdefault(parameter, name)]
    return weights


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with whole tensors, on the CPU. Every process must call it."""

    def whole(tensor: DTensor) -> torch.Tensor:
        return tensor.full_tensor().cpu()

    state: dict[str, Any] = tree_map_only(DTensor, whole, optimizer.state_dict())
    return state


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer over sharded parameters from a ``state_dict`` with whole tensors."""
    if isinstance(optimizer, Combined):
        pairs = list(zip(optimizer.parts, state["parts"], strict=True))
    else:
        pairs = [(optimizer, state)]
    for part, saved in pairs:
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


class ShardedTrainer(CalmTrainer):
    """The Trainer of a model that is shared out among the processes."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Shard the model first, so that the optimizer holds the parts."""
        if self.optimizer is None:
            inner: Any = self.model
            self.model_wrapped = Sharded(inner, self.accelerator.autocast)
        return super().create_optimizer(model)

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return model

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As of :class:`CalmTrainer`; lets go of what was gathered."""
        metrics = super().evaluate(*args, **kwargs)
        model: Any = self.model
        model.reshard()
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole weights. Every process must call it."""
        model: Any = self.model
        weights = whole_weights(model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer, schedule = self._stateful()
        state = whole_state(optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER))
            torch.save(schedule.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, schedule = self._stateful()
        state, scheduled = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER, SCHEDULER)
        )
        load_whole_state(optimizer, state)
        schedule.load_state_dict(scheduled)

    def _stateful(self) -> tuple[torch.optim.Optimizer, Any]:
        """The optimizer without Accelerate's wrapper, and the schedule."""
        wrapped: Any = self.optimizer
        return wrapped.optimizer, self.lr_scheduler
