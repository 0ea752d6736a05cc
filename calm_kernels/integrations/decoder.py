"""The decoder's vocabulary head: its loss and its argmax without logits.

Known structure: children ``latent_to_hidden``, ``decoder_layers``, ``expand_layer`` and ``norm``,
and the parameter ``lm_head_weight``, by which the forward multiplies with ``F.linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from calm_kernels.integrations.examination import (
    agree,
    generator,
    modules_with,
    parameter_names,
    skeleton,
    undisturbed,
    why_not_examined,
)
from calm_kernels.integrations.logits import (
    LogitsUse,
    OnDemandLogits,
    can_be_put_off,
    on_demand_logits,
)
from calm_kernels.integrations.patching import (
    Finding,
    Patch,
    Patched,
    install,
    settings_of,
    uninstall,
)

DECODER = ("latent_to_hidden", "decoder_layers", "expand_layer", "norm")
WEIGHT = "lm_head_weight"


class _HeadPutOff(TorchFunctionMode):
    """Inside, ``F.linear`` with one certain weight gives logits on demand."""

    def __init__(self, weight: Tensor, use: LogitsUse) -> None:
        super().__init__()
        self._weight = weight
        self._use = use

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if (
            func is F.linear
            and len(args) == 2
            and not kwargs
            and args[1] is self._weight
            and can_be_put_off(*args)
        ):
            return on_demand_logits(args[0], args[1], self._use)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class DecoderSettings:
    """What of the head is replaced."""

    use: LogitsUse

    @property
    def parts(self) -> tuple[str, ...]:
        """As ``repr`` shows them."""
        chosen = {"decode": self.use.argmax, "cross_entropy": self.use.cross_entropy}
        return tuple(name for name, on in chosen.items() if on)


class FastDecoder(Patched):
    """The decoder as it was, with logits on demand."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. In compiled code the logits are there at once."""
        forward = super().forward  # type: ignore[misc]
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return forward(*args, **kwargs)
        weight: Tensor = getattr(self, WEIGHT)
        with _HeadPutOff(weight, settings_of(self, FastDecoder).use):
            return forward(*args, **kwargs)


def find(model: nn.Module, use: LogitsUse) -> Iterator[Finding]:
    """The decoders of a model."""
    notes = {
        "decode": (use.argmax, "argmax of the logits: linear_argmax"),
        "cross_entropy": (use.cross_entropy, "cross entropy of the logits: linear_cross_entropy"),
    }
    for path, module in modules_with(model, DECODER):
        if WEIGHT not in parameter_names(module):
            continue
        reason = _why_not_examined(module) or _why_not_values(module)
        patch = Patch(FastDecoder, DecoderSettings(use)) if reason is None else None
        for part, (wanted, note) in notes.items():
            if wanted:
                yield Finding(part, path, module, reason or note, patch)


def _why_not_examined(module: nn.Module) -> str | None:
    """As :func:`why_not_examined`; hooks inside do run, because the forward is the original."""
    reason = why_not_examined(module)
    return None if reason is not None and "hooks" in reason else reason


def _why_not_values(module: nn.Module) -> str | None:
    latent_to_hidden = module.latent_to_hidden
    width = getattr(latent_to_hidden, "in_features", None)
    if width is None:
        return f"latent_to_hidden is {type(latent_to_hidden).__name__}, not torch.nn.Linear"
    try:
        with undisturbed():
            plain = skeleton(module)
            latents = torch.randn((2, int(width)), generator=generator())
            expected = plain.forward(latents)
            install(plain, [Patch(FastDecoder, DecoderSettings(LogitsUse()))])
            actual = plain.forward(latents)
            uninstall(plain)
            if not isinstance(actual, OnDemandLogits):
                return f"its forward does not end with F.linear by {WEIGHT}"
            if not agree(actual.values_now(), expected):
                return "its forward computes something else"
    except Exception as error:
        return f"its forward could not be examined: {type(error).__name__}: {error}"
    return None
