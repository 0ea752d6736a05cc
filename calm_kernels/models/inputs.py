"""Token ids as the models take them: checked, cut into patches, and which patches count."""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels import _checks

IGNORE_INDEX = -100


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Check that token ids lie in [0, vocab_size).

    Values are looked at on the CPU only, and not while compiling: elsewhere it would be a stall.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name}: expected token ids in [0, {vocab_size}); got {low if low < 0 else high}; "
            "was the text tokenized with this model's tokenizer?"
        )


def check_token_batch(input_ids: Tensor, labels: Tensor | None, vocab_size: int) -> None:
    """Check a batch of equally long sequences and its labels: [B, L], neither of them empty."""
    _checks.tensor("input_ids", input_ids, _checks.INTEGER_DTYPES, ("B", "L"))
    if input_ids.numel() == 0:
        raise ValueError(
            f"input_ids: expected at least one sequence of one token; got {list(input_ids.shape)}"
        )
    if labels is not None:
        _checks.tensor("labels", labels, _checks.INTEGER_DTYPES, input_ids.shape)
        _checks.same_device(input_ids=input_ids, labels=labels)
    check_ids("input_ids", input_ids, vocab_size)


def to_patches(
    input_ids: Tensor, labels: Tensor | None, patch_size: int, vocab_size: int
) -> Tensor:
    """Checked token ids [B, L] -> [B, L/K, K].

    Raises:
        TypeError, ValueError: wrong dtype or shape, empty batch, L not a multiple of K, an id
            outside the vocabulary.
    """
    check_token_batch(input_ids, labels, vocab_size)
    length = input_ids.shape[1]
    if length % patch_size:
        raise ValueError(
            f"input_ids: expected a length that is a multiple of the patch size {patch_size}; "
            f"got {length}; pad to {length + -length % patch_size} with the pad id, or cut to "
            f"{length - length % patch_size}"
        )
    return input_ids.reshape(len(input_ids), -1, patch_size)


def real_tokens(
    input_ids: Tensor, labels: Tensor | None, pad_token_id: int | None
) -> Tensor | None:
    """Which tokens count: bool [B, L]; None if neither labels nor a pad id can exclude any."""
    real = None if pad_token_id is None else input_ids != pad_token_id
    if labels is not None:
        labelled = labels != IGNORE_INDEX
        real = labelled if real is None else real & labelled
    return real


def whole_patches(real: Tensor | None, patch_size: int) -> Tensor | None:
    """Which patches count, [B, L/K]: those with nothing but real tokens."""
    return None if real is None else real.unflatten(1, (-1, patch_size)).all(dim=-1)


def position_ids(mask: Tensor) -> Tensor:
    """Positions in left-padded rows, [B, n]: the first real entry of a row is position 0."""
    return (mask.long().cumsum(dim=-1) - 1).clamp_min(0)
