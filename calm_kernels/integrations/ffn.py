"""Feed-forward blocks with their norm and residual: ``gated_ffn`` in their place.

Two structures are known: the autoencoder's block (children ``mlp`` and ``layernorm``) and the Llama
decoder layer (``input_layernorm``, ``self_attn``, ``post_attention_layernorm``, ``mlp``), whose
second half is the same block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from calm_kernels.integrations.examination import (
    agree,
    child_names,
    generator,
    is_from_here,
    is_plain_linear,
    parameter_names,
    skeleton,
    undisturbed,
    why_not_examined,
)
from calm_kernels.integrations.patching import (
    Finding,
    Patch,
    Patched,
    in_transform,
    install,
    is_hooked,
    settings_of,
    uninstall,
)
from calm_kernels.ops.gated_ffn import gated_ffn

PART = "ffn"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BLOCK = {"mlp", "layernorm"}
DECODER_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_EPS_NAMES = ("variance_epsilon", "eps")
_PROBE_ROWS = 3


@dataclass(frozen=True)
class BlockSettings:
    """What a block was when it was examined.

    Args:
        norm: name of the norm's attribute.
        norm_type, mlp_type: a module of another type in their place is not replaced.
        eps: name of the attribute of the norm that holds it.
    """

    norm: str
    norm_type: type[nn.Module]
    mlp_type: type[nn.Module]
    eps: str


def _serves(module: Any, settings: BlockSettings, x: Tensor) -> bool:
    """Whether ``gated_ffn`` may stand for the block in this call.

    It may not where a hook or another module was put in since, or where the dtypes differ: then the
    original's result has a wider dtype than ``gated_ffn``'s would (the residual stream in float32
    under autocast, above all).
    """
    mlp: Any = module.mlp
    norm: Any = getattr(module, settings.norm)
    if type(mlp) is not settings.mlp_type or type(norm) is not settings.norm_type:
        return False
    projections: tuple[Any, ...] = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not all(is_plain_linear(projection, bias=False) for projection in projections):
        return False
    if is_hooked(mlp, norm, *projections) or in_transform():
        return False
    if torch.is_autocast_enabled(x.device.type):
        return x.dtype == torch.get_autocast_dtype(x.device.type)
    weighted: tuple[Any, ...] = (norm, *projections)
    return all(part.weight.dtype == x.dtype for part in weighted)


def _block(module: Any, settings: BlockSettings, x: Tensor) -> Tensor:
    norm: Any = getattr(module, settings.norm)
    mlp: Any = module.mlp
    return gated_ffn(
        x,
        norm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
        eps=getattr(norm, settings.eps),
    )


class FastBlock(Patched):
    """x + mlp(layernorm(x)) in one operator."""

    parts = (PART,)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original; what it is not made for, the original serves."""
        settings: BlockSettings = settings_of(self, FastBlock)
        if args or kwargs or not _serves(self, settings, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return _block(self, settings, x)


class FastDecoderLayer(Patched):
    """The layer's attention as it was, then norm, FFN and residual in one operator."""

    parts = (PART,)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original; what it is not made for, the original serves."""
        settings: BlockSettings = settings_of(self, FastDecoderLayer)
        layer: Any = self
        if args or not _serves(layer, settings, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        normed = layer.input_layernorm(hidden_states)
        attended = layer.self_attn(hidden_states=normed, **kwargs)[0]
        return _block(layer, settings, hidden_states + attended)


def find(model: nn.Module) -> Iterator[Finding]:
    """Blocks and decoder layers of a model."""
    examined: dict[object, str | None] = {}
    for path, module in model.named_modules():
        names = child_names(module)
        if is_from_here(module):
            continue
        if names == BLOCK:
            norm = "layernorm"
            kind: type[Patched] = FastBlock
        elif names == DECODER_LAYER:
            norm, kind = "post_attention_layernorm", FastDecoderLayer
        else:
            continue
        yield _examine(path, module, norm, kind, examined)


def _examine(
    path: str,
    module: nn.Module,
    norm_name: str,
    kind: type[Patched],
    examined: dict[object, str | None],
) -> Finding:
    norm, mlp = getattr(module, norm_name), cast(nn.Module, module.mlp)
    reason = _why_not_structure(norm, mlp) or _why_not_parts(module, norm, mlp)
    if reason is not None:
        return Finding(PART, path, module, reason)
    eps = next(name for name in _EPS_NAMES if hasattr(norm, name))
    settings = BlockSettings(norm_name, type(norm), type(mlp), eps)
    patch = Patch(kind, settings)
    # Layers of one class and one description compute the same.
    key = (type(module), type(norm), type(mlp), repr(mlp), repr(norm), getattr(norm, eps))
    if key not in examined:
        examined[key] = _why_not_values(module, patch)
    if (reason := examined[key]) is not None:
        return Finding(PART, path, module, reason)
    return Finding(PART, path, module, "norm, FFN and residual: gated_ffn", patch)


def _why_not_structure(norm: nn.Module, mlp: nn.Module) -> str | None:
    if parameter_names(norm) != {"weight"} or not any(hasattr(norm, name) for name in _EPS_NAMES):
        return f"its norm {type(norm).__name__} is no RMSNorm with a weight and an epsilon"
    if not isinstance(getattr(norm, next(n for n in _EPS_NAMES if hasattr(norm, n))), float):
        return "its norm has no epsilon of its own"
    for name in PROJECTIONS:
        projection = getattr(mlp, name, None)
        if projection is None:
            return f"its mlp has no {name}"
        if not is_plain_linear(projection):
            return f"mlp.{name} is {type(projection).__name__}, not torch.nn.Linear"
        if projection.bias is not None:
            return f"mlp.{name} has a bias"
    return None


def _why_not_parts(module: nn.Module, *parts: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if is_hooked(*parts):
        return "a module inside has hooks, which would not run"
    return next((r for part in parts if (r := why_not_examined(part)) is not None), None)


class _Attention(nn.Module):
    """Stands for the attention of a decoder layer: a known function, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[dict[str, Any]] = []

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        others = {
            k: v for k, v in kwargs.items() if k != "hidden_states" and v not in (None, False)
        }
        self.given.append({"positional": args[1:], **others})
        return hidden.flip(-1) * 0.7, None


def _why_not_values(module: nn.Module, patch: Patch) -> str | None:
    """Compare a copy with what would replace it, in both modes."""
    stub = _Attention()
    attention = getattr(module, "self_attn", None)
    stubs: dict[int, nn.Module] = {} if attention is None else {id(attention): stub}
    kwargs: dict[str, Any] = {}
    if attention is not None:
        names = ("attention_mask", "position_embeddings", "past_key_values", "extra")
        kwargs = {name: f"<{name}>" for name in names} | {"use_cache": True}
    try:
        with undisturbed():
            plain = skeleton(module, stubs)
            width = int(getattr(module, patch.settings.norm).weight.shape[0])
            x = torch.randn((1, _PROBE_ROWS, width), generator=generator())
            for training in (True, False):
                plain.train(training)
                expected = plain.forward(x.clone(), **kwargs)
                install(plain, [patch])
                actual = plain.forward(x.clone(), **kwargs)
                uninstall(plain)
                if not isinstance(expected, Tensor):
                    return f"its forward returns a {type(expected).__name__}, not a tensor"
                if not agree(actual, expected):
                    return "its forward computes something else (another activation or order)"
    except Exception as error:
        return f"its forward could not be examined: {type(error).__name__}: {error}"
    if stub.given and any(given != stub.given[0] for given in stub.given):
        return "its forward hands other arguments to its attention"
    return None
