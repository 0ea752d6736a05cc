"""Choosing the next patch of each sequence, at a temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calm_kernels.models.draws import Drawer, noise_rows
from calm_kernels.ops.random import philox_uniform
from calm_kernels.ops.temperature_sampling import (
    batch_temperature_sample,
    exact_temperature_sample,
)
from calm_kernels.reference.philox import Stream

SAMPLERS = ("batch", "exact")


@dataclass(frozen=True)
class Choice:
    """The patch chosen for one sequence, and how; see :class:`GenerationOutput`."""

    tokens: list[int]
    """[K], or none if no draw began as it must"""
    num_draws: int
    accepted: bool = True
    matched: bool = True


class PatchSampler:
    """The patches that may follow, given one hidden state per sequence.

    Args:
        drawer: of the model.
        hidden: [B, H].
        seed: of this step.
        num_candidates, max_draws, sampler: as of :func:`calm_kernels.models.generation.generate`.
    """

    def __init__(
        self,
        drawer: Drawer,
        hidden: Tensor,
        seed: int,
        num_candidates: int,
        max_draws: int,
        sampler: str,
    ) -> None:
        self._drawer = drawer
        self._hidden = hidden
        self._seed = seed
        self.num_candidates = num_candidates
        self.max_draws = max_draws
        self._exact = sampler == "exact"

    def draw(self, sequences: Tensor, first: int, count: int) -> Tensor:
        """Draws [first, first + count) of some sequences: int64 [A] -> [A, count, K].

        A draw depends on the seed, its sequence and its number, on nothing else.
        """
        rows = noise_rows(sequences, first, count)
        width = self._drawer.noise_size
        noise = philox_uniform(self._seed, rows, width, Stream.HEAD_NOISE) - 0.5
        noise = noise.reshape(count, len(sequences), width)
        return self._drawer.patches(self._hidden[sequences], noise).transpose(0, 1)

    def sample(
        self, sequences: list[int], temperatures: Tensor, beginnings: list[list[int]]
    ) -> dict[int, Choice]:
        """Choose a patch for each of some sequences.

        Args:
            sequences: their numbers, ascending.
            temperatures: of all sequences, [B] on the CPU.
            beginnings: tokens that the patch must begin with, for all sequences.
        """
        free = [b for b in sequences if not beginnings[b]]
        at_one = [b for b in free if temperatures[b] == 1]
        colder = [b for b in free if temperatures[b] != 1]
        choices = self._sample_at_one(at_one) if at_one else {}
        if colder:
            choices |= self._sample_colder(colder, temperatures[colder])
        for b in sequences:
            if beginnings[b]:
                choices[b] = self._sample_given(b, temperatures[b : b + 1], beginnings[b])
        return choices

    def _sample_at_one(self, sequences: list[int]) -> dict[int, Choice]:
        tokens = self.draw(torch.tensor(sequences, device=self._hidden.device), 0, 1)[:, 0]
        return _choices(sequences, tokens, [1] * len(sequences), [True] * len(sequences))

    def _sample_colder(self, sequences: list[int], temperatures: Tensor) -> dict[int, Choice]:
        device = self._hidden.device
        rows = torch.tensor(sequences, device=device)
        if not self._exact:
            tokens = self._vote(rows, self.draw(rows, 0, self.num_candidates), temperatures)
            return _choices(
                sequences, tokens, [self.num_candidates] * len(rows), [True] * len(rows)
            )
        drawn = 0

        def draw(active: Tensor, count: int) -> Tensor:
            # Sequences leave and never return, so all that are left have drawn equally often.
            nonlocal drawn
            drawn += count
            return self.draw(rows[active], drawn - count, count)

        tokens, num_draws, accepted = exact_temperature_sample(
            draw,
            len(rows),
            temperatures.to(device),
            max_draws=self.max_draws,
            seed=self._seed,
            rows=rows,
            device=device,
        )
        if not bool(accepted.all()):
            left = (~accepted).nonzero().squeeze(1)
            candidates = self.draw(rows[left], drawn, self.num_candidates)
            tokens[left] = self._vote(rows[left], candidates, temperatures[left.cpu()])
            num_draws[left] += self.num_candidates
        return _choices(sequences, tokens, num_draws.tolist(), accepted.tolist())

    def _vote(self, sequences: Tensor, candidates: Tensor, temperatures: Tensor) -> Tensor:
        chosen: Tensor = batch_temperature_sample(
            candidates, temperatures.to(candidates.device), seed=self._seed, rows=sequences
        )
        return chosen

    def _sample_given(self, sequence: int, temperature: Tensor, beginning: list[int]) -> Choice:
        """Choose among draws that begin as given: a sample of the conditional law."""
        source = _MatchingDraws(self, sequence, beginning)
        at_one = bool(temperature == 1)
        chosen = None
        if self._exact and not at_one:
            chosen = self._exact_given(source, temperature)
        else:
            source.search(1 if at_one else self.num_candidates)
        accepted = chosen is not None or at_one or not self._exact
        candidates = source.found[:, : 1 if at_one else self.num_candidates]
        if candidates.numel() == 0:
            return Choice([], source.num_drawn, matched=False)
        if chosen is None:
            chosen = self._vote(source.sequence, candidates, temperature)
        return Choice(chosen[0].tolist(), source.num_drawn, accepted=accepted)

    def _exact_given(self, source: _MatchingDraws, temperature: Tensor) -> Tensor | None:
        """An exact choice among matching draws, [1, K]; None if the budget does not suffice."""
        used = 0

        def draw(active: Tensor, count: int) -> Tensor:
            nonlocal used
            if not source.search(used + count):
                raise _NotEnoughDraws
            used += count
            return source.found[:, used - count : used]

        device = self._hidden.device
        try:
            tokens, _, accepted = exact_temperature_sample(
                draw,
                1,
                temperature.to(device),
                max_draws=self.max_draws,
                seed=self._seed,
                rows=source.sequence,
                device=device,
            )
        except _NotEnoughDraws:
            return None
        return tokens if bool(accepted) else None


class _NotEnoughDraws(Exception):
    """The budget ended before enough draws began as they must."""


class _MatchingDraws:
    """The draws of one sequence that begin with given tokens, in the order they were drawn."""

    def __init__(self, sampler: PatchSampler, sequence: int, beginning: list[int]) -> None:
        device = sampler._hidden.device
        self._sampler = sampler
        self.sequence = torch.tensor([sequence], device=device)
        self._beginning = torch.tensor(beginning, device=device)
        self.found = self._beginning.new_empty((1, 0, sampler._drawer.decoder.patch_size))
        """Matching draws so far, [1, n, K]."""
        self.num_drawn = 0

    def search(self, count: int) -> bool:
        """Draw until ``count`` draws match; False if the budget does not suffice."""
        budget = self._sampler.max_draws
        while self.found.shape[1] < count and self.num_drawn < budget:
            size = min(self._sampler.num_candidates, budget - self.num_drawn)
            draws = self._sampler.draw(self.sequence, self.num_drawn, size)
            self.num_drawn += size
            matches = (draws[0, :, : len(self._beginning)] == self._beginning).all(dim=-1)
            self.found = torch.cat((self.found, draws[:, matches]), dim=1)
        return self.found.shape[1] >= count


def _choices(
    sequences: list[int], tokens: Tensor, num_draws: list[int], accepted: list[bool]
) -> dict[int, Choice]:
    rows = zip(sequences, tokens.tolist(), num_draws, accepted, strict=True)
    return {b: Choice(patch, count, accepted=yes) for b, patch, count, yes in rows}
