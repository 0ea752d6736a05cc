"""Generation with the energy transformer: draw patches, vote, feed the chosen tokens back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels.models.cached_backbone import Backbone, StaticBackbone, make_backbone
from calm_kernels.models.device_steps import DeviceSteps
from calm_kernels.models.draws import Drawer
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

_STEPS_BETWEEN_LOOKS = 8
"""Patches that a GPU draws before the host looks for ends among them."""
_WORTH_LEAVING_OUT = 0.75
"""Ended sequences are left out of the batch once no more than this share of it goes on."""


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
        on_patch: called for every step with each sequence's new tokens; on a GPU for several
            steps at a time, when the host next looks at them.

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
    sampling = _Sampling(as_int_seed(seed), num_candidates, max_draws, sampler)
    steps = _Steps(model, prompts, sequences, temperatures, sampling, on_patch)
    steps.run()
    return steps.output()


@dataclass(frozen=True)
class _Sampling:
    """How patches are chosen; as of :func:`generate`."""

    seed: int
    num_candidates: int
    max_draws: int
    sampler: str


class _Steps:
    """One call of ``generate`` under way.

    The first step is special where a prompt ends inside a patch. The others run on the device
    without the host, where the choice is a vote and the backbone allows it.
    """

    def __init__(
        self,
        model: EnergyTransformer,
        prompts: list[list[int]],
        sequences: Sequences,
        temperatures: Tensor,
        sampling: _Sampling,
        on_patch: OnPatch | None,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._sequences = sequences
        self._temperatures = temperatures
        self._sampling = sampling
        self._drawer = Drawer(model, _num_draws(temperatures, sampling.num_candidates))
        self._on_patch = on_patch
        self._most_steps = sequences.most_patches(model.config.patch_size)
        self._choices: list[list[Choice]] = [[] for _ in prompts]
        self._num_done = 0
        self._backbone: Backbone

    def run(self) -> None:
        """All steps."""
        contexts, beginnings = _split_prompts(self._model, self._prompts)
        self._backbone = make_backbone(self._model, contexts, self._most_steps)
        last = None
        if any(beginnings):
            chosen = self._sample(self._sequences.active, beginnings)
            unmatched = [b for b, choice in chosen.items() if not choice.matched]
            for b in unmatched:
                contexts[b] = _cut_anew(self._model, self._prompts[b])
                beginnings[b] = []
                self._choices[b].append(chosen[b])
            if unmatched:
                self._backbone = make_backbone(self._model, contexts, self._most_steps)
                chosen |= self._sample(unmatched, beginnings)
            last = self._take(chosen, beginnings)
        if not self._sequences.active:
            return
        votes = self._sampling.sampler == "batch" or bool((self._temperatures == 1).all())
        if votes and isinstance(self._backbone, StaticBackbone):
            self._run_on_device(self._backbone, last)
        else:
            self._run_with_host(last)

    def _sample(self, sequences: list[int], beginnings: list[list[int]]) -> dict[int, Choice]:
        how = self._sampling
        seed = seed_of_step(how.seed, self._num_done)
        sampler = PatchSampler(
            self._drawer,
            self._backbone.hidden,
            seed,
            how.num_candidates,
            how.max_draws,
            how.sampler,
        )
        return sampler.sample(sequences, self._temperatures, beginnings)

    def _take(self, chosen: dict[int, Choice], beginnings: list[list[int]]) -> Tensor:
        """Note what was chosen; returns the patches to feed, those of ended sequences idle."""
        for b, choice in chosen.items():
            self._choices[b].append(choice)
        self._append({b: c.tokens[len(beginnings[b]) :] for b, c in chosen.items()})
        self._num_done += 1
        idle = [0] * self._model.config.patch_size
        rows = [chosen[b].tokens if b in chosen else idle for b in range(len(self._prompts))]
        return torch.tensor(rows, device=self._backbone.hidden.device)

    def _append(self, tokens: dict[int, list[int]]) -> None:
        kept = self._sequences.append(tokens)
        if self._on_patch is not None:
            self._on_patch(kept)

    def _run_with_host(self, last: Tensor | None) -> None:
        nothing: list[list[int]] = [[] for _ in self._prompts]
        while self._sequences.active:
            if last is not None:
                self._backbone.feed(last)
            last = self._take(self._sample(self._sequences.active, nothing), nothing)

    def _run_on_device(self, backbone: StaticBackbone, last: Tensor | None) -> None:
        sampling = self._sampling
        numbers = range(self._num_done, self._most_steps)
        steps = DeviceSteps(
            self._drawer,
            backbone,
            self._temperatures,
            sampling.num_candidates,
            [seed_of_step(sampling.seed, step) for step in numbers],
            last,
        )
        # A look costs a GPU a stall; a CPU nothing, and steps past the end of a sequence do.
        between_looks = _STEPS_BETWEEN_LOOKS if backbone.capturable else 1
        while active := self._sequences.active:
            if len(active) <= _WORTH_LEAVING_OUT * len(steps.sequences):
                steps.keep(active)
            num_candidates = steps.num_candidates
            count = min(between_looks, self._most_steps - self._num_done)
            for patches in steps.run(count).tolist():
                by_sequence = dict(zip(steps.sequences, patches, strict=True))
                wanted = self._sequences.active
                if not wanted:
                    break
                for b in wanted:
                    draws = 1 if self._temperatures[b] == 1 else num_candidates
                    self._choices[b].append(Choice(by_sequence[b], draws))
                self._append({b: by_sequence[b] for b in wanted})
            self._num_done += count

    def output(self) -> GenerationOutput:
        """The result."""
        rows = self._choices
        return self._sequences.output(
            self._backbone.hidden.device,
            accepted=[all(choice.accepted for choice in row) for row in rows],
            prompt_matched=[all(choice.matched for choice in row) for row in rows],
            mean_draws=[
                sum(c.num_draws for c in row) / sum(c.matched for c in row) for row in rows
            ],
        )


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


def _num_draws(temperatures: Tensor, num_candidates: int) -> int:
    """Patches drawn at a time."""
    return len(temperatures) * (1 if bool((temperatures == 1).all()) else num_candidates)


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
