"""New positions of each sequence through Llama decoder layers, keys and values cached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import decoder_step as reference

_FLOAT32 = (torch.float32,)
_NAMES = ("norm", "query", "key", "value", "out", "post_norm", "gate", "up", "down")


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_decoder_step = define(
    "decoder_step",
    "(Tensor x, Tensor[] weights, Tensor(a!) keys, Tensor(b!) values, Tensor position, "
    "Tensor filling, Tensor cos, Tensor sin, float[] eps, float scale) -> Tensor",
    reference=reference.decoder_step,
    fake=_fake,
)


@dataclass(frozen=True)
class DecoderLayerWeights:
    """Weights of a Llama decoder layer without biases, float32.

    Args:
        norm, post_norm: [H], of the RMSNorms before attention and before the feed-forward block.
        query: [heads * width, H]. key, value: [key_heads * width, H].
        out: [H, heads * width].
        gate, up: [I, H]. down: [H, I].
        eps, post_eps: of the two norms.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape.
    """

    norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    eps: float
    post_eps: float

    def __post_init__(self) -> None:
        _checks.tensor("gate", self.gate, _FLOAT32, ("I", "H"))
        size, hidden_size = self.gate.shape
        _checks.tensor("query", self.query, _FLOAT32, ("heads*width", hidden_size))
        _checks.tensor("key", self.key, _FLOAT32, ("key_heads*width", hidden_size))
        _checks.tensor("value", self.value, _FLOAT32, tuple(self.key.shape))
        _checks.tensor("out", self.out, _FLOAT32, (hidden_size, self.query.shape[0]))
        _checks.tensor("up", self.up, _FLOAT32, (size, hidden_size))
        _checks.tensor("down", self.down, _FLOAT32, (hidden_size, size))
        for name in ("norm", "post_norm"):
            _checks.tensor(name, getattr(self, name), _FLOAT32, (hidden_size,))
        for name, weight in zip(_NAMES, self.tensors, strict=True):
            # The kernel reads rows one after the other.
            object.__setattr__(self, name, weight.detach().contiguous())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights in the operator's order."""
        return tuple(getattr(self, name) for name in _NAMES)


class DecoderWeights:
    """Weights of Llama decoder layers that follow one another, and of the norm behind them.

    Args:
        layers: at least one, all of the same sizes.
        norm: float32 [H], of the RMSNorm that follows.
        eps: of it.

    Raises:
        TypeError: wrong dtype. ValueError: no layer, wrong shape, different sizes.
    """

    def __init__(self, layers: Sequence[DecoderLayerWeights], norm: Tensor, eps: float) -> None:
        if not layers:
            raise ValueError("layers: expected at least one")
        sizes = {tuple(tuple(tensor.shape) for tensor in layer.tensors) for layer in layers}
        if len(sizes) > 1:
            raise ValueError(f"layers: expected the same sizes in all; got {len(sizes)} kinds")
        _checks.tensor("norm", norm, _FLOAT32, tuple(layers[0].norm.shape))
        self.num_layers = len(layers)
        self.hidden_size = norm.shape[0]
        self.query_size, self.key_size = len(layers[0].query), len(layers[0].key)
        self.tensors = [tensor for layer in layers for tensor in layer.tensors]
        """In the operator's order."""
        self.tensors.append(norm.detach().contiguous())
        self.eps = [value for layer in layers for value in (layer.eps, layer.post_eps)] + [eps]


def why_not_decoder_step(weights: Iterable[Tensor]) -> str | None:
    """Why :func:`decoder_step` is not the fast way for such weights; None if it is."""
    return _decoder_step.why_not_native_for(weights, torch.float32)


def decoder_step(
    x: Tensor,
    weights: DecoderWeights,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    filling: Tensor,
    rotary: tuple[Tensor, Tensor],
    *,
    scale: float,
) -> Tensor:
    """Run Llama decoder layers on a few new positions of each sequence. No gradient.

    Made for few rows, B * T up to 32 or so: each of them meets every weight on its own.

    Args:
        x: float32 [B, H], or [B, T, H] for T positions that follow one another.
        weights: of the layers and of the norm behind them.
        keys, values: float32 [layers, B, key_heads, capacity, width], contiguous; the T slots
            from ``position`` on are written.
        position: int64 [1], the slot of the first new position; all lie in [0, capacity).
        filling: int64 [B], the slot of each sequence's first position, at most the last new one.
            What is given for new positions before it has no meaning.
        rotary: cosines and sines [capacity, width] by a position's distance from the first; the
            first half of the sines negated.
        scale: of the products of queries and keys.

    Returns:
        of the shape of x

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, a slot out of range (CPU tensors).

    Source: transformers' LlamaModel; head h of the queries reads key head
    h // (heads / key_heads).
    """
    steps = ("T",) if x.dim() == 3 else ()
    _checks.tensor("x", x, _FLOAT32, ("B", *steps, weights.hidden_size))
    batch, num_steps = x.shape[0], x.shape[1] if steps else 1
    shape = (weights.num_layers, batch, "key_heads", "capacity", "width")
    _checks.tensor("keys", keys, _FLOAT32, shape)
    _checks.tensor("values", values, _FLOAT32, tuple(keys.shape))
    key_heads, capacity, width = keys.shape[2:]
    if weights.key_size != key_heads * width or weights.query_size % (key_heads * width):
        raise ValueError(
            f"keys: expected key_heads * width = {weights.key_size}, a divisor of the queries' "
            f"{weights.query_size}; got {key_heads} * {width}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys, values: expected contiguous memory; call .contiguous()")
    integers = (torch.int64,)
    _checks.tensor("position", position, integers, (1,))
    _checks.tensor("filling", filling, integers, (batch,))
    for table in rotary:
        _checks.tensor("rotary", table, _FLOAT32, (capacity, width))
    device = _checks.same_device(x=x, keys=keys, values=values, position=position, filling=filling)
    if device.type == "cpu" and batch:
        at, fillings = int(position) + num_steps - 1, filling.tolist()
        first, last = min(fillings), max(fillings)
        if not (0 <= first <= last <= at < capacity and num_steps <= at + 1):
            raise ValueError(
                f"position: expected 0 <= filling <= position < {capacity}; got filling in "
                f"[{first}, {last}], {num_steps} positions up to {at}"
            )
    tables = [table.contiguous() for table in rotary]
    rows = x.reshape(-1, weights.hidden_size)
    result: Tensor = _decoder_step(
        device, rows, weights.tensors, keys, values, position, filling, *tables, weights.eps, scale
    )
    return result.view(x.shape)
