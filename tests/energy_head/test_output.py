"""The energy head's last layers as an operator: values, gradients, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import calm_kernels
from calm_kernels.ops.energy_head_output import energy_head_output, why_not_output

EPS = 1e-6
SHAPES = [
    (5, 33, 7),
    (17, 13, 13),
    (29, 17, 41),
    (1100, 21, 9),  # more rows than two blocks, the last one not full
    (601, 97, 5),  # products of this library's own, for some of the weights
    (601, 65, 131),  # and for all of them
    (530, 64, 64),
    (203, 40, 70),
    (3, 9, 1),
]
"""Rows, H, D."""
BACKENDS = ("native", "reference")
NAMES = ("norm_weight", "norm_bias", "hidden_weight", "hidden_bias", "latent_weight", "latent_bias")
Function = Callable[..., Tensor]


def draw_inputs(rows: int, size: int, latent_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows and the six weights."""

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (scale * torch.randn(*shape) + shift).to(dtype)

    return [
        draw(rows, size, scale=2.0, shift=0.5),
        draw(size, scale=0.3, shift=1.0),
        draw(size, scale=0.3),
        draw(size, size, scale=size**-0.5),
        draw(size, scale=0.3),
        draw(latent_size, size, scale=size**-0.5),
        draw(latent_size, scale=0.3),
    ]


def plain(
    e: Tensor,
    norm_w: Tensor,
    norm_b: Tensor,
    hidden_w: Tensor,
    hidden_b: Tensor,
    latent_w: Tensor,
    latent_b: Tensor,
    eps: float = EPS,
) -> Tensor:
    normed = F.layer_norm(e, norm_w.shape, norm_w, norm_b, eps)
    return F.linear(F.silu(F.linear(normed, hidden_w, hidden_b)), latent_w, latent_b)


def results(function: Function, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    wanted = [t.detach().requires_grad_() for t in inputs]
    out = function(*wanted)
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent.to(out.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_as_exact_as_those_of_plain_torch(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    unit = torch.finfo(dtype).eps
    # Squared errors over a few draws: few numbers of either side may round luckily.
    squares = torch.zeros(3, 2 + len(NAMES), dtype=torch.float64)
    for seed in range(1 + 200 // shape[0]):
        torch.manual_seed(100 * seed + sum(shape))
        inputs = draw_inputs(*shape, dtype)
        cotangent = torch.randn(shape[0], shape[2]).to(dtype)
        exact = results(plain, [t.double() for t in inputs], cotangent.double())
        with calm_kernels.backend(backend):
            actual = results(energy_head_output, inputs, cotangent)
        rough = results(plain, inputs, cotangent)
        for i, (value, own, truth) in enumerate(zip(actual, rough, exact, strict=True)):
            assert value.dtype == dtype and value.shape == truth.shape
            squares[0, i] += (value.double() - truth).square().sum()
            squares[1, i] += (own.double() - truth).square().sum()
            squares[2, i] += truth.square().sum()
    error, own_error = (squares[:2] / squares[2]).sqrt()
    bound = 1.5 * own_error + unit if dtype != torch.float64 else torch.full_like(error, 64 * unit)
    for name, value, most in zip(("latents", "e", *NAMES), error, bound, strict=True):
        assert value <= most, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_one_feature_the_norm_is_its_bias(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    inputs = draw_inputs(6, 1, 3, dtype)
    cotangent = torch.randn(6, 3).to(dtype)
    exact = results(plain, [t.double() for t in inputs], cotangent.double())
    with calm_kernels.backend(backend):
        actual = results(energy_head_output, inputs, cotangent)
    # What vanishes but for rounding is enlarged by the norm's factor, eps^-1/2.
    close = 2 * EPS**-0.5 * torch.finfo(dtype).eps
    for value, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=close, atol=close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend: str) -> None:
    torch.manual_seed(2)
    inputs = [t.requires_grad_() for t in draw_inputs(5, 4, 3, torch.float64)]
    with calm_kernels.backend(backend):
        assert torch.autograd.gradcheck(energy_head_output, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_served(backend: str) -> None:
    torch.manual_seed(3)
    inputs = draw_inputs(39, 24, 7, torch.float16)
    cotangent = torch.randn(39, 7).half()
    exact = results(plain, [t.double() for t in inputs], cotangent.double())
    with calm_kernels.backend(backend):
        actual = results(energy_head_output, inputs, cotangent)
    for value, truth in zip(actual, exact, strict=True):
        assert value.dtype == torch.float16
        assert (value.double() - truth).norm() < 4e-3 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_added_to_the_variance(backend: str) -> None:
    torch.manual_seed(4)
    inputs = draw_inputs(7, 9, 5, torch.float64)
    cotangent = torch.randn(7, 5, dtype=torch.float64)
    expected = results(lambda *t: plain(*t, eps=0.5), inputs, cotangent)
    with calm_kernels.backend(backend):
        actual = results(lambda *t: energy_head_output(*t, eps=0.5), inputs, cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_without_gradient_nothing_is_kept_and_the_result_is_the_same() -> None:
    torch.manual_seed(5)
    inputs = draw_inputs(640, 33, 7, torch.float32)
    with torch.no_grad():
        frozen = energy_head_output(*inputs)
    inputs[3].requires_grad_()
    torch.testing.assert_close(energy_head_output(*inputs).detach(), frozen, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 33, 7), (130, 65, 70)])
def test_frozen_weights_get_no_gradient_and_rows_the_same(
    backend: str, shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(6)
    e, *weights = draw_inputs(*shape, torch.float32)
    cotangent = torch.randn(shape[0], shape[2])
    with calm_kernels.backend(backend):
        expected = results(energy_head_output, [e, *weights], cotangent)[1]
        e.requires_grad_()
        energy_head_output(e, *weights).backward(cotangent)
    torch.testing.assert_close(e.grad, expected)
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", NAMES)
def test_the_gradient_of_a_weight_alone_is_the_same(backend: str, wanted: str) -> None:
    torch.manual_seed(7)
    inputs = draw_inputs(30, 33, 7, torch.float32)
    cotangent = torch.randn(30, 7)
    place = 1 + NAMES.index(wanted)
    with calm_kernels.backend(backend):
        expected = results(energy_head_output, inputs, cotangent)[1 + place]
        inputs[place].requires_grad_()
        out = energy_head_output(*inputs)
        (alone,) = torch.autograd.grad(out, inputs[place], cotangent)
    torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows_and_zero_gradients(backend: str) -> None:
    inputs = draw_inputs(0, 8, 3, torch.float32)
    with calm_kernels.backend(backend):
        values = results(energy_head_output, inputs, torch.zeros(0, 3))
    assert values[0].shape == (0, 3)
    for gradient, tensor in zip(values[1:], inputs, strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize(("size", "latent_size"), [(33, 7), (65, 70)])
def test_results_do_not_depend_on_the_number_of_threads(size: int, latent_size: int) -> None:
    torch.manual_seed(8)
    inputs = draw_inputs(1551, size, latent_size, torch.float32)
    cotangent = torch.randn(1551, latent_size)
    threads = torch.get_num_threads()
    values = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            values.append(results(energy_head_output, inputs, cotangent))
    finally:
        torch.set_num_threads(threads)
    # With more threads blocks have more rows, and sums another order.
    for other in values[1:]:
        for value, first in zip(other, values[0], strict=True):
            assert (value - first).norm() <= 3e-6 * first.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "latent_size"), [(9, 4), (65, 70)])
def test_strides_do_not_matter(backend: str, size: int, latent_size: int) -> None:
    torch.manual_seed(9)
    inputs = draw_inputs(210, size, latent_size, torch.float32)
    cotangent = torch.randn(210, latent_size)
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    spread = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in inputs]
    assert not any(t.is_contiguous() for t in spread)
    slow = cotangent.t().contiguous().t()
    with calm_kernels.backend(backend):
        expected = results(energy_head_output, inputs, cotangent)
        for other in (turned, spread):
            actual = results(energy_head_output, other, slow)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_rows(backend: str) -> None:
    e, *weights = draw_inputs(24, 8, 3, torch.float32)
    with calm_kernels.backend(backend):
        expected = energy_head_output(e, *weights)
        assert torch.equal(
            energy_head_output(e.view(2, 3, 4, 8), *weights), expected.view(2, 3, 4, 3)
        )
        single = energy_head_output(e[5], *weights)
    torch.testing.assert_close(single, expected[5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_all_tensors(backend: str) -> None:
    torch.manual_seed(10)
    inputs = draw_inputs(30, 33, 7, torch.float32)
    cotangent = torch.randn(30, 7)
    with calm_kernels.backend(backend):
        expected = results(energy_head_output, [t.bfloat16() for t in inputs], cotangent)
        with torch.autocast("cpu", torch.bfloat16):
            actual = results(energy_head_output, inputs, cotangent)
    assert actual[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in actual[1:])
    for value, other in zip(actual, expected, strict=True):
        assert torch.equal(value, other.to(value.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_inside_autocast_is_that_outside(backend: str) -> None:
    inputs = [t.requires_grad_() for t in draw_inputs(30, 33, 7, torch.float32)]
    cotangent = torch.randn(30, 7)
    with calm_kernels.backend(backend):
        out = energy_head_output(*inputs)
        expected = torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            actual = torch.autograd.grad(out, inputs, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_operator_passes_opcheck(overload: str) -> None:
    inputs = draw_inputs(7, 6, 4, torch.float32)
    operator = getattr(torch.ops.calm_kernels.energy_head_output, overload)
    for arguments in (inputs, [t.clone().requires_grad_() for t in inputs]):
        torch.library.opcheck(operator, (*arguments, EPS, True))
    latents, hidden = operator(*inputs, EPS, True)
    backward = getattr(torch.ops.calm_kernels.energy_head_output_backward, overload)
    for weight_grads in (True, False):
        torch.library.opcheck(backward, (latents, *inputs, hidden, EPS, weight_grads))


@pytest.mark.parametrize("dynamic", [False, True])
def test_output_compiles_whole(dynamic: bool) -> None:
    torch.manual_seed(11)
    inputs = draw_inputs(12, 8, 3, torch.float32)
    cotangent = torch.randn(12, 3)
    compiled = torch.compile(
        energy_head_output, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    torch.testing.assert_close(
        results(compiled, inputs, cotangent), results(energy_head_output, inputs, cotangent)
    )


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_a_gradient_without_kept_activations_is_refused(overload: str) -> None:
    e, *weights = draw_inputs(7, 6, 4, torch.float32)
    operator = getattr(torch.ops.calm_kernels.energy_head_output, overload)
    latents, hidden = operator(e.requires_grad_(), *weights, EPS, False)
    assert hidden.shape == (0, 6)
    with pytest.raises(RuntimeError, match="save_activations=True"):
        latents.sum().backward()


@pytest.mark.parametrize(
    ("index", "value", "expected", "message"),
    [
        (0, torch.zeros(7, 6, dtype=torch.int64), TypeError, "^e:"),
        (0, torch.zeros(7, 5), ValueError, r"^latent_weight: expected shape \[D, 5\]"),
        (0, torch.zeros(7, 6).double(), TypeError, "^norm_weight: .* that of e"),
        (1, torch.zeros(5), ValueError, "^norm_weight:"),
        (2, torch.zeros(1, 6), ValueError, "^norm_bias:"),
        (3, torch.zeros(4, 6), ValueError, "^hidden_weight:"),
        (4, torch.zeros(6, dtype=torch.bfloat16), TypeError, "^hidden_bias: .* that of e"),
        (5, torch.zeros(4, 5), ValueError, "^latent_weight:"),
        (5, torch.zeros(5, 6), ValueError, r"^latent_bias: expected shape \[5\]; got \[4\]"),
        (5, torch.zeros(4, 6, device="meta"), ValueError, "^latent_weight: expected device cpu"),
        (6, torch.zeros(4, dtype=torch.int32), TypeError, "^latent_bias:"),
    ],
)
def test_output_names_what_is_wrong(
    index: int, value: Tensor, expected: type[Exception], message: str
) -> None:
    inputs = draw_inputs(7, 6, 4, torch.float32)
    inputs[index] = value
    with pytest.raises(expected, match=message):
        energy_head_output(*inputs)


def test_why_it_does_not_serve_is_said() -> None:
    _, *weights = draw_inputs(7, 6, 4, torch.float32)
    with calm_kernels.backend("native"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert why_not_output([weight.to(dtype) for weight in weights]) is None
        mixed = [*weights[:-1], weights[-1].bfloat16()]
        assert why_not_output(mixed) == "weights are torch.bfloat16, not torch.float32"
        far = [weight.to("meta") for weight in weights]
        assert "meta tensors" in (why_not_output(far) or "")
    with calm_kernels.backend("reference"):
        assert why_not_output(weights) == "backend 'reference' is forced"
