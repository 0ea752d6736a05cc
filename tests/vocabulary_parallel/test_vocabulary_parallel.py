"""Vocabularies sharded over two and three processes give what the whole vocabulary gives."""

from __future__ import annotations

from typing import Any

import pytest
import shards
import torch
from processes import in_processes
from torch import Tensor

import calm_kernels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def operands(dtype: torch.dtype, rows: int, hidden_size: int, vocab_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "hidden": torch.randn(rows, hidden_size, generator=generator).to(dtype),
        "weight": torch.randn(vocab_size, hidden_size, generator=generator).to(dtype),
        "bias": torch.randn(vocab_size, generator=generator).to(dtype),
    }


def unsharded(call: dict[str, Any], grad: Tensor | None) -> list[Tensor]:
    """The same by the operator that sees the whole vocabulary, in float64."""
    call = {k: v for k, v in call.items() if k != "backend"}
    leaves = {
        name: call.pop(name).double().requires_grad_()
        for name in ("hidden", "weight", "bias")
        if call[name] is not None
    }
    call.pop("bias", None)
    with calm_kernels.backend("reference"):
        loss = calm_kernels.linear_cross_entropy(**leaves, **call)
        grads = torch.autograd.grad(loss, list(leaves.values()), grad)
    return [loss.detach(), *grads]


def assert_near(result: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("dtype", "world", "reduction", "bias", "backend"),
    [
        (torch.float64, 3, "mean", True, "auto"),
        (torch.float32, 2, "mean", False, "auto"),
        (torch.float32, 2, "none", True, "auto"),
        (torch.float32, 2, "sum", True, "reference"),
        (torch.bfloat16, 2, "mean", True, "auto"),
    ],
)
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(
    dtype: torch.dtype, world: int, reduction: str, bias: bool, backend: str
) -> None:
    call: dict[str, Any] = operands(dtype, 37, 24, 501)
    call["bias"] = call["bias"] if bias else None
    call["target"] = torch.randint(0, 501, (37,), generator=torch.Generator().manual_seed(3))
    call["target"][[2, 9]] = 7
    call |= {"ignore_index": 7, "reduction": reduction, "backend": backend}
    grad = torch.randn(37, dtype=torch.float64) if reduction == "none" else None
    given = None if grad is None else grad.to(torch.promote_types(dtype, torch.float32))
    results = in_processes(world, shards.cross_entropy, call, given)
    expected = unsharded(call, given if given is None else given.double())
    loss, hidden = expected[0], expected[1]
    for rank, result in enumerate(results):
        own = shards.bounds(rank, world, 501)
        assert_near(result[0], loss, 2e-6 if dtype != torch.float64 else 1e-12)
        assert_near(result[1], hidden, TOLERANCE[dtype])
        for part, whole in zip(result[2:], expected[2:], strict=True):
            assert_near(part, whole[own], TOLERANCE[dtype])


def test_extreme_logits_keep_their_digits() -> None:
    call: dict[str, Any] = operands(torch.float32, 11, 8, 90)
    call["hidden"] *= 1e4
    call |= {"bias": None, "target": torch.arange(11) * 8, "reduction": "none", "backend": "auto"}
    results = in_processes(2, shards.cross_entropy, call, torch.ones(11))
    loss, hidden, _ = unsharded(call, torch.ones(11, dtype=torch.float64))
    for result in results:
        assert_near(result[0], loss, 1e-5)
        assert_near(result[1], hidden, 1e-5)


def test_a_target_that_no_process_has_makes_its_row_nan() -> None:
    call: dict[str, Any] = operands(torch.float32, 4, 8, 90)
    call |= {"target": torch.tensor([3, 90, -5, 89]), "reduction": "none", "backend": "auto"}
    for result in in_processes(2, shards.cross_entropy, call, torch.ones(4)):
        assert result[0].isnan().tolist() == [False, True, True, False]


def test_the_largest_logit_is_found_wherever_it_lies_ties_and_nan_included() -> None:
    given = operands(torch.float32, 64, 16, 103)
    weight, bias = given["weight"], given["bias"]
    weight[101] = weight[3] = weight[2]  # equal logits on both processes
    bias[[2, 3, 101]] = 30.0
    hidden = given["hidden"]
    hidden[5] = torch.nan
    weight[60, 0] = torch.nan  # later than the ties, on the other process
    hidden[7, 0] = 0.0
    expected = calm_kernels.linear_argmax(hidden, weight, bias)
    for shape in ((64, 16), (4, 16, 16)):
        shaped = hidden.reshape(shape)
        for result in in_processes(2, shards.argmax, shaped, weight, bias):
            assert torch.equal(result.flatten(), expected)
    weight[60, 0] = 1.0
    expected = calm_kernels.linear_argmax(hidden, weight, bias)
    assert expected.unique().tolist() != [60]
    for result in in_processes(3, shards.argmax, hidden, weight, bias):
        assert torch.equal(result, expected)
