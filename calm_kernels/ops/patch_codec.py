"""Patches of K tokens to vectors and back: embed and flatten, squeeze, expand, folded tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from calm_kernels import _autocast, _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import patch_codec as reference


def _fake_embed_flatten(
    ids: Tensor, embedding: Tensor, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    patches, patch_size = ids.shape
    flat = embedding.new_empty((patches, patch_size * embedding.shape[1]))
    return flat, ids.new_empty(ids.shape, dtype=torch.int64)


def _fake_embed_flatten_backward(grad_flat: Tensor, used_ids: Tensor, vocab_size: int) -> Tensor:
    return grad_flat.new_empty((vocab_size, grad_flat.shape[1] // used_ids.shape[1]))


_embed_flatten_backward = define(
    "embed_flatten_backward",
    "(Tensor grad_flat, Tensor used_ids, SymInt vocab_size) -> Tensor",
    reference=reference.embed_flatten_backward,
    fake=_fake_embed_flatten_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.vocab_size = inputs[1].shape[0]


def _backward(
    ctx: Any, grad_flat: Tensor | None, _: None
) -> tuple[None, Tensor | None, None, None]:
    if grad_flat is None:
        return None, None, None, None
    (used_ids,) = ctx.saved_tensors
    grad = _embed_flatten_backward(
        grad_flat.device, grad_flat.contiguous(), used_ids, ctx.vocab_size
    )
    return None, grad, None, None


_embed_flatten = define(
    "embed_flatten",
    "(Tensor ids, Tensor embedding, float dropout, Tensor? seed) -> (Tensor flat, Tensor used_ids)",
    reference=reference.embed_flatten,
    fake=_fake_embed_flatten,
    backward=_backward,
    setup_context=_setup_context,
)


def _fake_folded_squeezed_gather(ids: Tensor, tables: Tensor, bias: Tensor) -> Tensor:
    return tables.new_empty((ids.shape[0], tables.shape[2]))


_folded_squeezed_gather = define(
    "folded_squeezed_gather",
    "(Tensor ids, Tensor tables, Tensor bias) -> Tensor",
    reference=reference.folded_squeezed_gather,
    fake=_fake_folded_squeezed_gather,
)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    """Token ids within the vocabulary. Reading them would stall a GPU, so on CPU tensors only."""
    _checks.tensor("ids", ids, _checks.INTEGER_DTYPES, ("P", "K"))
    _checks.at_least("ids.shape[1]", ids.shape[1], 1, " token per patch")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"ids: expected token ids in [0, {vocab_size}), the rows of the table; got "
            f"{low if low < 0 else high}; use the tokenizer that the weights were trained with"
        )


def embed_flatten(
    ids: Tensor, embedding: Tensor, *, dropout: float = 0.0, seed: int | Tensor | None = None
) -> Tensor:
    """Look up the K tokens of each patch, side by side, some of them replaced by token 0.

    Args:
        ids: int64 or int32 [P, K] token ids.
        embedding: [V, H], float32, bfloat16, float16 or float64.
        dropout: probability in [0, 1) that a token is taken to be id 0.
        seed: of that choice: an int, an int64 tensor of one element, or None to draw one. Patch p,
            token k uses uniform k of row p on stream TOKEN_DROPOUT, and is replaced where that is
            below ``dropout``.

    Returns:
        [P, K*H], dtype of ``embedding``. Differentiable in ``embedding`` (summed in float32, by the
        native kernels in an order that depends on the ids alone; a replaced token's gradient goes
        to row 0).

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, an id outside [0, V) (checked on CPU
            tensors; a CUDA kernel asserts), dropout outside [0, 1), devices differ.

    Source: arXiv 2510.27688, section 3.
    """
    _checks.tensor("embedding", embedding, _checks.FLOAT_DTYPES, ("V", "H"))
    _check_ids(ids, embedding.shape[0])
    device = _checks.same_device(ids=ids, embedding=embedding)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1); got {dropout}")
    embedding = _autocast.cast(device, embedding)
    checked_seed = _checks.seed_tensor(seed, device) if dropout > 0.0 else None
    flat: Tensor
    flat, _ = _embed_flatten(device, ids, embedding, dropout, checked_seed)
    return flat


def squeeze_patches(flat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The K token vectors of a patch to one: flat [P, K*H], weight [H, K*H], bias [H] -> [P, H].

    A matmul with bias as torch does it: float32 accumulation, torch's autocast and gradients.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape.
    """
    _checks.tensor("flat", flat, _checks.FLOAT_DTYPES, ("P", "K*H"))
    _checks.tensor("weight", weight, _checks.FLOAT_DTYPES, ("H", flat.shape[1]))
    _checks.tensor("bias", bias, _checks.FLOAT_DTYPES, (weight.shape[0],))
    _checks.same_device(flat=flat, weight=weight, bias=bias)
    return reference.squeeze_patches(flat, weight, bias)


def expand_patches(x: Tensor, weight: Tensor, bias: Tensor, patch_size: int) -> Tensor:
    """One vector of a patch to its K token vectors.

    x [P, H], weight [K*H, H], bias [K*H] -> [P*K, H]; token k of patch p is row p*K + k.
    A matmul with bias as torch does it: float32 accumulation,
    torch's autocast and gradients.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, ``patch_size`` does not divide K*H.
    """
    _checks.tensor("x", x, _checks.FLOAT_DTYPES, ("P", "H"))
    _checks.at_least("patch_size", patch_size, 1)
    _checks.tensor("weight", weight, _checks.FLOAT_DTYPES, (patch_size * x.shape[1], x.shape[1]))
    _checks.tensor("bias", bias, _checks.FLOAT_DTYPES, (weight.shape[0],))
    _checks.same_device(x=x, weight=weight, bias=bias)
    return reference.expand_patches(x, weight, bias, patch_size)


def squeezed_tables(table: Tensor, squeeze_weight: Tensor) -> Tensor:
    """The squeeze applied to every token at each of the K places of a patch.

    Args:
        table: [V, H], a vector per token.
        squeeze_weight: [H, K*H], same dtype.

    Returns:
        [K, V, H]: entry k is ``table @ squeeze_weight[:, k*H:(k+1)*H].T``, so that
        ``squeeze_patches(flat, squeeze_weight, bias)`` of gathered rows is ``bias`` plus a sum of
        K gathered rows of these.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape.
    """
    _checks.tensor("table", table, _checks.FLOAT_DTYPES, ("V", "H"))
    hidden_size = table.shape[1]
    _checks.tensor("squeeze_weight", squeeze_weight, _checks.FLOAT_DTYPES, (hidden_size, "K*H"))
    if squeeze_weight.shape[1] % hidden_size:
        raise ValueError(
            f"squeeze_weight: expected a multiple of H = {hidden_size} columns; "
            f"got {squeeze_weight.shape[1]}"
        )
    _checks.same_dtype(table=table, squeeze_weight=squeeze_weight)
    _checks.same_device(table=table, squeeze_weight=squeeze_weight)
    return reference.squeezed_tables(table, squeeze_weight)


def folded_table_gather(ids: Tensor, table: Tensor) -> Tensor:
    """ids [P, K], table [V, H] -> [P, K*H]: the first stage of a folded encoder. No gradient.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, an id outside [0, V) (CPU tensors).
    """
    _checks.tensor("table", table, _checks.FLOAT_DTYPES, ("V", "H"))
    _check_ids(ids, table.shape[0])
    device = _checks.same_device(ids=ids, table=table)
    flat: Tensor
    flat, _ = _embed_flatten(device, ids, table.detach(), 0.0, None)
    return flat


def folded_squeezed_gather(ids: Tensor, tables: Tensor, bias: Tensor) -> Tensor:
    """First stage, flatten and squeeze of a folded encoder: K gathers and a sum. No gradient.

    Args:
        ids: int64 or int32 [P, K] token ids.
        tables: [K, V, H] from :func:`squeezed_tables`.
        bias: [H], same dtype.

    Returns:
        [P, H]: bias + sum_k tables[k, ids[:, k]], summed in float32, in the dtype of ``tables``.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, an id outside [0, V) (CPU tensors).
    """
    _checks.tensor("tables", tables, _checks.FLOAT_DTYPES, ("K", "V", "H"))
    patch_size, vocab_size, hidden_size = tables.shape
    _check_ids(ids, vocab_size)
    _checks.tensor("ids", ids, _checks.INTEGER_DTYPES, ("P", patch_size))
    _checks.tensor("bias", bias, _checks.FLOAT_DTYPES, (hidden_size,))
    _checks.same_dtype(tables=tables, bias=bias)
    device = _checks.same_device(ids=ids, tables=tables, bias=bias)
    result: Tensor = _folded_squeezed_gather(device, ids, tables.detach(), bias.detach())
    return result


SAMPLED_ENTRIES = 256
"""Entries of a weight on the CPU that tell its contents from others."""


def _contents(weight: Tensor) -> int:
    """A hash of some entries, spread over a weight; 0 where reading them would stall a GPU."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return 0
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    step = max(1, weight.numel() // SAMPLED_ENTRIES)
    return hash(tuple(weight.detach().view(integers).view(-1)[::step].tolist()))


def weight_stamps(weights: Sequence[Tensor]) -> list[int]:
    """Three numbers a weight, some of which change when it is written to, replaced or moved.

    Torch counts writes in place, but not those through ``Tensor.data``. These are seen on the CPU
    alone, and only if they meet one of ``SAMPLED_ENTRIES`` entries spread over the weight.
    """
    return [
        number
        for weight in weights
        for number in (
            -1 if weight.is_inference() else weight._version,
            weight.data_ptr(),
            _contents(weight),
        )
    ]


def _fresh_ids_impl(ids: Tensor, weights: Sequence[Tensor], stamps: Sequence[int]) -> Tensor:
    if weight_stamps(weights) != list(stamps):
        raise RuntimeError(
            "folded encoder: a weight changed after folding, so its tables are stale; "
            "call fold() again, or unfold() while weights still change"
        )
    return ids.clone()


def _fake_fresh_ids(ids: Tensor, weights: Sequence[Tensor], stamps: Sequence[int]) -> Tensor:
    return torch.empty_like(ids)


# An operator, so that compiled code runs the check as well, at every call. It has no backends to
# choose from; torch's decorator for such operators imports the compiler at the first call.
_library = torch.library.Library("calm_kernels", "FRAGMENT")
_library.define(
    "fresh_ids(Tensor ids, Tensor[] weights, int[] stamps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("fresh_ids", _fresh_ids_impl, "CompositeExplicitAutograd")
torch.library.register_fake("calm_kernels::fresh_ids", _fake_fresh_ids, lib=_library)


def fresh_ids(ids: Tensor, weights: Sequence[Tensor], stamps: Sequence[int]) -> Tensor:
    """A copy of ``ids`` for tables made from ``weights``, if those have not changed since.

    Args:
        ids: token ids.
        weights: what the tables were made from.
        stamps: :func:`weight_stamps` at that time.

    Raises:
        RuntimeError: a weight changed. Compiled code checks too, a CUDA graph's replay does not.
    """
    result: Tensor = torch.ops.calm_kernels.fresh_ids(
        ids, [weight.detach() for weight in weights], stamps
    )
    return result
