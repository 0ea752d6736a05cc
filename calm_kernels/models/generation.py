"""Generation with the energy transformer: draw patches, vote, feed the chosen tokens back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from calm_kernels import _checks
from calm_kernels.models.inputs import position_ids
from calm_kernels.models.patch_sampler import SAMPLERS, Choice, PatchSampler
from calm_kernels.models.sequences import (
    GenerationOutput,
    OnPatch,
    Sequences,
    as_int_seed,
    as_prompts,
    seed_of_step,
)

if TYPE_CHECKING:
    from calm_kernels.models.energy_transformer import EnergyTransformer

DEFAULT_MAX_DRAWS = 8192


@torch.no_grad()
def generate(
    model: EnergyTransformer,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float | Tensor = 1.0,
    num_candidates: int = 200,
    sampler: Literal["batch", "exact"] = "batch",
    seed: int | Tensor | None = None,
    max_draws: int = DEFAULT_MAX_DRAWS,
    on_patch: OnPatch | None = None,
) -> GenerationOutput:
    """Continue prompts, patch by patch.

    A prompt that ends inside a patch is not filled up with padding: its whole patches are the
    context, and the patch it ends in is drawn *given* the tokens that are there, by keeping only
    draws that begin with them. If none of ``max_draws`` does, patches are cut anew so that one
    ends where the prompt ends, the context loses the less than K tokens in front of the first
    whole patch, and ``prompt_matched`` says so: the answer is then that of a text that began
    later. A prompt of less than one patch gets a context of one patch of begin (or end) tokens,
    the boundary of a document; cut anew, they fill up its only patch in front.

    An end token stops its sequence; tokens after it in its patch are dropped.

    Args:
        model: the language model.
        input_ids: token ids [B, L], padded on either side, or one sequence of ids per prompt.
        attention_mask: [B, L], nonzero for real tokens; if None, pad ids are padding.
        max_new_tokens: tokens to generate per sequence, at least 1.
        temperature: T in (0, 1], or a float32 or float64 tensor [B]. At T = 1 one draw is enough.
        num_candidates: draws that vote with ``sampler="batch"``.
        sampler: ``"batch"`` (fixed cost, biased at finite ``num_candidates``) or ``"exact"``.
        seed: int, int64 tensor of one element, or None to draw one from torch's generator. The
            same seed, prompts and arguments give the same tokens.
        max_draws: most draws per patch of the exact sampler, after which a vote among
            ``num_candidates`` decides and ``accepted`` says so; and of the search for draws that
            continue a prompt.
        on_patch: called after every step with each sequence's new tokens.

    Raises:
        TypeError, ValueError: wrong dtype or shape, no prompt, an id outside the vocabulary, an
            argument outside its range, a prompt of less than a patch where the configuration names
            neither begin nor end token.

    Source: arXiv 2510.27688, sections 3 and 5.
    """
    config = model.config
    prompts = as_prompts(input_ids, attention_mask, config)
    sequences = Sequences(prompts, max_new_tokens, config)
    temperatures = _temperatures(temperature, len(prompts))
    _checks.at_least("num_candidates", num_candidates, 1)
    _checks.at_least("max_draws", max_draws, 1)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}; got {sampler!r}")
    base_seed = as_int_seed(seed)

    contexts, beginnings = _split_prompts(model, prompts)
    backbone = _CachedBackbone(model, contexts)
    choices: dict[int, list[Choice]] = {b: [] for b in range(len(prompts))}
    for step in itertools.count():
        options = (seed_of_step(base_seed, step), num_candidates, max_draws, sampler)
        chosen = PatchSampler(model, backbone.hidden, *options).sample(
            sequences.active, temperatures, beginnings
        )
        unmatched = [b for b, choice in chosen.items() if not choice.matched]
        if unmatched:
            for b in unmatched:
                contexts[b] = _cut_anew(model, prompts[b])
                beginnings[b] = []
                choices[b].append(chosen[b])
            backbone = _CachedBackbone(model, contexts)
            chosen |= PatchSampler(model, backbone.hidden, *options).sample(
                unmatched, temperatures, beginnings
            )
        for b, choice in chosen.items():
            choices[b].append(choice)
        kept = sequences.append({b: c.tokens[len(beginnings[b]) :] for b, c in chosen.items()})
        if on_patch is not None:
            on_patch(kept)
        if not sequences.active:
            break
        beginnings = [[] for _ in prompts]
        backbone.feed({b: choice.tokens for b, choice in chosen.items()})
    rows = choices.values()
    return sequences.output(
        backbone.hidden.device,
        accepted=[all(choice.accepted for choice in row) for row in rows],
        prompt_matched=[all(choice.matched for choice in row) for row in rows],
        mean_draws=[sum(c.num_draws for c in row) / sum(c.matched for c in row) for row in rows],
    )


class _CachedBackbone:
    """The backbone with its keys and values, over sequences of different lengths.

    Args:
        model: the language model.
        contexts: tokens of whole patches, at least one patch per sequence. Shorter sequences are
            filled on the left with patches that are never attended to.
    """

    def __init__(self, model: EnergyTransformer, contexts: list[list[int]]) -> None:
        self._model = model
        self._device = model.transformer.embed_tokens.weight.device
        self._cache = DynamicCache(config=model.config)
        patch_size = model.config.patch_size
        lengths = [len(context) // patch_size for context in contexts]
        longest = max(lengths)
        self._mask = torch.tensor(
            [[0] * (longest - n) + [1] * n for n in lengths], device=self._device
        )
        filled = [[0] * (longest * patch_size - len(context)) + context for context in contexts]
        patches = torch.tensor(filled, device=self._device).reshape(len(filled), longest, -1)
        self.hidden = self._run(patches)
        """What the head reads to draw the next patch of each sequence, [B, H]."""

    def feed(self, tokens: dict[int, list[int]]) -> None:
        """Append a patch to each sequence; those that are not given get an idle one."""
        idle = [0] * self._model.config.patch_size
        rows = [tokens.get(b, idle) for b in range(len(self._mask))]
        self._mask = torch.cat((self._mask, torch.ones_like(self._mask[:, :1])), dim=1)
        self.hidden = self._run(torch.tensor(rows, device=self._device).unsqueeze(1))

    def _run(self, patches: Tensor) -> Tensor:
        positions = position_ids(self._mask)[:, -patches.shape[1] :]
        return self._model.hidden_states(patches, self._mask, positions, self._cache)[:, -1]


def _temperatures(temperature: float | Tensor, batch_size: int) -> Tensor:
    """One temperature per sequence, float64 [B] on the CPU, checked."""
    if isinstance(temperature, Tensor):
        _checks.tensor("temperature", temperature, (torch.float32, torch.float64), (batch_size,))
        values = temperature.cpu()
    elif isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            "temperature: expected a float or a tensor of one temperature per sequence; got "
            f"{type(temperature).__name__}"
        )
    else:
        values = torch.full((batch_size,), temperature, dtype=torch.float64)
    if not bool(((values > 0) & (values <= 1)).all()):
        raise ValueError(
            f"temperature: expected 0 < T <= 1; got {values.tolist()}; T = 1 draws from the model"
        )
    return values


def _split_prompts(
    model: EnergyTransformer, prompts: list[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Whole patches of each prompt, and the tokens of the patch it ends in."""
    patch_size = model.config.patch_size
    contexts, beginnings = [], []
    for row, prompt in enumerate(prompts):
        whole = len(prompt) - len(prompt) % patch_size
        contexts.append(prompt[:whole] or [_boundary_token(model, row)] * patch_size)
        beginnings.append(prompt[whole:])
    return contexts, beginnings


def _cut_anew(model: EnergyTransformer, prompt: list[int]) -> list[int]:
    """Whole patches, the last of which ends where a ragged prompt ends."""
    patch_size = model.config.patch_size
    if len(prompt) >= patch_size:
        return prompt[len(prompt) % patch_size :]
    return [_boundary_token(model, 0)] * (patch_size - len(prompt)) + prompt


def _boundary_token(model: EnergyTransformer, row: int) -> int:
    bos, eos = model.config.bos_token_id, model.config.eos_token_id
    token = bos if bos is not None else (eos[0] if isinstance(eos, list) else eos)
    if token is None:
        raise ValueError(
            f"input_ids: prompt {row} is shorter than a patch of {model.config.patch_size} tokens, "
            "and the configuration names no begin or end token to precede it; give a longer prompt"
        )
    return int(token)
