"""The kernels of the gated feed-forward block on the host executor, against float64."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

# Largest error of the arithmetic over the largest value; then half a unit in the last place of what
# is stored, relative, and absolute below the smallest normal number.
ARITHMETIC = {"float32": 1e-6, "bfloat16": 1e-6, "float16": 1e-6, "float64": 1e-14}
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 0.0}
UNDERFLOW = {"float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-25, "float64": 0.0}
DTYPES = list(ARITHMETIC)
# Rows and size: fewer and more rows than a block's warps; odd sizes, pieces of 16 bytes for part of
# the lanes and for more than all of them.
SHAPES = [(3, 33), (11, 72), (1, 264)]
EPS = 1e-3


def normal(seed: int, dtype: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))


def bits(tensor: Tensor) -> np.ndarray:
    """NumPy's view; 16-bit values as uint16."""
    viewed = tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor
    result: np.ndarray = viewed.numpy()
    return result


def exact(tensor: Tensor) -> Tensor:
    return tensor.double().clone().requires_grad_()


def assert_rounded(array: np.ndarray, expected: Tensor, dtype: str) -> None:
    """The value in ``dtype`` is the exact one, up to the arithmetic's error and one rounding."""
    value = torch.from_numpy(array)
    value = value.view(getattr(torch, dtype)) if value.dtype == torch.uint16 else value
    expected = expected.detach()
    allowed = ARITHMETIC[dtype] * expected.abs().max() + ROUNDING[dtype] * expected.abs()
    error = (value.double() - expected).abs()
    assert (error <= allowed + UNDERFLOW[dtype]).all(), float((error - allowed).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_rms_norm_is_the_exact_norm_rounded_once(
    simt: ModuleType, rows: int, size: int, dtype: str
) -> None:
    x, weight = normal(0, dtype, rows, size), normal(1, dtype, size)
    kernel = getattr(simt, f"ffn_rms_norm_{dtype}")
    normed, rstd = kernel(bits(x), bits(weight), None, EPS, 1, 0, 0xA5)
    expected = rms_norm(x.double(), (size,), weight.double(), EPS)
    assert_rounded(normed, expected, dtype)
    mean_square = x.double().square().mean(dim=1)
    np.testing.assert_allclose(rstd, (mean_square + EPS).rsqrt().numpy(), rtol=3e-7)
    again, kept = kernel(bits(x), bits(weight), rstd, 77.0, 1, 3, 0)
    np.testing.assert_array_equal(again, normed)
    np.testing.assert_array_equal(kept, rstd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_swiglu_and_its_gradients_are_exact_up_to_rounding(
    simt: ModuleType, rows: int, size: int, dtype: str
) -> None:
    gate_up, grad = normal(2, dtype, rows, 2 * size) * 3, normal(3, dtype, rows, size)
    wide = exact(gate_up)
    gate, up = wide.chunk(2, dim=1)
    expected = silu(gate) * up
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    product = getattr(simt, f"ffn_swiglu_{dtype}")(bits(gate_up), 1, 1, 0xA5)
    assert_rounded(product, expected, dtype)
    kernel = getattr(simt, f"ffn_swiglu_backward_{dtype}")
    again, grads = kernel(bits(gate_up), bits(grad), 1, 2, 0xA5)
    np.testing.assert_array_equal(again, product)
    assert_rounded(grads, expected_grad, dtype)


@pytest.mark.parametrize(("in_shared", "residual"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_rms_norm_gradients_are_exact_up_to_rounding(
    simt: ModuleType, rows: int, size: int, dtype: str, in_shared: bool, residual: bool
) -> None:
    x, weight = normal(4, dtype, rows, size), normal(5, dtype, size)
    grad_out, grad_normed = normal(6, dtype, rows, size), normal(7, dtype, rows, size)
    wide_x, wide_weight = exact(x), exact(weight)
    normed = rms_norm(wide_x, (size,), wide_weight, EPS)
    loss = (normed * grad_normed.double()).sum()
    if residual:
        loss = loss + (wide_x * grad_out.double()).sum()
    expected_x, expected_weight = torch.autograd.grad(loss, (wide_x, wide_weight))
    rstd = (x.double().square().mean(dim=1) + EPS).rsqrt()
    rstd = rstd.to(torch.float64 if dtype == "float64" else torch.float32)
    kernel = getattr(simt, f"ffn_rms_norm_backward_{dtype}")
    inputs = [bits(t) for t in (x, weight, rstd, grad_out if residual else x[:0], grad_normed)]
    results = []
    for order, poison in ((0, 0xA5), (7, 0)):
        grad_x, grad_weight = kernel(*inputs, in_shared, 1, order, poison)
        assert_rounded(grad_x, expected_x, dtype)
        assert_rounded(grad_weight, expected_weight, dtype)
        results.append((grad_x, grad_weight))
    # The order of the sums over rows does not hang on the order in which warps run.
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


def test_sums_over_rows_go_through_every_block(simt: ModuleType) -> None:
    x, grad = normal(8, "float32", 29, 5), normal(9, "float32", 29, 5)
    weight, rstd = torch.ones(5), torch.ones(29)
    expected = (x.double() * grad.double()).sum(dim=0)
    for blocks in (1, 3):
        _, got = simt.ffn_rms_norm_backward_float32(
            *(bits(t) for t in (x, weight, rstd, grad, grad)), True, blocks, 5, 0xA5
        )
        assert_rounded(got, expected, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_swiglu_of_extreme_gates_neither_overflows_nor_becomes_nan(
    simt: ModuleType, dtype: str
) -> None:
    gate = torch.tensor([[-1e30, -800.0, -90.0, 0.0, 90.0, 800.0, 1e30, 1.0]])
    gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1).to(getattr(torch, dtype))
    product = getattr(simt, f"ffn_swiglu_{dtype}")(bits(gate_up), 1, 0, 0)
    expected = silu(gate.double()).numpy()
    np.testing.assert_allclose(product, expected, rtol=3e-7, atol=1e-36)
    ones = torch.ones(1, 8, dtype=gate_up.dtype)
    _, grads = getattr(simt, f"ffn_swiglu_backward_{dtype}")(bits(gate_up), bits(ones), 1, 0, 0)
    assert np.isfinite(grads).all()
    slopes = [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(grads[0, :7], slopes, rtol=1e-6, atol=1e-30)
