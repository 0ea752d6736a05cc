"""The Triton kernels of linear_cross_entropy, interpreted on CPU tensors, against the reference."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from calm_kernels.reference import linear_cross_entropy as reference
from calm_kernels.reference.linear_cross_entropy import CAPACITY, DENSE

NAN = float("nan")
MODULES = ("tiles", "join", "forward", "lists", "backward")
WHOLE = 10**6
"""Vocabulary tiles of a split that is all of the vocabulary."""


@dataclasses.dataclass(frozen=True)
class Forward:
    """The results of ``linear_cross_entropy_rows``, in order."""

    loss: Tensor
    correct: Tensor
    top: Tensor
    total: Tensor
    list_columns: Tensor
    list_probabilities: Tensor
    list_length: Tensor
    statistics: Tensor


class Kernels:
    """The kernels at small tiles."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def plan(self, tiles_per_split: int, descriptors: bool, chunk: int, size: int) -> Any:
        tiles = self.module.Tiles(size, size, 32, 4, 3, 1, 4)
        return self.module.Plan(tiles, descriptors, tiles_per_split, chunk)

    def rows(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        drop_mass: float,
        *,
        ignore_index: int = -100,
        tiles_per_split: int = WHOLE,
        descriptors: bool = False,
        size: int = 32,
    ) -> Forward:
        operands = self.module.Operands(hidden, weight, bias, target, ignore_index)
        plan = self.plan(tiles_per_split, descriptors, size, size)
        return Forward(**vars(self.module._forward(operands, drop_mass, plan)))

    def backward(
        self,
        grad_loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: Forward,
        *,
        ignore_index: int = -100,
        wanted: Sequence[bool] = (True, True, True),
        descriptors: bool = False,
        chunk: int = 96,
        size: int = 32,
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = self.module.Operands(hidden, weight, bias, target, ignore_index)
        lists = (rows.list_columns, rows.list_probabilities, rows.list_length)
        saved = self.module.Saved(rows.top, rows.total, *lists)
        scales = self.module.scales(grad_loss, target != ignore_index)
        plan = self.plan(1, descriptors, chunk, size)
        results: tuple[Tensor, Tensor, Tensor] = self.module.launch_backward(
            operands,
            saved,
            *scales,
            list(wanted),
            torch.float32,
            plan.tiles,
            plan.chunk,
            plan.descriptors,
        )
        return results

    def reduced(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        drop_mass: float,
        mean: bool,
        wanted: tuple[bool, bool, bool] = (True, True, True),
    ) -> tuple[Tensor, ...]:
        operands = self.module.Operands(hidden, weight, bias, target, -100)
        plan = self.plan(2, False, 96, 32)
        results: tuple[Tensor, ...] = self.module.reduced(
            operands, drop_mass, mean, list(wanted), plan
        )
        return results


@pytest.fixture
def kernels(interpreted: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Kernels:
    for part in MODULES:
        name = f"linear_cross_entropy_{part}"
        # The next module is to import this copy.
        monkeypatch.setitem(sys.modules, f"calm_kernels.triton.{name}", interpreted(name))
    return Kernels(interpreted("linear_cross_entropy"))


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, target. From diffuse to sure rows; odd ones have likely targets; every
    fifth is ignored."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator) * torch.linspace(0.3, 6.0, rows)[:, None]
    w = torch.randn(vocab, hidden, generator=generator)
    b = torch.randn(vocab, generator=generator)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[1::2] = (h @ w.t() + b).argmax(dim=1)[1::2]
    target[3::5] = -100
    return h.to(dtype), w.to(dtype), b.to(dtype), target


def exact(
    h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, grad_loss: Tensor
) -> list[Tensor]:
    """Row losses and gradients in float64."""
    tensors = [t.double().requires_grad_() for t in (h, w, b) if t is not None]
    loss = cross_entropy(linear(*tensors), target, reduction="none")
    return [loss.detach(), *torch.autograd.grad(loss, tensors, grad_loss.double())]


def assert_near(value: Tensor, truth: Tensor, tolerance: float) -> None:
    assert value.shape == truth.shape
    error = (value.double() - truth.double()).norm()
    assert float(error) <= tolerance * float(truth.double().norm()), float(error)


def incoming(rows: int) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(5)) + 0.3


DESCRIPTORS = {"descriptors": True}
CASES = [
    (torch.float32, (1, 101, 24), True, {"tiles_per_split": 2}, {}),
    (torch.float32, (37, 97, 33), False, {"tiles_per_split": 1}, {"chunk": 64}),
    (torch.float16, (5, 7, 3), True, {}, {}),
    (torch.float16, (19, 131, 40), True, {"tiles_per_split": 2, **DESCRIPTORS}, DESCRIPTORS),
    (torch.bfloat16, (37, 131, 72), False, {"tiles_per_split": 3, **DESCRIPTORS}, DESCRIPTORS),
    (torch.bfloat16, (35, 64, 32), True, {}, {"chunk": 32}),
]


@pytest.mark.parametrize(("dtype", "shape", "with_bias", "forward", "backward"), CASES)
def test_exact_loss_and_gradients_equal_float64(
    kernels: Kernels,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    with_bias: bool,
    forward: dict[str, Any],
    backward: dict[str, Any],
) -> None:
    h, w, b, target = operands(*shape, dtype)
    bias, grad_loss = (b if with_bias else None), incoming(shape[0])
    rows = kernels.rows(h, w, bias, target, 0.0, **forward)
    grads = kernels.backward(grad_loss, h, w, bias, target, rows, **backward)
    loss, *truths = exact(h, w, bias, target, grad_loss)
    assert_near(rows.loss, loss, 2e-6)
    expected = (linear(h.float(), w.float(), None if bias is None else bias.float())).argmax(1)
    assert torch.equal(rows.correct, expected == target)
    assert rows.list_columns.shape == rows.list_probabilities.shape == (shape[0], 0)
    assert rows.statistics.tolist() == [int((target != -100).sum()), 0.0, 0.0]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for grad, truth in zip(grads, truths, strict=False):
        assert grad.dtype == torch.float32
        assert_near(grad, truth, tolerance)


@pytest.mark.parametrize(("tiles_per_split", "descriptors"), [(2, True), (WHOLE, False)])
def test_lists_and_their_gradients_equal_the_reference(
    kernels: Kernels, tiles_per_split: int, descriptors: bool
) -> None:
    h, w, b, target = operands(31, 211, 24)
    ours = kernels.rows(
        h, w, b, target, 1e-3, tiles_per_split=tiles_per_split, descriptors=descriptors
    )
    theirs = Forward(*reference.linear_cross_entropy_rows(h, w, b, target, -100, 1e-3))
    for name, value in vars(ours).items():
        truth = getattr(theirs, name)
        assert value.dtype == truth.dtype and value.shape == truth.shape, name
    # A loose bound may overflow early: dense in place of sparse. Never the other way.
    agree = ours.list_length == theirs.list_length
    assert (agree | (ours.list_length == DENSE)).all()
    assert agree[1::2].all() and agree.double().mean() > 0.9
    sparse = (ours.list_length > 0) & agree
    assert 5 < sparse.sum() < 28
    assert torch.equal(ours.list_columns[sparse], theirs.list_columns[sparse])
    for name in ("loss", "correct", "top", "total"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    p, expected = ours.list_probabilities, theirs.list_probabilities
    torch.testing.assert_close(p[sparse], expected[sparse], rtol=2e-5, atol=1e-7)
    assert not p[~sparse].any() and not ours.list_columns[~sparse].any()
    counted, number, missing = ours.statistics.tolist()
    assert counted == (target != -100).sum() and number == sparse.sum()
    assert missing == pytest.approx(float((1 - p.double().sum(1))[sparse].amax()), abs=1e-6)

    grad_loss = incoming(31)
    grads = kernels.backward(grad_loss, h, w, b, target, ours, descriptors=descriptors)
    saved = list(vars(ours).values())[2:7]
    arguments = (h.double(), w.double(), b.double(), target)
    doubles = [t.double() if t.is_floating_point() else t for t in saved]
    truths = reference.linear_cross_entropy_rows_backward(
        grad_loss.double(), *arguments, *doubles, -100, [True] * 3
    )
    for grad, truth in zip(grads, truths, strict=True):
        assert_near(grad, truth, 1e-5)


def logit_gradient(kernels: Kernels, logits: Tensor, target: Tensor, drop_mass: float, **options):
    """The logits' gradient as the kernels have it: hidden = identity makes it grad_weight."""
    identity, weight = torch.eye(logits.shape[0]), logits.float().t().contiguous()
    rows = kernels.rows(identity, weight, None, target, drop_mass, **options)
    ones = torch.ones(logits.shape[0])
    _, grad, _ = kernels.backward(ones, identity, weight, None, target, rows, chunk=256)
    return rows, grad.t().double()


def exact_logit_gradient(logits: Tensor, target: Tensor) -> Tensor:
    gradient = logits.float().double().softmax(dim=1)
    gradient[torch.arange(len(target)), target] -= 1.0
    return gradient


@pytest.mark.parametrize(("drop_mass", "tiles_per_split"), [(1e-3, WHOLE), (0.05, 3), (0.5, 3)])
def test_left_out_part_of_each_logit_gradient_is_within_drop_mass(
    kernels: Kernels, drop_mass: float, tiles_per_split: int
) -> None:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(20, 230, generator=generator)
    ranks = -torch.arange(1, 231).log() * torch.linspace(0.5, 6.0, 20)[:, None]
    logits = torch.cat([noise * torch.linspace(0.0, 12.0, 20)[:, None], ranks])
    target = torch.arange(40) * 5
    target[::2] = logits.argmax(dim=1)[::2]
    rows, gradient = logit_gradient(
        kernels, logits, target, drop_mass, tiles_per_split=tiles_per_split
    )
    left_out = (gradient - exact_logit_gradient(logits, target)).abs().sum(dim=1)
    assert left_out.amax() <= drop_mass + 2e-6
    assert 8 < (rows.list_length > 0).sum() < 40
    assert float(rows.statistics[2]) == pytest.approx(
        float(left_out[rows.list_length > 0].amax()), rel=0.01, abs=2e-6
    )


def peaks(count: int, vocab: int, mass: float = 1.0) -> Tensor:
    """Logits of one row: ``count`` equal tokens share ``mass``, the others the rest."""
    p = torch.full((1, vocab), (1.0 - mass) / max(vocab - count, 1), dtype=torch.float64)
    p[0, :count] = mass / count
    return p.clamp_min(1e-30).log()


@pytest.mark.parametrize("tiles_per_split", [4, WHOLE])
def test_adversarial_rows_are_listed_as_specified(kernels: Kernels, tiles_per_split: int) -> None:
    cases = [
        (peaks(1, 300), 0, 1),
        (peaks(2, 300), 1, 2),  # two equal peaks
        (peaks(2, 300), 299, 3),  # the target is in the list however unlikely
        (peaks(CAPACITY, 300), 0, CAPACITY),  # capacity exactly met
        (peaks(CAPACITY, 300), 299, DENSE),  # and exceeded by the target
        (peaks(CAPACITY + 1, 300), 0, DENSE),
        (peaks(300, 300), 3, DENSE),  # uniform, overflowing
        (peaks(3, 300, mass=0.9995), 2, 3),  # the rest is too thin to list and allowed to go
        (peaks(3, 300, mass=0.9985), 2, DENSE),  # too thin to list but too much to drop
    ]
    logits = torch.cat([row for row, _, _ in cases])
    target = torch.tensor([target for _, target, _ in cases])
    rows, gradient = logit_gradient(kernels, logits, target, 1e-3, tiles_per_split=tiles_per_split)
    lengths = [length for _, _, length in cases]
    if tiles_per_split != WHOLE:
        # Splits without a peak cannot know that their columns are insignificant.
        lengths[2] = rows.list_length[2].item()
        assert lengths[2] in (3, DENSE)
    assert rows.list_length.tolist() == lengths
    left_out = (gradient - exact_logit_gradient(logits, target)).abs().sum(dim=1)
    assert (left_out <= torch.where(rows.list_length == DENSE, 2e-6, 1e-3)).all()
    for vocab, row, length in ((CAPACITY, peaks(64, 64), 64), (40, peaks(3, 40, mass=0.9), 40)):
        rows, gradient = logit_gradient(kernels, row, torch.tensor([2]), 1e-3)
        assert rows.list_length.tolist() == [length]
        assert rows.list_columns[0, :length].tolist() == list(range(vocab))
        assert_near(gradient, exact_logit_gradient(row, torch.tensor([2])), 2e-6)


@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
@pytest.mark.parametrize("mean", [False, True])
def test_reduced_loss_and_gradients_come_in_one_go(
    kernels: Kernels, mean: bool, drop_mass: float
) -> None:
    h, w, b, target = operands(23, 130, 24)
    ours = kernels.reduced(h, w, b, target, drop_mass, mean)
    theirs = reference.linear_cross_entropy_reduced(
        *(t.double() for t in (h, w, b)), target, -100, drop_mass, mean, [True] * 3
    )
    assert ours[0].shape == () and ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6)
    assert torch.equal(ours[1], theirs[1])
    assert ours[2][0] == theirs[2][0] and ours[2][1] <= theirs[2][1] <= ours[2][1] + 2
    for grad, truth in zip(ours[3:], theirs[3:], strict=True):
        assert_near(grad, truth, 1e-5 + drop_mass)


@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
def test_results_are_bitwise_repeatable(kernels: Kernels, drop_mass: float) -> None:
    h, w, b, target = operands(23, 130, 24, torch.bfloat16)
    first, second = (kernels.reduced(h, w, b, target, drop_mass, True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
def test_only_ignored_rows_give_nan_mean_and_zero_gradients(
    kernels: Kernels, drop_mass: float
) -> None:
    h, w, b, target = operands(17, 50, 16)
    loss, correct, statistics, *grads = kernels.reduced(
        h, w, b, torch.full_like(target, -100), drop_mass, True
    )
    assert loss.isnan() and not correct.any() and not statistics.any()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("ignore_index", [5, 1, 10**12])
def test_an_ignored_row_is_neither_sparse_nor_dense(kernels: Kernels, ignore_index: int) -> None:
    h, w, b, target = operands(9, 50, 16)
    target[:] = torch.arange(9)
    target[[0, 4]] = ignore_index
    ignored = target == ignore_index
    for drop_mass in (0.0, 1e-3):
        rows = kernels.rows(h, w, b, target, drop_mass, ignore_index=ignore_index)
        assert torch.equal(rows.list_length == 0, ignored)
        assert not rows.loss[ignored].any() and (rows.loss[~ignored] > 0.0).all()
        grads = kernels.backward(torch.ones(9), h, w, b, target, rows, ignore_index=ignore_index)
        assert torch.equal(grads[0].any(dim=1), ~ignored)


@pytest.mark.parametrize(("bad", "drop_mass"), [(50, 0.0), (50, 0.5), (-1, 0.5), (10**12, 0.5)])
def test_a_target_outside_the_vocabulary_gives_nan(
    kernels: Kernels, drop_mass: float, bad: int
) -> None:
    h, w, b, target = operands(9, 50, 16)
    target[2] = bad
    rows = kernels.rows(h, w, b, target, drop_mass)
    assert rows.loss.isnan().nonzero().flatten().tolist() == [2]
    assert not rows.correct[2]
    grad_hidden, _, _ = kernels.backward(incoming(9), h, w, b, target, rows)
    assert grad_hidden.isnan().any(dim=1).nonzero().flatten().tolist() == [2]
    assert kernels.reduced(h, w, b, target, drop_mass, True)[0].isnan()


@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
def test_logits_of_ten_thousand_are_handled_as_well_as_by_plain_pytorch(
    kernels: Kernels, drop_mass: float
) -> None:
    h, w, b, target = operands(40, 130, 16)
    h = h * 1e4 / (h @ w.t()).abs().amax()
    # Near ties at the top, so that gradients are not all one-hot.
    w[::10] = w[0] * (1.0 + 1e-5 * torch.arange(13).unsqueeze(1))
    grad_loss = incoming(40)
    rows = kernels.rows(h, w, b, target, drop_mass, tiles_per_split=3)
    values = [rows.loss, *kernels.backward(grad_loss, h, w, b, target, rows)]
    plain = [t.clone().requires_grad_() for t in (h, w, b)]
    loss = cross_entropy(linear(*plain), target, reduction="none")
    others = [loss.detach(), *torch.autograd.grad(loss, plain, grad_loss)]
    truths = exact(h, w, b, target, grad_loss)
    for value, other, truth in zip(values, others, truths, strict=True):
        assert value.isfinite().all()
        allowed = 1.5 * (other - truth).norm() + drop_mass * truth.norm()
        assert (value - truth).norm() <= allowed


@pytest.mark.parametrize("tiles_per_split", [1, 2, WHOLE])
def test_correct_means_the_lowest_index_of_the_largest_logit(
    kernels: Kernels, tiles_per_split: int
) -> None:
    pairs = [(0, 82), (15, 16), (31, 32), (16, 47), (1, 2), (63, 81), (80, 82), (66, 67)]
    w = torch.zeros(83, len(pairs))
    for r, pair in enumerate(pairs):
        w[list(pair), r] = 1.5
    for which in (0, 1):
        target = torch.tensor([pair[which] for pair in pairs])
        rows = kernels.rows(
            torch.eye(len(pairs)), w, None, target, 0.0, tiles_per_split=tiles_per_split
        )
        assert rows.correct.tolist() == [which == 0] * len(pairs)


@pytest.mark.parametrize("tiles_per_split", [1, WHOLE])
def test_correct_means_the_first_nan_where_there_is_one(
    kernels: Kernels, tiles_per_split: int
) -> None:
    w = torch.randn(70, 16, generator=torch.Generator().manual_seed(3))
    w[[5, 37, 69], 0] = NAN
    target = torch.tensor([5, 37, 69, 2, 20, 68])
    h = torch.zeros(6, 16)
    h[:, 0] = 1.0
    rows = kernels.rows(h, w, None, target, 1e-3, tiles_per_split=tiles_per_split)
    assert rows.correct.tolist() == [True] + [False] * 5
    assert rows.loss.isnan().all()
    assert rows.list_length.tolist() == [DENSE] * 6


def test_a_logit_of_minus_infinity_has_no_part(kernels: Kernels) -> None:
    h, w, b, target = operands(6, 50, 16)
    b[:20] = -torch.inf  # the first tile, and part of the second
    target[:] = 30
    for drop_mass in (0.0, 1e-3):
        rows = kernels.rows(h, w, b, target, drop_mass)
        truth = cross_entropy(linear(h, w, b), target, reduction="none")
        torch.testing.assert_close(rows.loss, truth)
    # An impossible target: an infinite loss, and a gradient all the same.
    target[0], h[0] = 3, 0.0
    rows = kernels.rows(h, w, b, target, 1e-3)
    grad_hidden, _, grad_bias = kernels.backward(torch.ones(6), h, w, b, target, rows)
    assert rows.loss[0] == torch.inf and rows.loss[1:].isfinite().all()
    assert grad_hidden.isfinite().all() and grad_bias[3] == -1.0


@pytest.mark.parametrize("wanted", torch.eye(3, dtype=torch.bool).tolist())
def test_gradients_that_are_not_wanted_leave_the_others_unchanged(
    kernels: Kernels, wanted: list[bool]
) -> None:
    h, w, b, target = operands(13, 70, 16)
    rows = kernels.rows(h, w, b, target, 1e-3)
    everything = kernels.backward(incoming(13), h, w, b, target, rows)
    some = kernels.backward(incoming(13), h, w, b, target, rows, wanted=wanted)
    for grad, truth, want in zip(some, everything, wanted, strict=True):
        assert torch.equal(grad, truth) if want else grad.shape == (0,)


def test_small_incoming_gradients_are_not_lost_to_the_range_of_float16(kernels: Kernels) -> None:
    h, w, b, target = operands(19, 70, 16, torch.float16)
    grad_loss = 1e-7 * (incoming(19).abs() + 0.1)
    rows = kernels.rows(h, w, b, target, 0.0)
    grads = kernels.backward(grad_loss, h, w, b, target, rows)
    for grad, truth in zip(grads, exact(h, w, b, target, grad_loss)[1:], strict=True):
        assert_near(grad, truth, 1e-3)


@pytest.mark.parametrize(
    ("rows", "vocab", "itemsize"),
    [(16384, 128257, 2), (1, 128257, 2), (10**6, 128257, 4), (9, 7, 2)],
)
def test_the_residual_buffer_keeps_within_its_budget(
    kernels: Kernels, rows: int, vocab: int, itemsize: int
) -> None:
    tiles = sys.modules["calm_kernels.triton.linear_cross_entropy_tiles"].BY_DESCRIPTORS
    budget = sys.modules["calm_kernels.triton.linear_cross_entropy_backward"].RESIDUAL_BYTES
    chunk = kernels.module.chunk_columns(rows, vocab, itemsize, tiles)
    assert chunk % tiles.columns == 0 and 0 < chunk < vocab + tiles.columns
    padded = math.ceil(rows / tiles.rows) * tiles.rows
    assert chunk * padded * itemsize <= max(budget, tiles.columns * padded * itemsize)


def test_the_compiled_modules_are_left_as_they_were(kernels: Kernels) -> None:
    from triton.runtime.jit import JITFunction

    copy = sys.modules["calm_kernels.triton.linear_cross_entropy_forward"]
    assert not isinstance(copy.split_kernel, JITFunction)
    assert kernels.module.Operands is copy.Operands
