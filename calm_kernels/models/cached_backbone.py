"""The backbone one patch at a time, over the keys and values of the patches before.

Two of a kind: :class:`DynamicBackbone` runs transformers' own layers and cache and serves any
configuration; :class:`StaticBackbone` keeps keys and values in memory set aside beforehand and
leaves out what a single new patch does not need. Both give the same hidden states up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from calm_kernels._modules import computes_alone
from calm_kernels.models.decoder_layer import FastDecoderLayer, FastRMSNorm
from calm_kernels.models.inputs import position_ids
from calm_kernels.ops.decoder_step import (
    DecoderLayerWeights,
    DecoderWeights,
    decoder_step,
    why_not_decoder_step,
)
from calm_kernels.ops.rms_norm import rms_norm

if TYPE_CHECKING:
    from calm_kernels.models.energy_transformer import EnergyTransformer

SMALLEST_CAPACITY = 64
"""Patches that a static cache starts with; it doubles when full. A multiple of what attention
kernels want a mask aligned to."""
_MOST_ROWS_OF_ONE_OPERATOR = 32
_ROPE_THAT_LOOKS_AT_LENGTHS = ("dynamic", "longrope")


class DynamicBackbone:
    """The backbone with transformers' cache, over sequences of different lengths.

    Args:
        model: the language model.
        contexts: tokens of whole patches, at least one patch per sequence. Shorter sequences are
            filled on the left with patches that are never attended to.
    """

    def __init__(self, model: EnergyTransformer, contexts: list[list[int]]) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        patches, self._mask = _filled(model, contexts)
        self.hidden = self._run(patches)
        """What the head reads to draw the next patch of each sequence, [B, H]."""

    def feed(self, patches: Tensor) -> Tensor:
        """Append a patch to each sequence, int64 [B, K]; returns ``hidden``."""
        self._mask = torch.cat((self._mask, torch.ones_like(self._mask[:, :1])), dim=1)
        self.hidden = self._run(patches.unsqueeze(1))
        return self.hidden

    def _run(self, patches: Tensor) -> Tensor:
        positions = position_ids(self._mask)[:, -patches.shape[1] :]
        return self._model.hidden_states(patches, self._mask, positions, self._cache)[:, -1]


def why_not_static(model: EnergyTransformer) -> str | None:
    """Why :class:`StaticBackbone` cannot run a model; None if it can."""
    backbone: Any = model.transformer
    rope_type = backbone.rotary_emb.rope_type
    if any(name in rope_type for name in _ROPE_THAT_LOOKS_AT_LENGTHS):
        return f"rotary embedding {rope_type!r} depends on the length so far"
    if not all(type(layer) in (FastDecoderLayer, LlamaDecoderLayer) for layer in backbone.layers):
        return "a layer of the backbone is not transformers' LlamaDecoderLayer"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over several devices"
    return None


class StaticBackbone:
    """The backbone with its keys and values at fixed addresses.

    Prompts run through transformers' layers, those of a few patches as one step does; a step reads
    the submodules of each layer directly. Feeding a patch is two calls: :meth:`make_room` on the
    host, which may replace the memory, and :meth:`step`, which queues work for the device, reads
    nothing back, and takes everything that changes from tensors, so that it can be replayed from a
    CUDA graph.

    Args:
        model, contexts: as of :class:`DynamicBackbone`.
        num_steps: patches that will be fed at most.
    """

    def __init__(self, model: EnergyTransformer, contexts: list[list[int]], num_steps: int) -> None:
        self._model = model
        self._backbone: Any = model.transformer
        self._weights = _step_weights(self._backbone)
        patches, mask = _filled(model, contexts)
        self._length = mask.shape[1]
        self._longest = self._length + num_steps
        filling = self._length - mask.sum(dim=1)
        self._padded = bool(filling.any())
        self._filling = filling
        """Patches on the left of each sequence that are not its own, [B]."""
        self._position = torch.zeros(1, dtype=torch.int64, device=mask.device)
        """Where the next patch goes, [1]."""
        self._keys: Tensor
        self._values: Tensor
        """Of all layers, [layers, B, key heads, capacity, width]."""
        self.hidden = self._run_prompts(patches, contexts)
        self._position.fill_(self._length)

    def _run_prompts(self, patches: Tensor, contexts: list[list[int]]) -> Tensor:
        """Fill keys and values; returns ``hidden``."""
        capacity = self._capacity(self._length)
        if self._weights is not None and patches.shape[:2].numel() <= _MOST_ROWS_OF_ONE_OPERATOR:
            x: Tensor = self._model.embed_patches(patches)
            if self._runs_by_operator(x):
                width = self._backbone.layers[0].self_attn.head_dim
                shape = (self._weights.key_size // width, capacity, width)
                self._keys = x.new_zeros((self._weights.num_layers, len(x), *shape))
                self._values = torch.zeros_like(self._keys)
                self._make_tables()
                return self._step_by_operator(x, self._weights)[:, -1]
        first = DynamicBackbone(self._model, contexts)
        layers: Any = first._cache.layers
        self._keys = _widened(torch.stack([layer.keys for layer in layers]), capacity)
        self._values = _widened(torch.stack([layer.values for layer in layers]), capacity)
        self._make_tables()
        return first.hidden

    @property
    def capturable(self) -> bool:
        """Whether :meth:`step` can be recorded in a CUDA graph."""
        return self._position.is_cuda

    def _capacity(self, length: int) -> int:
        capacity = SMALLEST_CAPACITY
        while capacity <= length:
            capacity *= 2
        most = -(-self._longest // SMALLEST_CAPACITY) * SMALLEST_CAPACITY
        return min(capacity, most) if most > length else capacity

    def _make_tables(self) -> None:
        """What depends on the capacity alone: rotary factors of every position, slot numbers."""
        capacity = self._keys.shape[3]
        self._slots = torch.arange(capacity, device=self._position.device)
        cos, sin = self._backbone.rotary_emb(self._keys[0], self._slots.unsqueeze(0))
        half = cos.shape[-1] // 2
        # rotate_half(x) * sin is roll(x) * sin with the sign moved to the factor.
        self._cos, self._sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)

    def make_room(self) -> bool:
        """Count one more patch; True if the memory moved, which ends the use of a recording."""
        self._length += 1
        if self._length <= len(self._slots):
            return False
        capacity = self._capacity(self._length - 1)
        self._keys = _widened(self._keys, capacity)
        self._values = _widened(self._values, capacity)
        self._make_tables()
        return True

    def feed(self, patches: Tensor) -> Tensor:
        """Append a patch to each sequence, int64 [B, K]; returns ``hidden``."""
        self.make_room()
        self.hidden = self.step(patches)
        return self.hidden

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sequences only, int64 [n]."""
        self._keys, self._values = self._keys[:, rows], self._values[:, rows]
        self._filling, self.hidden = self._filling[rows], self.hidden[rows]

    def step(self, patches: Tensor) -> Tensor:
        """int64 [B, K] -> [B, H]; the place was made by :meth:`make_room`."""
        x: Tensor = self._model.embed_patches(patches)
        if self._weights is not None and self._runs_by_operator(x):
            hidden = self._step_by_operator(x, self._weights)
            self._position += 1
            return hidden
        places = (self._position - self._filling).unsqueeze(1)
        rotary = (F.embedding(places, self._cos), F.embedding(places, self._sin))
        # A recording has one shape: it attends to all slots, of which a mask hides the free ones.
        visible = len(self._slots) if self.capturable else self._length
        mask = self._mask(visible)
        for i, layer in enumerate(self._backbone.layers):
            x = x + self._attend(i, layer.self_attn, _norm(layer.input_layernorm, x), rotary, mask)
            x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
        self._position += 1
        return _norm(self._backbone.norm, x)

    def _runs_by_operator(self, x: Tensor) -> bool:
        if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            return False
        return x.shape[:-1].numel() <= _MOST_ROWS_OF_ONE_OPERATOR

    def _step_by_operator(self, x: Tensor, weights: DecoderWeights) -> Tensor:
        return decoder_step(
            x,
            weights,
            self._keys,
            self._values,
            self._position,
            self._filling,
            (self._cos, self._sin),
            scale=self._backbone.layers[0].self_attn.scaling,
        )

    def _mask(self, visible: int) -> Tensor | None:
        """Which slots each sequence sees, bool [B or 1, 1, 1, visible]; None for all."""
        if not self.capturable and not self._padded:
            return None
        slots = self._slots[:visible]
        seen = slots <= self._position
        if self._padded:
            seen = seen & (slots >= self._filling.unsqueeze(1))
        return seen.reshape(-1, 1, 1, visible)

    def _attend(
        self,
        index: int,
        attention: Any,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """The new patch of each sequence among those before it: [B, H] -> [B, H]."""
        batch, width = len(x), attention.head_dim
        keys, values = self._keys[index], self._values[index]
        key_heads = keys.shape[1]
        query, key = attention.q_proj(x), attention.k_proj(x)
        heads = torch.cat((query, key), dim=-1).reshape(batch, -1, width)
        cos, sin = rotary
        heads = torch.addcmul(heads * cos, heads.roll(width // 2, dims=-1), sin)
        query, key = heads.split((heads.shape[1] - key_heads, key_heads), dim=1)
        value = attention.v_proj(x).reshape(batch, key_heads, 1, width)
        keys.index_copy_(2, self._position, key.unsqueeze(2))
        values.index_copy_(2, self._position, value)
        visible = mask.shape[-1] if mask is not None else self._length
        # The query heads that share a key head take the place of several queries.
        seen = F.scaled_dot_product_attention(
            query.reshape(batch, key_heads, -1, width),
            keys[:, :, :visible],
            values[:, :, :visible],
            attn_mask=mask,
            scale=attention.scaling,
        )
        out: Tensor = attention.o_proj(seen.reshape(batch, -1))
        return out


Backbone = DynamicBackbone | StaticBackbone


def make_backbone(model: EnergyTransformer, contexts: list[list[int]], num_steps: int) -> Backbone:
    """The fast one of the two, where it can run the model."""
    if why_not_static(model) is None:
        return StaticBackbone(model, contexts, num_steps)
    return DynamicBackbone(model, contexts)


def _filled(model: EnergyTransformer, contexts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Patches [B, n, K] of contexts filled on the left, and which of them are theirs, [B, n]."""
    device = model.transformer.embed_tokens.weight.device
    patch_size = model.config.patch_size
    lengths = [len(context) // patch_size for context in contexts]
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device)
    filled = [[0] * (longest * patch_size - len(context)) + context for context in contexts]
    return torch.tensor(filled, device=device).reshape(len(filled), longest, -1), mask


def _widened(cached: Tensor, capacity: int) -> Tensor:
    """Keys or values [*, n, width] at the front of memory for ``capacity`` patches."""
    wide = cached.new_zeros((*cached.shape[:-2], capacity, cached.shape[-1]))
    wide[..., : cached.shape[-2], :] = cached
    return wide


def _step_weights(backbone: Any) -> DecoderWeights | None:
    """The weights of a backbone that :func:`decoder_step` runs, faster than torch; else None."""
    norm = backbone.norm
    if type(norm) not in (FastRMSNorm, LlamaRMSNorm) or not computes_alone(norm):
        return None
    if why_not_decoder_step(backbone.parameters()) is not None:
        return None
    layers = [_layer_weights(layer) for layer in backbone.layers]
    plain = [layer for layer in layers if layer is not None]
    alike = {
        (layer.self_attn.scaling, layer.mlp.gate_proj.weight.shape) for layer in backbone.layers
    }
    if len(plain) < len(layers) or len(alike) > 1:
        return None
    return DecoderWeights(plain, norm.weight, norm.variance_epsilon)


def _layer_weights(layer: Any) -> DecoderLayerWeights | None:
    """The weights of a layer of torch's and transformers' own parts; None for another."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    plain = (
        all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
        and all(type(norm) in (FastRMSNorm, LlamaRMSNorm) for norm in norms)
        and isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation))
        and computes_alone(*layer.modules())
    )
    if not plain:
        return None
    query, key, value, out, gate, up, down = (linear.weight for linear in linears)
    eps, post_eps = (norm.variance_epsilon for norm in norms)
    norm, post_norm = (norm.weight for norm in norms)
    return DecoderLayerWeights(
        norm, query, key, value, out, post_norm, gate, up, down, eps, post_eps
    )


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    if type(module) in (FastRMSNorm, LlamaRMSNorm):
        norm: Any = module
        return rms_norm(x, norm.weight.to(x.dtype), eps=norm.variance_epsilon)
    out: Tensor = module(x)
    return out
