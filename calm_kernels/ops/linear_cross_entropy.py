"""Cross entropy of a linear layer's logits, without the logits."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from calm_kernels import _autocast, _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import linear_cross_entropy as reference

REDUCTIONS = ("none", "mean", "sum")

SMALLEST_SPARSE_VOCABULARY = 256
"""Below it ``drop_mass`` is taken as 0: lists of 64 entries would hold much of the vocabulary.
Forward and backward of 2048 rows, H = 256, on two cores of an EPYC, exact and with lists: V = 258
takes 11.0 ms and 3.8 ms (80% of rows sparse), V = 1024 takes 19.9 ms and 10.4 ms; with no row
sparse both take the same time."""


class LinearCrossEntropyInfo(NamedTuple):
    """By-products of :func:`linear_cross_entropy`, on the device of its tensors.

    Attributes:
        correct: bool [*], whether the largest logit of a row is its target's (the lowest index on
            ties, the first NaN if there is one); False where ignored.
        num_rows: int64 scalar, rows that count.
        num_sparse_rows: int64 scalar, how many of them get their gradient from a list. 0 where no
            gradient is wanted, or gradients are exact.
        largest_dropped_mass: float32 scalar, the most probability that one of these leaves out.
    """

    correct: Tensor
    num_rows: Tensor
    num_sparse_rows: Tensor
    largest_dropped_mass: Tensor


def _fake_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    drop_mass: float,
) -> tuple[Tensor, ...]:
    dtype = reference.compute_dtype(hidden.dtype)
    rows, lists = hidden.shape[0], (hidden.shape[0], reference.list_capacity(drop_mass))
    return (
        hidden.new_empty((rows,), dtype=dtype),
        hidden.new_empty((rows,), dtype=torch.bool),
        hidden.new_empty((rows,), dtype=dtype),
        hidden.new_empty((rows,), dtype=dtype),
        hidden.new_empty(lists, dtype=torch.int32),
        hidden.new_empty(lists, dtype=dtype),
        hidden.new_empty((rows,), dtype=torch.int32),
        hidden.new_empty((3,), dtype=torch.float32),
    )


def _fake_rows_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    top: Tensor,
    total: Tensor,
    list_columns: Tensor,
    list_probabilities: Tensor,
    list_length: Tensor,
    ignore_index: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if want else (0,))
        for shape, want in zip(shapes, wanted, strict=True)
    )


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, ctx.ignore_index, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the size of the lists
    ctx.save_for_backward(hidden, weight, bias, target, *output[2:7])


def _backward_rows(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 6
    wanted = list(ctx.needs_input_grad[:3])
    grads = _rows_backward(
        grad_loss.device, grad_loss.contiguous(), *ctx.saved_tensors, ctx.ignore_index, wanted
    )
    selected = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return (*selected, None, None, None)


_rows_backward = define(
    "linear_cross_entropy_rows_backward",
    "(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor top, "
    "Tensor total, Tensor list_columns, Tensor list_probabilities, Tensor list_length, "
    "int ignore_index, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    reference=_autocast.disabled(reference.linear_cross_entropy_rows_backward),
    fake=_fake_rows_backward,
    triton_module="calm_kernels.triton.linear_cross_entropy",
)

_rows = define(
    "linear_cross_entropy_rows",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
    "float drop_mass) -> (Tensor loss, Tensor correct, Tensor top, Tensor total, "
    "Tensor list_columns, Tensor list_probabilities, Tensor list_length, Tensor statistics)",
    reference=_autocast.disabled(reference.linear_cross_entropy_rows),
    fake=_fake_rows,
    backward=_backward_rows,
    setup_context=_setup_rows,
    triton_module="calm_kernels.triton.linear_cross_entropy",
)


def _fake_reduced(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    drop_mass: float,
    mean: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    dtype = reference.compute_dtype(hidden.dtype)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grads = (
        hidden.new_empty(shape if want else (0,), dtype=dtype)
        for shape, want in zip(shapes, wanted, strict=True)
    )
    correct = hidden.new_empty(hidden.shape[:1], dtype=torch.bool)
    statistics = hidden.new_empty((3,), dtype=torch.float32)
    return (hidden.new_empty((), dtype=dtype), correct, statistics, *grads)


def _setup_reduced(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.drop_mass, ctx.mean, ctx.wanted = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the size of the gradients
    ctx.save_for_backward(*tensors)
    ctx.grads = output[3:]


def _backward_reduced(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    # The gradients are scaled where they are and handed out: a copy would hold the largest tensor
    # of the whole call twice. Whoever goes through a retained graph again has them made again.
    # Traced tensors are of a subclass; the compiler sees to their memory.
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        options = (ctx.ignore_index, ctx.drop_mass, ctx.mean, ctx.wanted)
        _, _, _, *grads = _reduced(grad_loss.device, *ctx.saved_tensors, *options)
    dtype = ctx.saved_tensors[0].dtype
    scaled = (
        (grad.mul_(grad_loss) if type(grad) is Tensor else grad * grad_loss).to(dtype)
        if needed
        else None
        for grad, needed in zip(grads, ctx.needs_input_grad[:3], strict=True)
    )
    return (*scaled, None, None, None, None, None)


_reduced = define(
    "linear_cross_entropy_reduced",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index, "
    "float drop_mass, bool mean, bool[3] wanted) "
    "-> (Tensor loss, Tensor correct, Tensor statistics, Tensor grad_hidden, Tensor grad_weight, "
    "Tensor grad_bias)",
    reference=_autocast.disabled(reference.linear_cross_entropy_reduced),
    fake=_fake_reduced,
    backward=_backward_reduced,
    setup_context=_setup_reduced,
    triton_module="calm_kernels.triton.linear_cross_entropy",
)


def _check_tensors(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, reduction: str
) -> torch.device:
    """Types, shapes, devices and the reduction; returns the device."""
    _checks.tensor("hidden", hidden, _checks.FLOAT_DTYPES, ("*", "H"))
    _checks.tensor("weight", weight, _checks.FLOAT_DTYPES, ("V", hidden.shape[-1]))
    _checks.at_least("weight.shape[0]", weight.shape[0], 1, " row")
    _checks.tensor("target", target, _checks.INTEGER_DTYPES, hidden.shape[:-1])
    if bias is not None:
        _checks.tensor("bias", bias, _checks.FLOAT_DTYPES, (weight.shape[0],))
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    return _checks.same_device(hidden=hidden, weight=weight, target=target, bias=bias)


def _check_target(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Targets within the vocabulary. Reading them would stall a GPU, so on CPU tensors only."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (target < 0) | (target >= vocab_size)
    outside &= target != ignore_index
    if outside.any():
        raise ValueError(
            f"target: expected token ids in [0, {vocab_size}), the rows of weight, or ignore_index "
            f"{ignore_index}; got {int(target[outside][0])}"
        )


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    drop_mass: float = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    drop_mass: float = ...,
    return_info: Literal[True],
) -> tuple[Tensor, LinearCrossEntropyInfo]: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    drop_mass: float = ...,
    return_info: bool,
) -> Tensor | tuple[Tensor, LinearCrossEntropyInfo]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    drop_mass: float = 0.0,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, LinearCrossEntropyInfo]:
    """Cross entropy of ``hidden @ weight.T + bias`` with ``target``; the logits are never stored.

    The same numbers as ``F.cross_entropy(F.linear(hidden, weight, bias), target, ...)``, computed
    in chunks of rows.

    Args:
        hidden: [*, H], float32, bfloat16, float16 or float64.
        weight: [V, H], same dtype and device.
        target: int64 or int32 [*], token ids.
        bias: [V], same dtype and device, or None.
        ignore_index: rows with this target have loss 0, no gradient, and no part in the mean.
        reduction: ``"mean"`` over the rows that count, ``"sum"``, or ``"none"``. The mean over no
            row is NaN with zero gradients, as in torch.
        drop_mass: in [0, 1). 0: exact gradients. Above: a row whose 64 or fewer significant
            entries hold all but at most this much of its probability gets its gradient from those
            entries alone. What is left out of the gradient of a row's logits has an L1 norm of at
            most ``drop_mass`` times the row's incoming gradient; the loss itself is exact.
            Confident rows then cost next to nothing in the backward. Gradients of vocabularies
            under 256 are exact in any case.
        return_info: return the by-products too; they cost nothing and wait for nothing.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [*] for ``"none"``. Logits and gradient
        sums are float32 too. Differentiable once, in hidden, weight and bias. With ``return_info``
        the pair (loss, :class:`LinearCrossEntropyInfo`).

    Memory: a buffer for a chunk of rows: 6.25 MiB in float32, or the logits of 64 rows and eight
        times their hidden states if that is more (compiled CPU code; the PyTorch reference holds 6
        MiB of logits, or one row's, with ``drop_mass`` twice). ``"mean"`` and ``"sum"`` make the
        gradients together with the loss and keep them for the backward, which hands them out, in
        float32: H values a row and the size of weight. Going through a retained graph a second
        time computes them again. ``"none"`` keeps two values a row, and with ``drop_mass`` its list
        of 64 entries, and computes the logits again.

    Autocast: hidden, weight and bias are cast to the autocast dtype.

    Raises:
        TypeError: wrong dtype. ValueError: wrong shape, reduction or drop_mass, devices differ, a
            target outside [0, V) (checked on CPU tensors; elsewhere, and in compiled code, it
            makes its row and the reduced loss NaN).

    Source: the certified sparse backward is this package's own; its specification is the docstring
    of calm_kernels/reference/linear_cross_entropy.py.
    """
    device = _check_tensors(hidden, weight, target, bias, reduction)
    hidden_size, lead = hidden.shape[-1], hidden.shape[:-1]
    if not 0.0 <= drop_mass < 1.0:
        raise ValueError(f"drop_mass: expected a probability mass in [0, 1); got {drop_mass}")
    _check_target(target, weight.shape[0], ignore_index)
    hidden, weight = _autocast.cast(device, hidden), _autocast.cast(device, weight)
    bias = _autocast.cast(device, bias)
    _checks.same_dtype(hidden=hidden, weight=weight, bias=bias)

    hidden = hidden.reshape(-1, hidden_size).contiguous()
    target = target.reshape(-1).to(torch.int64)
    wanted = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    ]
    if weight.shape[0] < SMALLEST_SPARSE_VOCABULARY or not any(wanted):
        drop_mass = 0.0
    loss: Tensor
    if any(wanted) and reduction != "none":
        mean = reduction == "mean"
        loss, correct, statistics, *_ = _reduced(
            device, hidden, weight, bias, target, ignore_index, drop_mass, mean, wanted
        )
    else:
        loss, correct, *_, statistics = _rows(
            device, hidden, weight, bias, target, ignore_index, drop_mass
        )
        if reduction == "none":
            loss = loss.reshape(lead)
        else:
            total = loss.sum()
            loss = total if reduction == "sum" else total / (target != ignore_index).sum()
    if not return_info:
        return loss
    counts = statistics[:2].to(torch.int64)
    info = LinearCrossEntropyInfo(correct.reshape(lead), counts[0], counts[1], statistics[2])
    return loss, info
