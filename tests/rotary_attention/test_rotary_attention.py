"""Attention of rotated queries and keys against torch in float64, as an operator and in a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

import calm_kernels
from calm_kernels import _native
from calm_kernels.models import decoder_layer
from calm_kernels.models.decoder_layer import FastAttention
from calm_kernels.ops.rotary_attention import rotary_attention, why_not_rotary_attention

BACKENDS = ["auto", "reference"]
SHAPES = [
    (1, 1, 1, 1, 2),
    (2, 13, 2, 2, 32),
    (3, 63, 4, 4, 64),
    (2, 50, 6, 2, 10),
    (1, 200, 4, 1, 34),
]
"""B, T, heads, key heads, width."""


class Case:
    """Random inputs; angles of one sequence, or of each its own."""

    def __init__(self, shape: tuple[int, int, int, int, int], own_angles: bool = False) -> None:
        batch, length, heads, key_heads, width = shape
        generator = torch.Generator().manual_seed(sum(shape))

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.inputs = [normal(batch, length, n * width) for n in (heads, key_heads, key_heads)]
        angles = 4 * normal(batch if own_angles else 1, length, width // 2)
        angles = torch.cat((angles, angles), dim=2)
        self.rotary = (angles.cos(), angles.sin())
        self.scale = 1.3 * width**-0.5
        self.cotangent = normal(batch, length, heads * width)

    def run(self, function: Any, dtype: torch.dtype) -> list[Tensor]:
        """Result and gradients of query, key and value."""
        inputs = [x.to(dtype).requires_grad_() for x in self.inputs]
        cos, sin = (table.to(dtype) for table in self.rotary)
        out = function(*inputs, (cos, sin), scale=self.scale)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.cotangent.to(dtype))]


def plain(
    query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor], *, scale: float
) -> Tensor:
    """As transformers' Llama and torch have it, a head after the other."""
    cos, sin = rotary
    width = cos.shape[2]

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, width)).transpose(1, 2)

    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)

    q, k, v = rotated(heads(query)), rotated(heads(key)), heads(value)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return seen.transpose(1, 2).flatten(2)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own_angles", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_no_larger_than_those_of_torch(
    shape: tuple[int, int, int, int, int], own_angles: bool, backend: str
) -> None:
    case = Case(shape, own_angles)
    exact, theirs = case.run(plain, torch.float64), case.run(plain, torch.float32)
    with calm_kernels.backend(backend):
        results = case.run(rotary_attention, torch.float32)
    size = float(case.cotangent.norm())
    for result, their, right in zip(results, theirs, exact, strict=True):
        assert result.shape == right.shape and result.dtype == torch.float32
        # A lone position's gradients of query and key are exactly zero.
        bound = max(2 * error(their, right), 1e-6 * float(right.norm()), 1e-7 * size)
        assert error(result, right) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_and_a_long_sequence_stay_exact(backend: str) -> None:
    case = Case((1, 700, 1, 1, 6))
    case.scale = 30.0
    exact, theirs = case.run(plain, torch.float64), case.run(plain, torch.float32)
    with calm_kernels.backend(backend):
        results = case.run(rotary_attention, torch.float32)
    for result, their, right in zip(results, theirs, exact, strict=True):
        assert result.isfinite().all()
        assert error(result, right) <= 3 * error(their, right) + 1e-6 * float(right.norm())


def test_float64_is_the_references() -> None:
    case = Case((2, 13, 2, 1, 8))
    for result, right in zip(
        case.run(rotary_attention, torch.float64), case.run(plain, torch.float64), strict=True
    ):
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, right, rtol=1e-10, atol=1e-10)
    if _native.serves("calm_kernels::rotary_attention", "cpu"):
        with (
            calm_kernels.backend("native"),
            pytest.raises(RuntimeError, match=r"not torch\.float64"),
        ):
            case.run(rotary_attention, torch.float64)


def test_gradients_of_the_reference_agree_with_finite_differences() -> None:
    case = Case((2, 5, 4, 2, 4), own_angles=True)
    inputs = [x.requires_grad_() for x in case.inputs]
    with calm_kernels.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda q, k, v: rotary_attention(q, k, v, case.rotary, scale=case.scale), inputs
        )


def test_results_do_not_depend_on_threads_nor_on_later_positions() -> None:
    case = Case((3, 41, 4, 2, 16))
    results = case.run(rotary_attention, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for one, two in zip(case.run(rotary_attention, torch.float32), results, strict=True):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(threads)
    for x in case.inputs:
        x[:, 30:] = torch.nan
    cut = rotary_attention(
        *(x.float() for x in case.inputs), tuple(t.float() for t in case.rotary), scale=case.scale
    )  # fmt: skip
    assert torch.equal(cut[:, :30], results[0][:, :30])


def test_operators_pass_opcheck_and_nothing_is_allowed() -> None:
    case = Case((2, 9, 4, 2, 6))
    inputs = [x.float().requires_grad_() for x in case.inputs]
    tables = [table.float() for table in case.rotary]
    operators = torch.ops.calm_kernels
    for overload in (operators.rotary_attention.default, operators.rotary_attention.reference):
        torch.library.opcheck(overload, (*inputs, *tables, case.scale))
    inputs = [x.detach() for x in inputs]
    out, log_sums = operators.rotary_attention.reference(*inputs, *tables, case.scale)
    arguments = (case.cotangent.float(), *inputs, *tables, out, log_sums, case.scale)
    for overload in (
        operators.rotary_attention_backward.default,
        operators.rotary_attention_backward.reference,
    ):
        torch.library.opcheck(overload, arguments)
    for backend in BACKENDS:
        with calm_kernels.backend(backend):
            nothing = [x[:0] for x in inputs]
            rotary = (tables[0], tables[1])
            assert rotary_attention(*nothing, rotary, scale=1.0).shape == (0, 9, 24)


def test_wrong_arguments_are_named() -> None:
    case = Case((2, 9, 4, 2, 6))

    def fails(match: str, index: int, value: Tensor, rotary: Any = case.rotary) -> None:
        inputs = list(case.inputs)
        inputs[index] = value
        with pytest.raises((TypeError, ValueError), match=match):
            rotary_attention(*inputs, rotary, scale=1.0)

    query, key, value = case.inputs
    cos, sin = case.rotary
    fails("query: expected dtype", 0, query.bfloat16())
    fails("key: expected shape", 1, key[:, :8])
    fails("value: expected shape", 2, value[..., :6])
    fails("key: expected dtype float64", 1, key.float())
    fails("rotary: expected shape", 0, query, (cos[:, :8], sin[:, :8]))
    fails(r"rotary: expected \[1 or 2, 9, width\]", 0, query, (cos.repeat(3, 1, 1),) * 2)
    fails("width even; got", 0, query, (cos[..., :3], sin[..., :3]))
    fails("key: expected key_heads", 0, query[..., :18])


@pytest.mark.skipif(
    why_not_rotary_attention(torch.empty(1)) is not None,
    reason="needs the CPU library and AVX-512",
)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_layer_is_that_of_transformers_and_calls_the_operator(
    key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(key_heads)
    config = LlamaConfig(
        vocab_size=10, hidden_size=24, intermediate_size=30, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=key_heads, attention_bias=True,
    )  # fmt: skip
    model = LlamaModel(config).train()
    x = torch.randn(3, 17, 24, requires_grad=True)

    def run(dtype: torch.dtype = torch.float32, **settings: Any) -> list[Tensor]:
        model.to(dtype)
        given = x.to(dtype)
        out = model(inputs_embeds=given, use_cache=False, **settings).last_hidden_state
        weights = [p for p in model.parameters() if p is not model.embed_tokens.weight]
        gradients = torch.autograd.grad(out.sin().sum(), (x, *weights))
        return [out.detach(), *gradients]

    exact, theirs = run(torch.float64), run()
    for module in model.modules():
        if type(module) is LlamaAttention:
            module.__class__ = FastAttention
    calls = 0

    def counted(*arguments: Any, **settings: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return rotary_attention(*arguments, **settings)

    monkeypatch.setattr(decoder_layer, "rotary_attention", counted)
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
