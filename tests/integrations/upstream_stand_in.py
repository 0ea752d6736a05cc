"""The models of CALM in plain PyTorch, written from the paper's equations.

Parameter names are those of the released checkpoints. Nothing is fused, shared or left out: this is
what a drop-in has to equal. Padding is left aside. Random numbers are drawn in float32 whatever
the model's dtype, so that one seed means the same draws.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel


@dataclass
class Config:
    vocab_size: int = 23
    hidden_size: int = 12
    intermediate_size: int = 20
    latent_size: int = 6
    patch_size: int = 4
    num_layers: int = 4
    dropout: float = 0.15
    kl_weight: float = 1e-3
    kl_clamp: float = 0.5
    lm_hidden_size: int = 16
    noise_size: int = 5
    num_blocks: int = 2
    num_samples: int = 3
    num_targets: int = 100
    beta: float = 1.0


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.layernorm = RMSNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.layernorm(x))
        return out


class Encoder(nn.Module):
    """ids [P, K] -> mean and log_std side by side, [P, 2D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        h = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, h)
        self.encoder_layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.squeeze_layer = nn.Linear(config.patch_size * h, h)
        self.norm = RMSNorm(h)
        self.hidden_to_latent = nn.Linear(h, 2 * config.latent_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        half = len(self.encoder_layers) // 2
        for layer in self.encoder_layers[:half]:
            x = layer(x)
        x = self.squeeze_layer(x.flatten(1))
        for layer in self.encoder_layers[half:]:
            x = layer(x)
        latent: Tensor = self.hidden_to_latent(self.norm(x))
        return latent


class Decoder(nn.Module):
    """latents [P, D] -> logits [P, K, V]."""

    def __init__(self, config: Config, embedding: nn.Parameter) -> None:
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.latent_to_hidden = nn.Linear(config.latent_size, h)
        self.decoder_layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.expand_layer = nn.Linear(h, config.patch_size * h)
        self.norm = RMSNorm(h)
        self.lm_head_weight = embedding

    def forward(self, latents: Tensor) -> Tensor:
        x = self.latent_to_hidden(latents)
        half = len(self.decoder_layers) // 2
        for layer in self.decoder_layers[:half]:
            x = layer(x)
        x = self.expand_layer(x).unflatten(-1, (self.config.patch_size, -1))
        for layer in self.decoder_layers[half:]:
            x = layer(x)
        return F.linear(self.norm(x), self.lm_head_weight)


@dataclass
class AutoencoderOutput:
    loss: Tensor
    logits: Tensor
    kl_loss: Tensor


class Autoencoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, self.encoder.embed_tokens.weight)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> AutoencoderOutput:
        """input_ids [B, L]; the loss of reconstructing labels, or input_ids."""
        config = self.config
        patches = input_ids.reshape(-1, config.patch_size)
        targets = (input_ids if labels is None else labels).reshape(-1)
        if self.training:
            patches = patches.masked_fill(torch.rand(patches.shape) < config.dropout, 0)
        mean, log_std = self.encoder(patches).chunk(2, dim=-1)
        latents = mean
        if self.training:
            noise, kept = torch.randn(mean.shape), torch.rand(mean.shape) >= config.dropout
            latents = mean + noise.to(mean.dtype) * log_std.exp()
            latents = latents * kept / (1 - config.dropout)
        logits = self.decoder(latents).float()
        loss = nn.CrossEntropyLoss()(logits.view(-1, config.vocab_size), targets)
        kl = 0.5 * (mean.pow(2) + (2 * log_std).exp() - 1 - 2 * log_std)
        kl_loss = kl.clamp_min(config.kl_clamp).sum(dim=-1).mean()
        if self.training:
            loss = config.patch_size * loss + config.kl_weight * kl_loss
        return AutoencoderOutput(loss, logits, kl_loss)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [P, D] -> the likeliest ids [P, K]."""
        logits: Tensor = self.decoder(latents)
        return logits.argmax(dim=-1)


class HeadBlock(nn.Module):
    def __init__(self, h: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(h, eps=1e-6)
        self.linears = nn.Sequential(
            nn.Linear(2 * h, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU(), nn.Linear(h, 2 * h)
        )
        self.down_proj = nn.Linear(h, h)

    def forward(self, e: Tensor, c: Tensor) -> Tensor:
        gate, up = self.linears(torch.cat((self.in_ln(e), c), dim=-1)).chunk(2, dim=-1)
        step: Tensor = self.down_proj(F.silu(gate) * up)
        return e + step


class FinalLayer(nn.Module):
    def __init__(self, h: int, latent_size: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(h, eps=1e-6)
        self.linears = nn.Sequential(nn.Linear(h, h), nn.SiLU(), nn.Linear(h, latent_size))

    def forward(self, e: Tensor) -> Tensor:
        latent: Tensor = self.linears(self.in_ln(e))
        return latent


class Head(nn.Module):
    """Hidden states [N, *, H], one a sample, and noise [N, *, noise] -> samples [N, *, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        h = config.lm_hidden_size
        self.noise_embd = nn.Linear(config.noise_size, h)
        self.hidden_embd = nn.Linear(h, h)
        self.norm_noise = nn.LayerNorm(h, eps=1e-6)
        self.norm_hidden = nn.LayerNorm(h, eps=1e-6)
        self.mlp_blocks = nn.ModuleList(HeadBlock(h) for _ in range(config.num_blocks))
        self.final_layer = FinalLayer(h, config.latent_size)

    def forward(self, hidden: Tensor, noise: Tensor) -> Tensor:
        e = self.norm_noise(self.noise_embd(noise))
        c = self.norm_hidden(self.hidden_embd(hidden))
        for block in self.mlp_blocks:
            e = block(e, c)
        latent: Tensor = self.final_layer(e)
        return latent


class EnergyTransformer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        h = config.lm_hidden_size
        self.transformer = LlamaModel(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=h,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                rms_norm_eps=1e-6,
            )
        )
        self.embed_proj = nn.Sequential(
            nn.Linear(config.patch_size * h, 2 * h),
            nn.SiLU(),
            nn.Linear(2 * h, h),
            nn.LayerNorm(h, eps=1e-6),
        )
        self.mlp_generator = Head(config)
        self.ae_model = Autoencoder(config).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> EnergyTransformer:
        super().train(mode)
        self.ae_model.eval()
        return self

    def hidden_states(self, patches: Tensor) -> Tensor:
        """ids [B, n, K] -> [B, n, H]"""
        embedded = self.embed_proj(self.transformer.embed_tokens(patches).flatten(-2))
        hidden: Tensor = self.transformer(inputs_embeds=embedded).last_hidden_state
        return hidden

    def energy_score(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """Samples [N, *, D] against draws of the posterior: [*]"""
        num_samples = x.shape[0]
        noise = torch.randn(self.config.num_targets, *mean.shape).to(mean.dtype)
        y = mean + noise * log_std.exp()
        beta = self.config.beta
        between = (x.unsqueeze(0) - x.unsqueeze(1)).norm(dim=-1).pow(beta).sum(dim=(0, 1))
        to_targets = (x.unsqueeze(1) - y.unsqueeze(0)).norm(dim=-1).pow(beta).mean(dim=(0, 1))
        return between / (num_samples * (num_samples - 1)) - 2 * to_targets

    def sample(self, hidden: Tensor, num_samples: int) -> Tensor:
        repeated = hidden.unsqueeze(0).repeat(num_samples, *[1] * hidden.dim())
        noise = torch.rand(*repeated.shape[:-1], self.config.noise_size) - 0.5
        samples: Tensor = self.mlp_generator(repeated, noise.to(hidden.dtype))
        return samples

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, L] -> the energy loss."""
        patches = input_ids.unflatten(1, (-1, self.config.patch_size))
        samples = self.sample(self.hidden_states(patches[:, :-1]), self.config.num_samples)
        with torch.no_grad():
            latent = self.ae_model.encoder(patches[:, 1:].flatten(0, 1))
        mean, log_std = latent.unflatten(0, samples.shape[1:3]).chunk(2, dim=-1)
        return -self.energy_score(samples, mean, log_std).mean()

    def temperature_sample(self, draws: Tensor, temperature: float) -> Tensor:
        """Draws [B, N, K] -> one patch per sequence, [B, K], by a vote; 1/T an integer."""
        chosen = []
        for row in draws.tolist():
            counts = Counter(tuple(patch) for patch in row)
            for votes in range(round(1 / temperature), 0, -1):
                weights = {patch: comb(count, votes) for patch, count in counts.items()}
                if any(weights.values()):
                    break
            chosen.append(random.choices(list(weights), list(weights.values()))[0])
        return torch.tensor(chosen)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, num_patches: int, temperature: float, n: int) -> Tensor:
        """Continue prompts of whole patches [B, L] by some patches, from n candidates each."""
        patch_size = self.config.patch_size
        for _ in range(num_patches):
            hidden = self.hidden_states(input_ids.unflatten(1, (-1, patch_size)))[:, -1]
            latents = self.sample(hidden, n)
            ids = self.ae_model.decode(latents.flatten(0, 1))
            draws = ids.unflatten(0, latents.shape[:2]).transpose(0, 1)
            input_ids = torch.cat((input_ids, self.temperature_sample(draws, temperature)), dim=1)
        return input_ids


def perturb(model: nn.Module) -> None:
    """Move every weight off its special value (zero biases, unit norms)."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
