"""The Triton kernels of the gated feed-forward block, interpreted on CPU tensors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from calm_kernels.reference import gated_ffn as reference
from calm_kernels.triton.gated_ffn import packed_weights

EPS = 1e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, hidden and intermediate sizes: less than a tile, whole tiles, and odd ones with more.
SHAPES = [(1, 16, 16), (32, 32, 48), (37, 40, 51)]


@pytest.fixture
def matmuls(interpreted: Callable[..., ModuleType]) -> ModuleType:
    return interpreted("gated_ffn_matmuls")


@pytest.fixture
def norm(interpreted: Callable[..., ModuleType]) -> ModuleType:
    return interpreted("gated_ffn_norm")


def operands(rows: int, hidden: int, size: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = [
        2.0 * normal(rows, hidden),
        1.0 + 0.3 * normal(hidden),
        normal(size, hidden) * hidden**-0.5,
        normal(size, hidden) * hidden**-0.5,
        normal(hidden, size) * size**-0.5,
    ]
    return [t.to(dtype) for t in tensors]


def composition(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    normed = rms_norm(x, x.shape[-1:], norm, EPS)
    return x + linear(silu(linear(normed, gate)) * linear(normed, up), down)


def assert_as_close_as_plain(
    values: list[Tensor], plain: list[Tensor], exact: list[Tensor]
) -> None:
    # Single draws round luckily on either side: a quarter of the dtype's rounding comes on top.
    for value, other, truth in zip(values, plain, exact, strict=True):
        assert value.dtype == other.dtype and value.shape == truth.shape
        slack = 0.25 * torch.finfo(value.dtype).eps * truth.norm()
        error = (value.double() - truth).norm()
        assert error <= 1.5 * (other.double() - truth).norm() + slack


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_as_close_to_exact_as_plain_pytorch(
    matmuls: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype, save: bool
) -> None:
    x, norm, gate, up, down = tensors = operands(*shape, dtype)
    tiles = matmuls.Tiles(16, 32, 16, num_warps=1, num_stages=1)
    rstd = (x.float().square().mean(1) + EPS).rsqrt()
    weight = packed_weights(gate, up, norm)
    product, gate_up = matmuls.gate_up_product(x, weight, rstd, save, tiles)
    out = matmuls.down_with_residual(product, down, x, tiles)
    exact = composition(*(t.double() for t in tensors))
    assert_as_close_as_plain([out], [composition(*tensors)], [exact])
    assert gate_up.shape == (shape[0] if save else 0, 2 * shape[2])
    if save:
        normed = rms_norm(x.double(), (shape[1],), norm.double(), EPS)
        truth = linear(normed, torch.cat([gate, up]).double())
        plain = linear(rms_norm(x, (shape[1],), norm, EPS), torch.cat([gate, up]))
        assert_as_close_as_plain([gate_up], [plain], [truth])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_products_are_exact_up_to_rounding(
    matmuls: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, hidden, size = shape
    *_, down = operands(*shape, dtype)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(rows, hidden, generator=generator).to(dtype)
    gate_up = (2.0 * torch.randn(rows, 2 * size, generator=generator)).to(dtype)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, dim=1)
    truth = silu(gate) * up
    (expected,) = torch.autograd.grad(truth, wide, grad_out.double() @ down.double())
    tiles = matmuls.Tiles(16, 32, 16, num_warps=1, num_stages=1)
    product, grads = matmuls.product_gradient(grad_out, down, gate_up, tiles)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(product.double(), truth.detach(), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(grads.double(), expected, rtol=tolerance, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (33, 40), (67, 19)])
def test_norm_and_its_gradients_are_exact_up_to_rounding(
    norm: ModuleType, rows: int, size: int, dtype: torch.dtype
) -> None:
    x, weight = operands(rows, size, 1, dtype)[:2]
    generator = torch.Generator().manual_seed(2)
    grad_out, grad_normed = (
        torch.randn(rows, size, generator=generator).to(dtype) for _ in range(2)
    )
    wide = [t.double().requires_grad_() for t in (x, weight)]
    normed = rms_norm(wide[0], (size,), wide[1], EPS)
    loss = (normed * grad_normed.double()).sum() + (wide[0] * grad_out.double()).sum()
    expected = torch.autograd.grad(loss, wide)
    rstd = norm.normed_rstd(x, EPS)
    torch.testing.assert_close(rstd, (x.float().square().mean(1) + EPS).rsqrt())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    result = norm.normed_rows(x, weight, rstd)
    torch.testing.assert_close(result.double(), normed.detach(), rtol=tolerance, atol=1e-6)
    grads = norm.norm_gradient(x, weight, rstd, grad_out, grad_normed.clone())
    for grad, truth in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), truth, rtol=tolerance, atol=2e-5)


@pytest.fixture
def whole(
    interpreted: Callable[..., ModuleType],
    matmuls: ModuleType,
    norm: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> ModuleType:
    """The operator's implementation over interpreted kernels, at the tiles of a GPU."""
    for copy in (matmuls, norm):
        name = copy.__name__.removeprefix("interpreted_")
        monkeypatch.setitem(sys.modules, f"calm_kernels.triton.{name}", copy)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return interpreted("gated_ffn")


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("weight_grads", [True, False])
def test_the_operators_equal_the_reference(
    whole: ModuleType, weight_grads: bool, save: bool
) -> None:
    tensors = operands(35, 24, 40, torch.float32)
    grad_out = torch.randn(35, 24, generator=torch.Generator().manual_seed(3))
    results = [each.gated_ffn(*tensors, EPS, save) for each in (whole, reference)]
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)
    _, rstd, gate_up = results[0]
    arguments = (grad_out, *tensors, rstd, gate_up, weight_grads)
    grads = [each.gated_ffn_backward(*arguments) for each in (whole, reference)]
    for value, expected in zip(*grads, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("rows", "dtype"), [(0, torch.float32), (3, torch.float64)])
def test_what_no_kernel_serves_goes_to_the_reference(
    whole: ModuleType, rows: int, dtype: torch.dtype
) -> None:
    tensors = operands(rows, 8, 12, dtype)
    for value, expected in zip(
        whole.gated_ffn(*tensors, EPS, True), reference.gated_ffn(*tensors, EPS, True), strict=True
    ):
        assert torch.equal(value, expected)
