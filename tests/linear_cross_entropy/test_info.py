"""By-products of the loss: which rows are right, how many went sparse, what they left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calm_kernels import LinearCrossEntropyInfo, linear_cross_entropy
from calm_kernels.nn import LinearCrossEntropyLoss

NAN, INF = float("nan"), float("inf")


def loss_and_info(
    logits: Tensor, target: Tensor, **options
) -> tuple[Tensor, LinearCrossEntropyInfo]:
    identity = torch.eye(logits.shape[0], dtype=logits.dtype)
    weight = logits.t().contiguous().requires_grad_()
    return linear_cross_entropy(identity, weight, target, return_info=True, **options)


def mixed_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """From flat to certain, every third target the largest logit, every fifth ignored."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(60, 1500, generator=generator, dtype=torch.float64)
    logits = (logits * torch.linspace(0.5, 12.0, 60, dtype=torch.float64).unsqueeze(1)).to(dtype)
    target = torch.randint(0, 1500, (60,), generator=generator)
    target[::3] = logits.argmax(dim=1)[::3]
    target[::5] = -100
    return logits, target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_products_count_what_happened(dtype: torch.dtype, reduction: str, backend: str) -> None:
    logits, target = mixed_rows(dtype)
    loss, info = loss_and_info(logits, target, reduction=reduction, drop_mass=1e-2)
    assert loss.shape == ((60,) if reduction == "none" else ())
    assert torch.equal(info.correct, logits.argmax(dim=1) == target)
    assert info.num_rows == 48
    assert info.largest_dropped_mass.dtype == torch.float32
    overload = "default" if backend == "native" else backend
    rows = getattr(torch.ops.calm_kernels.linear_cross_entropy_rows, overload)
    *_, columns, probabilities, length, statistics = rows(
        torch.eye(60, dtype=dtype), logits.t().contiguous(), None, target, -100, 1e-2
    )
    assert info.num_sparse_rows == (length > 0).sum() == statistics[1]
    assert 5 < info.num_sparse_rows < 40
    exact = logits.double().softmax(dim=1)
    listed = columns.long().masked_fill(torch.arange(64) >= length.unsqueeze(1), -1)
    dropped = [
        1.0 - float(exact[r, listed[r, :n]].sum()) for r, n in enumerate(length.tolist()) if n > 0
    ]
    assert float(info.largest_dropped_mass) == pytest.approx(max(dropped), abs=1e-6)
    assert 0.0 < info.largest_dropped_mass <= 1e-2
    for r, n in enumerate(length.tolist()):
        if n > 0:
            torch.testing.assert_close(
                probabilities[r, :n].double(), exact[r, listed[r, :n]], rtol=2e-6, atol=0
            )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("row", "first"),
    [
        ([0.0, 2.0, 1.0, 2.0], 1),
        ([3.0, 3.0, 3.0, 3.0], 0),
        ([0.0, 5.0, NAN, 9.0], 2),
        ([NAN, 5.0, NAN, 9.0], 0),
        ([0.0, INF, INF, 9.0], 1),
        ([-INF, -INF, -INF, -INF], 0),
        ([-1e4, -2e4, -1e4, -3e4], 0),
    ],
)
def test_ties_and_nans_are_decided_as_by_argmax(
    row: list[float], first: int, reduction: str
) -> None:
    # Past 64 columns too, where vector lanes have gone round.
    for shift in (0, 130):
        # Logits enter as the bias: 0 times infinity would be NaN in the product.
        bias = torch.full((shift + 4,), -INF if row[0] == -INF else -1e5)
        bias[shift:] = torch.tensor(row)
        expected = bias.argmax()
        assert expected == (0 if row[0] == -INF else shift + first)
        target = torch.arange(shift + 4)
        hidden = torch.zeros(shift + 4, 3, requires_grad=True)
        _, info = linear_cross_entropy(
            hidden,
            torch.zeros(shift + 4, 3),
            target,
            bias=bias,
            reduction=reduction,
            return_info=True,
        )
        assert info.correct.nonzero().flatten().tolist() == [expected]


def test_leading_dimensions_carry_over() -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4)
    target = torch.randint(0, 7, (2, 3))
    loss, info = linear_cross_entropy(hidden, weight, target, return_info=True)
    assert loss.shape == ()
    assert torch.equal(info.correct, (hidden @ weight.t()).argmax(-1) == target)
    assert (info.num_rows, info.num_sparse_rows, info.largest_dropped_mass) == (6, 0, 0.0)


def test_a_target_outside_the_vocabulary_is_not_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    _, info = loss_and_info(logits, torch.tensor([0, 2]))
    assert info.correct.tolist() == [True, False]


def test_no_rows_have_no_by_products() -> None:
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "drop_mass": 0.1, "return_info": True}
        hidden = torch.ones(0, 4, requires_grad=True)
        _, info = linear_cross_entropy(hidden, torch.ones(2000, 4), torch.ones(0).long(), **options)
        assert [float(value) for value in info[1:]] == [0.0, 0.0, 0.0]
        assert info.correct.shape == (0,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_by_products_equal_eager_ones(reduction: str) -> None:
    def by_products(logits: Tensor, target: Tensor):
        return loss_and_info(logits, target, reduction=reduction, drop_mass=1e-2)[1]

    arguments = mixed_rows(torch.float32)
    compiled = torch.compile(by_products, fullgraph=True)(*arguments)
    for value, expected in zip(compiled, by_products(*arguments), strict=True):
        assert torch.equal(value, expected)


def test_module_returns_by_products_and_drops_in_training_only() -> None:
    logits, target = mixed_rows(torch.float64)
    identity = torch.eye(60, dtype=torch.float64)
    weight = logits.t().contiguous().requires_grad_()
    module = LinearCrossEntropyLoss(drop_mass=1e-2, return_info=True)
    _, training = module(identity, weight, target)
    _, evaluation = module.eval()(identity, weight, target)
    assert training.num_sparse_rows > 0
    assert evaluation.num_sparse_rows == 0
    assert torch.equal(training.correct, evaluation.correct)
