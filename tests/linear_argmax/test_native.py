"""The native CPU kernel: tiles, bfloat16 ties, widened operands, threads, memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from calm_kernels._dispatch import operators
from calm_kernels.bench.memory import peak_bytes
from calm_kernels.bench.timing import Runnable

OPERATOR = torch.ops.calm_kernels.linear_argmax
WHY_NOT = operators()["linear_argmax"].why_not("native", "cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
# Sides of the kernel's tiles: 400 rows, 512 columns, up to 8192 columns for few rows.
TILE = 512


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def native(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = OPERATOR.default(hidden, weight, bias)
    return result


def operands(rows: int, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + vocab + hidden)
    shapes = ((rows, hidden), (vocab, hidden), (vocab,))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def assert_equals_the_reference(h: Tensor, w: Tensor, b: Tensor | None = None) -> None:
    """Indices wherever the lead exceeds float32's rounding, values everywhere."""
    index, value = native(h, w, b)
    expected_index, expected = OPERATOR.reference(h, w, b)
    assert value.dtype == expected.dtype
    scale = h.double().norm(dim=1) * w.double().norm(dim=1).amax()
    bound = 8 * torch.finfo(value.dtype).eps * scale
    assert ((value.double() - expected.double()).abs() <= bound).all()
    exact = h.double() @ w.double().t() + (0.0 if b is None else b.double())
    chosen = exact.gather(1, index.unsqueeze(1)).squeeze(1)
    assert (exact.amax(1) - chosen <= bound).all()
    assert (index == expected_index).float().mean() > 0.98


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("rows", "vocab", "hidden"),
    [(1, 20011, 40), (3, 1, 8), (127, 1537, 33), (401, 1100, 24), (805, 513, 8), (5, 70, 1)],
)
def test_tiles_of_rows_and_columns_join_to_the_reference(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, with_bias: bool
) -> None:
    h, w, b = operands(rows, vocab, hidden, dtype)
    assert_equals_the_reference(h, w, b if with_bias else None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_operands_are_read_where_they_are(dtype: torch.dtype) -> None:
    h, w, b = operands(9, 1300, 48, dtype)
    expected = native(h[:, 3:40].contiguous(), w[:, 3:40].contiguous(), b)
    apart = torch.stack([b, b], dim=1)[:, 0]
    strided = native(h[:, 3:40], w[:, 3:40], apart)
    turned = native(h[:, 3:40].t().contiguous().t(), w[:, 3:40].t().contiguous().t(), apart)
    for result in (strided, turned):
        assert torch.equal(result[0], expected[0])
        torch.testing.assert_close(result[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_rows_and_no_inner_dimension(dtype: torch.dtype) -> None:
    h, w, b = operands(3, 1200, 8, dtype)
    assert [tuple(t.shape) for t in native(h[:0], w)] == [(0,), (0,)]
    assert native(h[:, :0], w[:, :0])[0].tolist() == [0, 0, 0]
    index, value = native(h[:, :0], w[:, :0], b)
    assert index.tolist() == [int(b.argmax())] * 3
    assert value.tolist() == [float(b.max())] * 3


def near_ties(gap: float, columns: list[int], vocab: int) -> tuple[Tensor, Tensor]:
    """One bfloat16 row with logits 64 + i gap at columns[i], below 60 elsewhere.

    A bfloat16 number between 64 and 128 is a multiple of 1/2.
    """
    generator = torch.Generator().manual_seed(vocab)
    h = torch.zeros(1, 40)
    h[0, 0], h[0, 37] = 8.0, gap
    w = torch.randn(vocab, 40, generator=generator)
    w[:, 0] = 7.0 * torch.rand(vocab, generator=generator)
    w[:, 37] = 0.0
    w[columns, 0] = 8.0
    w[columns, 37] = torch.arange(len(columns), dtype=torch.float32)
    return h.bfloat16(), w.bfloat16()


@pytest.mark.parametrize("count", [2, 3, 40, 200])
@pytest.mark.parametrize("rows", [1, 400])
def test_logits_that_bfloat16_cannot_tell_apart_are_told_apart(rows: int, count: int) -> None:
    vocab = 3 * TILE + 7
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(count))[:count]
    gap = 2.0**-12
    h, w = near_ties(gap, order.tolist(), vocab)
    rounded = (h.float() @ w.float().t()).bfloat16()
    assert int((rounded == rounded.max()).sum()) == count
    index, value = native(h.expand(rows, -1), w)
    assert index.tolist() == [int(order[-1])] * rows
    assert value.tolist() == [64.0 + (count - 1) * gap] * rows


def test_a_larger_bfloat16_logit_beats_the_ties_before_it() -> None:
    columns = [5, 700, 1400]
    h, w = near_ties(2.0**-12, columns, 3 * TILE)
    for better in (4, 900, 1535):
        w_better = w.clone()
        w_better[better] = 0.0
        w_better[better, 0] = 9.0
        index, value = native(h, w_better)
        assert index.tolist() == [better] and value.tolist() == [72.0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_exact_ties_go_to_the_lowest_index_across_tiles(dtype: torch.dtype) -> None:
    # Many rows take the tiles of 512 columns; enough threads that ties cross their borders too.
    torch.set_num_threads(4)
    vocab = 4 * TILE + 3
    pairs = [(0, vocab - 1), (511, 512), (1023, 1024), (1, 1030), (1535, 2047), (2048, 2050)]
    h, w, _ = operands(402, vocab, 40, dtype)
    w *= 0.1
    for row, pair in enumerate(pairs):
        w[list(pair)] = h[row]
    index = native(h, w)[0]
    assert index[: len(pairs)].tolist() == [low for low, _ in pairs]


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_where_everything_ties_give_index_zero(dtype: torch.dtype) -> None:
    h, w, _ = operands(402, 2 * TILE + 1, 40, dtype)
    h[::2] = 0.0
    index, value = native(h, w)
    assert not index[::2].any() and not value[::2].any()
    assert_equals_the_reference(h[1::2], w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 5, 17, 127, 402])
def test_equal_weights_tie_wherever_they_are(rows: int, dtype: torch.dtype) -> None:
    h, w, _ = operands(rows, 2 * TILE + 1, 40, dtype)
    for weight in (torch.ones_like(w), w[:1].expand(8 * TILE * 4 + 1, -1).contiguous()):
        assert not native(h, weight)[0].any()
        assert not OPERATOR.reference(h, weight, None)[0].any()


def test_minus_zero_ties_with_zero() -> None:
    for values in ([-1.0, -0.0, 0.0, -0.0], [-1.0, 0.0, -0.0], [-0.0] * 70 + [0.0]):
        w = torch.tensor(values).repeat_interleave(20).unsqueeze(1)
        for dtype in FLOATS:
            expected = int(w.squeeze(1).argmax())
            assert native(torch.ones(1, 1, dtype=dtype), w.to(dtype))[0].tolist() == [expected]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("position", [0, 33, 511, 512, 1024, 1539])
def test_the_first_nan_of_a_row_wins_and_others_do_not_notice(
    position: int, dtype: torch.dtype
) -> None:
    h, w, _ = operands(402, 3 * TILE + 4, 24, dtype)
    clean = native(h, w)
    h[:, 7] = 0.0
    h[5] = 1.0
    w_dirty = w.clone()
    w_dirty[position:, 7][::13] = NAN
    w_dirty[0, 9] = torch.inf
    index, value = native(h, w_dirty)
    assert index.tolist() == [position] * 402 and value.isnan().all()
    h, w, _ = operands(402, 3 * TILE + 4, 24, dtype)
    h[11, 3] = NAN
    index, value = native(h, w)
    assert index[11] == 0 and value[11].isnan()
    others = torch.arange(402) != 11
    assert torch.equal(index[others], clean[0][others])


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_are_compared_as_torch_compares_them(dtype: torch.dtype) -> None:
    h = torch.ones(402, 8, dtype=dtype)
    w = torch.zeros(1200, 8, dtype=dtype)
    w[700, 2], w[600, 1], w[3, 0] = torch.inf, torch.inf, -torch.inf
    index, value = native(h, w)
    assert index.tolist() == [600] * 402 and (value == torch.inf).all()
    index, value = native(h, torch.full_like(w, -torch.inf))
    assert not index.any() and (value == -torch.inf).all()


def test_float16_logits_may_exceed_its_range() -> None:
    h = torch.full((2, 8), 200.0, dtype=torch.float16)
    w = torch.full((700, 8), 200.0, dtype=torch.float16)
    w[600, 0] = 201.0
    index, value = native(h, w)
    assert index.tolist() == [600, 600] and value.tolist() == [320200.0] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [None, 0.0])
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype, bias: float | None) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    b = None if bias is None else torch.tensor([bias], dtype=dtype)
    value = native(numbers.unsqueeze(1), torch.ones(1, 1, dtype=dtype), b)[1]
    torch.testing.assert_close(value, numbers.float(), rtol=0, atol=0, equal_nan=True)
    finite = numbers[numbers.isfinite()]
    one = torch.ones(1, 1, dtype=dtype)
    for weight in finite.split(1000):
        b = None if bias is None else torch.full((len(weight),), bias, dtype=dtype)
        index, value = native(one, weight.unsqueeze(1), b)
        assert float(value) == float(weight.float().max())
        assert int(index) == int(weight.float().argmax())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 20011, 64), (450, 2500, 48), (7, 90, 9)])
def test_the_same_bits_for_any_number_of_threads(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype
) -> None:
    h, w, b = operands(rows, vocab, hidden, dtype)
    for bias in (None, b):
        torch.set_num_threads(1)
        alone = native(h, w, bias)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for one, many in zip(alone, native(h, w, bias), strict=True):
                assert torch.equal(one, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_fiftieth_of_the_logits_at_most(dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    rows, vocab = 800, 128257
    h, w, _ = operands(rows, vocab, 16, dtype)
    logits_bytes = rows * vocab * h.element_size()
    inputs = {"hidden": h, "weight": w}

    def peak(call: Runnable) -> int:
        call.call(inputs)
        found = peak_bytes(call, inputs, torch.device("cpu"))
        if found is None:
            pytest.skip("the system does not tell the memory of a process")
        return found

    assert peak(Runnable(lambda inputs: native(**inputs), "auto")) < logits_bytes / 50
    stored = Runnable(lambda inputs: (inputs["hidden"] @ inputs["weight"].t()).argmax(-1), "auto")
    assert peak(stored) > logits_bytes / 2
