"""Muon's updates, and which parameters each optimizer takes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from calm_kernels.training import optimizer as module
from calm_kernels.training.optimizer import Combined, Muon, make_optimizer, orthogonalize
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


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 17), (2, 30, 64)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-6, 1.0, 1e4])[: shape[0], None, None]
    result = orthogonalize(matrices, steps=8)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.25
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    aligned = torch.einsum("nij,nij->n", result, u @ vh) / result.flatten(1).norm(dim=1)
    assert torch.all(aligned / shape[1] ** 0.5 > 0.98)


def test_muon_s_first_step_is_the_scaled_orthogonal_gradient_with_decay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "native_bf16", lambda device: False)
    torch.manual_seed(1)
    weights = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4))]
    before = [weight.detach().clone() for weight in weights]
    gradients = [torch.randn_like(weight) for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    Muon(weights, lr=0.1, weight_decay=0.5).step()
    for weight, old, gradient in zip(weights, before, gradients, strict=True):
        flat = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.mT
        update = orthogonalize(flat.unsqueeze(0)).squeeze(0)
        update = update if gradient.shape[0] <= gradient.shape[1] else update.mT
        expected = old * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * update
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_muon_looks_one_step_ahead_of_the_averaged_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(module, "native_bf16", lambda device: False)
    monkeypatch.setattr(module, "orthogonalize", lambda x: seen.append(x.clone()) or x)
    weight = nn.Parameter(torch.zeros(2, 3))
    muon = Muon([weight], lr=0.1, momentum=0.9)
    first, second = torch.randn(2, 3), torch.randn(2, 3)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        muon.step()
    average = 0.9 * (0.1 * first) + 0.1 * second
    torch.testing.assert_close(seen[1][0], 0.1 * second + 0.9 * average)


def test_matrices_of_one_shape_are_updated_each_by_its_own_gradient() -> None:
    torch.manual_seed(2)
    gradients = torch.randn(3, 4, 4)
    together = [nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
    for weight, gradient in zip(together, gradients, strict=True):
        weight.grad = gradient.clone()
    Muon(together, lr=1.0).step()
    for weight, gradient in zip(together, gradients, strict=True):
        alone = nn.Parameter(torch.zeros(4, 4))
        alone.grad = gradient.clone()
        Muon([alone], lr=1.0).step()
        torch.testing.assert_close(weight, alone, rtol=2e-2, atol=2e-2)


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


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="expected matrices"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


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
