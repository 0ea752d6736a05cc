"""Logits on demand: the numbers of plain logits, whatever is done with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calm_kernels.integrations.logits import LogitsUse, OnDemandLogits, on_demand_logits

V, H = 11, 5
Use = Callable[[Any], Tensor]
TARGET = torch.tensor([3, -100, 0, 10, 7, 3])
WITHOUT_VALUES: dict[str, Use] = {
    "argmax": lambda z: z.argmax(-1),
    "torch.argmax of a view": lambda z: torch.argmax(z.view(-1, V), dim=1),
    "argmax of floats": lambda z: z.float().flatten(0, 1).contiguous().argmax(dim=-1),
    "cross entropy": lambda z: F.cross_entropy(z.reshape(6, -1), TARGET),
    "module": lambda z: torch.nn.CrossEntropyLoss(reduction="sum")(z.view((6, V)).float(), TARGET),
    "rows": lambda z: F.cross_entropy(z.flatten(0, -2), TARGET, reduction="none"),
    "other ignored": lambda z: F.cross_entropy(
        z.to(torch.float64).view(-1, V), TARGET.clamp_min(0), ignore_index=3
    ),
}
WITH_VALUES: dict[str, Use] = {
    "sum": lambda z: z.sum(),
    "operator": lambda z: 2 * z + 1,
    "index": lambda z: z[:, 1, 2:5],
    "argmax of all": lambda z: z.argmax(),
    "argmax over rows": lambda z: z.argmax(0),
    "kept dimension": lambda z: z.argmax(-1, keepdim=True),
    "smoothing": lambda z: F.cross_entropy(z.view(-1, V), TARGET, label_smoothing=0.1),
    "weights": lambda z: F.cross_entropy(z.view(-1, V), TARGET, torch.arange(V) + 1.0),
    "probabilities": lambda z: F.cross_entropy(z.view(-1, V), torch.eye(V)[:6]),
    "classes in the middle": lambda z: F.cross_entropy(z.transpose(1, 2), TARGET.view(2, 3)),
    "log softmax": lambda z: z.log_softmax(-1),
    "other shape": lambda z: z.view(V, 6),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy().copy()),
    "narrow": lambda z: z.to(torch.bfloat16).argmax(-1),
    "top": lambda z: torch.topk(z, 2).values,
    "list": lambda z: torch.cat([z, z]),
    "written into": lambda z: z.masked_fill_(torch.arange(V) == 2, -9.0).view(-1, V).sum(0),
    "view written into": lambda z: (z.view(-1, V).detach().fill_(1.0), z.argmax(-1))[1],
    "split": lambda z: z.chunk(2)[1],
}


def operands() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, H, generator=drawn, requires_grad=True)
    weight = torch.randn(V, H, generator=drawn, requires_grad=True)
    return hidden, weight


def outcome(make: Callable[[Tensor, Tensor], Tensor], use: Use) -> list[Tensor | None]:
    hidden, weight = operands()
    result = use(make(hidden, weight))
    if result.requires_grad:
        (result * torch.arange(1.0, result.numel() + 1).view(result.shape)).sum().backward()
    return [result.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("name", [*WITHOUT_VALUES, *WITH_VALUES])
def test_any_use_gives_the_values_and_gradients_of_plain_logits(name: str) -> None:
    use = {**WITHOUT_VALUES, **WITH_VALUES}[name]
    actual = outcome(lambda h, w: on_demand_logits(h, w, LogitsUse()), use)
    expected = outcome(F.linear, use)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            assert type(a) is Tensor
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT_VALUES)
def test_loss_and_argmax_need_no_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_kernels.integrations.logits._Head.logits", None)
    WITHOUT_VALUES[name](on_demand_logits(*operands(), LogitsUse()))


def test_metadata_needs_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_kernels.integrations.logits._Head.logits", None)
    logits = on_demand_logits(*operands(), LogitsUse())
    assert isinstance(logits, OnDemandLogits) and logits.shape == (2, 3, V) and logits.dim() == 3
    assert logits.dtype == torch.float32 and logits.size(-1) == V and len(logits) == 2
    assert logits.requires_grad and logits.grad_fn is not None


@pytest.mark.parametrize("use", [LogitsUse(argmax=False), LogitsUse(cross_entropy=False)])
def test_what_is_not_wanted_is_computed_from_values(use: LogitsUse) -> None:
    logits: Any = on_demand_logits(*operands(), use)
    logits.argmax(-1)
    assert (logits._head.values is None) == use.argmax
    logits = on_demand_logits(*operands(), use)
    F.cross_entropy(logits.view(-1, V), TARGET)
    assert (logits._head.values is None) == use.cross_entropy


def test_gradient_reaches_through_a_custom_function() -> None:
    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.pow(2).sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * grad * x

    def use(logits: Tensor) -> Tensor:
        result: Tensor = Squares.apply(logits)
        return result

    actual = outcome(lambda h, w: on_demand_logits(h, w, LogitsUse()), use)
    for a, e in zip(actual, outcome(F.linear, use), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_logits_looked_at_after_a_step_are_refused() -> None:
    hidden, weight = operands()
    logits = on_demand_logits(hidden, weight, LogitsUse())
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="written to before the logits were computed"):
        logits.sum()


def test_logits_made_with_gradient_have_it_when_looked_at_without() -> None:
    hidden, weight = operands()
    logits = on_demand_logits(hidden, weight, LogitsUse())
    with torch.no_grad():
        assert not (logits * 2).requires_grad
    logits.sum().backward()
    assert weight.grad is not None


def test_autocast_decides_where_the_logits_are_made() -> None:
    hidden, weight = operands()
    with torch.autocast("cpu", torch.bfloat16):
        logits, plain = on_demand_logits(hidden, weight, LogitsUse()), F.linear(hidden, weight)
        loss = F.cross_entropy(logits.view(-1, V), TARGET)
        expected = F.cross_entropy(plain.view(-1, V), TARGET)
    assert (logits.dtype, loss.dtype) == (plain.dtype, expected.dtype)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(logits + 0, plain)
