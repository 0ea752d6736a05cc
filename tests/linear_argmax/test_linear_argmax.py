from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import calm_kernels
from calm_kernels import _native
from calm_kernels.ops.linear_argmax import linear_argmax

BACKENDS = ["reference"]
if _native.serves("calm_kernels::linear_argmax", "cpu"):
    BACKENDS.append("native")
NAN = float("nan")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest):
    with calm_kernels.backend(request.param):
        yield request.param


def operands(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + vocab + hidden)
    shapes = ((rows, hidden), (vocab, hidden), (vocab,))
    h, w, b = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return h, w, b


def indicator(values: list[float]) -> tuple[Tensor, Tensor]:
    """Operands of one row whose logits are exactly ``values``."""
    return torch.ones(1, 1), torch.tensor(values).unsqueeze(1)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocab", "hidden"),
    [(1, 1, 1), (3, 2, 8), (127, 257, 24), (5, 5003, 33), (1100, 1025, 16)],
)
def test_index_is_the_exact_one_wherever_the_lead_exceeds_rounding(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, with_bias: bool
) -> None:
    h, w, b = operands(rows, vocab, hidden, dtype)
    bias = b if with_bias else None
    result = linear_argmax(h, w, bias)
    assert result.dtype == torch.int64
    assert result.shape == (rows,)

    exact = h.double() @ w.double().t() + (b.double() if with_bias else 0.0)
    chosen = exact.gather(1, result.unsqueeze(1)).squeeze(1)
    # Products and sums in float32 at least: |h|.|w| bounds what they can be off by.
    bound = (h.double().abs() @ w.double().abs().t() + b.double().abs()).amax(dim=1)
    bound *= (hidden + 2) * torch.finfo(torch.float32).eps
    assert (exact.amax(dim=1) - chosen <= bound).all()
    top = exact.topk(min(2, vocab), dim=1).values
    clear = (top[:, 0] - top[:, -1] > bound) | (vocab == 1)
    assert clear.float().mean() > 0.9
    assert torch.equal(result[clear], exact.argmax(dim=1)[clear])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_not_rounded_into_ties(dtype: torch.dtype) -> None:
    # 1024.0 and 1024.0625 are one value in 16 bits; the larger one comes second.
    h = torch.tensor([[32.0, 0.25]], dtype=dtype)
    w = torch.tensor([[32.0, 0.0], [32.0, 0.25]], dtype=dtype)
    assert linear_argmax(h, w).tolist() == [1]


@pytest.mark.parametrize("vocab", [2, 100, 1024, 1025, 4099])
def test_a_tie_goes_to_the_lowest_index_near_and_far(vocab: int) -> None:
    for first, second in {(0, vocab - 1), (vocab // 2 - 1, vocab // 2), (vocab - 2, vocab - 1)}:
        values = torch.zeros(vocab)
        values[[max(first, 0), second]] = 2.5
        h, w = indicator(values.tolist())
        assert linear_argmax(h, w).tolist() == [max(first, 0)]


def test_ties_across_every_power_of_two_boundary_go_to_the_lower_side() -> None:
    vocab = 8195
    boundaries = [2**k for k in range(1, 14)]
    # Row r of weight is one-hot at the two sides of boundary r.
    w = torch.zeros(vocab, len(boundaries))
    for r, boundary in enumerate(boundaries):
        w[[boundary - 1, boundary], r] = 1.0
    result = linear_argmax(torch.eye(len(boundaries)), w)
    assert result.tolist() == [boundary - 1 for boundary in boundaries]


def test_all_equal_logits_give_index_zero() -> None:
    assert linear_argmax(torch.zeros(3, 4), torch.randn(3001, 4)).tolist() == [0, 0, 0]
    minus_infinity = torch.full((3001,), -torch.inf)
    assert linear_argmax(torch.zeros(1, 4), torch.zeros(3001, 4), minus_infinity).tolist() == [0]


@pytest.mark.parametrize("position", [0, 7, 1023, 1024, 2999])
def test_the_first_nan_wins_over_anything(position: int) -> None:
    values = torch.randn(3000)
    values[5], values[2998] = torch.inf, torch.inf
    values[position:][::13] = NAN
    h, w = indicator(values.tolist())
    assert linear_argmax(h, w).tolist() == [position] == values.argmax().reshape(1).tolist()


def test_a_nan_hidden_row_gives_index_zero_and_leaves_the_others_alone() -> None:
    h, w, _ = operands(5, 3000, 8)
    expected = (h.double() @ w.double().t()).argmax(dim=1)
    h[2, 3] = NAN
    expected[2] = 0
    assert torch.equal(linear_argmax(h, w), expected)


def test_infinite_bias_masks_tokens() -> None:
    h, w, b = operands(9, 50, 8)
    b[10:] = -torch.inf
    assert linear_argmax(h, w, b).max() < 10


def test_logits_are_never_stored() -> None:
    rows, vocab = 2000, 6001
    h, w, _ = operands(rows, vocab, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        linear_argmax(h, w)
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < rows * vocab * 4 / 8


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    h, w, b = operands(24, 300, 8)
    expected = linear_argmax(h, w, b)
    assert torch.equal(linear_argmax(h.reshape(2, 3, 4, 8), w, b), expected.reshape(2, 3, 4))
    assert torch.equal(linear_argmax(h.t().contiguous().t(), w.t().contiguous().t(), b), expected)
    assert linear_argmax(h[0], w, b).shape == ()
    assert linear_argmax(h[:0], w, b).shape == (0,)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_logit_is_returned_on_request(dtype: torch.dtype, with_bias: bool) -> None:
    h, w, b = operands(21, 1203, 40, dtype)
    bias = b if with_bias else None
    index, value = linear_argmax(h.reshape(3, 7, 40), w, bias, return_max=True)
    assert value.shape == index.shape == (3, 7)
    assert torch.equal(index, linear_argmax(h.reshape(3, 7, 40), w, bias))
    exact = h.double() @ w.double().t() + (b.double() if with_bias else 0.0)
    chosen = exact.gather(1, index.reshape(21, 1)).reshape(3, 7)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(value.dtype).eps
    torch.testing.assert_close(value.double(), chosen, rtol=20 * eps, atol=20 * eps)


def test_the_largest_logit_of_a_row_with_a_nan_is_nan() -> None:
    h, w = indicator([1.0, NAN, torch.inf])
    index, value = linear_argmax(h, w, return_max=True)
    assert index.tolist() == [1] and value.isnan().all()
    index, value = linear_argmax(h, w[::2], return_max=True)
    assert index.tolist() == [1] and value.tolist() == [torch.inf]


def test_result_has_no_gradient() -> None:
    h, w, b = (t.requires_grad_() for t in operands(4, 9, 8))
    assert not linear_argmax(h, w, b).requires_grad
    assert not linear_argmax(h, w, b, return_max=True)[1].requires_grad


def test_autocast_casts_the_inputs_but_not_the_logits() -> None:
    h, w, b = operands(64, 999, 40)
    expected = linear_argmax(h.bfloat16(), w.bfloat16(), b.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_argmax(h, w, b), expected)
        # 1 + 2^-7 and 1 are apart in bfloat16, 256 times them are not.
        assert linear_argmax(torch.full((1, 2), 16.0), torch.tensor([[16.0, 0], [16, 0.5]])) == 1


def test_operator_passes_opcheck(backend: str) -> None:
    operator = torch.ops.calm_kernels.linear_argmax
    operator = operator.default if backend == "native" else operator.reference
    h, w, b = (t.requires_grad_() for t in operands(5, 33, 8))
    torch.library.opcheck(operator, (h.detach(), w.detach(), b.detach()))
    torch.library.opcheck(operator, (h.detach(), w.detach(), None))
    torch.library.opcheck(operator, (h.detach().bfloat16(), w.detach().bfloat16(), None))
    torch.library.opcheck(operator, (h.detach().double()[:0], w.detach().double(), None))


def test_compiled_equals_eager_at_any_row_count() -> None:
    compiled = torch.compile(linear_argmax, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        h, w, b = operands(rows, 33, 8)
        assert torch.equal(compiled(h, w, b), linear_argmax(h, w, b))
        expected = linear_argmax(h, w, return_max=True)
        for got, want in zip(compiled(h, w, return_max=True), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("arguments", "error_type", "message"),
    [
        ({"hidden": torch.ones(3, 8).long()}, TypeError, "hidden: expected dtype float32"),
        ({"hidden": torch.ones(3, 8).double()}, TypeError, "weight: expected dtype float64"),
        ({"hidden": torch.ones(3, 7)}, ValueError, r"weight: expected shape \[V, 7\]"),
        ({"weight": torch.ones(0, 8)}, ValueError, r"weight.shape\[0\]: expected at least 1"),
        ({"bias": torch.ones(9)}, ValueError, r"bias: expected shape \[10\]; got \[9\]"),
        ({"bias": torch.ones(10).half()}, TypeError, "bias: expected dtype float32"),
        ({"weight": torch.ones(10, 8, device="meta")}, ValueError, "weight: expected device cpu"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Tensor], error_type: type, message: str
) -> None:
    good = {"hidden": torch.ones(3, 8), "weight": torch.ones(10, 8), "bias": torch.ones(10)}
    with pytest.raises(error_type, match=message):
        linear_argmax(**{**good, **arguments})
