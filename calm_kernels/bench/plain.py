"""The models in plain PyTorch, as in use without this package: the eager peers of whole steps.

All functions read the parameters of this package's modules and nothing else of them. Random numbers
come in as tensors, so that the same ones can be given to both sides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache


def _linear(x: Tensor, layer: Any) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def _block(x: Tensor, layer: Any) -> Tensor:
    n = _rms_norm(x, layer.layernorm.weight, layer.layernorm.eps)
    gate, up = F.linear(n, layer.mlp.gate_proj.weight), F.linear(n, layer.mlp.up_proj.weight)
    return x + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)


def encode(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [P, K] -> (mean, log_std): every token of every patch through the first stage."""
    half = len(encoder.encoder_layers) // 2
    x = F.embedding(ids, encoder.embed_tokens.weight)
    for layer in encoder.encoder_layers[:half]:
        x = _block(x, layer)
    x = _linear(x.flatten(1), encoder.squeeze_layer)
    for layer in encoder.encoder_layers[half:]:
        x = _block(x, layer)
    x = _rms_norm(x, encoder.norm.weight, encoder.norm.eps)
    mean, log_std = _linear(x, encoder.hidden_to_latent).chunk(2, dim=-1)
    return mean, log_std


def decode_logits(decoder: Any, latents: Tensor) -> Tensor:
    """latents [P, D] -> logits [P, K, V]"""
    half = len(decoder.decoder_layers) // 2
    x = _linear(latents, decoder.latent_to_hidden)
    for layer in decoder.decoder_layers[:half]:
        x = _block(x, layer)
    x = _linear(x, decoder.expand_layer).unflatten(-1, (decoder.patch_size, -1))
    for layer in decoder.decoder_layers[half:]:
        x = _block(x, layer)
    x = _rms_norm(x, decoder.norm.weight, decoder.norm.eps)
    return F.linear(x, decoder.lm_head_weight)


def autoencoder_loss(
    model: Any, ids: Tensor, kept_tokens: Tensor, noise: Tensor, kept_latents: Tensor
) -> Tensor:
    """The training loss of patches, all logits and their cross entropy.

    Args:
        ids: [P, K]. kept_tokens: bool [P, K]. noise: [P, D]. kept_latents: bool [P, D].
    """
    config = model.config
    mean, log_std = encode(model.encoder, ids * kept_tokens)
    latents = mean + noise.to(mean.dtype) * log_std.exp()
    latents = latents * kept_latents / (1.0 - config.ae_dropout)
    logits = decode_logits(model.decoder, latents.to(mean.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    token_loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    variance = (2.0 * log_std).exp()
    kl = 0.5 * (mean.square() + variance - 1.0 - 2.0 * log_std)
    kl_loss = kl.clamp_min(config.kl_clamp).sum(dim=-1).mean()
    loss: Tensor = config.patch_size * token_loss + config.kl_weight * kl_loss
    return loss


def head(module: Any, hidden: Tensor, noise: Tensor) -> Tensor:
    """hidden [*, H], noise [N, *, E] -> [N, *, D]: the hidden state anew for every sample."""
    noise = noise.to(module.noise_embd.weight.dtype)
    hidden = hidden.unsqueeze(0).repeat(noise.shape[0], *[1] * hidden.dim())
    e = _layer_norm(_linear(noise, module.noise_embd), module.norm_noise)
    condition = _layer_norm(_linear(hidden, module.hidden_embd), module.norm_hidden)
    for block in module.mlp_blocks:
        x = torch.cat((_layer_norm(e, block.in_ln), condition), dim=-1)
        x = F.silu(_linear(x, block.linears[0]))
        x = F.silu(_linear(x, block.linears[2]))
        gate, up = _linear(x, block.linears[4]).chunk(2, dim=-1)
        e = e + _linear(F.silu(gate) * up, block.down_proj)
    last = module.final_layer
    x = F.silu(_linear(_layer_norm(e, last.in_ln), last.linears[0]))
    return _linear(x, last.linears[2])


def energy_loss(samples: Tensor, mean: Tensor, log_std: Tensor, normals: Tensor) -> Tensor:
    """Minus the mean energy score of alpha = 1 with targets [M, P, D] made of standard normals.

    Args:
        samples: [N, P, D]. mean, log_std: [P, D]. normals: [M, P, D].
    """
    num_samples = samples.shape[0]
    targets = mean + log_std.exp() * normals.to(mean.dtype)
    between = (samples.unsqueeze(0) - samples.unsqueeze(1)).norm(dim=-1)
    spread = between.sum(dim=(0, 1)) / (num_samples * (num_samples - 1))
    to_targets = (samples.unsqueeze(1) - targets.unsqueeze(0)).norm(dim=-1).mean(dim=(0, 1))
    loss: Tensor = (2.0 * to_targets - spread).mean()
    return loss


def hidden_states(model: Any, patches: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """patches [B, n, K] -> [B, n, H] by transformers' layers."""
    embedded = F.embedding(patches, model.transformer.embed_tokens.weight).flatten(-2)
    for layer in model.embed_proj:
        embedded = layer(embedded)
    hidden: Tensor = model.transformer(
        inputs_embeds=embedded, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    return hidden


def language_model_loss(
    model: Any, patches: Tensor, noise: Tensor, normals: Tensor | None = None
) -> Tensor:
    """The energy loss of patches [B, n, K].

    Args:
        noise: of the head, [N, B * (n - 1), E].
        normals: of the targets, [M, B * (n - 1), D]; drawn here if None.
    """
    hidden = hidden_states(model, patches[:, :-1]).flatten(0, 1)
    with torch.no_grad():
        mean, log_std = encode(model.ae_model.encoder, patches[:, 1:].flatten(0, 1))
    samples = head(model.mlp_generator, hidden, noise)
    if normals is None:
        normals = torch.randn(model.config.num_targets, *mean.shape, device=mean.device)
    return energy_loss(samples.to(mean.dtype), mean, log_std, normals)


def candidates(model: Any, hidden: Tensor, noise: Tensor) -> Tensor:
    """Patches drawn given hidden [B, H] and noise [N, B, E]: int64 [B, N, K]."""
    latents = head(model.mlp_generator, hidden, noise)
    logits = decode_logits(model.ae_model.decoder, latents.flatten(0, 1))
    draws: Tensor = logits.argmax(dim=-1).unflatten(0, noise.shape[:2])
    return draws.transpose(0, 1)


def vote(draws: Tensor, exponent: int, uniforms: Sequence[float]) -> list[list[int]]:
    """One patch a sequence of draws [B, N, K], with weight C(count, exponent), by Counters."""
    chosen = []
    for row, u in zip(draws.tolist(), uniforms, strict=True):
        counts = Counter(tuple(patch) for patch in row)
        for n in range(exponent, 0, -1):
            weights = {p: math.comb(c, n) for p, c in counts.items() if c >= n}
            if weights:
                break
        threshold, running = u * sum(weights.values()), 0
        for patch, weight in weights.items():
            running += weight
            if running > threshold:
                chosen.append(list(patch))
                break
    return chosen


@torch.no_grad()
def generate(
    model: Any, prompt: Tensor, noise: Tensor, exponent: int, uniforms: list[list[float]]
) -> Tensor:
    """Continue prompts of whole patches, [B, L] -> new tokens [B, steps * K].

    Args:
        noise: of the head, [steps, N, B, E].
        exponent: 1/T.
        uniforms: of the votes, by step and sequence.
    """
    cache = DynamicCache(config=model.config)
    hidden = hidden_states(model, prompt.unflatten(1, (-1, model.config.patch_size)), cache)
    chosen: list[Tensor] = []
    for step_noise, step_uniforms in zip(noise, uniforms, strict=True):
        if chosen:
            hidden = hidden_states(model, chosen[-1].unsqueeze(1), cache)
        draws = candidates(model, hidden[:, -1], step_noise)
        chosen.append(torch.tensor(vote(draws, exponent, step_uniforms), device=prompt.device))
    return torch.cat(chosen, dim=1)
