"""A layer's attention in one operator against torch in float64, alone and in a Llama model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

import calm_kernels
from calm_kernels import _native
from calm_kernels.models import decoder_layer
from calm_kernels.models.decoder_layer import use_fast_layers
from calm_kernels.ops.attention_block import attention_block, why_not_attention_block

BACKENDS = ["auto", "reference"]
SHAPES = [
    (1, 1, 1, 1, 2, 3),
    (2, 13, 2, 2, 32, 70),
    (3, 63, 4, 4, 64, 96),
    (2, 50, 6, 2, 10, 33),
    (7, 300, 2, 1, 34, 64),
]
"""B, T, heads, key heads, width, H: odd sizes; more rows than a block."""
EPS = 1e-5


class Case:
    """Random inputs; angles of one sequence, or of each its own."""

    def __init__(self, shape: tuple[int, ...], own_angles: bool = False) -> None:
        batch, length, heads, key_heads, width, size = shape
        generator = torch.Generator().manual_seed(sum(shape))

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*size, generator=generator, dtype=torch.float64)

        outputs = (heads * width, key_heads * width, key_heads * width)
        self.inputs = [
            normal(batch, length, size),
            1 + normal(size, scale=0.3),
            *(normal(n, size, scale=size**-0.5) for n in outputs),
            normal(size, outputs[0], scale=outputs[0] ** -0.5),
        ]
        angles = 4 * normal(batch if own_angles else 1, length, width // 2)
        angles = torch.cat((angles, angles), dim=2)
        self.rotary = (angles.cos(), angles.sin())
        self.scale = 1.3 * width**-0.5
        self.cotangent = normal(batch, length, size)

    def run(self, function: Any, dtype: torch.dtype) -> list[Tensor]:
        """Result and gradients of x and the weights."""
        inputs = [x.to(dtype).requires_grad_() for x in self.inputs]
        cos, sin = (table.to(dtype) for table in self.rotary)
        out = function(*inputs, (cos, sin), scale=self.scale, eps=EPS)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.cotangent.to(dtype))]


def plain(
    x: Tensor,
    norm_weight: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    out_weight: Tensor,
    rotary: tuple[Tensor, Tensor],
    *,
    scale: float,
    eps: float,
) -> Tensor:
    """As transformers' Llama and torch have it, a head after the other."""
    cos, sin = (table.unsqueeze(1) for table in rotary)
    normed = F.rms_norm(x, norm_weight.shape, norm_weight, eps)

    def heads(weight: Tensor) -> Tensor:
        return F.linear(normed, weight).unflatten(2, (-1, cos.shape[3])).transpose(1, 2)

    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    q, k, v = rotated(heads(query_weight)), rotated(heads(key_weight)), heads(value_weight)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return x + F.linear(seen.transpose(1, 2).flatten(2), out_weight)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own_angles", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_no_larger_than_those_of_torch(
    shape: tuple[int, ...], own_angles: bool, backend: str
) -> None:
    case = Case(shape, own_angles)
    exact, theirs = case.run(plain, torch.float64), case.run(plain, torch.float32)
    with calm_kernels.backend(backend):
        results = case.run(attention_block, torch.float32)
    size = float(case.cotangent.norm())
    for result, their, right in zip(results, theirs, exact, strict=True):
        assert result.shape == right.shape and result.dtype == torch.float32
        # A lone position's gradients of queries and keys are exactly zero.
        bound = max(2 * error(their, right), 1e-6 * float(right.norm()), 1e-7 * size)
        assert error(result, right) <= bound


def test_float64_is_the_references() -> None:
    case = Case((2, 13, 2, 1, 8, 20))
    for result, right in zip(
        case.run(attention_block, torch.float64), case.run(plain, torch.float64), strict=True
    ):
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)
    if _native.serves("calm_kernels::attention_block", "cpu"):
        with (
            calm_kernels.backend("native"),
            pytest.raises(RuntimeError, match=r"not torch\.float64"),
        ):
            case.run(attention_block, torch.float64)


def test_gradients_of_the_reference_agree_with_finite_differences() -> None:
    case = Case((2, 5, 4, 2, 4, 6), own_angles=True)
    inputs = [x.requires_grad_() for x in case.inputs]
    with calm_kernels.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *x: attention_block(*x, case.rotary, scale=case.scale, eps=EPS), inputs
        )


def test_results_do_not_depend_on_threads_nor_on_later_positions() -> None:
    case = Case((3, 41, 4, 2, 16, 64))
    results = case.run(attention_block, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for one, two in zip(case.run(attention_block, torch.float32), results, strict=True):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(threads)
    case.inputs[0][:, 30:] = torch.nan
    cut = case.run(attention_block, torch.float32)[0]
    assert torch.equal(cut[:, :30], results[0][:, :30])


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_leave_the_gradient_of_x(backend: str) -> None:
    case = Case((2, 13, 2, 1, 8, 20))
    exact = case.run(plain, torch.float64)[1]
    x, *weights = (t.float() for t in case.inputs)
    x.requires_grad_()
    rotary = (case.rotary[0].float(), case.rotary[1].float())
    with calm_kernels.backend(backend):
        out = attention_block(x, *weights, rotary, scale=case.scale, eps=EPS)
        (grad,) = torch.autograd.grad(out, x, case.cotangent.float())
    assert error(grad, exact) <= 1e-6 * float(exact.norm())


def test_views_are_read_as_they_are() -> None:
    case = Case((3, 10, 2, 1, 8, 20))
    expected = case.run(attention_block, torch.float32)
    wide = [torch.stack((t, t + 1), dim=-1).float()[..., 0] for t in case.inputs]
    assert not any(t.is_contiguous() for t in wide)
    inputs = [t.requires_grad_() for t in wide]
    rotary = (case.rotary[0].float(), case.rotary[1].float())
    out = attention_block(*inputs, rotary, scale=case.scale, eps=EPS)
    gradients = torch.autograd.grad(out, inputs, case.cotangent.float())
    for actual, right in zip((out.detach(), *gradients), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)


def test_operators_pass_opcheck_and_nothing_is_allowed() -> None:
    case = Case((2, 9, 4, 2, 6, 10))
    inputs = [x.float().requires_grad_() for x in case.inputs]
    tables = [table.float() for table in case.rotary]
    operators = torch.ops.calm_kernels
    for overload in (operators.attention_block.default, operators.attention_block.reference):
        torch.library.opcheck(overload, (*inputs, *tables, case.scale, EPS))
    inputs = [x.detach() for x in inputs]
    _, *kept = operators.attention_block.reference(*inputs, *tables, case.scale, EPS)
    for weight_grads in (True, False):
        arguments = (case.cotangent.float(), *inputs, *tables, *kept, case.scale, weight_grads)
        for overload in (
            operators.attention_block_backward.default,
            operators.attention_block_backward.reference,
        ):
            torch.library.opcheck(overload, arguments)
    for backend in BACKENDS:
        with calm_kernels.backend(backend):
            nothing = [inputs[0][:0].requires_grad_(), *(w.requires_grad_() for w in inputs[1:])]
            out = attention_block(*nothing, (tables[0], tables[1]), scale=1.0)
            assert out.shape == (0, 9, 10)
            gradients = torch.autograd.grad(out.sum(), nothing)
            assert all(not g.any() for g in gradients)


def test_wrong_arguments_are_named() -> None:
    case = Case((2, 9, 4, 2, 6, 10))

    def fails(match: str, index: int, value: Tensor, rotary: Any = case.rotary) -> None:
        inputs = list(case.inputs)
        inputs[index] = value
        with pytest.raises((TypeError, ValueError), match=match):
            attention_block(*inputs, rotary, scale=1.0)

    x, norm, query, key, _, out = case.inputs
    cos, sin = case.rotary
    fails("x: expected dtype", 0, x.bfloat16())
    fails("x: expected shape", 0, x[0])
    fails("norm_weight: expected shape", 1, norm[:9])
    fails("query_weight: expected shape", 2, query[:, :9])
    fails("value_weight: expected shape", 4, key[:6])
    fails("out_weight: expected shape", 5, out[:, :9])
    fails("norm_weight: expected dtype float64", 1, norm.float())
    fails("rotary: expected shape", 0, x, (cos[:, :8], sin[:, :8]))
    fails("width even; got", 0, x, (cos[..., :3], sin[..., :3]))


@pytest.mark.skipif(
    why_not_attention_block(torch.empty(1)) is not None,
    reason="needs the CPU library and AVX-512",
)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_models_layers_call_it_where_nothing_is_in_between(
    key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(key_heads)
    config = LlamaConfig(
        vocab_size=10, hidden_size=24, intermediate_size=30, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=key_heads,
    )  # fmt: skip
    model = LlamaModel(config).train()
    x = torch.randn(3, 17, 24, requires_grad=True)

    def run(dtype: torch.dtype = torch.float32, **settings: Any) -> list[Tensor]:
        model.to(dtype)
        out = model(inputs_embeds=x.to(dtype), use_cache=False, **settings).last_hidden_state
        weights = [p for p in model.parameters() if p is not model.embed_tokens.weight]
        gradients = torch.autograd.grad(out.sin().sum(), (x, *weights), allow_unused=True)
        return [out.detach(), *gradients]

    exact, theirs = run(torch.float64), run()
    use_fast_layers(model, config)
    calls = 0

    def counted(*arguments: Any, **settings: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return attention_block(*arguments, **settings)

    monkeypatch.setattr(decoder_layer, "attention_block", counted)
    for result, their, right in zip(run(), theirs, exact, strict=True):
        assert error(result, right) <= max(2 * error(their, right), 1e-6 * float(right.norm()))
    assert calls == 2

    # A mask, another dtype, autocast and dropout are transformers' own.
    mask = torch.ones(3, 17, dtype=torch.int64)
    mask[0, :4] = 0
    run(attention_mask=mask)
    run(torch.float64)
    model.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        run()
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.5
    run()
    assert calls == 2
    for layer in model.layers:
        layer.self_attn.attention_dropout = 0.0

    # What watches or replaces a part sees its calls: the first layer's, here.
    attention = model.layers[0].self_attn
    seen: list[nn.Module] = []
    for module in (attention, attention.k_proj, model.layers[0].input_layernorm):
        hook = module.register_forward_hook(lambda module, *_: seen.append(module))
        run()
        hook.remove()
        assert seen.pop() is module and not seen
    assert calls == 5

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    attention.o_proj.__class__ = Doubled
    run()
    assert calls == 6
