"""linear_cross_entropy where several processes hold parts of the vocabulary.

Each process computes the largest logit and the sum of exponentials of its own columns, and the
target's logit where it has it. Three numbers a row are combined over the processes; with the whole
vocabulary's largest logit and sum, every process has the gradient of its own rows of the weight,
and the gradients of ``hidden`` add up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calm_kernels import _autocast, _checks
from calm_kernels.ops.linear_cross_entropy import _check_tensors, _rows, _rows_backward

IGNORED = -1
"""Local target of rows that do not count. One past the last row of the shard: it is elsewhere."""


class _Rows(torch.autograd.Function):
    """The loss of every row: hidden [R, H], weight [V_r, H], local target [R] -> [R]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        counted, elsewhere = target != IGNORED, target == weight.shape[0]
        here = counted & ~elsewhere
        # The forward wants a target among its columns; what it says of a borrowed one is not read.
        loss, _, top, total, *lists, _ = _rows(
            hidden.device, hidden, weight, bias, target.masked_fill(elsewhere, 0), IGNORED, 0.0
        )
        largest = top.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        below = top - largest
        at_target = torch.where(here, total.log() - loss + below, 0.0)
        sums = torch.stack((total * below.exp(), at_target, here.to(loss.dtype)))
        dist.all_reduce(sums, group=group)
        whole_total, at_target, owners = sums
        whole_total = whole_total.masked_fill(counted & (owners != 1), torch.nan)
        ctx.group = group
        ctx.save_for_backward(hidden, weight, bias, target, largest, whole_total, *lists)
        return torch.where(counted, whole_total.log() - at_target, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        wanted = list(ctx.needs_input_grad[:3])
        grads = _rows_backward(
            grad_loss.device, grad_loss.contiguous(), *ctx.saved_tensors, IGNORED, wanted
        )
        if wanted[0]:
            dist.all_reduce(grads[0], group=ctx.group)
        selected = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return (*selected, None, None)


def vocabulary_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`calm_kernels.linear_cross_entropy` over a weight sharded by rows of the vocabulary.

    Every process calls it with the same ``hidden`` and ``target`` and with its own rows of the
    weight, and gets the whole vocabulary's loss. Each process then has to run the backward, with
    the same incoming gradient: it gets the gradient of its own rows, and all get that of hidden.

    Args:
        hidden: [*, H], the same on all processes.
        weight: [V_r, H], this process's rows, V_r >= 1; numbers of rows may differ.
        target: int64 or int32 [*], token ids of the whole vocabulary, the same on all processes.
        vocab_start: token id of the first of these rows. Shards must not overlap.
        bias: [V_r] or None.
        ignore_index, reduction: as of :func:`calm_kernels.linear_cross_entropy`.
        group: process group over which the vocabulary is sharded; None for all processes.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [*] for ``"none"``, the same on all
        processes. Gradients are exact and once differentiable, in hidden, weight and bias; that of
        hidden is summed over the processes in its own dtype. A target that no process has makes
        its row NaN.

    Communication: four numbers a row forward, the gradient of hidden backward.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape or reduction, devices differ.
        RuntimeError: no process group is initialised.
    """
    device = _check_tensors(hidden, weight, target, bias, reduction)
    hidden, weight = _autocast.cast(device, hidden), _autocast.cast(device, weight)
    bias = _autocast.cast(device, bias)
    _checks.same_dtype(hidden=hidden, weight=weight, bias=bias)
    counted = target != ignore_index
    local = target.to(torch.int64) - vocab_start
    local = torch.where((local < 0) | (local > weight.shape[0]), weight.shape[0], local)
    loss: Tensor = _Rows.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]).contiguous(),
        weight,
        bias,
        local.masked_fill(~counted, IGNORED).reshape(-1),
        group,
    )
    if reduction == "none":
        return loss.reshape(target.shape)
    total = loss.sum()
    return total if reduction == "sum" else total / counted.sum()
