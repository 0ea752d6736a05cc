"""Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time.

A process has one ``triton``, whose functions are compiled ones. A test that takes ``interpreted``
gets a fresh copy of a kernel module that runs on CPU tensors; while it runs, Triton's own library
functions (``tl.max``, ``tl.sum``, ...) are interpreted ones too. Afterwards all is as it was, so
that compiled kernels and torch.compile in the same process notice nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

import calm_kernels.triton as package
from calm_kernels import _dispatch
from calm_kernels.triton import ahead_of_time


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | Path], ModuleType]:
    """``interpreted("linear_argmax")``: that module of calm_kernels.triton for CPU tensors.

    A path loads the kernels of a file.

    Launch its kernels, or functions that launch them, inside the test only. ``num_warps`` and
    ``num_stages`` are ignored, and programs run one after the other. bfloat16 values can be
    loaded, stored, cast and multiplied by ``tl.dot``; other arithmetic on them is the interpreter's
    to refuse or to get wrong, so cast to float32 before it, as a kernel should.
    """
    # What is imported from here on would be interpreted, and stay so.
    ahead_of_time.kernel_modules()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    functions: dict[int, interpreter.InterpretedFunction[Any]] = {}
    for module in (tl, tl.standard, tl.tensor):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                function = functions.setdefault(
                    id(value), interpreter.InterpretedFunction(value.fn)
                )
                monkeypatch.setattr(module, name, function)
    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", _reduce)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", _cast)
    # The copy must not take the operator over from the compiled module.
    monkeypatch.setattr(_dispatch, "register_triton", lambda name, implementation: None)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", _call)
    # Rewritten functions are cached for ever, and those of one test call functions of its copy.
    monkeypatch.setattr(interpreter.InterpretedFunction, "rewritten_fn", {})

    def load(kernels: str | Path) -> ModuleType:
        if isinstance(kernels, str):
            kernels = Path(package.__file__).with_name(f"{kernels}.py")
        name = f"interpreted_{kernels.stem}"
        spec = importlib.util.spec_from_file_location(name, kernels)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function called by a kernel: what it patches of the language is put back afterwards."""
    scope = interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    finally:
        scope.restore()


def _reduce(self: Any, arguments: Any) -> list[Any]:
    """``tl.reduce`` with any function: whole slices at a time, where Triton goes by elements."""
    arguments, axis = self.unravel(arguments, self.axis)
    slices = [np.moveaxis(each.handle.data, axis, 0) for each in arguments]

    def at(i: int) -> tuple[Any, ...]:
        return tuple(
            self.to_tensor(data[i], each.dtype)
            for data, each in zip(slices, arguments, strict=True)
        )

    total = at(0)
    for i in range(1, len(slices[0])):
        combined = self.combine_fn.fn(*total, *at(i))
        total = combined if isinstance(combined, tuple) else (combined,)
    result = [each.handle.data for each in total]
    if self.keep_dims:
        result = [np.expand_dims(data, axis) for data in result]
    return [self.to_tensor(data, each.dtype) for data, each in zip(result, arguments, strict=True)]


def _values(handle: Any) -> Any:
    """A handle's numbers: the interpreter keeps bfloat16 as its bits."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_imprecise: Any) -> Any:
    """``tl.dot`` for bfloat16 too, which the interpreter multiplies as the integers of its bits."""
    with np.errstate(invalid="ignore"):
        product = np.matmul(_values(a), _values(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


_triton_cast = interpreter.InterpreterBuilder.cast_impl


def _cast(self: Any, source: Any, target: Any) -> Any:
    """Casts; to bfloat16 to nearest, ties to even, as the hardware does and not by cutting off."""
    if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
        return _triton_cast(self, source, target)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)
