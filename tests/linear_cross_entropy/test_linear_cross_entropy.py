from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.profiler import ProfilerActivity, profile

from calm_kernels.nn.linear_cross_entropy import LinearCrossEntropyLoss
from calm_kernels.ops.linear_cross_entropy import linear_cross_entropy
from calm_kernels.reference import linear_cross_entropy as reference
from calm_kernels.reference.linear_cross_entropy import CAPACITY

OPERATORS = torch.ops.calm_kernels
REDUCTIONS = ("mean", "sum", "none")


def operands(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias (all wanting gradients) and targets; every third target ignored."""
    generator = torch.Generator().manual_seed(seed)
    h = 2.0 * torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64) * hidden**-0.5
    b = torch.randn(vocab, generator=generator, dtype=torch.float64)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[2::3] = -100
    h, w, b = (t.to(dtype).requires_grad_() for t in (h, w, b))
    return h, w, b, target


def plain(h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, **options) -> Tensor:
    return cross_entropy(linear(h, w, b), target, **options)


def ours(h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, **options) -> Tensor:
    return linear_cross_entropy(h, w, target, bias=b, **options)


def incoming(rows: int, reduction: str) -> Tensor:
    """A gradient of the loss that is not 1, and differs from row to row."""
    shape = (rows,) if reduction == "none" else ()
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.3


def outcome(function, h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, **options):
    """Loss and gradients."""
    tensors = [t.detach().requires_grad_() for t in (h, w, b) if t is not None]
    loss = function(*tensors, *([None] if b is None else []), target, **options)
    grad = incoming(h.shape[0], options.get("reduction", "mean")).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, tensors, grad)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 257, 8), (3, 33, 24), (127, 515, 40)])
def test_loss_and_gradients_are_as_close_to_exact_as_plain_pytorch(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, with_bias: bool, reduction: str
) -> None:
    # Squared errors over many draws: a single value of either side may round luckily.
    squares = torch.zeros(2, 3 + with_bias, dtype=torch.float64)
    for seed in range(30 + 100 // rows):
        h, w, b, target = operands(rows, vocab, hidden, dtype, seed)
        bias = b if with_bias else None
        wide = None if bias is None else bias.double()
        exact = outcome(plain, h.double(), w.double(), wide, target, reduction=reduction)
        for i, function in enumerate((ours, plain)):
            values = outcome(function, h, w, bias, target, reduction=reduction)
            for j, (value, truth) in enumerate(zip(values, exact, strict=True)):
                squares[i, j] += (value.double() - truth).square().sum()
        assert values[1].dtype == dtype
    mine, theirs = squares.sqrt()
    assert (mine <= 1.5 * theirs).all(), mine / theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_of_16_bit_inputs_is_float32(dtype: torch.dtype) -> None:
    h, w, b, target = operands(5, 33, 8, dtype)
    assert ours(h, w, b, target).dtype == torch.float32
    assert ours(h, w, b, target, reduction="none").dtype == torch.float32


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float64_gradients_pass_gradcheck(reduction: str) -> None:
    h, w, b, target = operands(4, 7, 3)
    assert torch.autograd.gradcheck(
        lambda *tensors: ours(*tensors, target, reduction=reduction), (h, w, b)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("ignored", "ignore_index"),
    [
        ([], -100),
        ([0], -100),
        ([0, 1, 3, 6], -100),
        ([2], 5),
        ([0, 6], 1000),
        (list(range(7)), -100),
    ],
)
def test_ignored_rows_count_for_nothing(
    ignored: list[int], ignore_index: int, reduction: str
) -> None:
    h, w, b, _ = operands(7, 11, 4)
    target = torch.tensor([3, 5, 0, 10, 5, 1, 2])
    target[ignored] = ignore_index
    options = {"reduction": reduction, "ignore_index": ignore_index}
    expected = outcome(plain, h, w, b, target, **options)
    values = outcome(ours, h, w, b, target, **options)
    for value, truth in zip(values, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_mean_over_no_row_is_nan_with_zero_gradients() -> None:
    h, w, b, target = operands(7, 11, 4)
    loss, *grads = outcome(ours, h, w, b, torch.full_like(target, -100))
    assert loss.isnan()
    assert not any(grad.any() for grad in grads)
    assert linear_cross_entropy(h[:0], w, target[:0]).isnan()
    assert linear_cross_entropy(h[:0], w, target[:0], reduction="sum") == 0.0
    assert linear_cross_entropy(h[:0], w, target[:0], reduction="none").shape == (0,)


@pytest.mark.parametrize("drop_mass", [0.0, 1e-2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_results_do_not_depend_on_how_rows_are_chunked(
    monkeypatch: pytest.MonkeyPatch, reduction: str, drop_mass: float
) -> None:
    h, w, b, target = operands(23, 1101, 6)
    # From flat to peaked, so that with drop_mass every chunk size meets sparse and dense rows.
    h = h * torch.linspace(0.0, 20.0, 23).unsqueeze(1)
    arguments, options = (h, w, b, target), {"reduction": reduction, "drop_mass": drop_mass}
    whole = outcome(ours, *arguments, **options)
    for rows_per_chunk in (0, 1, 7, 22):
        monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", rows_per_chunk * 1101 + 50)
        for value, expected in zip(outcome(ours, *arguments, **options), whole, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
def test_logits_of_ten_thousand_are_handled_as_well_as_by_plain_pytorch(
    drop_mass: float, reduction: str
) -> None:
    h, w, b, target = operands(200, 1300, 16, torch.float32)
    with torch.no_grad():
        h *= 1e4 / (h @ w.t()).abs().amax()
        # Near ties at the top, so that gradients are not all one-hot.
        w[::100] = w[0] * (1.0 + 1e-5 * torch.arange(13).unsqueeze(1))
    exact = outcome(plain, h.double(), w.double(), b.double(), target, reduction=reduction)
    values = outcome(ours, h, w, b, target, reduction=reduction, drop_mass=drop_mass)
    others = outcome(plain, h, w, b, target, reduction=reduction)
    for value, other, truth in zip(values, others, exact, strict=True):
        assert value.isfinite().all()
        allowed = 1.5 * (other - truth).norm()
        if drop_mass:
            allowed = allowed + drop_mass * truth.norm()
        assert (value - truth).norm() <= allowed


def test_one_token_vocabulary_has_no_loss() -> None:
    h, w, b, _ = operands(5, 1, 4)
    loss, *grads = outcome(ours, h, w, b, torch.zeros(5, dtype=torch.long))
    assert loss == 0.0
    assert not any(grad.any() for grad in grads)


def test_uniform_logits_have_the_loss_of_a_coin_with_v_sides() -> None:
    target = torch.arange(4)
    loss = linear_cross_entropy(torch.zeros(4, 3), torch.randn(50, 3), target)
    assert loss.item() == pytest.approx(math.log(50), rel=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leading_dimensions_int32_targets_and_strides_do_not_matter(reduction: str) -> None:
    h, w, b, target = operands(24, 33, 8, torch.float32)
    expected = ours(h, w, b, target, reduction=reduction)
    strided = h.detach().t().contiguous().t().requires_grad_()
    loss = linear_cross_entropy(
        strided.reshape(2, 3, 4, 8),
        w,
        target.reshape(2, 3, 4).int(),
        bias=b,
        reduction=reduction,
    )
    assert torch.equal(loss.reshape(expected.shape), expected)
    assert loss.shape == ((2, 3, 4) if reduction == "none" else ())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_operands_leave_the_other_gradients_unchanged(
    frozen: tuple[int, ...], reduction: str
) -> None:
    *tensors, target = operands(7, 33, 8, torch.float32)
    expected = outcome(ours, *tensors, target, reduction=reduction)[1:]
    tensors = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    ours(*tensors, target, reduction=reduction).backward(incoming(7, reduction).float())
    for i, (tensor, grad) in enumerate(zip(tensors, expected, strict=True)):
        assert tensor.grad is None if i in frozen else torch.equal(tensor.grad, grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_graph_kept_alive_gives_the_same_gradients_again(reduction: str) -> None:
    h, w, b, target = operands(7, 33, 8, torch.float32)
    loss = ours(h, w, b, target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (h, w, b), retain_graph=True)
    second = torch.autograd.grad(2.0 * loss, (h, w, b))
    assert all(torch.equal(2.0 * a, b) for a, b in zip(first, second, strict=True))


def test_evaluation_gives_the_loss_of_training() -> None:
    h, w, b, target = operands(127, 257, 8, torch.float32)
    for reduction in REDUCTIONS:
        training = ours(h, w, b, target, reduction=reduction)
        with torch.no_grad():
            evaluation = ours(h, w, b, target, reduction=reduction)
        torch.testing.assert_close(evaluation, training.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_never_stored(reduction: str, drop_mass: float) -> None:
    rows, vocab = 5000, 4001
    h, w, _, target = operands(rows, vocab, 8, torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = linear_cross_entropy(h, w, target, reduction=reduction, drop_mass=drop_mass)
        torch.autograd.grad(loss.sum(), (h, w))
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    chunk = 4 * reference.LOGITS_PER_CHUNK
    kept_between = 8 * rows * CAPACITY if drop_mass else w.nbytes + h.nbytes
    assert 0 < peak < 2 * chunk + 4 * kept_between < rows * vocab * 4 / 3


def test_little_is_kept_for_the_backward_of_single_rows() -> None:
    rows = 500
    h, w, _, target = operands(rows, 1025, 8, torch.float32)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in (h.data_ptr(), w.data_ptr(), target.data_ptr()):
            kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(h, w, target, reduction="none", drop_mass=1e-3)
    assert sum(kept) <= 4 * rows * (3 + 2 * CAPACITY)


def test_gradients_of_a_reduced_loss_are_handed_out_not_copied() -> None:
    h, w, _, target = operands(50, 4001, 32, torch.float32)
    loss = linear_cross_entropy(h, w, target)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        torch.autograd.grad(loss, (h, w))
    allocated = [e.nbytes() for e in recorded.profiler.kineto_results.events()
                 if e.name() == "[memory]" and e.nbytes() > 0]  # fmt: skip
    assert sum(allocated) < w.nbytes / 10


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast_casts_the_operands_but_not_the_logits(reduction: str) -> None:
    h, w, b, target = operands(30, 65, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = outcome(ours, h, w, b, target, reduction=reduction)
    cast = outcome(ours, h.bfloat16(), w.bfloat16(), b.bfloat16(), target, reduction=reduction)
    for value, expected in zip(values, cast, strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, expected.float())


def test_backward_inside_autocast_is_that_outside() -> None:
    h, w, b, target = operands(30, 65, 8, torch.float32)
    for reduction in REDUCTIONS:
        loss = ours(h, w, b, target, reduction=reduction).sum()
        expected = torch.autograd.grad(loss, (h, w, b), retain_graph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = torch.autograd.grad(loss, (h, w, b))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("bad", [-1, 33, 10**12, -(10**12)])
def test_a_target_outside_the_vocabulary_is_refused(bad: int) -> None:
    h, w, b, target = operands(5, 33, 8)
    target[3] = bad
    with pytest.raises(ValueError, match=rf"target: expected token ids in \[0, 33\).*got {bad}"):
        ours(h, w, b, target)


@pytest.mark.parametrize("drop_mass", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_unchecked_target_outside_the_vocabulary_gives_nan_not_a_clamped_loss(
    monkeypatch: pytest.MonkeyPatch, reduction: str, drop_mass: float
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    h, w, b, target = operands(5, 1100, 8)
    target[3] = 1100
    loss, grad_hidden, *_ = outcome(ours, h, w, b, target, reduction=reduction, drop_mass=drop_mass)
    assert loss[..., None].flatten()[min(3, loss.numel() - 1)].isnan()
    assert grad_hidden[3].isnan().all()
    assert grad_hidden[:3].isfinite().all()


@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_operators_pass_opcheck(with_bias: bool, drop_mass: float, backend: str) -> None:
    overload = "default" if backend == "native" else backend
    h, w, b, target = operands(5, 33, 8, torch.float32)
    bias = b if with_bias else None
    common = (h, w, bias, target, -100, drop_mass)
    rows = getattr(OPERATORS.linear_cross_entropy_rows, overload)
    reduced = getattr(OPERATORS.linear_cross_entropy_reduced, overload)
    backward = getattr(OPERATORS.linear_cross_entropy_rows_backward, overload)
    torch.library.opcheck(rows, common)
    torch.library.opcheck(reduced, (*common, True, [True, True, with_bias]))
    _, _, *saved, _ = rows(*common)
    tensors = [None if t is None else t.detach() for t in (h, w, bias)]
    torch.library.opcheck(
        backward, (torch.randn(5), *tensors, target, *saved, -100, [True, False, with_bias])
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_equals_eager_bitwise_at_any_row_count(reduction: str) -> None:
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    options = {"reduction": reduction, "drop_mass": 1e-3}
    for rows in (7, 12):
        arguments = operands(rows, 1100, 8, torch.float32)
        values = outcome(compiled, *arguments, **options)
        for value, expected in zip(values, outcome(ours, *arguments, **options), strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("arguments", "error_type", "message"),
    [
        ({"hidden": torch.ones(3, 8).long()}, TypeError, "hidden: expected dtype float32"),
        ({"hidden": torch.ones(3, 8).half()}, TypeError, "weight: expected dtype float16, that of"),
        ({"hidden": torch.ones(3, 7)}, ValueError, r"weight: expected shape \[V, 7\]"),
        ({"weight": torch.ones(0, 8)}, ValueError, r"weight.shape\[0\]: expected at least 1"),
        ({"weight": torch.ones(9, 8, device="meta")}, ValueError, "weight: expected device cpu"),
        ({"target": torch.zeros(3)}, TypeError, "target: expected dtype int64, int32"),
        ({"target": torch.zeros(2).long()}, ValueError, r"target: expected shape \[3\]; got \[2\]"),
        ({"bias": torch.ones(8)}, ValueError, r"bias: expected shape \[9\]; got \[8\]"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of none, mean, sum"),
        ({"drop_mass": 1.0}, ValueError, r"drop_mass: expected a probability mass in \[0, 1\)"),
        ({"drop_mass": -0.1}, ValueError, r"drop_mass: expected a probability mass in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, error_type: type, message: str) -> None:
    good = {
        "hidden": torch.ones(3, 8),
        "weight": torch.ones(9, 8),
        "target": torch.zeros(3, dtype=torch.long),
        "bias": torch.ones(9),
    }
    with pytest.raises(error_type, match=message):
        linear_cross_entropy(**{**good, **arguments})


def test_module_passes_its_options_on() -> None:
    h, w, b, target = operands(7, 33, 8)
    target[0] = 4
    module = LinearCrossEntropyLoss(ignore_index=4, reduction="sum", drop_mass=0.25)
    counted = target.masked_fill(target == -100, 4)
    options = {"ignore_index": 4, "reduction": "sum", "drop_mass": 0.25}
    expected = outcome(ours, h, w, b, counted, **options)
    values = outcome(
        lambda h, w, b, target, **_: module(h, w, target, b), h, w, b, counted, **options
    )
    assert all(torch.equal(a, e) for a, e in zip(values, expected, strict=True))
    assert repr(module) == (
        "LinearCrossEntropyLoss(ignore_index=4, reduction='sum', drop_mass=0.25)"
    )
