"""A stack of layers in one call against the same layers in float64, one by one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import calm_kernels
from calm_kernels.ops.row_layers import RowLayers

BACKENDS = ["auto", "reference"]
EPS = 1e-5
Plain = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rows, residual) -> (rows, residual), in the dtype of the rows."""


class Stack:
    """Random layers of random sizes, packed and as plain functions."""

    def __init__(self, seed: int, num_layers: int, num_positions: int = 1) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.in_size = self._size = self._random.choice([1, 7, 16, 33, 64])
        self._residual_size = 0
        self.layers = RowLayers(self.in_size)
        self.biases: list[Tensor] = []
        self._plain: list[Plain] = []
        self._num_positions = num_positions
        for _ in range(num_layers):
            self._add()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _weight(self, size: int) -> Tensor:
        return self._normal(size, self._size) / self._size**0.5

    def _add(self) -> None:
        kinds = ["linear", "silu", "at call", "gated", "layer norm", "rms norm"]
        if self._residual_size:
            kinds.append("add")
        kind = self._random.choice(kinds)
        size = self._random.choice([1, 5, 16, 17, 31, 32, 40, 70])
        if "norm" in kind:
            self._add_norm(kind)
        elif kind == "gated":
            self._add_gated(size)
            self._size = size
        else:
            self._add_linear(kind, size)

    def _add_norm(self, kind: str) -> None:
        weight, bias, size = self._normal(self._size) + 1, self._normal(self._size), self._size
        if kind == "layer norm":
            self.layers.layer_norm(weight, bias, eps=EPS)
            self._plain.append(
                lambda x, _: (F.layer_norm(x, (size,), weight.to(x), bias.to(x), EPS), x)
            )
        else:
            self.layers.rms_norm(weight, eps=EPS)
            self._plain.append(lambda x, _: (F.rms_norm(x, (size,), weight.to(x), EPS), x))
        self._residual_size = size

    def _add_gated(self, size: int) -> None:
        gate, up, gate_bias, up_bias = (
            self._weight(size),
            self._weight(size),
            self._normal(size),
            self._normal(size) if self._random.random() < 0.5 else None,
        )
        self.layers.gated(gate, up, gate_bias, up_bias)
        self._plain.append(
            lambda x, r: (
                F.silu(F.linear(x, gate.to(x), gate_bias.to(x)))
                * F.linear(x, up.to(x), None if up_bias is None else up_bias.to(x)),
                r,
            )
        )

    def _add_linear(self, kind: str, size: int) -> None:
        size = self._residual_size if kind == "add" else size
        weight, bias = self._weight(size), self._normal(size)
        if kind == "add":
            self.layers.add_linear(weight, bias)

            def add(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
                total = r + F.linear(x, weight.to(x), bias.to(x))
                return total, total

            self._plain.append(add)
        elif kind == "at call":
            biases = self._normal(self._num_positions, size)
            self.layers.linear(weight, activation="silu", bias_at_call=True)
            self.biases.append(biases)
            self._plain.append(
                lambda x, r: (F.silu(F.linear(x, weight.to(x)) + _spread(biases, x)), r)
            )
        elif kind == "silu":
            self.layers.linear(weight, bias, activation="silu")
            self._plain.append(lambda x, r: (F.silu(F.linear(x, weight.to(x), bias.to(x))), r))
        else:
            self.layers.linear(weight)
            self._plain.append(lambda x, r: (F.linear(x, weight.to(x)), r))
        self._size = size

    def rows(self, count: int) -> Tensor:
        return self._normal(count, self.in_size)

    def plain(self, rows: Tensor) -> Tensor:
        residual = rows
        for layer in self._plain:
            rows, residual = layer(rows, residual)
        return rows


def _spread(biases: Tensor, x: Tensor) -> Tensor:
    return biases.to(x).repeat_interleave(len(x) // len(biases), dim=0)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_rows", [1, 2, 11, 12, 13, 25, 97, 200, 391])
@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_errors_are_those_of_layers_one_by_one(
    num_layers: int, num_rows: int, backend: str
) -> None:
    for seed in range(8):
        stack = Stack(100 * num_rows + 10 * num_layers + seed, num_layers)
        rows = stack.rows(num_rows)
        exact = stack.plain(rows.double())
        with calm_kernels.backend(backend):
            result = stack.layers(rows, stack.biases)
        assert result.shape == exact.shape and result.dtype == torch.float32
        bound = max(2 * error(stack.plain(rows), exact), 1e-6 * float(exact.norm()))
        assert error(result, exact) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_positions", "samples"), [(3, 1), (1, 40), (4, 7), (9, 23)])
def test_rows_of_a_position_share_its_bias(num_positions: int, samples: int, backend: str) -> None:
    biased = 0
    for seed in range(12):
        stack = Stack(seed, 6, num_positions)
        biased += bool(stack.biases)
        rows = stack.rows(num_positions * samples)
        exact = stack.plain(rows.double())
        with calm_kernels.backend(backend):
            result = stack.layers(rows, stack.biases)
        bound = max(2 * error(stack.plain(rows), exact), 1e-6 * float(exact.norm()))
        assert error(result, exact) <= bound
    assert biased > 3


def test_wide_layers_whose_slabs_are_the_smallest() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, up = (torch.randn(5000, 300, generator=generator) / 17 for _ in range(2))
    down = torch.randn(300, 5000, generator=generator) / 70
    norm, rows = torch.rand(300, generator=generator), torch.randn(50, 300, generator=generator)
    layers = RowLayers(300).rms_norm(norm, eps=EPS).gated(weight, up).add_linear(down)

    def plain(x: Tensor) -> Tensor:
        n = F.rms_norm(x, (300,), norm.to(x), EPS)
        product = F.silu(n @ weight.to(x).t()) * (n @ up.to(x).t())
        return x + product @ down.to(x).t()

    exact = plain(rows.double())
    assert error(layers(rows), exact) <= 2 * error(plain(rows), exact)


def test_a_row_does_not_depend_on_the_others_nor_on_threads() -> None:
    threads = torch.get_num_threads()
    for seed in range(10):
        stack = Stack(seed, 6)
        rows = stack.rows(150)
        result = stack.layers(rows, stack.biases)
        assert torch.equal(stack.layers(rows[40:57], stack.biases), result[40:57])
        assert torch.equal(stack.layers(rows[::2], stack.biases), result[::2])
        try:
            torch.set_num_threads(1)
            assert torch.equal(stack.layers(rows, stack.biases), result)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_stay_as_they_are_where_they_are_the_residual(backend: str) -> None:
    layers = RowLayers(20).rms_norm(torch.rand(20), eps=EPS).add_linear(torch.randn(20, 20))
    rows = torch.randn(30, 20)
    before = rows.clone()
    with calm_kernels.backend(backend):
        layers(rows)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_no_rows(backend: str) -> None:
    stack = Stack(4, 6)
    with calm_kernels.backend(backend):
        result = stack.layers(torch.empty(0, stack.in_size), stack.biases)
        assert result.shape == (0, stack.plain(stack.rows(1)).shape[1])


def test_later_changes_of_weights_do_not_count() -> None:
    weight, bias, norm = torch.randn(32, 32), torch.randn(32), torch.rand(32)
    layers = RowLayers(32).linear(weight, bias).rms_norm(norm, eps=EPS).gated(weight, weight)
    rows = torch.randn(5, 32)
    before = layers(rows)
    for tensor in (weight, bias, norm):
        tensor.zero_()
    assert torch.equal(layers(rows), before)


def test_layers_that_follow_share_their_weights() -> None:
    first, second = Stack(1, 4), RowLayers(3)
    third = RowLayers(first.layers._size).linear(torch.randn(9, first.layers._size))
    both = first.layers.followed_by(third)
    rows = first.rows(14)
    expected = third(first.layers(rows, first.biases))
    assert torch.equal(both(rows, first.biases), expected)
    kept = [t.data_ptr() for t in third._tensors if t is not None]
    assert [t.data_ptr() for t in both._tensors if t is not None][-len(kept) :] == kept
    with pytest.raises(ValueError, match="expected layers that read rows of"):
        second.followed_by(RowLayers(4))


def test_wrong_arguments_are_named() -> None:
    layers = RowLayers(8)
    with pytest.raises(ValueError, match="at least one layer"):
        layers(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, 8\]"):
        layers.linear(torch.randn(4, 7))
    with pytest.raises(TypeError, match="weight: expected dtype float32"):
        layers.linear(torch.randn(4, 8).double())
    with pytest.raises(ValueError, match="add_linear: expected a norm before it"):
        layers.add_linear(torch.randn(8, 8))
    with pytest.raises(ValueError, match="bias: expected None"):
        layers.linear(torch.randn(4, 8), torch.randn(4), bias_at_call=True)
    layers.linear(torch.randn(4, 8), bias_at_call=True)
    with pytest.raises(ValueError, match="biases: expected 1"):
        layers(torch.randn(2, 8))
    with pytest.raises(ValueError, match="a number of rows that divides 6; got 4"):
        layers(torch.randn(6, 8), [torch.randn(4, 4)])
    with pytest.raises(ValueError, match=r"rows: expected shape \[R, 8\]"):
        layers(torch.randn(6, 9), [torch.randn(1, 4)])
    with pytest.raises(ValueError, match="up_weight"):
        layers.gated(torch.randn(5, 4), torch.randn(6, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 32, 33, 258])
@pytest.mark.parametrize("num_rows", [0, 1, 13, 150])
def test_largest_columns_are_those_of_the_results(num_rows: int, size: int, backend: str) -> None:
    torch.manual_seed(size)
    weight = torch.randint(-3, 4, (size, 20)).float()  # exact sums, and many equal ones
    rows = torch.randint(-2, 3, (num_rows, 20)).float()
    if num_rows > 2:
        rows[1] = 0.0
        rows[2, 5] = torch.nan
    layers = RowLayers(20).linear(weight)
    with calm_kernels.backend(backend):
        found = layers.argmax(rows)
        assert found.dtype == torch.int64 and torch.equal(found, layers(rows).argmax(dim=1))
    deep = RowLayers(20).linear(torch.eye(20)).followed_by(layers)
    assert torch.equal(deep.argmax(rows), found)
    if size > 3 and num_rows > 2:
        infinite = weight.clone()
        infinite[:, 3] = -torch.inf
        infinite[3, 3] = torch.nan
        rows[:, 3] = 1.0
        layers = RowLayers(20).linear(infinite)
        with calm_kernels.backend(backend):
            assert torch.equal(layers.argmax(rows), layers(rows).argmax(dim=1))


def test_largest_columns_need_a_plain_last_layer() -> None:
    rows = torch.randn(3, 8)
    layers = RowLayers(8)
    with pytest.raises(ValueError, match="a last layer that is linear without bias"):
        layers.argmax(rows)
    for biased in (
        RowLayers(8).linear(torch.randn(4, 8), torch.randn(4)),
        RowLayers(8).linear(torch.randn(4, 8), activation="silu"),
        RowLayers(8).linear(torch.randn(4, 8)).rms_norm(torch.randn(4), eps=EPS),
    ):
        with pytest.raises(ValueError, match="a last layer that is linear without bias"):
            biased.argmax(rows)


@pytest.mark.parametrize("size", [1, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("depth", [1, 15, 16, 50])
def test_panels_are_those_of_the_reference(size: int, depth: int) -> None:
    weight, other = torch.randn(depth, size).t(), torch.randn(size, depth)
    packed = torch.ops.calm_kernels.pack_panels
    for second in (None, other):
        assert torch.equal(packed(weight, second), packed.reference(weight, second))
        torch.library.opcheck(packed.reference, (weight, second))


def test_the_operator_passes_opcheck() -> None:
    stack = Stack(3, 6)
    tensors = iter(stack.layers._checked_biases(stack.rows(4), stack.biases))
    given = [next(tensors) if t is None else t for t in stack.layers._tensors]
    kinds = [int(kind) for kind in stack.layers._kinds]
    arguments = (stack.rows(4), kinds, given, stack.layers._eps, stack.layers._size)
    for overload in (
        torch.ops.calm_kernels.row_layers.default,
        torch.ops.calm_kernels.row_layers.reference,
    ):
        torch.library.opcheck(overload, arguments)
