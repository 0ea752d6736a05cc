"""The autoencoder: K tokens to one continuous latent and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from calm_kernels import _checks
from calm_kernels.models.checkpoint import (
    Folder,
    checked_folder,
    load_strictly,
    read_config,
    read_weights,
)
from calm_kernels.models.configuration import AutoencoderConfig
from calm_kernels.models.initialization import CalmPreTrainedModel
from calm_kernels.models.inputs import IGNORE_INDEX, check_ids, real_tokens, to_patches
from calm_kernels.nn.linear_cross_entropy import LinearCrossEntropyLoss
from calm_kernels.nn.patch_codec import PatchDecoder, PatchEncoder
from calm_kernels.ops.random import philox_normal, philox_uniform
from calm_kernels.reference.philox import Stream

LARGEST_SQUEEZED_TABLES = 2**26
"""Most entries of the folded encoder's K*V*H tables; beyond it the V*H table serves."""


@dataclass
class AutoencoderOutput(ModelOutput):
    """What :meth:`Autoencoder.forward` returns.

    Attributes:
        loss: scalar; what training minimises, or the mean token loss in evaluation.
        token_loss: mean cross entropy of the tokens that count.
        kl_loss: mean over patches of the clamped KL divergence from the standard normal.
        token_accuracy: share of the tokens that count whose logit is the largest; in training mode
            of noisy latents.
        mean, log_std: the posterior, each [B, L/K, D].
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    kl_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    mean: Tensor | None = None
    log_std: Tensor | None = None


class Autoencoder(CalmPreTrainedModel):
    """Codes each patch of K tokens on its own: no attention, no position.

    The output weight ``decoder.lm_head_weight`` is the embedding ``encoder.embed_tokens.weight``.

    Source: arXiv 2510.27688, section 2.
    """

    config_class = AutoencoderConfig
    config: AutoencoderConfig
    supports_gradient_checkpointing = False
    _tied_weights_keys = {  # noqa: RUF012  (transformers reads it as a plain attribute)
        "decoder.lm_head_weight": "encoder.embed_tokens.weight"
    }

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        sizes = (
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size,
            config.latent_size,
            config.patch_size,
        )
        dropout = config.ae_dropout if config.token_dropout is None else config.token_dropout
        self.encoder = PatchEncoder(
            *sizes, config.num_encoder_layers, token_dropout=dropout, eps=config.rms_norm_eps
        )
        self.decoder = PatchDecoder(*sizes, config.num_decoder_layers, eps=config.rms_norm_eps)
        self.cross_entropy = LinearCrossEntropyLoss(drop_mass=config.drop_mass, return_info=True)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Folder, **kwargs: Any
    ) -> Autoencoder:
        """Load a checkpoint folder strictly; the model is in evaluation mode.

        Args:
            folder: with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, which
                may hold both names of the tied weight or one.
            kwargs: as of ``PreTrainedModel.from_pretrained``: ``dtype``, ``device_map``, ...

        Raises:
            FileNotFoundError: no such folder, or no checkpoint in it.
            ValueError: the file is damaged, or weights are missing, unexpected or misshapen.
        """
        path = checked_folder(folder)
        config = kwargs.pop("config", None) or read_config(AutoencoderConfig, path)
        return load_strictly(cls, config, read_weights(path), path, **kwargs)

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of each patch.

        Args:
            input_ids: token ids [P, K], or [B, L] with L a larger multiple of K.

        Returns:
            (mean, log_std), each [P, D] or [B, L/K, D].

        Raises:
            TypeError, ValueError: wrong dtype or shape, an id outside the vocabulary.
        """
        patch_size = self.config.patch_size
        patches = to_patches(input_ids, None, patch_size, self.config.vocab_size)
        mean, log_std = self.encoder(patches.flatten(0, 1))
        if input_ids.shape[1] == patch_size:
            return mean, log_std
        shape = patches.shape[:2]
        return mean.unflatten(0, shape), log_std.unflatten(0, shape)

    def decode(self, latents: Tensor) -> Tensor:
        """The most likely tokens of each latent, [*, D] -> int64 [*, K], without logits."""
        flat = self._flat_latents(latents)
        return self.decoder.decode(flat).reshape(*latents.shape[:-1], -1)

    def decode_logits(self, latents: Tensor) -> Tensor:
        """Logits of each latent's tokens, [*, D] -> [*, K, V]."""
        logits: Tensor = self.decoder(self._flat_latents(latents))
        return logits.reshape(*latents.shape[:-1], *logits.shape[1:])

    def fold(self) -> Autoencoder:
        """Give the encoder its lookup tables, or renew them; for weights that stay put.

        Compiled code renews none: there, tables that became stale raise when they are used.
        """
        if self.encoder.folded is not None and torch.compiler.is_compiling():
            return self
        if self.encoder.folded is None or self.encoder.is_stale():
            config = self.config
            entries = config.patch_size * config.vocab_size * config.hidden_size
            self.encoder.fold("squeezed" if entries <= LARGEST_SQUEEZED_TABLES else "table")
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        seed: int | Tensor | None = None,
        first_sequence: int = 0,
    ) -> AutoencoderOutput:
        """Losses of reconstructing tokens.

        Training mode: tokens are dropped from the input (replaced by id 0), the latent is drawn
        from the posterior and thinned by inverted dropout, and the loss is
        K * token_loss + kl_weight * kl_loss. Evaluation mode: the latent is the posterior's mean,
        the loss is token_loss.

        Args:
            input_ids: int64 or int32 token ids [B, L], L a multiple of K.
            labels: the tokens to reconstruct, [B, L]; -100 and pad tokens count for nothing;
                ``input_ids`` itself if None.
            seed: of the dropouts and the noise: int, int64 tensor of one element, or None to draw
                one from torch's generator.
            first_sequence: where the sequences begin in a larger batch with one seed: parts of a
                batch, computed apart, see the noise that the whole would.

        Raises:
            TypeError, ValueError: wrong dtype or shape, empty batch, L not a multiple of K, an id
                outside the vocabulary.
        """
        config = self.config
        patches = to_patches(input_ids, labels, config.patch_size, config.vocab_size)
        batch = patches.shape[:2]
        real = real_tokens(input_ids, labels, config.pad_token_id)
        targets = input_ids if labels is None else labels
        if real is not None:
            targets = targets.masked_fill(~real, IGNORE_INDEX)
            check_ids("labels", targets.clamp_min(0), config.vocab_size)
        targets = targets.reshape(-1)

        seed = _checks.seed_tensor(seed, input_ids.device)
        first_patch = first_sequence * batch[1]
        mean, log_std = self.encoder(patches.flatten(0, 1), seed, first_patch)
        latents = self._noisy(mean, log_std, seed, first_patch) if self.training else mean
        hidden = self.decoder.hidden_states(latents)
        token_loss, info = self.cross_entropy(hidden, self.decoder.lm_head_weight, targets)
        kl_loss = self._kl(mean, log_std, targets if real is not None else None)
        loss = token_loss
        if self.training:
            loss = config.patch_size * token_loss + config.kl_weight * kl_loss
        return AutoencoderOutput(
            loss=loss,
            token_loss=token_loss,
            kl_loss=kl_loss,
            token_accuracy=info.correct.sum() / info.num_rows,
            mean=mean.unflatten(0, batch),
            log_std=log_std.unflatten(0, batch),
        )

    def _noisy(self, mean: Tensor, log_std: Tensor, seed: Tensor, first_patch: int = 0) -> Tensor:
        """A draw from the posterior, thinned: [P, D].

        Philox stream LATENT, row = patch, from ``first_patch`` on: elements 0..D-1 are the normals
        of the draw; the uniforms of the dropout start at the first multiple of 4 from D on, so they
        share no word.
        """
        num_patches, latent_size = mean.shape
        rows = torch.arange(first_patch, first_patch + num_patches, device=mean.device)
        noise = philox_normal(seed, rows, latent_size, Stream.LATENT).to(mean.dtype)
        latents = mean + noise * log_std.exp()
        if (rate := self.config.ae_dropout) == 0.0:
            return latents
        first = latent_size + -latent_size % 4
        kept = philox_uniform(seed, rows, latent_size, Stream.LATENT, first=first) >= rate
        return latents * kept.to(mean.dtype).mul_(1.0 / (1.0 - rate))

    def _kl(self, mean: Tensor, log_std: Tensor, targets: Tensor | None) -> Tensor:
        """Clamped KL, averaged over the patches that have a token to reconstruct."""
        mean, log_std = mean.float(), log_std.float()
        per_dimension = 0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0) - log_std
        kl = per_dimension.clamp_min(self.config.kl_clamp).sum(dim=-1)
        if targets is None:
            return kl.mean()
        used = (targets != IGNORE_INDEX).reshape(len(kl), -1).any(dim=-1)
        return (kl * used).sum() / used.sum()

    def _flat_latents(self, latents: Tensor) -> Tensor:
        _checks.tensor("latents", latents, _checks.FLOAT_DTYPES, ("*", self.config.latent_size))
        return latents.reshape(-1, self.config.latent_size)
