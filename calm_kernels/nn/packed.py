"""The energy head and the patch decoder for many rows and no gradient, from packed weights.

What generation calls step after step with weights that stay put: a copy of them in the order in
which :class:`~calm_kernels.ops.row_layers.RowLayers` reads them takes 4 bytes a weight and saves
each step the packing, and the threads' waiting between layers.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calm_kernels._modules import computes_alone
from calm_kernels.nn.energy_head import (
    EnergyHead,
    EnergyHeadBlock,
    EnergyHeadOutput,
    ZeroLinear,
)
from calm_kernels.nn.gated_ffn import GatedFFN, Projections
from calm_kernels.nn.patch_codec import PatchDecoder
from calm_kernels.nn.rms_norm import RMSNorm
from calm_kernels.ops.linear_argmax import linear_argmax
from calm_kernels.ops.row_layers import RowLayers, why_not_row_layers

_MOST_PACKED_TOKENS = 2048
"""Of a vocabulary whose weight is packed too; a larger one is better read once for many rows."""

_PLAIN = (
    EnergyHead,
    EnergyHeadBlock,
    EnergyHeadOutput,
    PatchDecoder,
    GatedFFN,
    Projections,
    RMSNorm,
    ZeroLinear,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.RMSNorm,
    nn.Sequential,
    nn.SiLU,
)


def why_not_packed(module: nn.Module) -> str | None:
    """Why an energy head or patch decoder cannot be packed, or would gain nothing; None if it can.

    A part that is not of this package's or torch's own class, or that has hooks, computes
    something that packed weights do not know of.
    """
    for part in module.modules():
        if type(part) not in _PLAIN or not computes_alone(part):
            return f"{type(part).__name__} computes what packed weights do not know of"
    return why_not_row_layers(module.parameters())


class PackedEnergyHead:
    """Samples of an energy head with the weights that it has now.

    Args:
        head: float32.
    """

    def __init__(self, head: EnergyHead) -> None:
        self._head = head
        self.noise_size = head.noise_size
        blocks = [cast(EnergyHeadBlock, block) for block in head.mlp_blocks]
        size = head.hidden_embd.in_features
        layers = _linear(RowLayers(head.noise_size), head.noise_embd)
        _layer_norm(layers, head.norm_noise)
        for block in blocks:
            _add_block(layers, block, size)
        _layer_norm(layers, head.final_layer.in_ln)
        _linear(layers, head.final_layer.linears[0], activation=True)
        self._layers = _linear(layers, head.final_layer.linears[2])
        inputs = [cast(nn.Linear, block.linears[0]) for block in blocks]
        self._condition_weight = torch.cat([layer.weight[:, size:] for layer in inputs]).detach()
        self._condition_bias = torch.cat([layer.bias for layer in inputs]).detach()

    def __call__(self, hidden: Tensor, num_samples: int, noise: Tensor) -> Tensor:
        """hidden [P, H], noise [N, P, noise_size] -> [N, P, D], as :class:`EnergyHead` gives."""
        head = self._head
        condition = head.norm_hidden(head.hidden_embd(hidden))
        shared = F.linear(condition, self._condition_weight, self._condition_bias)
        rows = noise.transpose(0, 1).reshape(-1, self.noise_size)
        latents = self._layers(rows, shared.split(hidden.shape[1], dim=1))
        return latents.view(len(hidden), num_samples, latents.shape[1]).transpose(0, 1)


class PackedDecoder:
    """A decoder with the weights that it has now.

    Args:
        decoder: float32.
    """

    def __init__(self, decoder: PatchDecoder) -> None:
        self.patch_size = decoder.patch_size
        self.lm_head_weight = decoder.lm_head_weight
        blocks = [cast(GatedFFN, block) for block in decoder.decoder_layers]
        stage = len(blocks) // 2
        expand = decoder.expand_layer
        size = expand.in_features
        layers = _linear(RowLayers(decoder.latent_to_hidden.in_features), decoder.latent_to_hidden)
        self._patch_layers = _add_ffns(layers, blocks[:stage])
        tokens = _add_ffns(RowLayers(size), blocks[stage:])
        tokens.rms_norm(decoder.norm.weight, eps=decoder.norm.eps)
        self._gives_tokens = len(self.lm_head_weight) <= _MOST_PACKED_TOKENS
        if self._gives_tokens:
            tokens.linear(self.lm_head_weight)
        self._token_layers = [
            RowLayers(size).linear(weight, bias).followed_by(tokens)
            for weight, bias in zip(expand.weight.split(size), expand.bias.split(size), strict=True)
        ]

    def patch_states(self, latents: Tensor) -> Tensor:
        """:meth:`PatchDecoder.patch_states`: [P, D] -> [P, H]."""
        return self._patch_layers(latents)

    def decode_places(self, states: Tensor, first: int, stop: int) -> Tensor:
        """:meth:`PatchDecoder.decode_places`: [P, H] -> int64 [P, stop - first]."""
        if self._gives_tokens:
            places = [layers.argmax(states) for layers in self._token_layers[first:stop]]
            return torch.stack(places, dim=1)
        hidden = [layers(states) for layers in self._token_layers[first:stop]]
        rows = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        tokens = linear_argmax(rows, self.lm_head_weight)
        return tokens.view(stop - first, -1).t()

    def decode(self, latents: Tensor) -> Tensor:
        """:meth:`PatchDecoder.decode`: [P, D] -> int64 [P, K]."""
        return self.decode_places(self.patch_states(latents), 0, self.patch_size)


def _linear(layers: RowLayers, linear: nn.Module, *, activation: bool = False) -> RowLayers:
    assert isinstance(linear, nn.Linear)
    return layers.linear(linear.weight, linear.bias, activation="silu" if activation else None)


def _layer_norm(layers: RowLayers, norm: nn.LayerNorm) -> RowLayers:
    return layers.layer_norm(norm.weight, norm.bias, eps=norm.eps)


def _add_block(layers: RowLayers, block: EnergyHeadBlock, size: int) -> None:
    first, _, middle, _, last = (cast(nn.Linear, layer) for layer in block.linears)
    _layer_norm(layers, block.in_ln)
    layers.linear(first.weight[:, :size], activation="silu", bias_at_call=True)
    _linear(layers, middle, activation=True)
    gate_weight, up_weight = last.weight.chunk(2)
    layers.gated(gate_weight, up_weight, *last.bias.chunk(2))
    layers.add_linear(block.down_proj.weight, block.down_proj.bias)


def _add_ffns(layers: RowLayers, blocks: list[GatedFFN]) -> RowLayers:
    for block in blocks:
        layers.rms_norm(block.layernorm.weight, eps=block.eps)
        layers.gated(block.mlp.gate_proj.weight, block.mlp.up_proj.weight)
        layers.add_linear(block.mlp.down_proj.weight)
    return layers
