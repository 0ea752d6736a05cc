"""Fast kernels and drop-in layers for Continuous Autoregressive Language Models (CALM).

Functions are here, layers in ``calm_kernels.nn``, whole models in ``calm_kernels.models`` (extra
``models``). Importing needs torch alone and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from calm_kernels import _native
from calm_kernels._dispatch import backend
from calm_kernels.ops import *  # noqa: F403
from calm_kernels.ops import __all__ as _operations

if TYPE_CHECKING:
    from calm_kernels import models, nn

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "models", "nn", *_operations]

# Exported graphs name the native overloads directly, so they are there once the package is.
_native.library("cpu")

_LAZY = ("bench", "integrations", "models", "nn", "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"calm_kernels.{name}")
    raise AttributeError(f"module 'calm_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
