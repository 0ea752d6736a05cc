"""The autoregressive baseline: a Llama language model scored by the same BrierLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.utils.generic import ModelOutput

from calm_kernels import _checks
from calm_kernels.models.brier import NGRAMS, BrierScores, num_starts, select
from calm_kernels.models.checkpoint import (
    Folder,
    checked_folder,
    load_strictly,
    read_config,
    read_weights,
)
from calm_kernels.models.configuration import BaselineConfig
from calm_kernels.models.initialization import Backbone, CalmPreTrainedModel
from calm_kernels.models.inputs import (
    IGNORE_INDEX,
    check_ids,
    check_token_batch,
    position_ids,
    real_tokens,
    to_patches,
    whole_patches,
)
from calm_kernels.models.rollout import Rollout
from calm_kernels.models.sequences import (
    GenerationOutput,
    OnPatch,
    Sequences,
    as_int_seed,
    as_prompts,
    seed_of_step,
)
from calm_kernels.ops.linear_cross_entropy import linear_cross_entropy
from calm_kernels.ops.random import philox_uniform
from calm_kernels.reference.philox import Stream

LARGEST_PROBABILITIES = 2**24
"""Entries of the rows x V probabilities that scoring holds at once."""


@dataclass
class BaselineOutput(ModelOutput):
    """What :meth:`AutoregressiveBaseline.forward` returns.

    Attributes:
        loss: scalar, if labels were given.
        logits: [B, L, V], if they were not.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class _NextToken:
    """What scoring needs of next-token distributions, each [R]."""

    probability: Tensor
    """of a given token"""
    collision: Tensor
    """sum of squares"""
    drawn: Tensor
    """a token drawn"""
    probability_of_drawn: Tensor


class AutoregressiveBaseline(CalmPreTrainedModel):
    """A Llama language model over single tokens.

    Parameters as of ``LlamaForCausalLM``: ``model.*`` and ``lm_head.weight``.
    """

    config_class = BaselineConfig
    config: BaselineConfig
    _tied_weights_keys = {  # noqa: RUF012  (transformers reads it as a plain attribute)
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Folder, **kwargs: Any
    ) -> AutoregressiveBaseline:
        """Load a checkpoint folder strictly; errors as of :meth:`Autoencoder.from_pretrained`."""
        path = checked_folder(folder)
        config = kwargs.pop("config", None) or read_config(BaselineConfig, path)
        return load_strictly(cls, config, read_weights(path), path, **kwargs)

    def hidden_states(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the backbone on token ids [B, L] -> [B, L, H]; other arguments as of the
        energy transformer's."""
        outputs = self.model(
            input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> BaselineOutput:
        """Mean cross entropy of every token given those before it, or logits without labels.

        Args:
            input_ids: int64 or int32 token ids [B, L]; L at least 2 with labels.
            labels: [B, L]; position i is the target of what precedes it; -100 and pad tokens count
                for nothing.
            attention_mask: [B, L], nonzero for tokens that may be attended to.

        Raises:
            TypeError, ValueError: wrong dtype or shape, empty batch, an id outside the vocabulary.
        """
        check_token_batch(input_ids, labels, self.config.vocab_size)
        positions = None if attention_mask is None else position_ids(attention_mask)
        if labels is None:
            hidden = self.hidden_states(input_ids, attention_mask, positions)
            return BaselineOutput(logits=self.lm_head(hidden))
        if input_ids.shape[1] < 2:
            raise ValueError("input_ids: expected at least two tokens: one predicts the other")
        real = real_tokens(input_ids, labels, self.config.pad_token_id)
        assert real is not None
        real = real[:, 1:]
        if attention_mask is not None:  # also that of the token that predicts
            real = real & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
        targets = labels[:, 1:].masked_fill(~real, IGNORE_INDEX)
        check_ids("labels", targets.clamp_min(0), self.config.vocab_size)
        hidden = self.hidden_states(
            input_ids[:, :-1],
            None if attention_mask is None else attention_mask[:, :-1],
            None if positions is None else positions[:, :-1],
        )
        loss = linear_cross_entropy(
            hidden, self.lm_head.weight, targets, drop_mass=self.config.drop_mass
        )
        return BaselineOutput(loss=loss)

    @torch.no_grad()
    def evaluate_brier(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_samples: int = 8,
        seed: int | Tensor | None = None,
        stride: int | None = None,
    ) -> BrierScores:
        """Unbiased Brier-1..4 at the positions where patch models are scored.

        An n-gram starts at each multiple of ``stride`` but 0. Its likelihood is exact.
        sum_x P(x)^2 is the mean over continuations x_1..x_{n-1} of their probability times the sum
        of squares of the last token's distribution, in closed form: exact for n = 1, sampled
        beyond.

        Args:
            input_ids, labels: as of :meth:`EnergyTransformer.forward`, with L a multiple of
                the stride.
            num_samples: continuations drawn per position, at least 1.
            seed: int, int64 tensor of one element, or None to draw one from torch's generator.
            stride: at least 1; ``config.patch_size`` if None.

        Raises:
            TypeError, ValueError: wrong dtype or shape, empty batch, too few tokens, an id outside
                the vocabulary, an attention implementation other than ``"sdpa"`` and ``"eager"``.

        Source: arXiv 2510.27688, section 4; the closed form is this package's.
        """
        config = self.config
        stride = config.patch_size if stride is None else stride
        _checks.at_least("stride", stride, 1)
        patches = to_patches(input_ids, labels, stride, config.vocab_size)
        starts = num_starts(patches.shape[1], stride)
        _checks.at_least("num_samples", num_samples, 1)
        base_seed = as_int_seed(seed)

        cache = DynamicCache(config=config)
        hidden = self.hidden_states(input_ids[:, :-1], cache=cache)
        visible = torch.arange(1, starts + 1, device=input_ids.device) * stride
        rollout = Rollout(self.hidden_states, cache, visible, config)

        likelihood = self._likelihoods(hidden, input_ids, visible)
        collision = torch.zeros_like(likelihood)
        first_hidden = hidden[:, visible - 1]
        for sample in range(num_samples):
            collision += self._collisions(first_hidden, rollout, seed_of_step(base_seed, sample))
            rollout.rewind()
        scores = 2.0 * likelihood - collision / num_samples
        real = real_tokens(input_ids, labels, config.pad_token_id)
        return select(scores, whole_patches(real, stride), stride)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int | Tensor | None = None,
        on_patch: OnPatch | None = None,
    ) -> GenerationOutput:
        """Continue prompts token by token, by sampling at a temperature.

        Args:
            input_ids: token ids [B, L], padded on either side, or one sequence of ids per prompt;
                none may be empty.
            attention_mask: [B, L], nonzero for real tokens; if None, pad ids are padding.
            max_new_tokens: tokens to generate per sequence, at least 1.
            temperature: T > 0 that the logits are divided by.
            seed: int, int64 tensor of one element, or None to draw one from torch's generator.
            on_patch: called after every step with each sequence's new tokens.

        Raises:
            TypeError, ValueError: wrong dtype or shape, no prompt or an empty one, an id outside
                the vocabulary, a temperature that is not positive.
        """
        prompts = as_prompts(input_ids, attention_mask, self.config)
        if not all(prompts):
            raise ValueError("input_ids: expected at least one token in every prompt")
        if not temperature > 0.0:
            raise ValueError(f"temperature: expected a positive number; got {temperature}")
        sequences = Sequences(prompts, max_new_tokens, self.config)
        device, base_seed = self.lm_head.weight.device, as_int_seed(seed)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        cache = DynamicCache(config=self.config)
        rows = torch.arange(len(prompts), device=device)
        positions, step = position_ids(mask), 0
        while True:
            hidden = self.hidden_states(ids, mask, positions, cache)[:, -1]
            probabilities = (self.lm_head(hidden).float() / temperature).softmax(dim=-1)
            tokens = _draw_tokens(probabilities, rows, seed_of_step(base_seed, step))
            chosen = tokens.tolist()
            kept = sequences.append({b: [chosen[b]] for b in sequences.active})
            if on_patch is not None:
                on_patch(kept)
            if not sequences.active:
                return sequences.output(device)
            ids, mask = tokens.unsqueeze(1), torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            positions, step = position_ids(mask)[:, -1:], step + 1

    def _likelihoods(self, hidden: Tensor, input_ids: Tensor, starts: Tensor) -> Tensor:
        """P of the first 1..4 tokens from each start on, given the true text: [B, m, 4]."""
        tokens = starts.unsqueeze(1) + torch.arange(NGRAMS, device=starts.device)
        needed, where = tokens.unique(return_inverse=True)
        before = hidden[:, needed - 1]
        probability = self._next_token(before, input_ids[:, needed]).probability
        return probability[:, where].cumprod(dim=-1)

    def _collisions(self, hidden: Tensor, rollout: Rollout, seed: int) -> Tensor:
        """Estimates of sum_x P(x)^2 over n-grams from one continuation per start: [B, m, 4]."""
        following = self._next_token(hidden, seed=seed_of_step(seed, 0))
        collisions, weight = [following.collision], torch.ones_like(following.collision)
        for n in range(1, NGRAMS):
            weight = weight * following.probability_of_drawn
            hidden = rollout.extend(following.drawn)
            following = self._next_token(hidden, seed=seed_of_step(seed, n))
            collisions.append(weight * following.collision)
        return torch.stack(collisions, dim=-1)

    def _next_token(
        self, hidden: Tensor, tokens: Tensor | None = None, seed: int | None = None
    ) -> _NextToken:
        """Figures of the distributions after hidden states [B, m, H], a few rows at a time."""
        shape, rows = hidden.shape[:-1], hidden.flatten(0, 1)
        asked = torch.zeros_like(rows[:, 0], dtype=torch.int64) if tokens is None else tokens
        asked = asked.reshape(-1, 1).long()
        numbers = torch.arange(len(rows), device=rows.device)
        at_once = max(1, LARGEST_PROBABILITIES // self.config.vocab_size)
        parts = []
        for part in numbers.split(at_once):
            p = F.linear(rows[part], self.lm_head.weight).float().softmax(dim=-1)
            drawn = asked[part, 0] if seed is None else _draw_tokens(p, part, seed)
            figures = p.gather(1, asked[part]), p.square().sum(dim=-1, keepdim=True)
            parts.append((*figures, drawn.unsqueeze(1), p.gather(1, drawn.unsqueeze(1))))
        columns = (torch.cat(column).reshape(shape) for column in zip(*parts, strict=True))
        return _NextToken(*columns)


def _draw_tokens(probabilities: Tensor, rows: Tensor, seed: int) -> Tensor:
    """A token from each distribution [R, V], by inversion; the number of a row is its Philox row.

    The stream is that of the choice among candidates, which token models do not make otherwise.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    u = philox_uniform(seed, rows, 1, Stream.BATCH_TEMPERATURE).double()
    tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return tokens.squeeze(1).clamp_max(probabilities.shape[1] - 1)
