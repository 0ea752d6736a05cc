"""transformers' Llama layer with this package's norm, attention and feed-forward block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
)

from calm_kernels._modules import computes_alone
from calm_kernels.ops.attention_block import attention_block, why_not_attention_block
from calm_kernels.ops.gated_ffn import gated_ffn
from calm_kernels.ops.rms_norm import rms_norm
from calm_kernels.ops.rotary_attention import rotary_attention, why_not_rotary_attention


class FastRMSNorm(LlamaRMSNorm):
    """``rms_norm`` where no dtype is promoted."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        if x.dtype != self.weight.dtype:
            out: Tensor = super().forward(x)
            return out
        return rms_norm(x, self.weight, eps=self.variance_epsilon)


class FastAttention(LlamaAttention):
    """``rotary_attention`` where it serves: no cache, no mask but the causal one, no dropout."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if (
            position_embeddings is None
            or attention_mask is not None
            or past_key_values is not None
            or not self._takes(hidden_states)
        ):
            attended: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return attended
        x = hidden_states
        seen = rotary_attention(
            self.q_proj(x), self.k_proj(x), self.v_proj(x), position_embeddings, scale=self.scaling
        )
        return self.o_proj(seen), None

    def takes_whole(self, x: Tensor, norm: nn.Module) -> bool:
        """Whether ``attention_block`` serves, with a norm in front and the residual."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return (
            why_not_attention_block(x) is None
            and self._takes(x)
            and isinstance(norm, FastRMSNorm)
            and norm.weight.dtype == x.dtype
            and computes_alone(self, norm, *projections)
            and all(isinstance(p, nn.Linear) and p.bias is None for p in projections)
            and all(p.weight.dtype == x.dtype for p in projections)
        )

    def _takes(self, x: Tensor) -> bool:
        return (
            why_not_rotary_attention(x) is None
            and not torch.is_autocast_enabled(x.device.type)
            and self.config._attn_implementation == "sdpa"
            and not (self.training and self.attention_dropout)
        )


class FastDecoderLayer(LlamaDecoderLayer):
    """Attention as it was; norm, feed-forward block and residual are one ``gated_ffn``.

    Unless the residual stream is wider than the matmuls, as it may be under autocast: ``gated_ffn``
    would narrow it.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or not self._takes(hidden_states):
            out: Tensor = super().forward(hidden_states, *args, **kwargs)
            return out
        mlp = self.mlp
        return gated_ffn(
            self._attended(hidden_states, **kwargs),
            self.post_attention_layernorm.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
            eps=self.post_attention_layernorm.variance_epsilon,
        )

    def _attended(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention and its residual."""
        norm, attention = self.input_layernorm, self.self_attn
        if (
            position_embeddings is not None
            and attention_mask is None
            and past_key_values is None
            and isinstance(attention, FastAttention)
            and attention.takes_whole(x, norm)
        ):
            return attention_block(
                x,
                norm.weight,
                attention.q_proj.weight,
                attention.k_proj.weight,
                attention.v_proj.weight,
                attention.o_proj.weight,
                position_embeddings,
                scale=attention.scaling,
                eps=norm.variance_epsilon,
            )
        attended: Tensor
        attended, _ = attention(
            hidden_states=norm(x),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return x + attended

    def _takes(self, x: Tensor) -> bool:
        if torch.is_autocast_enabled(x.device.type):
            return x.dtype == torch.get_autocast_dtype(x.device.type)
        return bool(x.dtype == self.mlp.gate_proj.weight.dtype)


def use_fast_layers(backbone: nn.Module, config: LlamaConfig) -> None:
    """Give a Llama model's layers the classes above; parameters and their names stay.

    Feed-forward blocks with a bias or another activation than SiLU keep transformers' code.
    """
    swiglu = config.hidden_act == "silu" and not config.mlp_bias
    for module in backbone.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = FastRMSNorm
        elif type(module) is LlamaAttention:
            module.__class__ = FastAttention
        elif type(module) is LlamaDecoderLayer and swiglu:
            module.__class__ = FastDecoderLayer
