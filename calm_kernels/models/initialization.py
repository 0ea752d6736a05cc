"""How fresh weights are drawn."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel

from calm_kernels.models.checkpoint import quiet_transformers
from calm_kernels.models.decoder_layer import use_fast_layers
from calm_kernels.nn.energy_head import ZeroLinear

WIDTH_SCALED_GAIN = 0.8
"""Std of a linear layer's weights is this over sqrt(fan_in). At width 256 a fixed 0.02 starves the
signal and training stalls; this keeps activations near unit scale at any width."""


def initialize(module: nn.Module, config: PreTrainedConfig) -> None:
    """Redraw a linear layer or embedding if the scheme is ``"width_scaled"``; reset zero layers.

    Called by transformers on every module that has weights of its own, after its own
    initialisation (std ``initializer_range``, zero biases, unit norms); inside it, the functions
    of ``nn.init`` leave loaded weights alone.
    """
    if getattr(config, "init_scheme", "normal") == "width_scaled":
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=WIDTH_SCALED_GAIN * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None and not _is_loaded(module.weight):
                nn.init.zeros_(module.weight[module.padding_idx])
    if isinstance(module, ZeroLinear):
        module.reset_parameters()


def _is_loaded(weight: Tensor) -> bool:
    """Whether a checkpoint filled a weight; the mark is lost on a slice of it."""
    return bool(getattr(weight, "_is_hf_initialized", False))


class CalmPreTrainedModel(PreTrainedModel):
    """What the models share: attention implementations and the initialisation scheme."""

    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["FastDecoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As of ``PreTrainedModel``, without its progress bar."""
        with quiet_transformers():
            super().save_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        initialize(module, self.config)


class Backbone(LlamaModel):
    """The Llama backbone: fast layers, the initialisation scheme of its configuration."""

    _no_split_modules = ["FastDecoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        use_fast_layers(self, config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        initialize(module, self.config)
