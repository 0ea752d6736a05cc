"""The energy head: what depends on the hidden state alone, once for all samples.

Known structure: children ``noise_embd``, ``hidden_embd``, ``norm_noise``, ``norm_hidden``,
``mlp_blocks.{i}`` (``in_ln``, ``linears``, ``down_proj``) and ``final_layer``. The head is called
with every hidden state repeated for its samples along the first dimension. That it was repeated is
proven by its strides (``expand``) or by its place in the autograd graph (``repeat``); without
proof the original runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calm_kernels.integrations.examination import (
    agree,
    child_names,
    generator,
    is_plain_linear,
    modules_with,
    skeleton,
    undisturbed,
    why_not_examined,
)
from calm_kernels.integrations.patching import (
    Finding,
    Patch,
    Patched,
    install,
    is_hooked,
    uninstall,
)

PART = "head"
HEAD = ("noise_embd", "hidden_embd", "norm_noise", "norm_hidden", "mlp_blocks", "final_layer")
HEAD_BLOCK = {"in_ln", "linears", "down_proj"}


def num_repeats(x: Tensor) -> int:
    """How often the first slice of x is known to be repeated along all of its first dimension.

    1 if nothing is known.
    """
    if x.dim() < 2 or x.shape[0] < 2:
        return 1
    if x.stride(0) == 0:
        return x.shape[0]
    if torch.compiler.is_compiling() or x.grad_fn is None:
        return 1
    node: Any = x.grad_fn
    if node.name() != "RepeatBackward0":
        return 1
    repeats, source = tuple(node._saved_repeats), tuple(node._saved_self_sym_sizes)
    source = (1,) * (len(repeats) - len(source)) + source
    once_along_others = all(count == 1 for count in repeats[1:])
    return x.shape[0] if source[0] == 1 and once_along_others else 1


class Shared(Patched):
    """A layer that is computed once for a repeated input, and its result expanded."""

    parts = (PART,)

    def forward(self, x: Tensor) -> Tensor:
        """As the original."""
        forward = super().forward  # type: ignore[misc]
        result: Tensor
        if (count := num_repeats(x)) == 1:
            result = forward(x)
            return result
        result = forward(x[:1])
        return result.expand(count, *result.shape[1:])


class SharedBlock(Patched):
    """A block with its first matmul split: the condition's half runs once for all samples."""

    parts = (PART,)

    def forward(self, e: Tensor, condition: Tensor) -> Tensor:
        """As the original: e, condition [N, *, H] -> [N, *, H]."""
        block: Any = self
        if num_repeats(condition) == 1 or is_hooked(block.linears, block.linears[0]):
            result: Tensor = super().forward(e, condition)  # type: ignore[misc]
            return result
        first, *rest = block.linears
        weight_e, weight_c = first.weight.chunk(2, dim=1)
        x = F.linear(block.in_ln(e), weight_e) + F.linear(condition[:1], weight_c, first.bias)
        for layer in rest:
            x = layer(x)
        gate, up = x.chunk(2, dim=-1)
        step: Tensor = block.down_proj(F.silu(gate) * up)
        return e + step


def find(model: nn.Module) -> Iterator[Finding]:
    """The energy heads of a model, layer by layer."""
    for path, module in modules_with(model, HEAD):
        head: Any = module
        prefix = f"{path}." if path else ""
        note = "computed once for all samples of a position"
        for name, kind in (("hidden_embd", nn.Linear), ("norm_hidden", nn.LayerNorm)):
            layer = getattr(head, name)
            reason = why_not_examined(layer)
            if reason is None and type(layer) is not kind:
                reason = f"it is {type(layer).__name__}, not torch.nn.{kind.__name__}"
            patch = Patch(Shared) if reason is None else None
            yield Finding(PART, f"{prefix}{name}", layer, reason or note, patch)
        examined: dict[str, str | None] = {}
        for i, block in enumerate(head.mlp_blocks):
            reason = why_not_examined(block)
            if reason is None:
                key = f"{type(block)} {block}"
                if key not in examined:
                    examined[key] = _why_not_block(block)
                reason = examined[key]
            patch = Patch(SharedBlock) if reason is None else None
            block_note = "the condition's half of the first matmul, once for all samples"
            yield Finding(PART, f"{prefix}mlp_blocks.{i}", block, reason or block_note, patch)


def _why_not_block(module: nn.Module) -> str | None:
    if not child_names(module) >= HEAD_BLOCK:
        return f"it has no {', '.join(sorted(HEAD_BLOCK - child_names(module)))}"
    linears: Any = module.linears
    if not isinstance(linears, nn.Sequential) or not is_plain_linear(linears[0]):
        return "linears is no Sequential that begins with a torch.nn.Linear"
    first: Any = linears[0]
    if first.in_features != 2 * first.out_features:
        return "its first layer does not read two vectors of its own width"
    try:
        with undisturbed():
            plain = skeleton(module)
            width = first.out_features
            e, condition = torch.randn((2, 3, 2, width), generator=generator())
            for training in (True, False):
                plain.train(training)
                c = condition[:1].expand_as(condition)
                expected = plain.forward(e.clone(), c.clone())
                install(plain, [Patch(SharedBlock)])
                actual = plain.forward(e.clone(), c)
                uninstall(plain)
                if not agree(actual, expected):
                    return "its forward computes something else"
    except Exception as error:
        return f"its forward could not be examined: {type(error).__name__}: {error}"
    return None
