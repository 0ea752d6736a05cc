"""The energy head's first block, from the noise on: values, gradients, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import calm_kernels
from calm_kernels.ops.energy_head import energy_head_first_block, why_not_first_block

EPS = 1e-6
SHAPES = [
    (5, 3, 7, 33),  # a block of rows that is not full
    (6, 5, 40, 13),  # more noise than features
    (37, 23, 5, 65),  # more rows than one block, the last one not full; a multiple of no task
    (2, 700, 9, 21),  # a position larger than a block
    (150, 4, 64, 64),  # the next three are as wide as products of this library's own
    (40, 20, 16, 97),
    (41, 17, 71, 67),
]
"""P, N, E, H."""
BACKENDS = ("native", "reference")
NAMES = (
    "embed_weight", "embed_bias", "embed_norm_weight", "embed_norm_bias", "norm_weight",
    "norm_bias", "in_weight", "in_bias", "mid_weight", "mid_bias", "out_weight", "out_bias",
    "down_weight", "down_bias",
)  # fmt: skip
Function = Callable[..., Tensor]


def draw_inputs(
    positions: int, samples: int, noise_size: int, size: int, dtype: torch.dtype
) -> list[Tensor]:
    """Noise, condition and the fourteen weights."""

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (scale * torch.randn(*shape) + shift).to(dtype)

    narrow = size**-0.5
    return [
        (torch.rand(positions, samples, noise_size) - 0.5).to(dtype),
        draw(positions, size),
        draw(size, noise_size, scale=noise_size**-0.5),
        draw(size, scale=0.3),
        draw(size, scale=0.3, shift=1.0),
        draw(size, scale=0.3),
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


def ours(noise: Tensor, condition: Tensor, *weights: Tensor, eps: float = EPS) -> Tensor:
    return energy_head_first_block(noise, condition, weights, eps=eps)


def plain(noise: Tensor, condition: Tensor, *weights: Tensor, eps: float = EPS) -> Tensor:
    """Layer after layer, every sample joined to its own copy of the condition."""
    embed_w, embed_b, embed_norm_w, embed_norm_b, norm_w, norm_b, *mlp = weights
    in_w, in_b, mid_w, mid_b, out_w, out_b, down_w, down_b = mlp
    size = embed_b.shape
    e = F.layer_norm(F.linear(noise, embed_w, embed_b), size, embed_norm_w, embed_norm_b, eps)
    normed = F.layer_norm(e, size, norm_w, norm_b, eps)
    x = torch.cat((normed, condition.unsqueeze(-2).expand_as(e)), dim=-1)
    x = F.silu(F.linear(F.silu(F.linear(x, in_w, in_b)), mid_w, mid_b))
    gate, up = F.linear(x, out_w, out_b).chunk(2, dim=-1)
    return e + F.linear(F.silu(gate) * up, down_w, down_b)


def results(function: Function, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The result and the gradients of the condition and of the weights."""
    noise = inputs[0].detach()
    wanted = [t.detach().requires_grad_() for t in inputs[1:]]
    out = function(noise, *wanted)
    return [out.detach(), *torch.autograd.grad(out, wanted, cotangent.to(out.dtype))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_gradients_are_as_exact_as_those_of_plain_torch(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    unit = torch.finfo(dtype).eps
    # Squared errors over a few draws: few numbers of either side may round luckily.
    squares = torch.zeros(3, 2 + len(NAMES), dtype=torch.float64)
    for seed in range(1 + 200 // (shape[0] * shape[1])):
        torch.manual_seed(100 * seed + sum(shape))
        inputs = draw_inputs(*shape, dtype)
        cotangent = torch.randn(*shape[:2], shape[3]).to(dtype)
        exact = results(plain, [t.double() for t in inputs], cotangent.double())
        with calm_kernels.backend(backend):
            actual = results(ours, inputs, cotangent)
        rough = results(plain, inputs, cotangent)
        for i, (value, own, truth) in enumerate(zip(actual, rough, exact, strict=True)):
            assert value.dtype == dtype and value.shape == truth.shape
            squares[0, i] += (value - truth).square().sum()
            squares[1, i] += (own - truth).square().sum()
            squares[2, i] += truth.square().sum()
    error, own_error = (squares[:2] / squares[2]).sqrt()
    bound = 1.5 * own_error + unit if dtype == torch.float32 else torch.full_like(error, 64 * unit)
    for name, value, most in zip(("out", "condition", *NAMES), error, bound, strict=True):
        assert value <= most, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_one_feature_both_norms_are_their_biases(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    inputs = draw_inputs(4, 5, 3, 1, dtype)
    cotangent = torch.randn(4, 5, 1).to(dtype)
    exact = results(plain, [t.double() for t in inputs], cotangent.double())
    with calm_kernels.backend(backend):
        actual = results(ours, inputs, cotangent)
    # What vanishes but for rounding is enlarged by the norm's factor, eps^-1/2.
    close = 2 * EPS**-0.5 * torch.finfo(dtype).eps
    for value, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=close, atol=close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend: str) -> None:
    torch.manual_seed(2)
    noise, *wanted = draw_inputs(2, 3, 4, 5, torch.float64)
    wanted = [t.requires_grad_() for t in wanted]
    with calm_kernels.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: ours(noise, *t), wanted, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_eps_is_added_to_both_variances(backend: str, eps: float) -> None:
    torch.manual_seed(3)
    inputs = draw_inputs(4, 3, 7, 9, torch.float64)
    cotangent = torch.randn(4, 3, 9, dtype=torch.float64)
    expected = results(lambda *t: plain(*t, eps=eps), inputs, cotangent)
    with calm_kernels.backend(backend):
        actual = results(lambda *t: ours(*t, eps=eps), inputs, cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_all_features_share_is_taken_off_by_the_first_norm(backend: str) -> None:
    torch.manual_seed(4)
    inputs = draw_inputs(9, 5, 7, 33, torch.float64)
    cotangent = torch.randn(9, 5, 33, dtype=torch.float64)
    shifted = list(inputs)
    shifted[2] = inputs[2] + torch.randn(7, dtype=torch.float64)
    shifted[3] = inputs[3] + 3.0
    with calm_kernels.backend(backend):
        before, after = (results(ours, each, cotangent) for each in (inputs, shifted))
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)
    for gradient in before[2:4]:
        assert gradient.sum(dim=0).abs().max() < 1e-12 * gradient.abs().sum()


def test_without_gradient_nothing_is_kept_and_the_result_is_the_same() -> None:
    torch.manual_seed(5)
    inputs = draw_inputs(40, 16, 7, 33, torch.float32)
    with torch.no_grad():
        frozen = ours(*inputs)
    inputs[8].requires_grad_()
    torch.testing.assert_close(ours(*inputs).detach(), frozen, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_get_no_gradient_and_the_condition_the_same(backend: str) -> None:
    torch.manual_seed(6)
    noise, condition, *weights = draw_inputs(6, 5, 7, 33, torch.float32)
    cotangent = torch.randn(6, 5, 33)
    with calm_kernels.backend(backend):
        expected = results(ours, [noise, condition, *weights], cotangent)[1]
        condition.requires_grad_()
        ours(noise, condition, *weights).backward(cotangent)
    torch.testing.assert_close(condition.grad, expected)
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", NAMES)
def test_the_gradient_of_a_weight_alone_is_the_same(backend: str, wanted: str) -> None:
    torch.manual_seed(7)
    inputs = draw_inputs(6, 5, 7, 33, torch.float32)
    cotangent = torch.randn(6, 5, 33)
    place = 2 + NAMES.index(wanted)
    with calm_kernels.backend(backend):
        expected = results(ours, inputs, cotangent)[place]
        inputs[place].requires_grad_()
        (alone,) = torch.autograd.grad(ours(*inputs), inputs[place], cotangent)
    torch.testing.assert_close(alone, expected)


def test_noise_gets_no_gradient_and_that_is_said() -> None:
    noise, condition, *weights = draw_inputs(3, 2, 4, 6, torch.float32)
    noise.requires_grad_()
    with pytest.raises(ValueError, match="noise: it gets no gradient"):
        energy_head_first_block(noise, condition, weights)
    with torch.no_grad():
        assert energy_head_first_block(noise, condition, weights).shape == (3, 2, 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows_and_zero_gradients(backend: str) -> None:
    for positions, samples in ((0, 3), (4, 0)):
        inputs = draw_inputs(positions, samples, 3, 8, torch.float32)
        with calm_kernels.backend(backend):
            values = results(ours, inputs, torch.zeros(positions, samples, 8))
        assert values[0].shape == (positions, samples, 8)
        for gradient, tensor in zip(values[1:], inputs[1:], strict=True):
            assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("size", [33, 65])
def test_results_do_not_depend_on_the_number_of_threads(size: int) -> None:
    torch.manual_seed(8)
    inputs = draw_inputs(97, 16, 7, size, torch.float32)
    cotangent = torch.randn(97, 16, size)
    threads = torch.get_num_threads()
    values = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            values.append(results(ours, inputs, cotangent))
    finally:
        torch.set_num_threads(threads)
    # With more threads blocks have more rows, and sums another order.
    for other in values[1:]:
        for value, first in zip(other, values[0], strict=True):
            assert (value - first).norm() <= 3e-6 * first.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [9, 65])
def test_strides_do_not_matter(backend: str, size: int) -> None:
    torch.manual_seed(9)
    inputs = draw_inputs(70, 3, 6, size, torch.float32)
    cotangent = torch.randn(70, 3, size)
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    spread = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in inputs]
    assert not any(t.is_contiguous() for t in spread)
    slow = cotangent.transpose(0, 1).contiguous().transpose(0, 1)
    with calm_kernels.backend(backend):
        expected = results(ours, inputs, cotangent)
        for other in (turned, spread):
            actual = results(ours, other, slow)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_are_positions(backend: str) -> None:
    noise, condition, *weights = draw_inputs(6, 5, 3, 8, torch.float32)
    with calm_kernels.backend(backend):
        expected = ours(noise, condition, *weights)
        folded = ours(noise.view(2, 3, 5, 3), condition.view(2, 3, 8), *weights)
        single = ours(noise[1], condition[1], *weights)
    assert torch.equal(folded, expected.view(2, 3, 5, 8))
    torch.testing.assert_close(single, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    torch.manual_seed(10)
    inputs = draw_inputs(9, 5, 7, 33, torch.float32)
    cotangent = torch.randn(9, 5, 33)
    with calm_kernels.backend(backend):
        expected = results(ours, inputs, cotangent)
        with torch.autocast("cpu", torch.bfloat16):
            actual = results(ours, inputs, cotangent)
    for value, other in zip(actual, expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_operator_passes_opcheck(overload: str) -> None:
    noise, condition, *weights = draw_inputs(3, 2, 4, 6, torch.float32)
    noise = noise.flatten(0, 1)
    operator = getattr(torch.ops.calm_kernels.energy_head_first_block, overload)
    wanted = [t.clone().requires_grad_() for t in (condition, *weights)]
    for given in ([condition, *weights], wanted):
        torch.library.opcheck(operator, (noise, given[0], given[1:], EPS, True))
    out, *kept = operator(noise, condition, weights, EPS, True)
    backward = getattr(torch.ops.calm_kernels.energy_head_first_block_backward, overload)
    for weight_grads in (True, False):
        arguments = (out, noise, condition, weights, *kept, EPS, weight_grads)
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_block_compiles_whole(dynamic: bool) -> None:
    torch.manual_seed(11)
    inputs = draw_inputs(4, 3, 5, 8, torch.float32)
    cotangent = torch.randn(4, 3, 8)
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(
        results(compiled, inputs, cotangent), results(ours, inputs, cotangent)
    )


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_a_gradient_without_kept_activations_is_refused(overload: str) -> None:
    noise, condition, *weights = draw_inputs(3, 2, 4, 6, torch.float32)
    operator = getattr(torch.ops.calm_kernels.energy_head_first_block, overload)
    out, *kept = operator(noise.flatten(0, 1), condition.requires_grad_(), weights, EPS, False)
    assert all(len(tensor) == 0 for tensor in kept)
    with pytest.raises(RuntimeError, match="save_activations=True"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("index", "value", "expected", "message"),
    [
        (0, torch.zeros(3, 2, 4, dtype=torch.bfloat16), TypeError, "^noise:"),
        (0, torch.zeros(3, 2, 4, dtype=torch.float64), TypeError, "^condition: .* that of noise"),
        (0, torch.zeros(3, 2, 5), ValueError, r"^embed_weight: expected shape \[6, 5\]"),
        (1, torch.zeros(4, 6), ValueError, r"^condition: expected shape \[3, H\]"),
        (1, torch.zeros(3, 6, dtype=torch.float16), TypeError, "^condition:"),
        (2, torch.zeros(4, 6), ValueError, "^embed_weight:"),
        (4, torch.zeros(6, dtype=torch.float16), TypeError, "^embed_norm_weight:"),
        (5, torch.zeros(5), ValueError, "^embed_norm_bias:"),
        (6, torch.zeros(6, device="meta"), ValueError, "^norm_weight: expected device cpu"),
        (8, torch.zeros(6, 6), ValueError, "^in_weight:"),
        (12, torch.zeros(12, 6, dtype=torch.bfloat16), TypeError, "^out_weight:"),
        (15, torch.zeros(6, dtype=torch.float64), TypeError, "^down_bias: .* that of noise"),
        (15, torch.zeros(6, dtype=torch.int64), TypeError, "^down_bias:"),
    ],
)
def test_block_names_what_is_wrong(
    index: int, value: Tensor, expected: type[Exception], message: str
) -> None:
    inputs = draw_inputs(3, 2, 4, 6, torch.float32)
    inputs[index] = value
    with pytest.raises(expected, match=message):
        ours(*inputs)


def test_the_number_of_weights_is_checked() -> None:
    inputs = draw_inputs(3, 2, 4, 6, torch.float32)
    for wrong in (inputs[:-1], [*inputs, inputs[-1]]):
        with pytest.raises(
            ValueError, match=f"^weights: expected 14 tensors; got {len(wrong) - 2}"
        ):
            ours(*wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"^noise: expected dtype float32, float64; got"):
        ours(*draw_inputs(3, 2, 4, 6, dtype))


def test_why_it_does_not_serve_is_said() -> None:
    noise, _, *weights = draw_inputs(3, 2, 4, 6, torch.float32)
    weights = [weight.requires_grad_() for weight in weights]
    wide = [weight.double() for weight in weights]
    with calm_kernels.backend("native"):
        assert why_not_first_block(noise, weights) is None
        assert why_not_first_block(noise.double(), wide) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert why_not_first_block(noise, weights) == "autocast is on"
        mixed = [*weights[:-1], weights[-1].double()]
        assert "torch.float64, not torch.float32" in (why_not_first_block(noise, mixed) or "")
        far = [weight.to("meta") for weight in weights]
        assert "meta tensors" in (why_not_first_block(noise, far) or "")
        for dtype in (torch.bfloat16, torch.float16):
            narrow = [weight.to(dtype) for weight in weights]
            expected = f"weights are {dtype}, not float32 or float64"
            assert why_not_first_block(noise.to(dtype), narrow) == expected
        noise.requires_grad_()
        assert why_not_first_block(noise, weights) == "noise needs a gradient"
        with torch.no_grad():
            assert why_not_first_block(noise, weights) is None
    with calm_kernels.backend("reference"):
        reason = why_not_first_block(noise.detach(), weights)
    assert reason == "backend 'reference' is forced"
