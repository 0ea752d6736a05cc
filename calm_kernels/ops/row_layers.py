"""A stack of layers over rows in one call, from weights packed beforehand. Float32, no gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from calm_kernels import _checks
from calm_kernels._dispatch import Operator, define
from calm_kernels._native import why_not_avx512
from calm_kernels.reference import row_layers as reference
from calm_kernels.reference.row_layers import PANEL, LayerKind

Activation = Literal["silu"]

_FLOAT32 = (torch.float32,)


def _fake(
    rows: Tensor, kinds: list[int], tensors: list[Tensor], eps: list[float], out_size: int
) -> Tensor:
    return rows.new_empty((rows.shape[0], out_size))


def _fake_pack_panels(weight: Tensor, other: Tensor | None) -> Tensor:
    rows = PANEL if other is None else PANEL // 2
    size, depth = weight.shape
    return weight.new_empty((-(-size // rows), depth, PANEL))


_pack_panels = define(
    "pack_panels",
    "(Tensor weight, Tensor? other) -> Tensor",
    reference=reference.pack_panels,
    fake=_fake_pack_panels,
)
_row_layers = define(
    "row_layers",
    "(Tensor rows, int[] kinds, Tensor[] tensors, float[] eps, int out_size) -> Tensor",
    reference=reference.row_layers,
    fake=_fake,
)


def _packed(weight: Tensor, other: Tensor | None = None) -> Tensor:
    result: Tensor = _pack_panels(
        weight.device, weight.detach(), None if other is None else other.detach()
    )
    return result


def _filled_up(biases: Tensor) -> Tensor:
    """[P, N] -> contiguous [P, whole panels]"""
    return F.pad(biases, (0, -biases.shape[1] % PANEL)).contiguous()


def why_not_row_layers(weights: Iterable[Tensor]) -> str | None:
    """Why :class:`RowLayers` are not the fast way for such weights; None if they are."""
    problem = _row_layers.why_not_native_for(weights, torch.float32)
    return why_not_avx512() if problem is None else problem


_row_layers_argmax = define(
    "row_layers_argmax",
    "(Tensor rows, int[] kinds, Tensor[] tensors, float[] eps, int out_size) -> Tensor",
    reference=reference.row_layers_argmax,
    fake=lambda rows, *_: rows.new_empty(rows.shape[:1], dtype=torch.int64),
)


class RowLayers:
    """Layers that rows go through one after the other, added by calling the methods in order.

    Weights are copied when a layer is added: later changes of them do not count. A norm keeps the
    rows it reads as the residual that :meth:`add_linear` adds to; what that gives is the residual
    of further ones, up to the next norm. On CPUs a thread takes its rows through all layers by
    itself; elsewhere the layers run one by one.

    Weights and rows are float32; no gradient.

    Args:
        size: of the rows that the first layer reads.
    """

    def __init__(self, size: int) -> None:
        self._kinds: list[LayerKind] = []
        self._tensors: list[Tensor | None] = []
        self._eps: list[float] = []
        self._sizes_at_call: list[int] = []
        self._in_size = self._size = size
        self._residual_size = 0
        self._plain_last = False

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: Activation | None = None,
        bias_at_call: bool = False,
    ) -> RowLayers:
        """x -> activation(x weight^T + bias).

        Args:
            weight: [N, K], K the size of the rows so far.
            bias: [N].
            activation: ``"silu"`` or None.
            bias_at_call: the bias is given when the layers are called.

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape.
        """
        kind = LayerKind.LINEAR if activation is None else LayerKind.LINEAR_SILU
        return self._add_product(kind, weight, bias, bias_at_call)

    def gated(
        self,
        gate_weight: Tensor,
        up_weight: Tensor,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
    ) -> RowLayers:
        """x -> silu(x gate_weight^T + gate_bias) * (x up_weight^T + up_bias); weights [N, K].

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape.
        """
        self._check_size("gate_weight", gate_weight)
        size = gate_weight.shape[0]
        _checks.tensor("up_weight", up_weight, _FLOAT32, tuple(gate_weight.shape))
        zeros = gate_weight.new_zeros(size)
        biases = [zeros if bias is None else bias.detach() for bias in (gate_bias, up_bias)]
        for name, bias in zip(("gate_bias", "up_bias"), biases, strict=True):
            _checks.tensor(name, bias, _FLOAT32, (size,))
        packed = _packed(gate_weight, up_weight)
        both = _packed(*(bias.unsqueeze(1) for bias in biases))
        self._append(LayerKind.GATED, packed, both.view(1, -1))
        self._size = size
        return self

    def add_linear(self, weight: Tensor, bias: Tensor | None = None) -> RowLayers:
        """x -> residual + x weight^T + bias; weight [N, K], N the size of the residual.

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape, or no norm before.
        """
        if not self._residual_size:
            raise ValueError("add_linear: expected a norm before it, whose input is the residual")
        self._check_size("weight", weight)
        _checks.tensor("weight", weight, _FLOAT32, (self._residual_size, "K"))
        return self._add_product(LayerKind.ADD_LINEAR, weight, bias, False)

    def layer_norm(self, weight: Tensor, bias: Tensor, *, eps: float) -> RowLayers:
        """LayerNorm with weight and bias [K]; its input becomes the residual.

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape.
        """
        return self._norm(LayerKind.LAYER_NORM, [weight, bias], eps)

    def rms_norm(self, weight: Tensor, *, eps: float) -> RowLayers:
        """RMSNorm with weight [K]; its input becomes the residual.

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape.
        """
        return self._norm(LayerKind.RMS_NORM, [weight], eps)

    def followed_by(self, other: RowLayers) -> RowLayers:
        """These layers, then ``other``'s, which share their weights with both.

        Raises:
            ValueError: ``other`` reads rows of another size.
        """
        if other._in_size != self._size:
            raise ValueError(
                f"other: expected layers that read rows of {self._size}; got {other._in_size}"
            )
        both = RowLayers(self._in_size)
        both._kinds = self._kinds + other._kinds
        both._tensors = self._tensors + other._tensors
        both._eps = self._eps + other._eps
        both._sizes_at_call = self._sizes_at_call + other._sizes_at_call
        both._size, both._residual_size = other._size, other._residual_size
        both._plain_last = other._plain_last
        return both

    def __call__(self, rows: Tensor, biases: Sequence[Tensor] = ()) -> Tensor:
        """Run the layers.

        Args:
            rows: [R, K].
            biases: of the layers with ``bias_at_call``, in order, each [P, N] with P a divisor of
                R: row r takes bias r // (R / P).

        Returns:
            [R, N] of the last layer.

        Raises:
            TypeError: wrong dtype. ValueError: wrong shape, wrong number of biases, no layer.
        """
        return self._run(_row_layers, rows, biases)

    def argmax(self, rows: Tensor, biases: Sequence[Tensor] = ()) -> Tensor:
        """The columns of the largest numbers of what :meth:`__call__` returns, without storing it.

        The first of equal ones; NaN is the largest. The last layer is linear without bias or
        activation. For up to some thousand columns: every task reads all of that layer's weight.

        Returns:
            int64 [R]

        Raises:
            As :meth:`__call__`. ValueError: another last layer.
        """
        if not self._plain_last:
            raise ValueError("argmax: expected a last layer that is linear without bias")
        return self._run(_row_layers_argmax, rows, biases)

    def _run(self, operator: Operator, rows: Tensor, biases: Sequence[Tensor]) -> Tensor:
        if not self._kinds:
            raise ValueError("RowLayers: expected at least one layer; add it with linear()")
        _checks.tensor("rows", rows, _FLOAT32, ("R", self._in_size))
        given = iter(self._checked_biases(rows, biases))
        tensors = [next(given) if tensor is None else tensor for tensor in self._tensors]
        result: Tensor = operator(
            rows.device, rows.detach(), self._kinds, tensors, self._eps, self._size
        )
        return result

    def _checked_biases(self, rows: Tensor, biases: Sequence[Tensor]) -> list[Tensor]:
        sizes, num_rows = self._sizes_at_call, rows.shape[0]
        if len(biases) != len(sizes):
            raise ValueError(
                f"biases: expected {len(sizes)}, one for each bias_at_call; got {len(biases)}"
            )
        for bias, size in zip(biases, sizes, strict=True):
            _checks.tensor("biases", bias, _FLOAT32, ("P", size))
            if num_rows and (len(bias) == 0 or num_rows % len(bias)):
                raise ValueError(
                    f"biases: expected a number of rows that divides {num_rows}; got {len(bias)}"
                )
        return [_filled_up(bias.detach()) for bias in biases]

    def _add_product(
        self, kind: LayerKind, weight: Tensor, bias: Tensor | None, bias_at_call: bool
    ) -> RowLayers:
        self._check_size("weight", weight)
        size = weight.shape[0]
        if bias is not None:
            _checks.tensor("bias", bias, _FLOAT32, (size,))
            if bias_at_call:
                raise ValueError("bias: expected None, since bias_at_call is True; got a tensor")
        given = weight.new_zeros(size) if bias is None else bias.detach()
        packed = None if bias_at_call else _filled_up(given.unsqueeze(0)).clone()
        self._append(kind, _packed(weight), packed)
        if bias_at_call:
            self._sizes_at_call.append(size)
        self._plain_last = kind is LayerKind.LINEAR and bias is None and not bias_at_call
        self._size = size
        return self

    def _norm(self, kind: LayerKind, tensors: list[Tensor], eps: float) -> RowLayers:
        for name, tensor in zip(("weight", "bias"), tensors, strict=False):
            _checks.tensor(name, tensor, _FLOAT32, (self._size,))
        self._append(kind, *(tensor.detach().clone() for tensor in tensors))
        self._eps.append(eps)
        self._residual_size = self._size
        return self

    def _append(self, kind: LayerKind, *tensors: Tensor | None) -> None:
        self._kinds.append(kind)
        self._plain_last = False
        self._tensors.extend(tensors)

    def _check_size(self, name: str, weight: Tensor) -> None:
        _checks.tensor(name, weight, _FLOAT32, ("N", self._size))
