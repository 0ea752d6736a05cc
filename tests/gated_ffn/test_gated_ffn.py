from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu
from torch.utils._python_dispatch import TorchDispatchMode

import calm_kernels
from calm_kernels import _native
from calm_kernels.nn.gated_ffn import GatedFFN
from calm_kernels.ops.gated_ffn import gated_ffn

NAMES = ("x", "norm_weight", "gate_weight", "up_weight", "down_weight")
OPERATORS = torch.ops.calm_kernels
BACKENDS = ["reference"]
if _native.serves("calm_kernels::gated_ffn", "cpu"):
    BACKENDS.append("native")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest):
    with calm_kernels.backend(request.param):
        yield request.param


def operands(
    rows: int, hidden: int, intermediate: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Random x and weights, scaled as in a trained block; every one wants its gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [
        normal(rows, hidden) * (1.0 + torch.arange(rows).unsqueeze(1) % 3),
        1.0 + 0.3 * normal(hidden),
        normal(intermediate, hidden) * hidden**-0.5,
        normal(intermediate, hidden) * hidden**-0.5,
        normal(hidden, intermediate) * intermediate**-0.5,
    ]
    return [t.to(dtype).requires_grad_() for t in tensors]


def composition(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The plain PyTorch formulation."""
    normed = rms_norm(x, x.shape[-1:], norm, 1e-6)
    return x + linear(silu(linear(normed, gate)) * linear(normed, up), down)


def grad_of(rows: int, hidden: int) -> Tensor:
    """A gradient to come in."""
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(rows))


def outcome(function, tensors: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    """Result and gradients of all operands."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    grads = torch.autograd.grad(out, tensors, grad_out.to(out.dtype))
    return [out.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "hidden", "intermediate"),
    [(1, 8, 12), (3, 24, 7), (127, 64, 160), (40, 33, 65), (4097, 24, 33)],
)
def test_result_and_gradients_are_as_close_to_exact_as_plain_pytorch(
    rows: int, hidden: int, intermediate: int, dtype: torch.dtype
) -> None:
    # Squared errors over many draws: a single value of either side may round luckily.
    squares = torch.zeros(2, 1 + len(NAMES), dtype=torch.float64)
    for seed in range(1 + 300 // rows):
        tensors = operands(rows, hidden, intermediate, dtype, seed)
        incoming = grad_of(rows, hidden).to(dtype)
        exact = outcome(composition, [t.double() for t in tensors], incoming.double())
        for i, function in enumerate((gated_ffn, composition)):
            for j, (value, truth) in enumerate(
                zip(outcome(function, tensors, incoming), exact, strict=True)
            ):
                assert value.dtype == dtype
                squares[i, j] += (value.double() - truth).square().sum()
    ours, plain = squares.sqrt()
    assert (ours <= 1.5 * plain).all(), dict(zip(("out", *NAMES), ours / plain, strict=True))


def test_float64_gradients_pass_gradcheck() -> None:
    assert torch.autograd.gradcheck(gated_ffn, operands(3, 6, 5))


@pytest.mark.parametrize("wanted", NAMES)
def test_gradient_of_each_operand_alone_passes_gradcheck(wanted: str) -> None:
    tensors = [
        t.requires_grad_(name == wanted) for name, t in zip(NAMES, operands(2, 5, 3), strict=True)
    ]
    assert torch.autograd.gradcheck(gated_ffn, tensors)


def test_identity_weights_give_the_scalar_formula() -> None:
    x = torch.tensor([[3.0, -1.0, 0.5, 2.0]], dtype=torch.float64)
    one, identity = torch.ones(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    unit = x / (x.square().mean() + 0.25).sqrt()
    out = gated_ffn(x, one, identity, 2.0 * identity, identity, eps=0.25)
    expected = x + unit / (1.0 + (-unit).exp()) * (2.0 * unit)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)


def test_backends_agree_beyond_a_block_of_rows() -> None:
    # More rows than a block of the compiled backward, and a last block that is not full.
    tensors, grad_out = operands(2100, 17, 21), grad_of(2100, 17)
    ours = outcome(gated_ffn, tensors, grad_out)
    with calm_kernels.backend("reference"):
        expected = outcome(gated_ffn, tensors, grad_out)
    for value, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


def test_large_odd_sizes_are_as_close_to_exact_as_plain_pytorch() -> None:
    # Sums of several steps, and blocks and tiles that the sizes do not fill.
    tensors, incoming = operands(1101, 301, 530, torch.float32), grad_of(1101, 301)
    exact = outcome(composition, [t.double() for t in tensors], incoming.double())
    errors = [
        [float((a.double() - b).norm()) for a, b in zip(results, exact, strict=True)]
        for results in (outcome(f, tensors, incoming) for f in (gated_ffn, composition))
    ]
    for name, ours, plain in zip(("out", *NAMES), *errors, strict=True):
        assert ours <= 1.5 * plain, name


def test_calls_of_other_sizes_between_change_nothing() -> None:
    # Working memory is reused from call to call.
    shapes = [(130, 40, 70), (1, 8, 12), (300, 48, 96), (130, 40, 70)]
    found = [
        outcome(gated_ffn, operands(*shape, torch.float32), grad_of(*shape[:2])) for shape in shapes
    ]
    for first, last in zip(found[0], found[-1], strict=True):
        assert torch.equal(first, last)
    outs = [gated_ffn(*operands(130, 40, 70, torch.float32, seed)) for seed in (0, 1)]
    assert torch.equal(outs[0], found[0][0]) and not torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates_are_those_of_silu(dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e30, -800.0, -89.0, -87.5, 0.0, 60.0, 90.0, 1e30], dtype=dtype)
    one = torch.ones(1, dtype=dtype)
    # One hidden unit: n is 1 (eps 0), so every gate is its weight; up is 1.
    x, gate = one.reshape(1, 1), gates.reshape(-1, 1).clone().requires_grad_()
    down = torch.zeros(1, 8, dtype=dtype).requires_grad_()
    out = gated_ffn(x, one, gate, torch.ones(8, 1, dtype=dtype), down, eps=0.0)
    assert torch.equal(out, x)
    (products,) = torch.autograd.grad(out.sum(), down)
    torch.testing.assert_close(products[0], silu(gates), rtol=3e-7, atol=1e-35)
    out = gated_ffn(x, one, gate, torch.ones(8, 1, dtype=dtype), torch.ones_like(down), eps=0.0)
    (slopes,) = torch.autograd.grad(out.sum(), gate)
    wide = gates.double().requires_grad_()
    (expected,) = torch.autograd.grad(silu(wide).sum(), wide)
    torch.testing.assert_close(slopes[:, 0], expected.to(dtype), rtol=1e-6, atol=1e-30)


def test_zero_down_projection_returns_x_exactly() -> None:
    x, norm, gate, up, down = operands(5, 8, 12, torch.bfloat16)
    assert torch.equal(gated_ffn(x, norm, gate, up, torch.zeros_like(down)), x)


def test_large_16_bit_activations_do_not_overflow_in_the_norm() -> None:
    _, *weights = operands(1, 8, 12, torch.float16)
    x = torch.full((2, 8), 6e4, dtype=torch.float16)
    assert gated_ffn(x, *(w * 1e-3 for w in weights)).isfinite().all()


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    x, *weights = operands(24, 8, 12, torch.float32)
    expected = gated_ffn(x, *weights)
    assert torch.equal(gated_ffn(x.reshape(2, 3, 4, 8), *weights).reshape(24, 8), expected)
    transposed = x.detach().t().contiguous().t()
    strided = [w.detach().repeat_interleave(2, dim=-1)[..., ::2] for w in weights]
    torch.testing.assert_close(gated_ffn(transposed, *strided), expected.detach())
    assert gated_ffn(x[0], *weights).shape == (8,)


def test_no_rows_give_no_rows_and_zero_weight_gradients() -> None:
    x, *weights = operands(0, 8, 12, torch.float32)
    out = gated_ffn(x, *weights)
    assert out.shape == (0, 8)
    for grad in torch.autograd.grad(out.sum(), [x, *weights]):
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_keeps_x_and_two_products_for_the_backward(dtype: torch.dtype) -> None:
    rows, hidden, intermediate = 50, 8, 12
    x, *weights = operands(rows, hidden, intermediate, dtype)
    known = {id(t) for t in (x, *weights)}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in known and tensor.data_ptr() != x.data_ptr():
            kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_ffn(x, *weights)
    assert sum(kept) <= rows * (2 * intermediate * dtype.itemsize + 4)


def test_nothing_is_kept_without_a_gradient_to_come() -> None:
    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name == "calm_kernels::gated_ffn":
                kept.append(args[-1])
            return function(*args, **(kwargs or {}))

    kept: list[bool] = []
    tensors = operands(5, 8, 12)
    with Spy():
        gated_ffn(*tensors)
        with torch.no_grad():
            gated_ffn(*tensors)
        gated_ffn(*(t.detach() for t in tensors))
    assert kept == [True, False, False]
    _, _, products = OPERATORS.gated_ffn.reference(*(t.detach() for t in tensors), 1e-6, False)
    assert products.shape == (0, 24)


def test_backward_is_the_same_when_the_products_were_not_kept() -> None:
    tensors, grad_out = operands(7, 16, 24, torch.float32), grad_of(7, 16)

    def run(save: bool) -> list[Tensor]:
        return outcome(
            lambda *t: OPERATORS.gated_ffn.reference(*t, 1e-6, save)[0], tensors, grad_out
        )

    for kept, recomputed in zip(run(True), run(False), strict=True):
        assert torch.equal(kept, recomputed)


def test_frozen_weights_leave_the_gradient_of_x_unchanged() -> None:
    tensors = operands(7, 16, 24, torch.float32)
    grad_out = grad_of(7, 16)
    expected = outcome(gated_ffn, tensors, grad_out)[1]
    x, *weights = (t.detach() for t in tensors)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(gated_ffn(x, *weights), x, grad_out)
    assert torch.equal(grad, expected)


def test_autocast_casts_all_operands() -> None:
    tensors = operands(7, 16, 24, torch.float32)
    grad_out = grad_of(7, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = outcome(gated_ffn, tensors, grad_out)
    cast = outcome(gated_ffn, [t.to(torch.bfloat16) for t in tensors], grad_out)
    assert ours[0].dtype == torch.bfloat16
    for value, expected in zip(ours, cast, strict=True):
        assert torch.equal(value, expected.to(value.dtype))
    assert all(grad.dtype == torch.float32 for grad in ours[1:])


def test_backward_inside_autocast_is_that_outside() -> None:
    tensors = operands(7, 16, 24, torch.float32)
    out, grad_out = gated_ffn(*tensors), grad_of(7, 16)
    expected = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(out, tensors, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("save", [True, False])
def test_operator_passes_opcheck(save: bool, backend: str) -> None:
    overload = "default" if backend == "native" else backend
    tensors = operands(5, 8, 11, torch.float32)
    torch.library.opcheck(getattr(OPERATORS.gated_ffn, overload), (*tensors, 1e-6, save))


@pytest.mark.parametrize("weight_grads", [True, False])
def test_backward_operator_passes_opcheck(weight_grads: bool, backend: str) -> None:
    overload = "default" if backend == "native" else backend
    tensors = [t.detach() for t in operands(5, 8, 11, torch.float32)]
    _, rstd, gate_up = OPERATORS.gated_ffn.reference(*tensors, 1e-6, True)
    arguments = (grad_of(5, 8), *tensors, rstd, gate_up, weight_grads)
    torch.library.opcheck(getattr(OPERATORS.gated_ffn_backward, overload), arguments)


def test_compiled_equals_eager_bitwise_at_any_row_count() -> None:
    compiled = torch.compile(gated_ffn, fullgraph=True, dynamic=True)
    for rows in (7, 12):
        tensors, grad_out = operands(rows, 8, 11, torch.float32), grad_of(rows, 8)
        for a, b in zip(
            outcome(compiled, tensors, grad_out), outcome(gated_ffn, tensors, grad_out), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "change", "error_type", "message"),
    [
        ("x", lambda t: t.long(), TypeError, "x: expected dtype float32, .* got int64"),
        ("x", lambda t: t.double(), TypeError, "norm_weight: expected dtype float64, that of x"),
        ("x", lambda t: t[:, :7], ValueError, r"norm_weight: expected shape \[7\]; got \[8\]"),
        ("norm_weight", lambda t: t[:1], ValueError, r"norm_weight: expected shape \[8\]"),
        ("gate_weight", lambda t: t.t(), ValueError, r"gate_weight: expected shape \[I, 8\]"),
        ("up_weight", lambda t: t[:5], ValueError, r"up_weight: expected shape \[12, 8\]"),
        ("down_weight", lambda t: t.t(), ValueError, r"down_weight: expected shape \[8, 12\]"),
        ("down_weight", lambda t: t.to("meta"), ValueError, "down_weight: expected device cpu"),
        ("up_weight", lambda t: [1.0], TypeError, "up_weight: expected a torch.Tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(name: str, change, error_type: type, message: str) -> None:
    arguments = dict(zip(NAMES, operands(5, 8, 12, torch.float32), strict=True))
    arguments[name] = change(arguments[name].detach())
    with pytest.raises(error_type, match=message):
        gated_ffn(*arguments.values())


def test_layer_has_the_checkpoint_names_and_calls_the_function() -> None:
    layer = GatedFFN(8, 12, eps=0.1)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "mlp.gate_proj.weight": (12, 8),
        "mlp.up_proj.weight": (12, 8),
        "mlp.down_proj.weight": (8, 12),
        "layernorm.weight": (8,),
    }
    x, norm, gate, up, down = operands(5, 8, 12, torch.float32)
    names = ("layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight")
    values = dict(zip((*names, "mlp.down_proj.weight"), (norm, gate, up, down), strict=True))
    layer.load_state_dict(values)
    assert torch.equal(layer(x), gated_ffn(x, norm, gate, up, down, eps=0.1))
