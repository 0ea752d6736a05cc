"""The energy head's block as an operator: values, gradients, and how it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import calm_kernels
from calm_kernels.ops.energy_head import energy_head_block

EPS = 1e-6
SHAPES = [(5, 3, 10), (1, 1, 1), (7, 8, 33), (150, 4, 64), (2, 700, 20)]
"""P, N, H: odd sizes, one block of rows, several, one whose positions are larger than a block."""
BACKENDS = ("native", "reference")


def draw_inputs(positions: int, samples: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (scale * torch.randn(*shape) + shift).to(dtype)

    narrow = size**-0.5
    return [
        draw(positions, samples, size, scale=2.0, shift=0.5),
        draw(positions, size),
        draw(size, scale=0.3, shift=1.0),
        draw(size, scale=0.3),
        draw(size, 2 * size, scale=narrow),
        draw(size, scale=0.3),
        draw(size, size, scale=narrow),
        draw(size, scale=0.3),
        draw(2 * size, size, scale=narrow),
        draw(2 * size, scale=0.3),
        draw(size, size, scale=narrow),
        draw(size, scale=0.3),
    ]


def plain(inputs: list[Tensor]) -> Tensor:
    """Every sample joined to its own copy of the condition."""
    e, condition, norm_w, norm_b, in_w, in_b, mid_w, mid_b, out_w, out_b, down_w, down_b = inputs
    normed = F.layer_norm(e, e.shape[-1:], norm_w, norm_b, EPS)
    x = torch.cat((normed, condition.unsqueeze(-2).expand_as(e)), dim=-1)
    x = F.silu(F.linear(F.silu(F.linear(x, in_w, in_b)), mid_w, mid_b))
    gate, up = F.linear(x, out_w, out_b).chunk(2, dim=-1)
    return e + F.linear(F.silu(gate) * up, down_w, down_b)


def results(function: Any, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_as_exact_as_those_of_plain_torch(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(sum(shape))
    inputs = draw_inputs(*shape, dtype)
    cotangent = torch.randn(*shape).to(dtype)
    exact = results(plain, [t.double() for t in inputs], cotangent.double())
    with calm_kernels.backend(backend):
        actual = results(lambda x: energy_head_block(*x), inputs, cotangent)
    unit = torch.finfo(dtype).eps
    rough = results(plain, inputs, cotangent)
    for i, (value, own, truth) in enumerate(zip(actual, rough, exact, strict=True)):
        assert value.dtype == dtype and value.shape == truth.shape
        if shape[2] == 1:
            # The norm of one element is its bias: gradients through it vanish but for rounding.
            torch.testing.assert_close(value.double(), truth, rtol=64 * unit, atol=64 * unit)
            continue
        if dtype == torch.float64:
            assert error(value, truth) <= 64 * unit, i
            continue
        assert error(value, truth) <= 1.5 * error(own, truth) + unit, i


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend: str) -> None:
    torch.manual_seed(1)
    inputs = [t.requires_grad_() for t in draw_inputs(2, 3, 4, torch.float64)]
    with calm_kernels.backend(backend):
        assert torch.autograd.gradcheck(energy_head_block, inputs, fast_mode=True)


def test_half_precision_is_served_natively() -> None:
    torch.manual_seed(2)
    inputs = draw_inputs(9, 3, 24, torch.float16)
    cotangent = torch.randn(9, 3, 24).half()
    exact = results(plain, [t.double() for t in inputs], cotangent.double())
    with calm_kernels.backend("native"):
        actual = results(lambda x: energy_head_block(*x), inputs, cotangent)
    for value, truth in zip(actual, exact, strict=True):
        assert error(value, truth) < 4e-3


def test_without_gradient_nothing_is_kept_and_the_result_is_the_same() -> None:
    inputs = draw_inputs(40, 16, 24, torch.float32)
    with torch.no_grad():
        frozen = energy_head_block(*inputs)
    inputs[4].requires_grad_()
    torch.testing.assert_close(energy_head_block(*inputs).detach(), frozen, rtol=1e-6, atol=1e-6)


def test_frozen_weights_get_no_gradient_and_inputs_the_same() -> None:
    inputs = draw_inputs(6, 5, 24, torch.float32)
    cotangent = torch.randn(6, 5, 24)
    expected = results(lambda x: energy_head_block(*x), inputs, cotangent)
    read = [t.clone().requires_grad_() for t in inputs[:2]]
    out = energy_head_block(*read, *inputs[2:])
    torch.testing.assert_close(list(torch.autograd.grad(out, read, cotangent)), expected[1:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows_and_zero_weight_gradients(backend: str) -> None:
    for positions, samples in ((0, 3), (4, 0)):
        inputs = draw_inputs(positions, samples, 8, torch.float32)
        with calm_kernels.backend(backend):
            values = results(lambda x: energy_head_block(*x), inputs, inputs[0])
        assert values[0].shape == (positions, samples, 8)
        assert all(not gradient.any() for gradient in values[3:])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(4)
    inputs = draw_inputs(96, 8, 32, torch.float32)
    cotangent = torch.randn(96, 8, 32)
    threads = torch.get_num_threads()
    values = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            values.append(results(lambda x: energy_head_block(*x), inputs, cotangent))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_operator_passes_opcheck(overload: str) -> None:
    inputs = draw_inputs(3, 2, 6, torch.float32)
    rows = [inputs[0].flatten(0, 1), *inputs[1:]]
    operator = getattr(torch.ops.calm_kernels.energy_head_block, overload)
    for arguments in (rows, [t.clone().requires_grad_() for t in rows]):
        torch.library.opcheck(operator, (*arguments, EPS, True))
    kept = operator(*rows, EPS, True)
    backward = getattr(torch.ops.calm_kernels.energy_head_block_backward, overload)
    for weight_grads in (True, False):
        torch.library.opcheck(backward, (kept[0], *rows, *kept[1:], EPS, weight_grads))


@pytest.mark.parametrize("dynamic", [False, True])
def test_block_compiles_whole(dynamic: bool) -> None:
    torch.manual_seed(5)
    inputs = draw_inputs(4, 3, 8, torch.float32)
    cotangent = torch.randn(4, 3, 8)
    compiled = torch.compile(
        energy_head_block, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    torch.testing.assert_close(
        results(lambda x: compiled(*x), inputs, cotangent),
        results(lambda x: energy_head_block(*x), inputs, cotangent),
    )


def test_a_gradient_without_kept_activations_is_refused() -> None:
    rows = draw_inputs(3, 2, 6, torch.float32)
    rows[0] = rows[0].flatten(0, 1).requires_grad_()
    out = torch.ops.calm_kernels.energy_head_block(*rows, EPS, False)[0]
    with pytest.raises(RuntimeError, match="save_activations=True"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("index", "value", "expected", "message"),
    [
        (0, torch.zeros(2, 6, dtype=torch.int64), TypeError, "^e:"),
        (1, torch.zeros(4, 6), ValueError, "^condition:"),
        (4, torch.zeros(6, 6), ValueError, "^in_weight:"),
        (8, torch.zeros(6, 6), ValueError, "^out_weight:"),
        (11, torch.zeros(6, dtype=torch.float64), TypeError, "^down_bias:"),
    ],
)
def test_block_names_what_is_wrong(
    index: int, value: Tensor, expected: type[Exception], message: str
) -> None:
    inputs = draw_inputs(3, 2, 6, torch.float32)
    inputs[index] = value
    with pytest.raises(expected, match=message):
        energy_head_block(*inputs)
