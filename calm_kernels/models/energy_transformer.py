"""The CALM language model: a Llama backbone over patches with a generative head."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils.generic import ModelOutput

from calm_kernels import _checks
from calm_kernels.models import brier, generation
from calm_kernels.models.autoencoder import Autoencoder
from calm_kernels.models.brier import BrierScores
from calm_kernels.models.checkpoint import (
    Folder,
    checked_folder,
    load_strictly,
    read_config,
    read_weights,
)
from calm_kernels.models.configuration import AutoencoderConfig, CalmConfig, as_plain_dict
from calm_kernels.models.heads import make_head, training_loss
from calm_kernels.models.initialization import Backbone, CalmPreTrainedModel
from calm_kernels.models.inputs import position_ids, real_tokens, to_patches, whole_patches
from calm_kernels.models.patch_embedding import project_patches
from calm_kernels.models.sequences import GenerationOutput, OnPatch
from calm_kernels.nn.energy import EnergyLoss

_AUTOENCODER = "ae_model."
_EMBEDDING_NORM_EPS = 1e-6
_log = logging.getLogger("calm_kernels")


@dataclass
class EnergyTransformerOutput(ModelOutput):
    """What :meth:`EnergyTransformer.forward` returns.

    Attributes:
        loss: scalar float32, averaged over the patches that count: minus the energy score, or the
            loss of the flow or diffusion head.
    """

    loss: Tensor | None = None


class EnergyTransformer(CalmPreTrainedModel):
    """Predicts the latent of the next patch by drawing samples of it.

    Submodules: ``embed_proj`` (K token embeddings to one input vector), ``transformer`` (Llama;
    ``transformer.embed_tokens`` is this model's token table), ``mlp_generator`` (the head)
    and ``ae_model`` (the autoencoder: frozen, always in evaluation mode, saved with the rest).

    Args:
        config: sizes; ``autoencoder_config`` describes the autoencoder if none is given.
        autoencoder: a trained autoencoder; its weights are copied. Without one, the folder
            ``config.ae_path`` is loaded if it exists, else ``ae_model`` starts untrained from
            ``config.autoencoder_config``.

    Raises:
        ValueError: no autoencoder to be had, or one whose K, D or vocabulary does not fit.

    Source: arXiv 2510.27688, section 3.
    """

    config_class = CalmConfig
    config: CalmConfig

    def __init__(self, config: CalmConfig, autoencoder: Autoencoder | None = None) -> None:
        if autoencoder is None and config.autoencoder_config is None:
            autoencoder = _autoencoder_of_path(config)
        if autoencoder is not None:
            config.autoencoder_config = as_plain_dict(autoencoder.config)
        super().__init__(config)
        hidden_size = config.hidden_size
        self.embed_proj = nn.Sequential(
            nn.Linear(config.patch_size * hidden_size, 2 * hidden_size),
            nn.SiLU(),
            nn.Linear(2 * hidden_size, hidden_size),
            nn.LayerNorm(hidden_size, eps=_EMBEDDING_NORM_EPS),
        )
        self.transformer = Backbone(config)
        self.mlp_generator = make_head(config)
        if autoencoder is None:
            self.ae_model = Autoencoder(AutoencoderConfig(**(config.autoencoder_config or {})))
        else:
            self.ae_model = copy.deepcopy(autoencoder)
            self.ae_model.encoder.unfold()
        _check_fit(config, self.ae_model.config)
        estimator: Any = config.estimator
        self.energy_loss = EnergyLoss(config.alpha, estimator, config.num_targets)
        self._freeze_autoencoder()
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Folder, autoencoder: Folder | Autoencoder | None = None, **kwargs: Any
    ) -> EnergyTransformer:
        """Load a checkpoint folder strictly; the model is in evaluation mode.

        Args:
            folder: with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``.
            autoencoder: the autoencoder, or its folder. Needed if the checkpoint does not carry
                its own (this package's checkpoints do); replaces the one carried, with a warning
                if they differ.
            kwargs: as of ``PreTrainedModel.from_pretrained``: ``dtype``, ``device_map``, ...

        Raises:
            FileNotFoundError: a folder is missing, or no checkpoint is in it.
            ValueError: a file is damaged; weights are missing, unexpected or misshapen; the
                autoencoder is unknown or does not fit.
        """
        path = checked_folder(folder)
        config = kwargs.pop("config", None) or read_config(CalmConfig, path)
        weights = read_weights(path)
        if autoencoder is None:
            autoencoder = _missing_autoencoder(config, weights, path)
        if autoencoder is not None:
            if not isinstance(autoencoder, Autoencoder):
                autoencoder = Autoencoder.from_pretrained(autoencoder)
            weights = _with_autoencoder(weights, autoencoder)
            config = copy.deepcopy(config)
            config.autoencoder_config = as_plain_dict(autoencoder.config)
        model = load_strictly(cls, config, weights, path, **kwargs)
        model._freeze_autoencoder()
        return model

    def train(self, mode: bool = True) -> EnergyTransformer:
        """Training mode, except for the frozen autoencoder."""
        super().train(mode)
        self.ae_model.eval()  # type: ignore[no-untyped-call]
        return self

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Token ids [B, n, K] -> the backbone's input vectors [B, n, H]."""
        return project_patches(patches, self.transformer.embed_tokens, self.embed_proj)

    def hidden_states(
        self,
        patches: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the backbone: position i of the result knows patches 0..i and predicts i+1.

        Args:
            patches: token ids [B, n, K].
            mask: which patches may be attended to, [B, cached + n], or [B, 1, n, cached + n].
            positions: rotary position of each patch, [B, n]; counted from what is cached if None.
            cache: keys and values of earlier patches, extended in place.

        Returns:
            [B, n, H]
        """
        outputs = self.transformer(
            inputs_embeds=self.embed_patches(patches),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    @torch.no_grad()
    def encode_targets(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The frozen autoencoder's (mean, log_std) of patches [B, n, K], each [B, n, D]."""
        mean, log_std = self.ae_model.fold().encoder(patches.reshape(-1, self.config.patch_size))
        return mean.unflatten(0, patches.shape[:-1]), log_std.unflatten(0, patches.shape[:-1])

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        first_sequence: int = 0,
    ) -> EnergyTransformerOutput:
        """The loss of predicting every patch from those before it.

        Args:
            input_ids: int64 or int32 token ids [B, L], L a multiple of K and at least 2 K.
            labels: [B, L]; a patch counts only if none of its labels is -100 and none of its
                tokens is the pad id. Values other than -100 are not read.
            attention_mask: [B, L], nonzero for real tokens; a patch is attended to, and counts,
                only if all of its tokens are real. Needed for padding on the left; padding on the
                right is never attended to by a patch that counts.
            seed: of the head's noise and the Monte Carlo targets: int, int64 tensor of one
                element, or None to draw one from torch's generator.
            first_sequence: where the sequences begin in a larger batch with one seed: parts of a
                batch, computed apart, see the noise that the whole would.

        Raises:
            TypeError, ValueError: wrong dtype or shape, empty batch, L not a multiple of K or less
                than two patches, an id outside the vocabulary.
        """
        patches = self._checked_patches(input_ids, labels)
        counted, context = self._counted(input_ids, labels, attention_mask)
        hidden = self.hidden_states(
            patches[:, :-1], context, None if context is None else position_ids(context)
        )
        mean, log_std = self.encode_targets(patches[:, 1:])
        seed = _checks.seed_tensor(seed, input_ids.device)
        loss = training_loss(
            self.mlp_generator,
            self.energy_loss,
            self.config.num_samples,
            hidden,
            mean,
            log_std,
            counted,
            seed,
            first_sequence * hidden.shape[1],
        )
        return EnergyTransformerOutput(loss=loss)

    @torch.no_grad()
    def evaluate_brier(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_samples: int = 8,
        seed: int | Tensor | None = None,
        stride: int | None = None,
    ) -> BrierScores:
        """Unbiased Brier-1..4 of the tokens after every patch.

        An n-gram starts at each patch but the first. With K >= 4 it is the first n tokens of the
        patch. With K < 4 it runs over ceil(4/K) patches: their likelihood is a product of
        independent estimates under the true text, and the chance that two continuations coincide
        comes from following one continuation, whose own tokens the model reads.

        Args:
            input_ids, labels: as of :meth:`forward`; a position counts if all patches of its
                n-grams do.
            num_samples: S >= 2 head samples for each position and patch.
            seed: int, int64 tensor of one element, or None to draw one from torch's generator.
            stride: n-grams start at its multiples, itself a multiple of K; K if None. Models of
                several K are scored on the same positions with a common multiple.

        Raises:
            TypeError, ValueError: as :meth:`forward`; fewer than two samples; a stride that is no
                multiple of K; with K < 4, an attention implementation other than ``"sdpa"`` and
                ``"eager"``.

        Source: arXiv 2510.27688, section 4; the U-statistics and K < 4 are this package's.
        """
        patches = self._checked_patches(input_ids, labels)
        counted = self._whole_patches(input_ids, labels)
        _checks.at_least("num_samples", num_samples, 2, " draws (a pair is needed)")
        return brier.score_patches(self, patches, counted, num_samples, seed, stride)

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float | Tensor = 1.0,
        num_candidates: int = 200,
        sampler: Literal["batch", "exact"] = "batch",
        seed: int | Tensor | None = None,
        max_draws: int = generation.DEFAULT_MAX_DRAWS,
        on_patch: OnPatch | None = None,
    ) -> GenerationOutput:
        """Continue prompts, patch by patch; see :func:`calm_kernels.models.generation.generate`."""
        return generation.generate(
            self,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            num_candidates=num_candidates,
            sampler=sampler,
            seed=seed,
            max_draws=max_draws,
            on_patch=on_patch,
        )

    def _checked_patches(self, input_ids: Tensor, labels: Tensor | None) -> Tensor:
        config = self.config
        patches = to_patches(input_ids, labels, config.patch_size, config.vocab_size)
        if patches.shape[1] < 2:
            raise ValueError(
                f"input_ids: expected at least two patches, {2 * config.patch_size} tokens, so "
                f"that one predicts the other; got {input_ids.shape[1]} tokens"
            )
        return patches

    def _whole_patches(self, input_ids: Tensor, labels: Tensor | None) -> Tensor | None:
        """Which patches have only real tokens, bool [B, n], or None for all."""
        real = real_tokens(input_ids, labels, self.config.pad_token_id)
        return whole_patches(real, self.config.patch_size)

    def _counted(
        self, input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which of patches 1.. count as targets, and which of patches ..n-2 may be attended to.

        Each bool [B, n-1], or None for all.
        """
        counted = self._whole_patches(input_ids, labels)
        counted = None if counted is None else counted[:, 1:]
        if attention_mask is None:
            return counted, None
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected shape {list(input_ids.shape)}, that of input_ids; "
                f"got {list(attention_mask.shape)}"
            )
        visible = whole_patches(attention_mask != 0, self.config.patch_size)
        assert visible is not None
        # What an invisible patch predicts is predicted from nothing.
        predicted = visible[:, 1:] & visible[:, :-1]
        return (predicted if counted is None else counted & predicted), visible[:, :-1]

    def _freeze_autoencoder(self) -> None:
        self.ae_model.requires_grad_(False)
        self.ae_model.eval()  # type: ignore[no-untyped-call]


Weights = dict[str, Tensor]


def _autoencoder_of_path(config: CalmConfig) -> Autoencoder:
    if config.ae_path is not None and Path(config.ae_path).is_dir():
        return Autoencoder.from_pretrained(config.ae_path)
    where = "" if config.ae_path is None else f" (there is no folder {config.ae_path!r})"
    raise ValueError(
        f"the language model needs its autoencoder{where}: pass autoencoder=, a trained "
        "Autoencoder or its folder"
    )


def _missing_autoencoder(config: CalmConfig, weights: Weights, path: Path) -> Autoencoder | None:
    """The autoencoder at ``config.ae_path``, if the checkpoint does not carry its own."""
    carried = any(name.startswith(_AUTOENCODER) for name in weights)
    if carried and config.autoencoder_config is not None:
        return None
    try:
        return _autoencoder_of_path(config)
    except ValueError as error:
        lacks = "configuration" if carried else "weights"
        raise ValueError(f"{str(path)!r} lacks its autoencoder's {lacks}: {error}") from error


def _with_autoencoder(weights: Weights, autoencoder: Autoencoder) -> Weights:
    """The weights with ``ae_model.*`` replaced by the given autoencoder's."""
    given = {_AUTOENCODER + name: value for name, value in autoencoder.state_dict().items()}
    for name, value in weights.items():
        if name in given and not _agree(value, given[name]):
            _log.warning(
                "the checkpoint was trained with another autoencoder than the given one "
                "(%s differs); the given one is used",
                name,
            )
            break
    others = {n: value for n, value in weights.items() if not n.startswith(_AUTOENCODER)}
    return {**others, **given}


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding to the coarser of their dtypes."""
    if a.shape != b.shape:
        return False
    coarser = max((a.dtype, b.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(a.cpu().to(coarser), b.cpu().to(coarser))


def _check_fit(config: CalmConfig, autoencoder: AutoencoderConfig) -> None:
    for name in ("patch_size", "latent_size", "vocab_size"):
        own, other = getattr(config, name), getattr(autoencoder, name)
        if own != other:
            raise ValueError(
                f"{name}: the language model has {own}, its autoencoder {other}; they must agree"
            )
