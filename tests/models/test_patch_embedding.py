"""Patches projected through a table of tokens and places equal those projected one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calm_kernels.models import patch_embedding
from calm_kernels.models.patch_embedding import project_patches

K, V, H, N = 3, 11, 6, 10


def modules(bias: bool = True) -> tuple[nn.Embedding, nn.Sequential]:
    torch.manual_seed(int(bias))
    layers = nn.Sequential(nn.Linear(K * H, N, bias=bias), nn.SiLU(), nn.Linear(N, 4))
    return nn.Embedding(V, H), layers


def run(
    patches: Tensor, embedding: nn.Embedding, layers: nn.Sequential, dtype: torch.dtype
) -> list[Tensor]:
    embedding.to(dtype), layers.to(dtype)
    out = project_patches(patches, embedding, layers)
    parameters = [*embedding.parameters(), *layers.parameters()]
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), parameters)]


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of patches of the calls that looked up."""
    calls: list[int] = []
    looked_up = patch_embedding._looked_up

    def counted(patches: Tensor, *arguments: Any) -> Tensor:
        calls.append(patches.numel() // K)
        return looked_up(patches, *arguments)

    monkeypatch.setattr(patch_embedding, "_looked_up", counted)
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(12,), (3, 7), (40, 1), (2, 3, 5)], ids=str)
def test_results_and_gradients_are_those_without_a_table(
    shape: tuple[int, ...], bias: bool, lookups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding, layers = modules(bias)
    patches = torch.randint(0, V - 2, (*shape, K))  # two tokens never occur
    results = run(patches, embedding, layers, torch.float32)
    assert len(lookups) == 1
    with monkeypatch.context() as patch:
        patch.setattr(patch_embedding, "_looks_up", lambda *_: False)
        exact = run(patches, embedding, layers, torch.float64)
        theirs = run(patches, embedding, layers, torch.float32)
    for result, their, right in zip(results, theirs, exact, strict=True):
        assert result.shape == right.shape
        error = float((result.double() - right).norm())
        assert error <= max(2 * float((their.double() - right).norm()), 1e-6 * float(right.norm()))


def test_a_table_is_made_only_where_it_is_smaller_and_exact(lookups: list[int]) -> None:
    embedding, layers = modules()
    few, many = torch.randint(0, V, (V, K)), torch.randint(0, V, (V + 1, K))
    project_patches(few, embedding, layers)
    assert lookups == []
    project_patches(many, embedding, layers)
    assert lookups == [V + 1]
    with torch.autocast("cpu", torch.bfloat16):
        project_patches(many, embedding, layers)
    project_patches(many, embedding.bfloat16(), layers.bfloat16())
    embedding.float(), layers.float()
    hook = layers.register_forward_pre_hook(lambda *_: None)
    project_patches(many, embedding, layers)
    hook.remove()

    class Adapted(nn.Linear):
        """A layer with more to it."""

    layers[0] = Adapted(K * H, N)
    project_patches(many, embedding, layers)
    project_patches(many, nn.Embedding(V, H, max_norm=1.0), layers)
    assert lookups == [V + 1]
