"""What the CPU kernels add: their own chunks, sorted sums, threads and memory."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import calm_kernels
from calm_kernels import linear_cross_entropy
from calm_kernels.bench.memory import peak_bytes
from calm_kernels.bench.timing import Runnable

MIB = 1 << 20


@pytest.fixture(autouse=True)
def native_only(backend: str) -> None:
    if backend != "native":
        pytest.skip("about the CPU library")


def trained_like(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Most rows sure of their token, every sixth diffuse, some ignored; few tokens frequent."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    frequent = torch.rand(rows, generator=generator, dtype=torch.float64).square().square()
    target = (frequent * vocab).long().clamp_max(vocab - 1)
    sure = torch.full((rows, 1), 14.0 / hidden**0.5, dtype=torch.float64)
    sure[::6] = 0.0
    h = torch.randn(rows, hidden, generator=generator, dtype=torch.float64) + sure * weight[target]
    bias = 0.1 * torch.randn(vocab, generator=generator, dtype=torch.float64)
    target[7::11] = -100
    h, weight, bias = (t.to(dtype).requires_grad_() for t in (h, 0.5 * weight, bias))
    return h, weight, bias, target


def outcome(h: Tensor, w: Tensor, b: Tensor, target: Tensor, **options) -> list[Tensor]:
    loss, info = linear_cross_entropy(h, w, target, bias=b, return_info=True, **options)
    factor = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *info, *torch.autograd.grad(loss, (h, w, b), factor)]


@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab", [1024, 4099])
def test_many_chunks_give_what_the_reference_gives(
    vocab: int, reduction: str, drop_mass: float
) -> None:
    arguments = trained_like(1700, vocab, 12, torch.float64)
    options = {"reduction": reduction, "drop_mass": drop_mass}
    values = outcome(*arguments, **options)
    with calm_kernels.backend("reference"):
        expected = outcome(*arguments, **options)
    if drop_mass:
        assert 0.3 < values[3] / values[2] < 0.95, "sparse and dense rows both"
    for value, truth in zip(values, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("rows", "vocab"), [(700, 4099), (300, 9), (3, 33)])
def test_results_are_the_same_bits_for_any_number_of_threads(
    rows: int, vocab: int, reduction: str, drop_mass: float, dtype: torch.dtype
) -> None:
    arguments = trained_like(rows, vocab, 24, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outcome(*arguments, reduction=reduction, drop_mass=drop_mass))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_exponential_is_accurate() -> None:
    # hidden = identity makes the gradient of weight the softmax, entry by entry.
    logits = -torch.linspace(0.0, 75.0, 40_000).repeat(2, 1)
    weight = logits.t().contiguous().requires_grad_()
    target = torch.tensor([0, 0])
    loss = linear_cross_entropy(torch.eye(2), weight, target, reduction="sum")
    loss.backward()
    exact = logits.double().softmax(dim=1)
    relative = (weight.grad.t().double() / exact - 1.0)[:, 1:].abs()
    assert relative.amax() < 5e-7


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exponentials_below_the_smallest_float_vanish(reduction: str) -> None:
    logits = torch.tensor([[0.0, -87.0, -88.0, -104.0, -1e4, -3e38, -float("inf")]])
    bias = logits[0].clone().requires_grad_()
    hidden = torch.zeros(1, 2, requires_grad=True)
    weight = torch.zeros(7, 2)
    target = torch.tensor([1])
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction)
    loss.sum().backward()
    exact = logits.double().softmax(dim=1)[0]
    exact[1] -= 1.0
    torch.testing.assert_close(bias.grad.double(), exact, rtol=1e-6, atol=2e-38)
    assert loss.item() == pytest.approx(87.0)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_a_buffer_and_the_gradients(reduction: str, drop_mass: float) -> None:
    rows, vocab, hidden = 6000, 4096, 16
    h, w, b, target = trained_like(rows, vocab, hidden, torch.float32)
    arguments = {"h": h, "w": w, "b": b, "target": target}

    def call(inputs: dict[str, Tensor]) -> list[Tensor]:
        return outcome(**inputs, reduction=reduction, drop_mass=drop_mass)

    call(arguments)
    peak = peak_bytes(Runnable(call, "native"), arguments, torch.device("cpu"))
    if peak is None:
        pytest.skip("the system does not tell")
    lists = rows * 64 * 8 if reduction == "none" and drop_mass else 0
    assert peak < 14 * MIB + lists, "logits would be 94 MiB"
