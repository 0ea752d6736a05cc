"""Logits that are computed when somebody looks at them.

A vocabulary head's logits, [rows, V], are large, and most code does one of two things with them:
the cross entropy with a target, or the argmax. Both have operators that never store them. So the
decoder hands on :class:`OnDemandLogits`, a tensor with the shape, dtype and gradient of the
logits and without their values. Cross entropy and argmax, after reshapes and casts, go to the
operators; anything else computes the values once and goes on with those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from calm_kernels.integrations.patching import in_transform
from calm_kernels.ops.linear_argmax import linear_argmax
from calm_kernels.ops.linear_cross_entropy import REDUCTIONS, linear_cross_entropy


@dataclass(frozen=True)
class LogitsUse:
    """What may be computed without the logits.

    Args:
        argmax, cross_entropy: whether their operators serve.
        drop_mass: of the cross entropy's gradient; see :func:`calm_kernels.linear_cross_entropy`.
    """

    argmax: bool = True
    cross_entropy: bool = True
    drop_mass: float = 0.0


class _Head:
    """The product of hidden states [R, H] and a vocabulary weight [V, H], not yet computed.

    Shared by all reshapes and casts of the same logits, so that what is written into one is seen
    by the others as far as it would be with plain tensors.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype, use: LogitsUse) -> None:
        self.hidden = hidden
        self.weight = weight
        self.dtype = dtype
        self.use = use
        self.values: Tensor | None = None
        self._grad_enabled = torch.is_grad_enabled()
        self._versions = _versions(hidden, weight)

    def operands(self) -> tuple[Tensor, Tensor]:
        """hidden and weight as the matmul takes them."""
        if _versions(self.hidden, self.weight) != self._versions:
            raise RuntimeError(
                "logits: hidden states or weight were written to before the logits were computed "
                "(an optimizer step, perhaps); use the logits, or .clone() them, before that"
            )
        return self.hidden.to(self.dtype), self.weight.to(self.dtype)

    def logits(self) -> Tensor:
        """The values, [R, V], computed once."""
        if self.values is None:
            with torch.set_grad_enabled(self._grad_enabled), _no_autocast(self.hidden):
                self.values = F.linear(*self.operands())
        return self.values


class _Node(torch.autograd.Function):
    """The place of unlooked-at logits in the graph, for code that goes past Python's overrides."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, head: _Head, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.set_materialize_grads(False)
        empty: Tensor = torch.Tensor._make_wrapper_subclass(
            OnDemandLogits, shape, dtype=dtype, device=hidden.device
        )
        return empty

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight = ctx.saved_tensors
        if grads[0] is None:
            return (None,) * 5
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (grad @ weight.to(grad.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ hidden.to(grad.dtype)).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


class OnDemandLogits(Tensor):
    """hidden @ weight.T, computed when its values are needed. Made by :func:`on_demand_logits`."""

    _head: _Head

    def values_now(self) -> Tensor:
        """The logits as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype = self.shape, self.dtype
        return self._head.logits().view(shape).to(dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        shortcut = _SHORTCUTS.get(func)
        # Once the values are there they may have been written to: they are what counts.
        if shortcut is not None and isinstance(args[0], cls) and args[0]._head.values is None:
            result = shortcut(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def on_demand_logits(hidden: Tensor, weight: Tensor, use: LogitsUse) -> Tensor:
    """``F.linear(hidden, weight)``, put off.

    Args:
        hidden: [*, H].
        weight: [V, H].
        use: what may be computed without the values.

    Returns:
        a tensor [*, V] in the dtype that ``F.linear`` gives here, autocast included.
    """
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    head = _Head(hidden.reshape(-1, hidden.shape[-1]), weight, dtype, use)
    return _made(head, torch.Size((*hidden.shape[:-1], weight.shape[0])), dtype)


def can_be_put_off(hidden: object, weight: object) -> bool:
    """Whether both are plain tensors with memory of their own and of one dtype."""
    return (
        type(hidden) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and hidden.device == weight.device
        and hidden.device.type != "meta"
        and (hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type))
        and not in_transform()
    )


def _made(head: _Head, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    with torch.set_grad_enabled(head._grad_enabled):
        logits: Any = _Node.apply(head.hidden, head.weight, head, shape, dtype)  # type: ignore[no-untyped-call]
    logits._head = head
    made: Tensor = logits
    return made


def _plain(value: Any) -> Any:
    return value.values_now() if isinstance(value, OnDemandLogits) else value


def _versions(*tensors: Tensor) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


@contextlib.contextmanager
def _no_autocast(like: Tensor) -> Iterator[None]:
    with torch.autocast(like.device.type, enabled=False):
        yield


def _reshaped(logits: OnDemandLogits, *shape: Any) -> Any:
    """view and reshape, as long as the vocabulary stays the last dimension."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    return _with_shape(logits, tuple(sizes))


def _with_shape(logits: OnDemandLogits, sizes: tuple[int, ...]) -> Any:
    vocab_size = logits.shape[-1]
    rows = logits.numel() // max(vocab_size, 1)
    known = 1
    for size in sizes[:-1]:
        known *= 1 if size == -1 else size
    if sizes[-1] not in (vocab_size, -1) or sizes.count(-1) > 1 or not known or rows % known:
        return NotImplemented
    filled = tuple(rows // known if size == -1 else size for size in sizes[:-1])
    elements = 1
    for size in filled:
        elements *= size
    if elements != rows:
        return NotImplemented
    return _made(logits._head, torch.Size((*filled, vocab_size)), logits.dtype)


def _flattened(logits: OnDemandLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % logits.dim(), end_dim % logits.dim()
    if end == logits.dim() - 1:
        return NotImplemented
    return _with_shape(logits, (*logits.shape[:start], -1, *logits.shape[end + 1 :]))


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(logits: OnDemandLogits, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return NotImplemented
        return _in_dtype(logits, dtype)

    return cast


def _to(logits: OnDemandLogits, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 1 or not isinstance(args[0], torch.dtype):
        return NotImplemented
    return _in_dtype(logits, args[0])


def _in_dtype(logits: OnDemandLogits, dtype: torch.dtype) -> Any:
    if dtype == logits.dtype:
        return logits
    # To a wider type only: the operators compare and sum in float32, which a narrower one is not.
    wider = (torch.float32, torch.float64)
    if dtype not in wider or torch.promote_types(dtype, logits.dtype) != dtype:
        return NotImplemented
    return _made(logits._head, logits.shape, dtype)


def _contiguous(logits: OnDemandLogits, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if args or kwargs else logits


def _argmax(logits: OnDemandLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    if not logits._head.use.argmax or keepdim or dim not in (-1, logits.dim() - 1):
        return NotImplemented
    hidden, weight = logits._head.operands()
    with _no_autocast(hidden):
        return linear_argmax(hidden, weight).reshape(logits.shape[:-1])


def _cross_entropy(
    logits: OnDemandLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    use = logits._head.use
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if not use.cross_entropy or not plain or reduction not in REDUCTIONS:
        return NotImplemented
    if logits.dim() != 2 or target.shape != logits.shape[:1] or target.dtype != torch.int64:
        return NotImplemented
    hidden, vocabulary = logits._head.operands()
    autocast = torch.is_autocast_enabled(hidden.device.type)
    with _no_autocast(hidden):
        loss = linear_cross_entropy(
            hidden,
            vocabulary,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            drop_mass=use.drop_mass,
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    return loss.to(wide if autocast else logits.dtype)


_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "is_cuda",
    "requires_grad",
    "is_leaf",
    "grad_fn",
)
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    torch.is_floating_point,
}
"""What is known without the values."""

_SHORTCUTS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.view: _reshaped,
    Tensor.reshape: _reshaped,
    torch.reshape: _reshaped,
    Tensor.flatten: _flattened,
    torch.flatten: _flattened,
    Tensor.contiguous: _contiguous,
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.to: _to,
    Tensor.argmax: _argmax,
    torch.argmax: _argmax,
    F.cross_entropy: _cross_entropy,
}
