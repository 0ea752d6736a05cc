from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from calm_kernels.nn.energy import EnergyLoss
from calm_kernels.ops.energy_score import energy_score


def gaussian() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 2, 5, 6), (2, 5, 6), (2, 5, 6))
    samples, mean, log_std = (torch.randn(*shape, generator=generator) for shape in shapes)
    return samples.requires_grad_(), mean.requires_grad_(), log_std.requires_grad_()


@pytest.mark.parametrize(
    "loss",
    [EnergyLoss(), EnergyLoss(alpha=0.6, estimator="monte_carlo", num_targets=3)],
    ids=["closed_form", "monte_carlo"],
)
def test_loss_is_the_negative_mean_score(loss: EnergyLoss) -> None:
    inputs = gaussian()
    score = energy_score(
        *inputs, alpha=loss.alpha, estimator=loss.estimator, num_targets=loss.num_targets, seed=2
    )
    torch.testing.assert_close(loss(*inputs, seed=2), -score.mean())


def test_masked_loss_is_the_mean_over_positions_that_count() -> None:
    inputs = gaussian()
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    assert 0 < int(mask.sum()) < 10
    expected = -energy_score(*inputs)[mask].mean()
    actual = EnergyLoss()(*inputs, mask=mask)
    torch.testing.assert_close(actual, expected)
    by_mask = torch.autograd.grad(actual, inputs)
    by_index = torch.autograd.grad(expected, inputs)
    for one, other in zip(by_mask, by_index, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_lies_outside_the_mask_touches_nothing(which: int, estimator: str) -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    loss = EnergyLoss(estimator=estimator)  # type: ignore[arg-type]
    expected = loss(*gaussian(), mask=mask, seed=0)
    inputs = [tensor.detach().clone() for tensor in gaussian()]
    inputs[which][..., 1, 3, 2] = math.nan
    for tensor in inputs:
        tensor.requires_grad_()
    actual = loss(*inputs, mask=mask, seed=0)
    assert torch.equal(actual, expected)
    for gradient in torch.autograd.grad(actual, inputs):
        assert bool(gradient.isfinite().all())
        assert torch.equal(gradient[..., 1, 3, :], torch.zeros_like(gradient[..., 1, 3, :]))


def test_without_a_position_that_counts_the_loss_is_zero() -> None:
    samples, mean, log_std = gaussian()
    loss = EnergyLoss()(samples, mean, log_std, mask=torch.zeros(2, 5, dtype=torch.bool))
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, samples)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert EnergyLoss()(samples[:, :0], mean[:0], log_std[:0]).item() == 0.0


def test_nan_at_a_position_that_counts_is_not_hidden() -> None:
    samples, mean, log_std = (tensor.detach().clone() for tensor in gaussian())
    samples[0, 0, 0, 0] = math.nan
    assert EnergyLoss()(samples, mean, log_std, mask=torch.ones(2, 5, dtype=torch.bool)).isnan()


def test_loss_compiles_whole_with_and_without_mask() -> None:
    torch._dynamo.reset()
    loss = EnergyLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = gaussian()
    for mask in (None, torch.arange(10).reshape(2, 5) % 3 > 0):
        expected, actual = loss(*inputs, mask=mask), compiled(*inputs, mask=mask)
        torch.testing.assert_close(actual, expected)
        for one, other in zip(
            torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 5), TypeError, r"mask: expected dtype bool"),
        (torch.ones(2, 4, dtype=torch.bool), ValueError, r"mask: expected shape \[2, 5\]"),
        ([True], TypeError, r"mask: expected a torch.Tensor"),
        (torch.ones(2, 5, dtype=torch.bool, device="meta"), ValueError, r"mask: expected device"),
    ],
)
def test_a_wrong_mask_is_named(mask: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EnergyLoss()(*gaussian(), mask=mask)


def test_loss_prints_its_settings() -> None:
    assert repr(EnergyLoss()) == "EnergyLoss(alpha=1.0, estimator='closed_form')"
    assert "num_targets=7" in repr(EnergyLoss(estimator="monte_carlo", num_targets=7))
