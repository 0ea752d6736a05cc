"""The operators: contract, checks, dispatch. Importing this package defines their schemas."""

from calm_kernels.ops.attention_block import attention_block
from calm_kernels.ops.brier import brier_lm, brier_rates, brier_scores
from calm_kernels.ops.decoder_step import DecoderLayerWeights, DecoderWeights, decoder_step
from calm_kernels.ops.energy_head import energy_head_block, energy_head_first_block
from calm_kernels.ops.energy_head_output import energy_head_output
from calm_kernels.ops.energy_score import energy_score, energy_score_from_targets
from calm_kernels.ops.gated_ffn import gated_ffn
from calm_kernels.ops.linear_argmax import linear_argmax
from calm_kernels.ops.linear_argmax_parallel import vocabulary_parallel_linear_argmax
from calm_kernels.ops.linear_cross_entropy import LinearCrossEntropyInfo, linear_cross_entropy
from calm_kernels.ops.linear_cross_entropy_parallel import (
    vocabulary_parallel_linear_cross_entropy,
)
from calm_kernels.ops.memory import empty_cache
from calm_kernels.ops.patch_codec import (
    embed_flatten,
    expand_patches,
    folded_squeezed_gather,
    folded_table_gather,
    squeeze_patches,
    squeezed_tables,
)
from calm_kernels.ops.random import philox_normal, philox_uniform
from calm_kernels.ops.repeated_draws import repeated_draws
from calm_kernels.ops.rms_norm import rms_norm
from calm_kernels.ops.rotary_attention import rotary_attention
from calm_kernels.ops.row_layers import RowLayers
from calm_kernels.ops.temperature_sampling import (
    batch_temperature_sample,
    exact_temperature_sample,
)

__all__ = [
    "DecoderLayerWeights",
    "DecoderWeights",
    "LinearCrossEntropyInfo",
    "RowLayers",
    "attention_block",
    "batch_temperature_sample",
    "brier_lm",
    "brier_rates",
    "brier_scores",
    "decoder_step",
    "embed_flatten",
    "empty_cache",
    "energy_head_block",
    "energy_head_first_block",
    "energy_head_output",
    "energy_score",
    "energy_score_from_targets",
    "exact_temperature_sample",
    "expand_patches",
    "folded_squeezed_gather",
    "folded_table_gather",
    "gated_ffn",
    "linear_argmax",
    "linear_cross_entropy",
    "philox_normal",
    "philox_uniform",
    "repeated_draws",
    "rms_norm",
    "rotary_attention",
    "squeeze_patches",
    "squeezed_tables",
    "vocabulary_parallel_linear_argmax",
    "vocabulary_parallel_linear_cross_entropy",
]
