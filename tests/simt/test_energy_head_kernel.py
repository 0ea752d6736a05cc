"""The energy head's CUDA kernels on the host executor against PyTorch in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "BFloat16": torch.bfloat16,
    "Float16": torch.float16,
}
# (positions, samples, H): rows narrower and wider than a warp, more rows than a sum's stretch.
SHAPES = [(3, 2, 5), (1, 1, 1), (9, 8, 33), (2, 3, 70)]
EPS = 1e-6


class Case:
    """Random operands of one dtype, the kernels that take them, and how close they must be."""

    def __init__(self, simt: ModuleType, dtype: str, shape: tuple[int, int, int], order: int):
        self.dtype, self.samples = DTYPES[dtype], shape[1]
        self.rows, self.size = shape[0] * shape[1], shape[2]
        self.kernels = getattr(simt, f"EnergyHead{dtype}")(1 + order, order, 0xFF if order else 0)
        self.generator = torch.Generator().manual_seed(order)
        self.unit = torch.finfo(self.dtype).eps

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).mul(2).to(self.dtype)

    def close(self, actual: Any, exact: Tensor, tolerance: float = 8.0) -> None:
        value = torch.from_numpy(np.asarray(actual))
        if value.dtype == torch.uint16:
            value = value.view(self.dtype)
        scale = float(exact.abs().max().clamp_min(1.0))
        unit = self.unit if value.dtype == self.dtype else torch.finfo(value.dtype).eps
        torch.testing.assert_close(
            value.double(), exact, rtol=tolerance * unit, atol=tolerance * unit * scale
        )


def to_numpy(tensor: Tensor) -> Any:
    if tensor.element_size() == 2:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


@pytest.fixture(params=[(d, s, o) for d in DTYPES for s in SHAPES for o in (0, 2)], ids=str)
def case(request: pytest.FixtureRequest, simt: ModuleType) -> Case:
    return Case(simt, *request.param)


def test_layer_norm_and_its_gradient(case: Case) -> None:
    x, grad, passed = (case.draw(case.rows, case.size) for _ in range(3))
    weight, bias = case.draw(case.size), case.draw(case.size)
    normed, mean, rstd = case.kernels.layer_norm(*map(to_numpy, (x, weight, bias)), EPS)
    wide = x.to(torch.float64, copy=True).requires_grad_()
    exact = F.layer_norm(wide, (case.size,), weight.double(), bias.double(), EPS)
    centre = x.double().mean(1)
    scale = (x.double().var(1, correction=0) + EPS).rsqrt()
    case.close(mean, centre)
    if case.size > 1:  # of one element the variance is rounding alone
        case.close(rstd, scale, 64)
    case.close(normed, exact.detach(), 32)
    (exact_grad,) = torch.autograd.grad(exact, wide, grad.double())
    actual = case.kernels.layer_norm_backward(
        to_numpy(x), to_numpy(weight), mean, rstd, to_numpy(grad), to_numpy(passed)
    )
    case.close(actual, exact_grad + passed.double(), 64 if case.size > 1 else 4096)

    sums = case.kernels.column_sums(to_numpy(grad), to_numpy(x), mean, rstd)
    unit = (x.double() - centre[:, None]) * scale[:, None]
    for value, terms in zip(sums, (grad.double(), grad.double() * unit), strict=True):
        case.close(value, terms.sum(0), 32)


def test_silu_adds_what_the_samples_of_a_position_share(case: Case) -> None:
    x, shared = case.draw(case.rows, case.size), case.draw(case.rows // case.samples, case.size)
    total, activated = case.kernels.silu(to_numpy(x), to_numpy(shared), case.samples)
    exact = x.double() + shared.double().repeat_interleave(case.samples, 0)
    case.close(total, exact)
    case.close(activated, F.silu(exact))
    alone, activated = case.kernels.silu(to_numpy(x), to_numpy(x[:0]), case.samples)
    case.close(alone, x.double(), 0.0)
    case.close(activated, F.silu(x.double()))


def test_gradient_of_silu(case: Case) -> None:
    x, grad = case.draw(case.rows, case.size), case.draw(case.rows, case.size)
    wide = x.to(torch.float64, copy=True).requires_grad_()
    (exact,) = torch.autograd.grad(F.silu(wide), wide, grad.double())
    actual, activated = case.kernels.silu_backward(to_numpy(x), to_numpy(grad))
    case.close(actual, exact)
    case.close(activated, F.silu(x.double()))


def test_gate_and_its_gradient(case: Case) -> None:
    gate_up, x = case.draw(case.rows, 2 * case.size), case.draw(case.rows, case.size)
    bias, grad = case.draw(case.size), case.draw(case.rows, case.size)
    wide = gate_up.to(torch.float64, copy=True).requires_grad_()
    gate, up = wide.chunk(2, dim=1)
    exact = F.silu(gate) * up
    product, out = case.kernels.gated(to_numpy(gate_up), to_numpy(x), to_numpy(bias))
    case.close(product, exact.detach())
    case.close(out, x.double() + bias.double())
    again, actual = case.kernels.gated_backward(to_numpy(gate_up), to_numpy(grad))
    case.close(again, exact.detach())
    case.close(actual, torch.autograd.grad(exact, wide, grad.double())[0])


def test_sum_over_the_samples_of_a_position(case: Case) -> None:
    rows = case.draw(case.rows, case.size)
    exact = rows.double().view(-1, case.samples, case.size).sum(1)
    case.close(case.kernels.sample_sum(to_numpy(rows), case.samples), exact)
