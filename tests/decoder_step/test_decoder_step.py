"""A decoder layer on one new position against the same layer in float64 over whole sequences."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import calm_kernels
from calm_kernels.ops.decoder_step import DecoderLayerWeights, decoder_step

BACKENDS = ["auto", "reference"]
EPS, POST_EPS = 1e-5, 3e-3


class Layer:
    """Random weights, sequences of different beginnings, and their cached keys and values."""

    def __init__(
        self,
        batch: int,
        hidden_size: int,
        size: int,
        key_heads: int,
        group: int,
        width: int,
        capacity: int,
        at: int,
    ) -> None:
        self._generator = torch.Generator().manual_seed(batch + hidden_size + at)
        heads = key_heads * group
        self.weights = DecoderLayerWeights(
            norm=self._normal(hidden_size) + 1,
            query=self._weight(heads * width, hidden_size),
            key=self._weight(key_heads * width, hidden_size),
            value=self._weight(key_heads * width, hidden_size),
            out=self._weight(hidden_size, heads * width),
            post_norm=self._normal(hidden_size) + 1,
            gate=self._weight(size, hidden_size),
            up=self._weight(size, hidden_size),
            down=self._weight(hidden_size, size),
            eps=EPS,
            post_eps=POST_EPS,
        )
        self.x = self._normal(batch, hidden_size)
        shape = (batch, key_heads, capacity, width)
        self.keys, self.values = self._normal(*shape), self._normal(*shape)
        self.keys[:, :, at:] = self.values[:, :, at:] = torch.nan  # never to be read
        self.position = torch.tensor([at])
        self.filling = torch.randint(0, at + 1, (batch,), generator=self._generator)
        angles = torch.rand(capacity, width // 2, generator=self._generator) * 6
        cos, sin = angles.cos(), angles.sin()
        self.rotary = (torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1))
        self.scale = 0.7 * width**-0.5

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _weight(self, *shape: int) -> Tensor:
        return self._normal(*shape) / shape[1] ** 0.5

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """(result, keys, values) of the operator."""
        keys, values = self.keys.clone(), self.values.clone()
        result = decoder_step(
            self.x,
            self.weights,
            keys,
            values,
            self.position,
            self.filling,
            self.rotary,
            scale=self.scale,
        )
        return result, keys, values

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same, a sequence and a head at a time."""
        w = {f.name: getattr(self.weights, f.name) for f in fields(self.weights)}
        w = {name: v.to(dtype) for name, v in w.items() if isinstance(v, Tensor)}
        keys, values, x = self.keys.to(dtype), self.values.to(dtype), self.x.to(dtype)
        key_heads, _, width = keys.shape[1:]
        at = int(self.position)
        rows = []
        for b, start in enumerate(self.filling.tolist()):
            normed = F.rms_norm(x[b], w["norm"].shape, w["norm"], EPS)
            query = (w["query"] @ normed).view(key_heads, -1, width)
            key, value = (w[name] @ normed for name in ("key", "value"))
            angle = [table[at - start].to(dtype) for table in self.rotary]
            keys[b, :, at] = rotated(key.view(key_heads, width), angle)
            values[b, :, at] = value.view(key_heads, width)
            seen = []
            for h in range(key_heads):
                scores = rotated(query[h], angle) @ keys[b, h, start : at + 1].t() * self.scale
                seen.append(scores.softmax(dim=-1) @ values[b, h, start : at + 1])
            y = x[b] + w["out"] @ torch.stack(seen).flatten()
            m = F.rms_norm(y, w["post_norm"].shape, w["post_norm"], POST_EPS)
            rows.append(y + w["down"] @ (F.silu(w["gate"] @ m) * (w["up"] @ m)))
        return torch.stack(rows), keys, values


def rotated(heads: Tensor, angle: list[Tensor]) -> Tensor:
    low, high = heads.chunk(2, dim=-1)
    return heads * angle[0] + torch.cat((high, low), dim=-1) * angle[1]


SHAPES: list[dict[str, int]] = [
    {"batch": 1, "hidden_size": 256, "size": 672, "key_heads": 4, "group": 1, "width": 64},
    {"batch": 8, "hidden_size": 64, "size": 100, "key_heads": 2, "group": 3, "width": 16},
    {"batch": 3, "hidden_size": 37, "size": 51, "key_heads": 3, "group": 2, "width": 10},
    {"batch": 33, "hidden_size": 20, "size": 1, "key_heads": 1, "group": 4, "width": 2},
    {"batch": 7, "hidden_size": 1, "size": 18, "key_heads": 5, "group": 1, "width": 34},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("capacity", "at"), [(1, 0), (20, 19), (40, 17), (70, 50)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_those_of_plain_float32(
    shape: dict[str, int], capacity: int, at: int, backend: str
) -> None:
    layer = Layer(**shape, capacity=capacity, at=at)
    exact, plain = layer.plain(torch.float64), layer.plain(torch.float32)
    with calm_kernels.backend(backend):
        results = layer.run()
    for result, right, ordinary in zip(results, exact, plain, strict=True):
        right, ordinary = right.nan_to_num(), ordinary.nan_to_num().double()
        error = float((result.nan_to_num().double() - right).norm())
        assert error <= max(2 * float((ordinary - right).norm()), 1e-6 * float(right.norm()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_new_slot_is_written(backend: str) -> None:
    layer = Layer(**SHAPES[1], capacity=30, at=12)
    with calm_kernels.backend(backend):
        _, keys, values = layer.run()
    for cached, before in ((keys, layer.keys), (values, layer.values)):
        changed = ~torch.isclose(cached, before, rtol=0.0, atol=0.0, equal_nan=True)
        assert changed[:, :, 12].all() and int(changed.sum()) == changed[:, :, 12].numel()


def test_no_sequences_and_large_scores() -> None:
    layer = Layer(**{**SHAPES[1], "batch": 0}, capacity=5, at=0)
    assert layer.run()[0].shape == (0, 64)
    layer = Layer(**SHAPES[1], capacity=30, at=12)
    layer.scale = 1e4  # one position takes all
    result, _, _ = layer.run()
    exact, _, _ = layer.plain(torch.float64)
    torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_threads_or_other_sequences() -> None:
    layer = Layer(**SHAPES[1], capacity=30, at=12)
    result, keys, _ = layer.run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(layer.run()[0], result)
    finally:
        torch.set_num_threads(threads)
    for name in ("x", "keys", "values", "filling"):
        setattr(layer, name, getattr(layer, name)[3:4].clone())
    alone, its_keys, _ = layer.run()
    assert torch.equal(alone, result[3:4])
    assert torch.equal(its_keys[:, :, 12], keys[3:4, :, 12])


def test_wrong_arguments_are_named() -> None:
    def fails(match: str, **changes: Any) -> None:
        layer = Layer(**SHAPES[1], capacity=30, at=12)
        for name, value in changes.items():
            setattr(layer, name, value)
        with pytest.raises((TypeError, ValueError), match=match):
            layer.run()

    layer = Layer(**SHAPES[1], capacity=30, at=12)
    fails("x: expected dtype float32", x=layer.x.double())
    fails("keys: expected shape", keys=layer.keys[:3])
    fails("values: expected shape", values=layer.values[:, :, :20])
    fails("key_heads \\* width", keys=layer.keys[:, :1], values=layer.values[:, :1])
    fails("expected 0 <= filling <= position < 30", position=torch.tensor([30]))
    fails("expected 0 <= filling <= position < 30", position=torch.tensor([-1]))
    fails("expected 0 <= filling", filling=torch.full((8,), 13))
    fails("rotary: expected shape", rotary=tuple(t[:29] for t in layer.rotary))
    with pytest.raises(ValueError, match="keys, values: expected contiguous"):
        layer.keys = layer.keys.transpose(0, 1).contiguous().transpose(0, 1)
        decoder_step(
            layer.x,
            layer.weights,
            layer.keys,
            layer.values,
            layer.position,
            layer.filling,
            layer.rotary,
            scale=1.0,
        )
    parts = {f.name: getattr(layer.weights, f.name) for f in fields(layer.weights)}
    with pytest.raises(ValueError, match="down: expected shape"):
        DecoderLayerWeights(**{**parts, "down": parts["down"].t()})


def test_the_operator_passes_opcheck() -> None:
    layer = Layer(**SHAPES[2], capacity=9, at=4)
    layer.keys, layer.values = layer.keys.nan_to_num(), layer.values.nan_to_num()
    arguments = (
        layer.x,
        *layer.weights.tensors,
        layer.keys,
        layer.values,
        layer.position,
        layer.filling,
        *layer.rotary,
        EPS,
        POST_EPS,
        layer.scale,
    )
    operators = torch.ops.calm_kernels.decoder_step
    for overload in (operators.default, operators.reference):
        torch.library.opcheck(overload, arguments)
