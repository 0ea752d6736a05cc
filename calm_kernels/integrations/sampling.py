"""The method that votes among draws at a temperature: the operator in its place.

Known structure: a method ``temperature_sample`` (or what the caller names) with two arguments,
draws [B, N, K] of token ids and a temperature; it returns one patch per sequence, [B, K].
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from calm_kernels.integrations.examination import is_from_here, undisturbed
from calm_kernels.integrations.patching import Finding, Patch, Patched
from calm_kernels.ops.temperature_sampling import batch_temperature_sample

PART = "sampling"
METHOD = "temperature_sample"


class FastTemperatureSample(Patched):
    """A model whose vote among draws the operator counts."""

    parts = (PART,)

    def calm_temperature_sample(self, tokens: Tensor, temperature: float | Tensor) -> Tensor:
        """As the original, and for any temperature in (0, 1]."""
        chosen: Tensor = batch_temperature_sample(tokens, temperature)
        return chosen


def find(model: nn.Module, method: str) -> Iterator[Finding]:
    """The modules that have the method."""
    for path, module in model.named_modules():
        function = getattr(type(module), method, None)
        if function is None or is_from_here(module) or method in module.__dict__:
            continue
        reason = _why_not(module, method)
        if reason is not None:
            yield Finding(PART, path, module, reason)
            continue
        patch = Patch(FastTemperatureSample, None, ((method, "calm_temperature_sample"),))
        yield Finding(PART, path, module, f"{method}: batch_temperature_sample", patch)


def _why_not(module: nn.Module, method: str) -> str | None:
    """Run it where the outcome is certain: one patch alone occurs 1/T times."""
    parameters = list(inspect.signature(getattr(module, method)).parameters.values())
    if len(parameters) != 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return f"its {method} has no two arguments, draws and a temperature"
    vote: Any = getattr(module, method)
    tokens = torch.tensor(
        [
            [[1, 2], [2, 1], [1, 2], [1, 2], [7, 2], [1, 2], [2, 2], [1, 7]],
            [[5, 5], [5, 6], [6, 5], [5, 6], [5, 6], [6, 6], [5, 6], [0, 0]],
        ]
    )
    expected = torch.tensor([[1, 2], [5, 6]])
    try:
        with undisturbed():
            chosen = [vote(tokens.clone(), temperature) for temperature in (0.25, 1 / 3, 0.1)]
    except Exception as error:
        return f"its {method} could not be examined: {type(error).__name__}: {error}"
    if not all(isinstance(c, Tensor) and torch.equal(c, expected) for c in chosen):
        return f"its {method} does not choose [B, K] by a vote among draws [B, N, K]"
    return None
