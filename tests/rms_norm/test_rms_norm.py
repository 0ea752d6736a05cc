"""rms_norm against float64, as an operator, and as a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import calm_kernels
from calm_kernels.nn import RMSNorm
from calm_kernels.ops.rms_norm import rms_norm

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 7), (127, 64), (33, 258), (4097, 16), (2, 3, 40), (0, 8)]
BACKENDS = ["auto", "reference"]


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient of the output, every one random."""
    generator = torch.Generator().manual_seed(shape[0] + shape[-1])

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return normal(*shape) * 3, normal(shape[-1]) + 1, normal(*shape)


def forward_and_gradients(function, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, eps=EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_no_larger_than_those_of_torch(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    given = tensors(shape, dtype)
    exact = forward_and_gradients(plain, *(t.double() for t in given))
    theirs = forward_and_gradients(plain, *given)
    with calm_kernels.backend(backend):
        results = forward_and_gradients(ours, *given)
    ulp = torch.finfo(dtype).eps
    for result, their, right in zip(results, theirs, exact, strict=True):
        assert result.shape == right.shape and result.dtype == dtype
        if right.numel() == 0:
            continue
        bound = max(1.5 * float((their.double() - right).norm()), ulp * float(right.norm()))
        assert float((result.double() - right).norm()) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_agree_with_finite_differences(backend: str) -> None:
    x, weight, _ = tensors((5, 6), torch.float64)
    with calm_kernels.backend(backend):
        assert torch.autograd.gradcheck(ours, (x.requires_grad_(), weight.requires_grad_()))


def test_native_and_reference_agree_and_a_row_of_zeros_is_finite() -> None:
    x, weight, grad = tensors((37, 129), torch.float32)
    x[5] = 0.0
    with calm_kernels.backend("reference"):
        expected = forward_and_gradients(ours, x, weight, grad)
    for result, right in zip(forward_and_gradients(ours, x, weight, grad), expected, strict=True):
        assert result.isfinite().all()
        torch.testing.assert_close(result, right, rtol=2e-6, atol=2e-6 * float(right.abs().max()))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    given = tensors((4097, 96), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = forward_and_gradients(ours, *given)
        torch.set_num_threads(2)
        for one, two in zip(alone, forward_and_gradients(ours, *given), strict=True):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(before)


def test_strided_and_expanded_inputs_are_read_right() -> None:
    wide, weight, grad = tensors((9, 12), torch.float32)
    for x in (wide.t().contiguous().t(), wide[::2], wide[:1].expand(9, 12)):
        passed = grad[: len(x)].t().contiguous().t()
        expected = forward_and_gradients(plain, x.double(), weight.double(), passed.double())
        for one, two in zip(forward_and_gradients(ours, x, weight, passed), expected, strict=True):
            torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-5)


def test_the_operators_pass_opcheck() -> None:
    for rows in (4, 0):
        x, weight, grad = tensors((rows, 6), torch.float32)
        x.requires_grad_(rows > 0)
        operators = torch.ops.calm_kernels
        for overload in (operators.rms_norm.default, operators.rms_norm.reference):
            torch.library.opcheck(overload, (x, weight, EPS))
        rstd = torch.rand(rows)
        arguments = (grad, x.detach(), weight, rstd)
        torch.library.opcheck(operators.rms_norm_backward.reference, arguments)


def test_compiled_equals_eager() -> None:
    given = tensors((11, 24), torch.float32)
    eager = forward_and_gradients(ours, *given)
    compiled = forward_and_gradients(torch.compile(ours, fullgraph=True), *given)
    for one, two in zip(eager, compiled, strict=True):
        assert torch.equal(one, two)


def test_the_layer_keeps_the_dtype_of_its_input_under_autocast() -> None:
    layer = RMSNorm(16, eps=EPS)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rms_norm(x, layer.weight.bfloat16(), eps=EPS))
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("x", "weight", "error", "words"),
    [
        (torch.ones(2, 3), torch.ones(4), ValueError, "weight"),
        (torch.ones(2, 3), torch.ones(3).double(), TypeError, "weight"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(3), TypeError, "x"),
        (torch.ones(2, 0), torch.ones(0), ValueError, "at least 1"),
    ],
)
def test_wrong_arguments_are_named(
    x: Tensor, weight: Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rms_norm(x, weight)
