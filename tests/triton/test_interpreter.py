"""The interpreter's own arithmetic, where tests/triton/conftest.py completes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def cast(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def product(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _larger_magnitude(a, b):
    return tl.where(tl.abs(a) > tl.abs(b), a, b)


@triton.jit
def reduced(source, out, largest, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(out + tl.arange(0, R), tl.reduce(tl.load(source + at), 1, _larger_magnitude))
    tl.store(largest + tl.arange(0, C), tl.max(tl.load(source + at), axis=0))
"""


@pytest.fixture
def kernels(interpreted: Callable[..., ModuleType], tmp_path: Path) -> ModuleType:
    path = tmp_path / "kernels.py"
    path.write_text(KERNELS)
    return interpreted(path)


def test_casts_to_bfloat16_round_to_nearest_even(kernels: ModuleType) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    values[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf, torch.nan])
    target = torch.zeros(64, dtype=torch.bfloat16)
    kernels.cast[(1,)](values, target, N=64)
    assert torch.equal(target.view(torch.int16)[:3], values.bfloat16().view(torch.int16)[:3])
    assert torch.equal(target[4:], values[4:].bfloat16()) and target[3].isnan()
    back = torch.zeros(64)
    kernels.cast[(1,)](target, back, N=64)
    assert torch.equal(back[4:], target[4:].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_values(kernels: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    out = torch.zeros(16, 16)
    kernels.product[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_reductions_with_a_function_of_ones_own(kernels: ModuleType) -> None:
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    out, largest = torch.zeros(4), torch.zeros(8)
    kernels.reduced[(1,)](values, out, largest, R=4, C=8)
    assert torch.equal(out, values.gather(1, values.abs().argmax(1, keepdim=True)).squeeze(1))
    assert torch.equal(largest, values.amax(0))
