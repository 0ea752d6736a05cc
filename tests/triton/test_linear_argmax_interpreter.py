"""The Triton kernels of linear_argmax, interpreted on CPU tensors, against the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from calm_kernels.reference.linear_argmax import linear_argmax as reference

NAN = float("nan")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


class Kernels:
    """The kernels at small tiles."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        rows: int = 16,
        columns: int = 16,
        inner: int = 16,
        tiles_per_split: int = 10**6,
        descriptors: bool = False,
    ) -> tuple[Tensor, Tensor]:
        tiles = self.module.Tiles(rows, columns, inner, 4, 3)
        result: tuple[Tensor, Tensor] = self.module.launch(
            hidden, weight, bias, tiles, tiles_per_split, descriptors
        )
        return result


@pytest.fixture
def kernels(interpreted: Callable[[str], ModuleType]) -> Kernels:
    return Kernels(interpreted("linear_argmax"))


def operands(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * vocab + hidden)
    shapes = ((rows, hidden), (vocab, hidden), (vocab,))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Random logits have no near ties at these sizes."""
    assert got[0].dtype == torch.int64 and got[1].dtype == torch.float32
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "vocab", "hidden", "layout"),
    [
        (1, 301, 40, {"tiles_per_split": 3}),
        (3, 257, 16, {"columns": 64}),
        (17, 301, 72, {"inner": 32, "tiles_per_split": 7}),
        (127, 131, 33, {"rows": 32, "columns": 32, "tiles_per_split": 2}),
        (5, 7, 3, {}),
        (4, 1, 24, {}),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_equal_the_reference(
    kernels: Kernels,
    rows: int,
    vocab: int,
    hidden: int,
    layout: dict[str, Any],
    with_bias: bool,
    dtype: torch.dtype,
) -> None:
    h, w, b = operands(rows, vocab, hidden, dtype)
    bias = b if with_bias else None
    assert_same(kernels(h, w, bias, **layout), reference(h, w, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocab", "hidden", "layout"),
    [
        (17, 301, 72, {"inner": 32, "tiles_per_split": 7}),
        (3, 64, 16, {"columns": 64}),
        (35, 97, 40, {"rows": 32, "columns": 32, "tiles_per_split": 1}),
    ],
)
def test_tiles_copied_by_descriptors_give_the_same(
    kernels: Kernels, rows: int, vocab: int, hidden: int, layout: dict[str, Any], dtype: torch.dtype
) -> None:
    h, w, b = operands(rows, vocab, hidden, dtype)
    # All logits negative: zeros that fill a tile past its end would win.
    b = b - 100
    assert_same(kernels(h, w, b, descriptors=True, **layout), reference(h, w, b))
    h, w = h.abs(), -w.abs()
    assert_same(kernels(h, w, descriptors=True, **layout), reference(h, w, None))


def test_the_rows_of_weight_may_lie_apart(kernels: Kernels) -> None:
    h, w, _ = operands(5, 70, 24, torch.bfloat16)
    apart = torch.full((70, 40), NAN, dtype=torch.bfloat16)
    apart[:, :24] = w
    for descriptors in (False, True):
        got = kernels(h, apart[:, :24], descriptors=descriptors, tiles_per_split=2)
        assert_same(got, reference(h, w, None))


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("tiles_per_split", [1, 2, 10**6])
def test_a_tie_goes_to_the_lowest_index_across_tiles_and_splits(
    kernels: Kernels, tiles_per_split: int, descriptors: bool
) -> None:
    vocab = 83
    pairs = [(0, 82), (15, 16), (31, 32), (16, 47), (1, 2), (63, 81), (80, 82), (66, 67)]
    w = torch.zeros(vocab, len(pairs))
    for r, pair in enumerate(pairs):
        w[list(pair), r] = 1.5
    h = torch.eye(len(pairs))
    got = kernels(
        h.bfloat16(), w.bfloat16(), tiles_per_split=tiles_per_split, descriptors=descriptors
    )
    assert got[0].tolist() == [first for first, _ in pairs]
    assert got[1].tolist() == [1.5] * len(pairs)


@pytest.mark.parametrize("tiles_per_split", [1, 10**6])
def test_equal_logits_give_index_zero_be_they_minus_infinity(
    kernels: Kernels, tiles_per_split: int
) -> None:
    h, w = torch.zeros(3, 16), torch.ones(50, 16)
    assert kernels(h, w, tiles_per_split=tiles_per_split)[0].tolist() == [0, 0, 0]
    minus_infinity = torch.full((50,), -torch.inf)
    index, value = kernels(h, w, minus_infinity, tiles_per_split=tiles_per_split)
    assert index.tolist() == [0, 0, 0] and value.tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("tiles_per_split", [1, 3, 10**6])
@pytest.mark.parametrize("position", [0, 7, 15, 16, 40, 69])
def test_the_first_nan_wins_over_anything(
    kernels: Kernels, position: int, tiles_per_split: int
) -> None:
    h = torch.zeros(2, 16)
    h[:, 0] = 1.0
    w = torch.randn(70, 16, generator=torch.Generator().manual_seed(3))
    w[5, 0], w[66, 0] = torch.inf, torch.inf
    w[position:, 0][::13] = NAN
    index, value = kernels(h, w, tiles_per_split=tiles_per_split)
    assert index.tolist() == [position] * 2
    assert value.isnan().all()
    h[0, 0], h[0, 1] = 0.0, NAN
    assert kernels(h, w, tiles_per_split=tiles_per_split)[0].tolist() == [0, position]


def test_infinities_are_compared_as_torch_compares_them(kernels: Kernels) -> None:
    h, w = torch.ones(1, 16), torch.zeros(40, 16)
    w[33, 0], w[20, 0], w[7, 0] = torch.inf, torch.inf, -torch.inf
    index, value = kernels(h, w, tiles_per_split=1)
    assert index.tolist() == [20] and value.tolist() == [torch.inf]


def test_16_bit_logits_are_not_rounded_into_ties(kernels: Kernels) -> None:
    h, w = torch.zeros(1, 16), torch.zeros(20, 16)
    h[0, :2] = torch.tensor([32.0, 0.25])
    w[:, 0], w[17, 1] = 32.0, 0.25
    index, value = kernels(h.bfloat16(), w.bfloat16())
    assert index.tolist() == [17] and value.tolist() == [1024.0625]


@pytest.mark.parametrize(
    ("row_tiles", "column_tiles", "programs"),
    [(1, 1, 132), (1, 501, 132), (7, 501, 132), (400, 501, 132), (3, 8192, 264), (133, 2, 132)],
)
def test_the_split_of_the_vocabulary_keeps_the_gpu_busy(
    kernels: Kernels, row_tiles: int, column_tiles: int, programs: int
) -> None:
    each = kernels.module.choose_tiles_per_split(row_tiles, column_tiles, programs)
    splits = -(-column_tiles // each)
    assert 1 <= each <= column_tiles and splits <= kernels.module.MAX_SPLITS
    waves = -(-row_tiles * splits // programs)
    fewest = row_tiles * column_tiles / programs
    assert waves * each <= 1.15 * fewest + 1


def test_tiles_follow_rows_and_dtype(kernels: Kernels) -> None:
    module = kernels.module
    assert module.choose_tiles(800, torch.bfloat16, True) == module.SM90_MANY_ROWS
    assert module.choose_tiles(4, torch.float16, True) == module.SM90_FEW_ROWS
    assert module.choose_tiles(800, torch.bfloat16, False) == module.SM80_MANY_ROWS
    assert module.choose_tiles(800, torch.float32, True) == module.FLOAT32


@pytest.mark.parametrize("sm90", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_every_choice_of_the_operator_gives_the_reference(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sm90: bool
) -> None:
    module = kernels.module
    monkeypatch.setattr(module, "_device", lambda index: (4, sm90))
    monkeypatch.setattr(module.torch.cuda, "device", lambda device: contextlib.nullcontext())
    # Few rows and many, V below a tile and above, rows of weight aligned, unaligned and apart.
    for rows, vocab, hidden in [(5, 700, 40), (70, 600, 72), (3, 100, 24), (2, 300, 13), (0, 9, 8)]:
        h, w, b = operands(rows, vocab, hidden, dtype)
        index, value = module.linear_argmax(h, w, b)
        expected_index, expected = reference(h, w, b)
        assert torch.equal(index, expected_index) and value.dtype == expected.dtype
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    h, w, _ = operands(5, 300, 48, dtype)
    for columns in (slice(0, 40), slice(3, 40)):
        turned = w[:, columns].t().contiguous().t()
        expected_index, _ = reference(h[:, columns], w[:, columns], None)
        for weight in (w[:, columns], turned):
            assert torch.equal(module.linear_argmax(h[:, columns], weight, None)[0], expected_index)


def test_the_compiled_module_is_left_as_it_was(
    interpreted: Callable[[str], ModuleType],
) -> None:
    from triton.runtime.jit import JITFunction

    from calm_kernels.triton import linear_argmax as compiled

    copy = interpreted("linear_argmax")
    assert not isinstance(copy.linear_argmax_kernel, JITFunction)
    assert isinstance(compiled.linear_argmax_kernel, JITFunction)
