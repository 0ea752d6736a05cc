"""The Triton kernels of linear_cross_entropy at sizes that use every part of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import calm_kernels

Operands = tuple[Tensor, Tensor, Tensor]
ROWS, HIDDEN, VOCAB = 1500, 512, 20011


@pytest.fixture(params=[0.0, 1e-3])
def drop_mass(request: pytest.FixtureRequest) -> float:
    return request.param


def operands(dtype: torch.dtype, device: torch.device) -> Operands:
    """hidden, weight and targets: from diffuse rows to sure ones, most of them right."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    hidden *= torch.linspace(0.02, 1.5, ROWS)[:, None]
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    target = (hidden @ weight.T).argmax(dim=1)
    target[::10] = torch.randint(0, VOCAB, target[::10].shape, generator=generator).to(device)
    target[7::13] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), target


def run(tensors: Operands, drop_mass: float, reduction: str) -> list[Tensor]:
    hidden, weight, target = tensors
    loss, info = calm_kernels.linear_cross_entropy(
        hidden, weight, target, reduction=reduction, drop_mass=drop_mass, return_info=True
    )
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    return [loss.detach(), *grads, *info]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import calm_kernels.triton.linear_cross_entropy_backward as backward

    # Five chunks of 4096 columns, the last one cut off by the vocabulary's end.
    monkeypatch.setattr(backward, "RESIDUAL_BYTES", 1536 * 4096 * 2)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_chunks_and_splits_equal_the_reference(
    device: torch.device, dtype: torch.dtype, reduction: str, drop_mass: float
) -> None:
    tensors = operands(dtype, device)
    with calm_kernels.backend("triton"):
        results = run(tensors, drop_mass, reduction)
    with calm_kernels.backend("reference"):
        doubles = tuple(t.detach().double().requires_grad_() for t in tensors[:2])
        truths = run((*doubles, tensors[2]), drop_mass, reduction)
    bounds = [1e-5, *[drop_mass + (1e-5 if dtype == torch.float32 else 1e-2)] * 2]
    for result, truth, bound in zip(results[:3], truths[:3], bounds, strict=True):
        assert (result.double() - truth).norm() <= bound * truth.norm()
    assert (results[3] != truths[3]).sum() <= 2  # near ties of the largest logit
    assert results[4] == truths[4]
    if drop_mass:
        assert truths[5] > ROWS / 4
        assert 0.95 * truths[5] <= results[5] <= truths[5] + 3
        assert results[6] <= drop_mass


@pytest.mark.usefixtures("small_chunks")
def test_results_are_bitwise_repeatable(device: torch.device, drop_mass: float) -> None:
    tensors = operands(torch.bfloat16, device)
    with calm_kernels.backend("triton"):
        first, *others = (run(tensors, drop_mass, "mean") for _ in range(3))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def peak_bytes(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_temporary_memory_is_a_small_part_of_the_logits(
    device: torch.device, drop_mass: float
) -> None:
    rows, vocab = 16384, 128257
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    hidden = torch.randn(rows, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, vocab, (rows,), device=device)

    # The float32 gradients are made with the loss and kept for the backward.
    kept = 4 * (hidden.numel() + weight.numel())
    with calm_kernels.backend("triton"):
        peak = peak_bytes(
            lambda: calm_kernels.linear_cross_entropy(hidden, weight, target, drop_mass=drop_mass)
        )
    assert kept < peak < kept + rows * vocab * 2 / 20
