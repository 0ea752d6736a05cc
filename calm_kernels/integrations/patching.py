"""Giving one module another method, and taking it back.

A patched module has a class made for it: the patch's class in front of the module's own, under the
same name. Nothing else changes: parameters, buffers, hooks and instance attributes stay where they
are, ``isinstance`` holds, and taking the patch back is giving the module its old class.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SETTINGS = "_calm_kernels"
"""Instance attribute of a patched module: the settings of each of its patches, by patch class."""

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)

MethodNames = tuple[tuple[str, str], ...]


class Patched:
    """What the class of a patched module inherits first.

    A patch derives from it and defines ``forward``, or methods that :class:`Patch` names.
    """

    parts: tuple[str, ...] = ()
    """The parts that a patch stands for, as ``repr`` shows them."""

    def _get_name(self) -> str:
        names = [part for patch in _patches(type(self)) for part in self._shown(patch)]
        base: str = super()._get_name()  # type: ignore[misc]
        return f"{base}[calm_kernels: {', '.join(names)}]"

    def _shown(self, patch: type[Patched]) -> tuple[str, ...]:
        settings = getattr(self, SETTINGS)[patch.__name__]
        return tuple(getattr(settings, "parts", patch.parts))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            made = type(self).__dict__.get("_made_of")
            if made is not None and reduced[1] == (type(self),):
                return (_new, made, *reduced[2:])
        return reduced


@dataclass(frozen=True)
class Patch:
    """How a module is to be changed.

    Args:
        kind: the class with the new methods.
        settings: what they read, under ``kind.__name__`` in the attribute ``SETTINGS``.
        names: pairs (attribute to replace, method of ``kind`` that replaces it); ``forward`` needs
            none.
    """

    kind: type[Patched]
    settings: Any = None
    names: MethodNames = ()


@dataclass(frozen=True)
class Finding:
    """A part that was recognised: what replaces it, or why nothing does.

    Args:
        part: keyword of ``apply_calm_kernels`` that it belongs to.
        path: of the module in the model; empty for the model itself.
        module: the module to patch.
        note: what serves now, or the reason.
        patch: None if the part is left as it is.
    """

    part: str
    path: str
    module: nn.Module = field(repr=False)
    note: str
    patch: Patch | None = None


def settings_of(module: Any, kind: type[Patched]) -> Any:
    """The settings of one patch of a module."""
    return module.__dict__[SETTINGS][kind.__name__]


def install(module: nn.Module, patches: list[Patch]) -> None:
    """Give a module that has none its patches."""
    names = tuple(pair for patch in patches for pair in patch.names)
    module.__dict__[SETTINGS] = {patch.kind.__name__: patch.settings for patch in patches}
    base: Any = type(module)
    module.__class__ = _patched_class(base, tuple(p.kind for p in patches), names)


def uninstall(*modules: nn.Module) -> None:
    """Give patched modules their own classes back.

    Raises:
        RuntimeError: the class of one was changed again after the patch. Nothing is undone.
    """
    for module in modules:
        _check_class(module)
    for module in modules:
        module.__class__ = type(module).__dict__["_made_of"][0]
        del module.__dict__[SETTINGS]


def _check_class(module: nn.Module) -> None:
    if "_made_of" not in type(module).__dict__:
        raise RuntimeError(
            f"{type(module).__name__}: its class was changed after apply_calm_kernels (by "
            "fully_shard or a parametrization, say); undo that first"
        )


def patched_modules(model: nn.Module) -> list[nn.Module]:
    """All patched modules of a model."""
    return [module for module in model.modules() if isinstance(module, Patched)]


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of the modules does more than its class says."""
    return any(
        "forward" in module.__dict__ or any(getattr(module, name) for name in _HOOKS)
        for module in modules
    )


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is at work, which the operators do not go through."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


@functools.cache
def _patched_class(
    base: Any, kinds: tuple[type[Patched], ...], names: MethodNames
) -> type[nn.Module]:
    """One class for all modules of a class with the same patches: compiled code is shared too."""
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_made_of": (base, kinds, names),
    }
    for name, source in names:
        method = next(getattr(kind, source) for kind in kinds if hasattr(kind, source))
        members[name] = method
    return type(base.__name__, (*kinds, base), members)


def _patches(patched_class: type) -> Iterator[type[Patched]]:
    for entry in patched_class.__mro__:
        made = entry.__dict__.get("_made_of")
        if made is not None:
            yield from made[1]


def _new(base: Any, kinds: tuple[type[Patched], ...], names: MethodNames) -> nn.Module:
    """An empty patched module, for unpickling and copying."""
    patched_class = _patched_class(base, kinds, names)
    return patched_class.__new__(patched_class)
