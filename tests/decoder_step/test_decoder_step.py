"""Decoder layers on one new position against the same in float64, a sequence and head at a time."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import calm_kernels
from calm_kernels.ops.decoder_step import DecoderLayerWeights, DecoderWeights, decoder_step

BACKENDS = ["auto", "reference"]
EPS, POST_EPS, LAST_EPS = 1e-5, 3e-3, 2e-2


NUM_LAYERS = 3


class Layers:
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
        layers = [
            DecoderLayerWeights(
                norm=self._normal(hidden_size) + 1,
                query=self._weight(heads * width, hidden_size),
                key=self._weight(key_heads * width, hidden_size),
                value=self._weight(key_heads * width, hidden_size),
                out=self._weight(hidden_size, heads * width),
                post_norm=self._normal(hidden_size) + 1,
                gate=self._weight(size, hidden_size),
                up=self._weight(size, hidden_size),
                down=self._weight(hidden_size, size),
                eps=EPS * (i + 1),
                post_eps=POST_EPS * (i + 1),
            )
            for i in range(NUM_LAYERS)
        ]
        self.layers, self.norm = layers, self._normal(hidden_size) + 1
        self.weights = DecoderWeights(layers, self.norm, LAST_EPS)
        self.x = self._normal(batch, hidden_size)
        shape = (NUM_LAYERS, batch, key_heads, capacity, width)
        self.keys, self.values = self._normal(*shape), self._normal(*shape)
        self.keys[..., at:, :] = self.values[..., at:, :] = torch.nan  # never to be read
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
        return self.call(keys, values), keys, values

    def call(self, keys: Tensor, values: Tensor) -> Tensor:
        return decoder_step(
            self.x,
            self.weights,
            keys,
            values,
            self.position,
            self.filling,
            self.rotary,
            scale=self.scale,
        )

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same, a sequence and a head at a time."""
        keys, values, x = self.keys.to(dtype), self.values.to(dtype), self.x.to(dtype)
        for i, layer in enumerate(self.layers):
            x = self._plain_layer(layer, x, keys[i], values[i])
        return F.rms_norm(x, x.shape[1:], self.norm.to(dtype), LAST_EPS), keys, values

    def _plain_layer(
        self, layer: DecoderLayerWeights, x: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        w = {f.name: getattr(layer, f.name) for f in fields(layer)}
        w = {name: v.to(x.dtype) for name, v in w.items() if isinstance(v, Tensor)}
        key_heads, _, width = keys.shape[1:]
        at = int(self.position)
        rows = []
        for b, start in enumerate(self.filling.tolist()):
            normed = F.rms_norm(x[b], w["norm"].shape, w["norm"], layer.eps)
            query = (w["query"] @ normed).view(key_heads, -1, width)
            key, value = (w[name] @ normed for name in ("key", "value"))
            angle = [table[at - start].to(x.dtype) for table in self.rotary]
            keys[b, :, at] = rotated(key.view(key_heads, width), angle)
            values[b, :, at] = value.view(key_heads, width)
            seen = []
            for h in range(key_heads):
                scores = rotated(query[h], angle) @ keys[b, h, start : at + 1].t() * self.scale
                seen.append(scores.softmax(dim=-1) @ values[b, h, start : at + 1])
            y = x[b] + w["out"] @ torch.stack(seen).flatten()
            m = F.rms_norm(y, w["post_norm"].shape, w["post_norm"], layer.post_eps)
            rows.append(y + w["down"] @ (F.silu(w["gate"] @ m) * (w["up"] @ m)))
        return torch.stack(rows)


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
    layers = Layers(**shape, capacity=capacity, at=at)
    exact, plain = layers.plain(torch.float64), layers.plain(torch.float32)
    with calm_kernels.backend(backend):
        results = layers.run()
    for result, right, ordinary in zip(results, exact, plain, strict=True):
        right, ordinary = right.nan_to_num(), ordinary.nan_to_num().double()
        error = float((result.nan_to_num().double() - right).norm())
        assert error <= max(2 * float((ordinary - right).norm()), 1e-6 * float(right.norm()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_new_slot_is_written(backend: str) -> None:
    layers = Layers(**SHAPES[1], capacity=30, at=12)
    with calm_kernels.backend(backend):
        _, keys, values = layers.run()
    for cached, before in ((keys, layers.keys), (values, layers.values)):
        changed = ~torch.isclose(cached, before, rtol=0.0, atol=0.0, equal_nan=True)
        assert changed[..., 12, :].all() and int(changed.sum()) == changed[..., 12, :].numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_several_positions_are_as_one_after_the_other(steps: int, backend: str) -> None:
    layers = Layers(**SHAPES[1], capacity=30, at=12)
    layers.x = layers._normal(8, steps, 64)
    layers.filling[0], layers.filling[1] = 12 + steps - 1, 12 + steps // 2  # begin among the new
    with calm_kernels.backend(backend):
        result, keys, values = layers.run()
    assert result.shape == (8, steps, 64)
    for b in range(8):
        alone = Layers(**{**SHAPES[1], "batch": 1}, capacity=30, at=12)
        alone.weights, alone.rotary, alone.scale = layers.weights, layers.rotary, layers.scale
        alone.filling = layers.filling[b : b + 1]
        its_keys, its_values = (
            layers.keys[:, b : b + 1].clone(),
            layers.values[:, b : b + 1].clone(),
        )
        for t in range(max(0, int(alone.filling) - 12), steps):
            alone.x, alone.position = layers.x[b : b + 1, t], torch.tensor([12 + t])
            right = alone.call(its_keys, its_values)
            torch.testing.assert_close(result[b, t], right[0], rtol=1e-5, atol=1e-5)
        own = slice(int(alone.filling), 12 + steps)
        for cached, its in ((keys, its_keys), (values, its_values)):
            torch.testing.assert_close(
                cached[:, b, :, own], its[:, 0, :, own], rtol=1e-5, atol=1e-5
            )


def test_no_sequences_and_large_scores() -> None:
    layers = Layers(**{**SHAPES[1], "batch": 0}, capacity=5, at=0)
    assert layers.run()[0].shape == (0, 64)
    layers = Layers(**SHAPES[1], capacity=30, at=12)
    layers.scale = 1e4  # one position takes all
    result, _, _ = layers.run()
    exact, _, _ = layers.plain(torch.float64)
    torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_threads_or_other_sequences() -> None:
    layers = Layers(**SHAPES[1], capacity=30, at=12)
    result, keys, _ = layers.run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(layers.run()[0], result)
    finally:
        torch.set_num_threads(threads)
    layers.x, layers.filling = layers.x[3:4], layers.filling[3:4]
    layers.keys, layers.values = (t[:, 3:4].contiguous() for t in (layers.keys, layers.values))
    alone, its_keys, _ = layers.run()
    assert torch.equal(alone, result[3:4])
    assert torch.equal(its_keys[..., 12, :], keys[:, 3:4, :, 12])


def test_wrong_arguments_are_named() -> None:
    def fails(match: str, **changes: Any) -> None:
        layers = Layers(**SHAPES[1], capacity=30, at=12)
        for name, value in changes.items():
            setattr(layers, name, value)
        with pytest.raises((TypeError, ValueError), match=match):
            layers.call(layers.keys, layers.values)

    layers = Layers(**SHAPES[1], capacity=30, at=12)
    fails("x: expected dtype float32", x=layers.x.double())
    fails("keys: expected shape", keys=layers.keys[:2])
    fails("keys: expected shape", keys=layers.keys[:, :3])
    fails("values: expected shape", values=layers.values[..., :20, :])
    fails("key_heads \\* width", keys=layers.keys[:, :, :1], values=layers.values[:, :, :1])
    fails("expected 0 <= filling <= position < 30", position=torch.tensor([30]))
    fails("expected 0 <= filling <= position < 30", position=torch.tensor([-1]))
    fails("expected 0 <= filling", filling=torch.full((8,), 13))
    several = layers.x.unsqueeze(1).repeat(1, 4, 1)
    fails("expected 0 <= filling <= position < 30", x=several, position=torch.tensor([27]))
    fails("expected 0 <= filling <= position < 30", x=several, position=torch.tensor([-1]))
    fails("x: expected shape", x=several.unsqueeze(1))
    fails("rotary: expected shape", rotary=tuple(t[:29] for t in layers.rotary))
    scattered = layers.keys.transpose(1, 2).contiguous().transpose(1, 2)
    fails("keys, values: expected contiguous", keys=scattered)
    parts = {f.name: getattr(layers.layers[0], f.name) for f in fields(layers.layers[0])}
    with pytest.raises(ValueError, match="down: expected shape"):
        DecoderLayerWeights(**{**parts, "down": parts["down"].t()})
    narrow = {name: parts[name][:50] for name in ("gate", "up")}
    narrower = DecoderLayerWeights(**{**parts, **narrow, "down": parts["down"][:, :50]})
    with pytest.raises(ValueError, match="layers: expected the same sizes"):
        DecoderWeights([*layers.layers, narrower], layers.norm, LAST_EPS)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        DecoderWeights([], layers.norm, LAST_EPS)
    with pytest.raises(ValueError, match="norm: expected shape"):
        DecoderWeights(layers.layers, layers.norm[1:], LAST_EPS)


def test_the_operator_passes_opcheck() -> None:
    layers = Layers(**SHAPES[2], capacity=9, at=4)
    layers.keys, layers.values = layers.keys.nan_to_num(), layers.values.nan_to_num()
    arguments = (
        layers.x,
        layers.weights.tensors,
        layers.keys,
        layers.values,
        layers.position,
        layers.filling,
        *layers.rotary,
        layers.weights.eps,
        layers.scale,
    )
    operators = torch.ops.calm_kernels.decoder_step
    for overload in (operators.default, operators.reference):
        torch.library.opcheck(overload, arguments)
