"""Muon's updates, and which parameters each optimizer takes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from calm_kernels.training.optimizer import Combined, make_optimizer
from calm_kernels.training.presets import Optimization

OPTIMIZATION = Optimization(
    steps=5, batch_size=1, block_length=8, learning_rate=0.01, warmup_steps=1, optimizer="muon"
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.second = nn.Linear(10, 6, bias=False)
        self.lm_head = nn.Linear(6, 7)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)


def names_of(model: nn.Module, parameters: list[Tensor]) -> set[str]:
    ids = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_muon_s_update_is_as_large_as_adamw_s_and_orthogonal() -> None:
    torch.manual_seed(1)
    model = Model()
    combined = make_optimizer(model, replace(OPTIMIZATION, weight_decay=0.0))
    before = model.second.weight.detach().clone()
    model.second.weight.grad = torch.randn_like(before)
    combined.step()
    update = (before - model.second.weight.detach()) / OPTIMIZATION.learning_rate
    values = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
    assert values.min() > 0.5 and values.max() < 1.5


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = Model()
    combined = make_optimizer(model, OPTIMIZATION)
    assert isinstance(combined, Combined)
    muon, adamw = combined.parts
    assert names_of(model, muon.param_groups[0]["params"]) == {"inner.weight", "second.weight"}
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert names_of(model, rest) == {
        "embed.weight", "inner.bias", "norm.weight", "norm.bias", "lm_head.weight", "lm_head.bias",
    }  # fmt: skip
    assert all(group["weight_decay"] == 0 for group in adamw.param_groups)


def test_adamw_decays_matrices_and_leaves_vectors_and_frozen_weights() -> None:
    model = Model()
    adamw = make_optimizer(model, replace(OPTIMIZATION, optimizer="adamw", weight_decay=0.3))
    decayed, free = adamw.param_groups
    assert names_of(model, decayed["params"]) == {
        "embed.weight", "inner.weight", "second.weight", "lm_head.weight",
    }  # fmt: skip
    assert names_of(model, free["params"]) == {
        "inner.bias", "norm.weight", "norm.bias", "lm_head.bias",
    }  # fmt: skip
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)


def run(model: Model, combined: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        loss = torch.zeros(())
        for parameter in model.parameters():
            if parameter.requires_grad:
                loss = loss + (parameter * torch.randn(parameter.shape, generator=generator)).sum()
        loss.backward()
        combined.step()
        combined.zero_grad()


def test_a_restored_optimizer_continues_as_if_never_saved() -> None:
    torch.manual_seed(3)
    model = Model()
    combined = make_optimizer(model, OPTIMIZATION)
    schedule = torch.optim.lr_scheduler.LambdaLR(combined, lambda step: 0.5)
    assert {group["lr"] for group in combined.param_groups} == {0.005}
    run(model, combined, 2)
    saved = copy.deepcopy([model.state_dict(), combined.state_dict()])
    run(model, combined, 3)
    other = Model()
    other.load_state_dict(saved[0])
    restored = make_optimizer(other, OPTIMIZATION)
    restored.load_state_dict(saved[1])
    run(other, restored, 3)
    del schedule
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
