"""Floating-point operations of the models, counted from their configurations.

What counts: every matrix product of [m, k] by [k, n] is 2 m n k operations, and attention's two
products over the L x L pairs of a sequence are among them, the pairs that the causal mask hides
included. The backward pass of a product is two products of the same size, or one where its input
needs no gradient. What does not count: sums, norms, nonlinearities, rotary angles, gathers, the
energy score, argmax, voting, the optimizer; what a backward pass computes anew to save memory, and
what the certified sparse backward leaves out. So the figures are those of the model, not of a
kernel.

What this package's models do in fewer products than a plain reading of the paper is counted as
done: what the head makes of the hidden state is shared by all samples; an encoder's first stage
runs once per token of the vocabulary where a batch holds more tokens than that; the frozen
encoder of a language model in training is folded into tables, so that of its first stage nothing
is left (making the tables, once a run, is left out).

A generated token of CALM costs 1/K of a step: one patch through input compression and backbone,
and for each candidate the head, the autoencoder's decoder and the vocabulary's K x V logits. At
temperature 1 there is one candidate, below it there are many (200 by default). The published
counts of CALM leave out the candidates' decode, which is most of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from calm_kernels.models.autoencoder import LARGEST_SQUEEZED_TABLES
from calm_kernels.models.configuration import AutoencoderConfig, BaselineConfig, CalmConfig
from calm_kernels.nn import diffusion_head, flow_head
from calm_kernels.nn.denoiser import TIME_FREQUENCIES

ModelConfig = AutoencoderConfig | CalmConfig | BaselineConfig


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass and of its backward pass."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Both passes."""
        return self.forward + self.backward

    @property
    def frozen(self) -> Flops:
        """The same without a backward pass."""
        return Flops(self.forward)

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Flops:
        return Flops(times * self.forward, times * self.backward)

    __rmul__ = __mul__


def training_step(config: ModelConfig, num_sequences: int, length: int) -> Flops:
    """Forward and backward pass of one batch, all of whose tokens are real.

    Args:
        config: of the model.
        num_sequences: B.
        length: L tokens a sequence; a multiple of K, except for the baseline.

    A language model predicts from all but the last patch (or token) of a sequence.
    """
    if isinstance(config, AutoencoderConfig):
        return autoencoder_pass(config, num_sequences * length // config.patch_size)
    if isinstance(config, BaselineConfig):
        positions = length - 1
        head = _linear(config.hidden_size, config.vocab_size)
        return num_sequences * (backbone(config, positions) + positions * head)
    positions = length // config.patch_size - 1
    per_position = (
        input_compression(config)
        + head_condition(config)
        + config.num_samples * head_draw_in_training(config)
        + folded_encoder(_autoencoder(config))
    )
    return num_sequences * (backbone(config, positions) + positions * per_position)


def per_token(config: CalmConfig | BaselineConfig, context: int, num_candidates: int = 1) -> float:
    """Operations to generate one token of one sequence with cached keys and values.

    Args:
        config: of the language model.
        context: tokens so far.
        num_candidates: patches that are drawn and decoded to choose one: 1 at temperature 1. A
            baseline needs none at any temperature and ignores it.
    """
    if isinstance(config, BaselineConfig):
        head = _linear(config.hidden_size, config.vocab_size)
        return float((backbone_step(config, context) + head).forward)
    candidate = head_draw(config) + decoder(_autoencoder(config))
    patch = without_candidates(config, context) + num_candidates * candidate
    return patch.forward / config.patch_size


def per_token_without_decode(config: CalmConfig | BaselineConfig, context: int) -> float:
    """As :func:`per_token` for one candidate that stays a latent: neither decoder nor logits.

    For a baseline the same as :func:`per_token`.
    """
    if isinstance(config, BaselineConfig):
        return per_token(config, context)
    patch = without_candidates(config, context) + head_draw(config)
    return patch.forward / config.patch_size


def without_candidates(config: CalmConfig, context: int) -> Flops:
    """What a patch costs before anything is drawn."""
    patches = max(1, context // config.patch_size)
    step = input_compression(config) + backbone_step(config, patches)
    return step + head_condition(config) + _sampling_times(config)


def backbone(config: LlamaConfig, length: int) -> Flops:
    """The Llama layers over one sequence of ``length`` positions."""
    return length * backbone_step(config, length)


def backbone_step(config: LlamaConfig, context: int) -> Flops:
    """The Llama layers for one position that attends to ``context`` positions, itself included."""
    hidden, head_dim = config.hidden_size, config.head_dim
    assert head_dim is not None and config.num_key_value_heads is not None
    queries = config.num_attention_heads * head_dim
    keys = config.num_key_value_heads * head_dim
    projections = 2 * _linear(hidden, queries) + 2 * _linear(hidden, keys)
    attention = 2 * _linear(context, queries)
    layer = projections + attention + gated_ffn(hidden, config.intermediate_size)
    return config.num_hidden_layers * layer


def input_compression(config: CalmConfig) -> Flops:
    """K token embeddings to one input vector of the backbone."""
    hidden = config.hidden_size
    return _linear(config.patch_size * hidden, 2 * hidden) + _linear(2 * hidden, hidden)


def head_condition(config: CalmConfig) -> Flops:
    """What a head computes once per position, whatever the number of draws."""
    hidden = config.hidden_size
    own = _linear(hidden, hidden)
    if config.head_type == "energy":
        own += config.num_mlp_layers * _linear(hidden, hidden)
    return own


def head_draw(config: CalmConfig) -> Flops:
    """One draw of a latent."""
    hidden, latent = config.hidden_size, config.latent_size
    if config.head_type != "energy":
        return _evaluations(config) * _denoiser(config)
    block = 5 * _linear(hidden, hidden)
    output = _linear(hidden, hidden) + _linear(hidden, latent)
    return _leaf(config.noise_size, hidden) + config.num_mlp_layers * block + output


def head_draw_in_training(config: CalmConfig) -> Flops:
    """One draw of the loss: a sample, or one noisy latent at a time of its own."""
    if config.head_type == "energy":
        return head_draw(config)
    return _denoiser(config) + _time_embedding(config) + _modulations(config)


def decoder(config: AutoencoderConfig) -> Flops:
    """One latent to the logits of its K tokens."""
    hidden, patch_size = config.hidden_size, config.patch_size
    block = config.num_decoder_layers // 2 * gated_ffn(hidden, config.intermediate_size)
    token = block + _linear(hidden, config.vocab_size)
    expand = _linear(hidden, patch_size * hidden)
    return _linear(config.latent_size, hidden) + block + expand + patch_size * token


def encoder(config: AutoencoderConfig, num_patches: int) -> Flops:
    """The unfolded encoder over a batch of patches."""
    hidden = config.hidden_size
    tokens = min(num_patches * config.patch_size, config.vocab_size)
    block = config.num_encoder_layers // 2 * gated_ffn(hidden, config.intermediate_size)
    squeeze = _linear(config.patch_size * hidden, hidden)
    return tokens * block + num_patches * (squeeze + _second_stage(config))


def folded_encoder(config: AutoencoderConfig) -> Flops:
    """The frozen encoder with its tables, for one patch."""
    entries = config.patch_size * config.vocab_size * config.hidden_size
    cost = _second_stage(config)
    if entries > LARGEST_SQUEEZED_TABLES:
        cost += _linear(config.patch_size * config.hidden_size, config.hidden_size)
    return cost.frozen


def autoencoder_pass(config: AutoencoderConfig, num_patches: int) -> Flops:
    """Encoder and decoder over a batch of patches."""
    return encoder(config, num_patches) + num_patches * decoder(config)


def gated_ffn(hidden: int, intermediate: int) -> Flops:
    """The three products of a gated feed-forward block, for one row."""
    return 3 * _linear(hidden, intermediate)


def _linear(inputs: int, outputs: int) -> Flops:
    """A linear layer for one row."""
    return Flops(2 * inputs * outputs, 4 * inputs * outputs)


def _leaf(inputs: int, outputs: int) -> Flops:
    """A linear layer whose input needs no gradient, for one row."""
    return Flops(2 * inputs * outputs, 2 * inputs * outputs)


def _autoencoder(config: CalmConfig) -> AutoencoderConfig:
    if config.autoencoder_config is None:
        raise ValueError("config: expected one that describes its autoencoder; got none")
    return AutoencoderConfig(**config.autoencoder_config)


def _second_stage(config: AutoencoderConfig) -> Flops:
    hidden = config.hidden_size
    block = config.num_encoder_layers // 2 * gated_ffn(hidden, config.intermediate_size)
    return block + _linear(hidden, 2 * config.latent_size)


def _denoiser(config: CalmConfig) -> Flops:
    """The flow or diffusion head's network for one noisy latent, without its modulations."""
    hidden, latent = config.hidden_size, config.latent_size
    blocks = config.num_mlp_layers * 2 * _linear(hidden, hidden)
    return _leaf(latent, hidden) + blocks + _linear(hidden, latent)


def _modulations(config: CalmConfig) -> Flops:
    hidden = config.hidden_size
    return config.num_mlp_layers * _linear(hidden, 3 * hidden) + _linear(hidden, 2 * hidden)


def _time_embedding(config: CalmConfig) -> Flops:
    hidden = config.hidden_size
    return _leaf(TIME_FREQUENCIES, hidden) + _linear(hidden, hidden)


def _sampling_times(config: CalmConfig) -> Flops:
    """Of a sequence's draws, all at the same times: embedded times and modulations."""
    if config.head_type == "energy":
        return Flops()
    return _evaluations(config) * (_time_embedding(config) + _modulations(config))


def _evaluations(config: CalmConfig) -> int:
    """Runs of the denoising network for one draw."""
    if config.head_type == "diffusion":
        return config.sampling_steps or diffusion_head.DEFAULT_STEPS
    steps = config.sampling_steps or flow_head.DEFAULT_STEPS
    return steps * (2 if config.flow_solver == "midpoint" else 1)
