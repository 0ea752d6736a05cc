"""Which draws share all tokens so far with enough others of their sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import repeated_draws as reference

_INT64 = (torch.int64,)


def _fake(rows: Tensor, groups: Tensor, tokens: Tensor, fewest: Tensor) -> tuple[Tensor, Tensor]:
    num_kept = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty(num_kept), rows.new_empty(num_kept)


_repeated_draws = define(
    "repeated_draws",
    "(Tensor rows, Tensor groups, Tensor tokens, Tensor fewest) -> (Tensor, Tensor)",
    reference=reference.repeated_draws,
    fake=_fake,
)


def repeated_draws(
    rows: Tensor, groups: Tensor, tokens: Tensor, fewest: Tensor
) -> tuple[Tensor, Tensor]:
    """The draws whose group and token enough draws have.

    Args:
        rows: int64 [R] numbers of draws, not negative; draw s of sequence a is number s * A + a.
        groups: int64 [R], equal for draws of one sequence whose tokens so far are equal, and for no
            others.
        tokens: int64 [R], the next token of each.
        fewest: int64 [A], how many equal draws make them stay.

    Returns:
        (rows, groups) of the draws that stay, int64 [n] each, in their order; the groups are those
        of the tokens so far and this one. No gradient.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, A = 0 where R > 0, several devices.
    """
    _checks.tensor("rows", rows, _INT64, ("R",))
    for name, tensor in (("groups", groups), ("tokens", tokens)):
        _checks.tensor(name, tensor, _INT64, tuple(rows.shape))
    _checks.tensor("fewest", fewest, _INT64, ("A",))
    if len(rows) and not len(fewest):
        raise ValueError(f"fewest: expected at least one sequence for {len(rows)} draws; got none")
    device = _checks.same_device(rows=rows, groups=groups, tokens=tokens, fewest=fewest)
    kept: tuple[Tensor, Tensor] = _repeated_draws(device, rows, groups, tokens, fewest)
    return kept
