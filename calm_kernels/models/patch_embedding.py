"""Patches of tokens to vectors: embeddings side by side, and layers of which the first is linear.

What a token adds in the first layer depends on the token and its place alone. Where the vocabulary
is smaller than the number of patches that is computed once for each of both, and looked up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calm_kernels._modules import computes_alone


def project_patches(patches: Tensor, embedding: nn.Module, layers: nn.Sequential) -> Tensor:
    """``layers`` of the embeddings of a patch's tokens, side by side.

    Args:
        patches: token ids [*, K].
        embedding: of V tokens, [V, H].
        layers: the first of them linear, from K*H.

    Returns:
        [*, N], N the size of the last layer.
    """
    if not _looks_up(patches, embedding, layers):
        projected: Tensor = layers(embedding(patches).flatten(-2))
        return projected
    x = _looked_up(patches, embedding, layers[0])
    for layer in list(layers)[1:]:
        x = layer(x)
    return x


def _looked_up(patches: Tensor, embedding: Any, linear: Any) -> Tensor:
    """``linear`` of the embeddings side by side, as a sum of K rows of a table [V * K, N]."""
    size, patch_size = embedding.weight.shape[1], patches.shape[-1]
    weights = linear.weight.view(-1, patch_size, size).transpose(0, 1).flatten(0, 1)
    table = F.linear(embedding.weight, weights).view(-1, linear.out_features)
    rows = patches * patch_size + torch.arange(patch_size, device=patches.device)
    total = F.embedding_bag(rows.reshape(-1, patch_size), table, mode="sum")
    if linear.bias is not None:
        total = total + linear.bias
    return total.view(*patches.shape[:-1], -1)


def _looks_up(patches: Tensor, embedding: nn.Module, layers: nn.Sequential) -> bool:
    """Fewer tokens than patches, and modules that compute nothing else, in float32 or float64: in
    16 bits every addition would round."""
    linear = layers[0]
    if type(embedding) is not nn.Embedding or type(linear) is not nn.Linear:
        return False
    if embedding.num_embeddings * patches.shape[-1] >= patches.numel():
        return False
    if torch.is_autocast_enabled(patches.device.type) or embedding.max_norm is not None:
        return False
    wide = embedding.weight.dtype in (torch.float32, torch.float64)
    return wide and computes_alone(embedding, layers, linear)
