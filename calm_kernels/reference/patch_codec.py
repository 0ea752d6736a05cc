"""Patches of K tokens to vectors and back, without the blocks between: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from calm_kernels.reference.philox import Stream, uniform


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def embed_flatten(
    ids: Tensor, embedding: Tensor, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ids [P, K], embedding [V, H] -> (flat [P, K*H], used_ids int64 [P, K]).

    Token k of patch p is replaced by id 0 where u(row=p, element=k) < dropout on stream
    TOKEN_DROPOUT; used_ids are the ids after that.
    """
    patches, patch_size = ids.shape
    used_ids = ids.to(torch.int64, copy=True)
    if dropout > 0.0:
        assert seed is not None
        rows = torch.arange(patches, device=ids.device)
        u = uniform(seed, rows, patch_size, Stream.TOKEN_DROPOUT)
        used_ids.masked_fill_(u < dropout, 0)
    flat = embedding.index_select(0, used_ids.flatten())
    return flat.reshape(patches, patch_size * embedding.shape[1]), used_ids


def embed_flatten_backward(grad_flat: Tensor, used_ids: Tensor, vocab_size: int) -> Tensor:
    """Gradient of the embedding [V, H], in the dtype of grad_flat, summed in float32."""
    dtype = grad_flat.dtype
    rows = grad_flat.reshape(used_ids.numel(), -1).to(accumulation_dtype(dtype))
    grad: Tensor = torch.ops.aten.embedding_dense_backward(
        rows, used_ids.flatten(), vocab_size, -1, False
    )
    return grad.to(dtype)


def squeeze_patches(flat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """flat [P, K*H], weight [H, K*H], bias [H] -> [P, H]."""
    return linear(flat, weight, bias)


def expand_patches(x: Tensor, weight: Tensor, bias: Tensor, patch_size: int) -> Tensor:
    """x [P, H], weight [K*H, H], bias [K*H] -> [P*K, H]; token k of patch p is row p*K + k."""
    return linear(x, weight, bias).reshape(-1, weight.shape[0] // patch_size)


def squeezed_tables(table: Tensor, squeeze_weight: Tensor) -> Tensor:
    """table [V, H], squeeze_weight [H, K*H] -> S [K, V, H] with S_k = table W_k^T.

    squeeze(flatten(table[ids])) = bias + sum_k S_k[ids_k].
    """
    hidden_size = table.shape[1]
    slices = squeeze_weight.unflatten(1, (-1, hidden_size)).permute(1, 2, 0)
    return torch.matmul(table, slices)


def folded_squeezed_gather(ids: Tensor, tables: Tensor, bias: Tensor) -> Tensor:
    """ids [P, K], tables [K, V, H], bias [H] -> bias + sum_k tables[k, ids_k], [P, H]."""
    total = bias.to(accumulation_dtype(tables.dtype)).expand(ids.shape[0], -1)
    for k in range(ids.shape[1]):
        total = total + tables[k].index_select(0, ids[:, k])
    return total.to(tables.dtype)
