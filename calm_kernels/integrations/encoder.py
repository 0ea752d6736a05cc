"""The frozen encoder of patches: lookup tables in place of its first stage.

Known structure: children ``embed_tokens``, ``encoder_layers``, ``squeeze_layer``, ``norm`` and
``hidden_to_latent``. Half of the layers stand before the squeeze and see one token each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calm_kernels import _autocast
from calm_kernels.integrations.examination import (
    agree,
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
    settings_of,
    uninstall,
)
from calm_kernels.nn.patch_codec import FoldedEncoder, fold_encoder

PART = "encode"
ENCODER = ("embed_tokens", "encoder_layers", "squeeze_layer", "norm", "hidden_to_latent")
LARGEST_SQUEEZED_TABLES = 2**26
"""Most entries of K*V*H tables; beyond it the V*H table serves."""

_PROBE_TOKENS = 50


@dataclass
class EncoderSettings:
    """How the original takes and gives its values, and the tables.

    Args:
        sequences: it takes [B, n*K] and gives [B, n, *]; else [P, K] and [P, *].
        pair: it gives (mean, log_std); else both in one tensor.
    """

    patch_size: int
    sequences: bool = False
    pair: bool = False
    fold_at_once: bool = False
    tables: FoldedEncoder | None = field(default=None, repr=False)
    unfolded_ids: int = 0
    """Ids coded without tables since the weights last changed."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tables": None, "unfolded_ids": 0}


class FastEncoder(Patched):
    """The encoder with tables where its weights are frozen; as it was elsewhere."""

    parts = (PART,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original."""
        settings: EncoderSettings = settings_of(self, FastEncoder)
        encoder: Any = self
        ids = _ids(args, kwargs, settings)
        if ids is None or not _is_frozen(encoder) or not _tables_pay(encoder, ids, settings):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        assert settings.tables is not None
        x = settings.tables(ids.reshape(-1, settings.patch_size))
        x = _autocast.cast(x.device, x)
        for block in encoder.encoder_layers[len(encoder.encoder_layers) // 2 :]:
            x = block(x)
        latent: Tensor = encoder.hidden_to_latent(encoder.norm(x))
        if settings.sequences:
            latent = latent.unflatten(0, (ids.shape[0], -1))
        return latent.chunk(2, dim=-1) if settings.pair else latent


def _ids(args: Any, kwargs: Any, settings: EncoderSettings) -> Tensor | None:
    """The one argument, if it is token ids of the shape that was examined."""
    values = [*args, *kwargs.values()]
    ids = values[0] if len(values) == 1 else None
    if not isinstance(ids, Tensor) or torch.compiler.is_compiling():
        return None
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.numel() == 0:
        return None
    length = ids.shape[1]
    fits = (
        length % settings.patch_size == 0 if settings.sequences else length == settings.patch_size
    )
    return ids if fits else None


def _is_frozen(encoder: nn.Module) -> bool:
    if encoder.training or any(parameter.requires_grad for parameter in encoder.parameters()):
        return False
    replaced = [m for m in encoder.modules() if m is not encoder]
    return is_plain_linear(encoder.squeeze_layer) and not is_hooked(*replaced)


def _tables_pay(encoder: Any, ids: Tensor, settings: EncoderSettings) -> bool:
    """Whether there are tables for this call, made once as many ids were coded as they hold."""
    embedding, squeeze = encoder.embed_tokens.weight, encoder.squeeze_layer
    tables = settings.tables
    if tables is not None and not _fits(tables, embedding, squeeze.weight):
        settings.tables, settings.unfolded_ids = None, 0
    if settings.tables is None:
        settings.unfolded_ids += ids.numel()
        if settings.unfolded_ids < embedding.shape[0] and not settings.fold_at_once:
            return False
        entries = settings.patch_size * embedding.numel()
        settings.tables = fold_encoder(
            embedding,
            list(encoder.encoder_layers[: len(encoder.encoder_layers) // 2]),
            squeeze.weight,
            squeeze.bias,
            mode="squeezed" if entries <= LARGEST_SQUEEZED_TABLES else "table",
        )
    return True


def _fits(tables: FoldedEncoder, embedding: Tensor, squeeze_weight: Tensor) -> bool:
    same = tables.sources[0] is embedding and tables.squeeze_weight is squeeze_weight
    where = (tables.tables.device, tables.tables.dtype) == (embedding.device, embedding.dtype)
    return same and where and not tables.is_stale()


def find(model: nn.Module) -> Iterator[Finding]:
    """The encoders of a model."""
    for path, module in modules_with(model, ENCODER):
        note, patch = _examine(module)
        yield Finding(PART, path, module, note, patch)


def _examine(module: nn.Module) -> tuple[str, Patch | None]:
    encoder: Any = module
    if (reason := why_not_examined(module)) is not None:
        return reason, None
    if type(encoder.embed_tokens) is not nn.Embedding:
        return (
            f"embed_tokens is {type(encoder.embed_tokens).__name__}, not torch.nn.Embedding",
            None,
        )
    if not is_plain_linear(encoder.squeeze_layer, bias=True):
        return "squeeze_layer is no torch.nn.Linear with a bias", None
    width, hidden_size = encoder.squeeze_layer.in_features, encoder.embed_tokens.embedding_dim
    layers = len(encoder.encoder_layers)
    if width % hidden_size or layers < 2 or layers % 2:
        return f"{layers} layers and a squeeze of {width} by {hidden_size} are no two stages", None
    patch_size = width // hidden_size
    if hidden_size != encoder.squeeze_layer.out_features:
        return "squeeze_layer does not end in the hidden size", None
    try:
        with undisturbed():
            few_tokens = nn.Embedding(_PROBE_TOKENS, hidden_size)
            stubs: dict[int, nn.Module] = {id(encoder.embed_tokens): few_tokens}
            settings = _convention(skeleton(module, stubs).eval(), patch_size)
    except Exception as error:
        return f"its forward could not be examined: {type(error).__name__}: {error}", None
    if settings is None:
        return "its forward computes something else", None
    return "first stage and squeeze of a frozen encoder: lookup tables", Patch(
        FastEncoder, settings
    )


def _convention(plain: nn.Module, patch_size: int) -> EncoderSettings | None:
    """How the original takes and gives its values; None if in no way that is known."""
    for sequences in (False, True):
        shape = (2, 3 * patch_size if sequences else patch_size)
        ids = torch.randint(0, _PROBE_TOKENS, shape, generator=generator())
        try:
            expected = plain.forward(ids)
        except Exception:
            continue
        pair = isinstance(expected, tuple)
        settings = EncoderSettings(patch_size, sequences, pair, fold_at_once=True)
        install(plain, [Patch(FastEncoder, settings)])
        actual = plain.forward(ids)
        uninstall(plain)
        if agree(actual, expected):
            return EncoderSettings(patch_size, sequences, pair)
    return None
