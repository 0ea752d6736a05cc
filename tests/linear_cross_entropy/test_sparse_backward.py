"""The certified sparse backward: what it may leave out, and that it leaves out no more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from calm_kernels._dispatch import current_backend
from calm_kernels.ops.linear_cross_entropy import linear_cross_entropy
from calm_kernels.reference.linear_cross_entropy import CAPACITY, DENSE, significance

ROUNDING = 2e-6  # of a softmax in float32, summed over a row


def logit_gradient(logits: Tensor, target: Tensor, drop_mass: float, reduction: str) -> Tensor:
    """d loss / d logits [R, V] as the operator has it: hidden = identity makes it grad_weight."""
    identity = torch.eye(logits.shape[0], dtype=logits.dtype)
    weight = logits.t().contiguous().requires_grad_()
    loss = linear_cross_entropy(identity, weight, target, reduction=reduction, drop_mass=drop_mass)
    loss.sum().backward()
    return weight.grad.t()


def exact_gradient(logits: Tensor, target: Tensor) -> Tensor:
    gradient = logits.double().softmax(dim=1)
    gradient[torch.arange(len(target)), target] -= 1.0
    return gradient


def list_lengths(logits: Tensor, target: Tensor, drop_mass: float) -> list[int]:
    identity = torch.eye(logits.shape[0], dtype=logits.dtype)
    overload = {"native": "default"}.get(current_backend(), "reference")
    operator = getattr(torch.ops.calm_kernels.linear_cross_entropy_rows, overload)
    *_, length, _ = operator(identity, logits.t().contiguous(), None, target, -100, drop_mass)
    return length.tolist()


def peaks(count: int, vocab: int, mass: float = 1.0) -> Tensor:
    """Logits of one row: ``count`` equal tokens share ``mass``, the others the rest."""
    p = torch.full((1, vocab), (1.0 - mass) / max(vocab - count, 1), dtype=torch.float64)
    p[0, :count] = mass / count
    return p.clamp_min(1e-30).log()


def random_rows(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(60, 1500, generator=generator, dtype=torch.float64)
    scale = {"flat": 0.1, "mild": 2.0, "peaked": 6.0, "one-hot": 40.0}
    if kind == "mixed":  # every row its own temperature: lists of all lengths, and overflows
        return noise * torch.linspace(0.0, 12.0, 60, dtype=torch.float64).unsqueeze(1)
    if kind.endswith("trained"):  # sure of a token, or not yet, every sixth row without a clue
        peak = torch.full((60, 1), {"trained": 16.0, "half-trained": 8.0}[kind])
        peak[::6] = 0.0
        return noise.scatter_add_(1, (torch.arange(60) * 25).unsqueeze(1), peak.double())
    if kind == "power law":
        ranks = torch.arange(1, 1501, dtype=torch.float64)
        return -ranks.log() * torch.linspace(0.5, 6.0, 60, dtype=torch.float64).unsqueeze(1)
    return noise * scale[kind]


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("drop_mass", [1e-4, 1e-3, 0.05, 0.5])
@pytest.mark.parametrize(
    "kind", ["flat", "mild", "peaked", "one-hot", "mixed", "power law", "trained", "half-trained"]
)
def test_left_out_part_of_each_logit_gradient_is_within_drop_mass(
    kind: str, drop_mass: float, dtype: torch.dtype, reduction: str
) -> None:
    logits = random_rows(kind).to(dtype)
    target = torch.arange(60) * 25  # mostly unlikely tokens
    target[::2] = logits.argmax(dim=1)[::2]
    gradient = logit_gradient(logits, target, drop_mass, reduction).double()
    left_out = (gradient - exact_gradient(logits, target)).abs().sum(dim=1)
    assert left_out.amax() <= drop_mass + (ROUNDING if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_mixed_rows_are_neither_all_sparse_nor_all_dense(reduction: str) -> None:
    logits, target = random_rows("mixed"), torch.arange(60)
    gradient = logit_gradient(logits, target, 1e-3, reduction)
    sparse = (gradient != 0.0).sum(dim=1) <= CAPACITY
    assert 0.2 < sparse.double().mean() < 0.9
    dense = gradient[~sparse]
    torch.testing.assert_close(dense, exact_gradient(logits, target)[~sparse])


@pytest.mark.parametrize(
    ("row", "target", "length"),
    [
        (peaks(1, 1500), 0, 1),
        (peaks(2, 1500), 1, 2),
        (peaks(2, 1500), 1499, 3),  # the target is in the list however unlikely
        (peaks(CAPACITY, 1500), 0, CAPACITY),  # capacity exactly met
        (peaks(CAPACITY, 1500), 1499, DENSE),  # and exceeded by the target
        (peaks(CAPACITY + 1, 1500), 0, DENSE),
        (peaks(1500, 1500), 3, DENSE),  # uniform, overflowing
        (peaks(CAPACITY, CAPACITY), 3, CAPACITY),  # uniform, fitting
        (peaks(3, 1500, mass=0.9995), 2, 3),  # the rest is too thin to list and allowed to go
        (peaks(3, 10**4, mass=0.9985), 2, DENSE),  # too thin to list but too much to drop
        (peaks(3, 40, mass=0.9), 2, 40),  # the rest is listed
    ],
)
def test_adversarial_rows_are_listed_as_specified(row: Tensor, target: int, length: int) -> None:
    for dtype in (torch.float64, torch.float32):
        assert list_lengths(row.to(dtype), torch.tensor([target]), 1e-3) == [length]
    gradient = logit_gradient(row, torch.tensor([target]), 1e-3, "none")
    left_out = (gradient - exact_gradient(row, torch.tensor([target]))).abs().sum()
    assert left_out <= (1e-3 if length != DENSE else 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_equal_the_definition(reduction: str) -> None:
    rows, vocab, width, drop_mass = 40, 1100, 6, 0.02
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    h = (h * torch.linspace(0, 12, rows, dtype=torch.float64).unsqueeze(1)).requires_grad_()
    w = torch.randn(vocab, width, generator=generator, dtype=torch.float64).requires_grad_()
    b = torch.randn(vocab, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[5:9] = -100
    loss = linear_cross_entropy(h, w, target, bias=b, reduction=reduction, drop_mass=drop_mass)
    factor = torch.randn(loss.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(loss, (h, w, b), factor)

    gradient = torch.zeros(rows, vocab, dtype=torch.float64)
    kinds = {"sparse": 0, "dense": 0}
    counted = (target != -100).sum()
    for r in range(rows):
        if target[r] == -100:
            continue
        p = (h[r] @ w.t() + b).detach().softmax(dim=0)
        listed = p > significance(drop_mass)
        listed[target[r]] = True
        sparse = listed.sum() <= CAPACITY and p[~listed].sum() <= drop_mass
        kinds["sparse" if sparse else "dense"] += 1
        if sparse:
            p = p * listed
        p[target[r]] -= 1.0
        scale = factor[r] if reduction == "none" else factor
        gradient[r] = p * (scale / counted if reduction == "mean" else scale)
    assert min(kinds.values()) >= 5
    expected = (gradient @ w, gradient.t() @ h, gradient.sum(dim=0))
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_exact_whatever_is_dropped(reduction: str) -> None:
    logits, target = random_rows("mixed"), torch.arange(60)
    identity, weight = torch.eye(60, dtype=torch.float64), logits.t().contiguous().requires_grad_()
    exact, dropped = (
        linear_cross_entropy(identity, weight, target, reduction=reduction, drop_mass=drop_mass)
        for drop_mass in (0.0, 0.5)
    )
    assert torch.equal(exact, dropped)


def test_small_vocabularies_have_exact_gradients() -> None:
    logits, target = random_rows("mixed")[:, :255].contiguous(), torch.arange(60)
    for reduction in ("sum", "none"):
        gradient = logit_gradient(logits, target, 0.5, reduction)
        torch.testing.assert_close(gradient, exact_gradient(logits, target))


def test_significance_lists_what_could_exceed_drop_mass_within_capacity() -> None:
    # CAPACITY tokens that are just too unlikely to be listed add up to half of drop_mass.
    assert significance(1e-3) * CAPACITY == pytest.approx(0.5e-3)
    assert math.isclose(significance(0.2), 200 * significance(1e-3))


@pytest.mark.parametrize("rows", [1, 5])
def test_only_ignored_rows_give_zero_gradients(rows: int) -> None:
    logits = torch.randn(rows, 1500, dtype=torch.float64)
    target = torch.full((rows,), -100)
    for reduction in ("mean", "sum", "none"):
        assert not logit_gradient(logits, target, 1e-3, reduction).any()
    assert list_lengths(logits, target, 1e-3) == [0] * rows
