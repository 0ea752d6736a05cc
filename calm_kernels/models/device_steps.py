"""Steps of generation that need nothing from the host: feed a patch, draw, vote."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from calm_kernels.models.cached_backbone import StaticBackbone
from calm_kernels.models.contenders import Contenders, fewest_equal_draws
from calm_kernels.models.draws import LARGEST_BATCH, Drawer, noise_rows
from calm_kernels.ops.random import philox_uniform
from calm_kernels.ops.temperature_sampling import batch_temperature_sample
from calm_kernels.reference.philox import Stream

_log = logging.getLogger("calm_kernels")


class DeviceSteps:
    """The sequences of a batch that go on, and how their next patches come about.

    A step feeds each sequence's last patch to the backbone, draws candidates from the head, decodes
    them and lets them vote. Everything that changes from step to step (patches, cache, step number)
    lives in tensors, so one step is one CUDA graph, recorded after a step that ran plainly, and
    again whenever memory has moved. Where recording fails, steps run plainly.

    Args:
        drawer: of the model.
        backbone: over the sequences' contexts.
        temperatures: of all sequences, float [B] on the CPU.
        num_candidates: draws that vote.
        seeds: of the steps, one each.
        last: patches to feed first, int64 [B, K]; None if the backbone has them already.
    """

    def __init__(
        self,
        drawer: Drawer,
        backbone: StaticBackbone,
        temperatures: Tensor,
        num_candidates: int,
        seeds: Sequence[int],
        last: Tensor | None,
    ) -> None:
        self._drawer = drawer
        self._backbone = backbone
        device = backbone.hidden.device
        self.sequences = list(range(len(temperatures)))
        """Numbers of the sequences that go on."""
        self._temperatures = temperatures
        self._most_candidates = num_candidates
        self._seeds = torch.tensor(seeds, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._num_done = 0
        patch_size = drawer.decoder.patch_size
        self._patches = torch.zeros(
            (len(seeds), len(temperatures), patch_size), dtype=torch.int64, device=device
        )
        """What was chosen, by step, [steps, B, K]."""
        self._last = self._patches.new_zeros(self._patches.shape[1:])
        self._fed = last is None
        if last is not None:
            self._last.copy_(last)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._records = backbone.capturable
        self._warm = False
        self._choose_rows()

    def _choose_rows(self) -> None:
        """What follows from which sequences go on."""
        device = self._last.device
        temperatures = self._temperatures[self.sequences]
        at_one = temperatures == 1
        self.num_candidates = 1 if bool(at_one.all()) else self._most_candidates
        self._votes = not bool(at_one.all())
        self._at_one = at_one.unsqueeze(1).to(device) if bool(at_one.any()) else None
        self._device_temperatures = temperatures.to(device)
        self._rows = torch.tensor(self.sequences, device=device)
        self._noise_rows = noise_rows(self._rows, 0, self.num_candidates)
        fewest = fewest_equal_draws(temperatures)
        leaves_out = self._votes and not self._backbone.capturable and bool((fewest > 1).any())
        at_once = self.num_candidates * len(self.sequences) <= LARGEST_BATCH
        self._fewest = fewest if leaves_out and at_once else None

    def run(self, count: int) -> Tensor:
        """Do some steps; int64 [count, sequences, K] on the device."""
        first = self._num_done
        for _ in range(count):
            self._advance()
        self._num_done += count
        return self._patches[first : self._num_done]

    def keep(self, sequences: list[int]) -> None:
        """Go on with some of the sequences only."""
        rows = torch.tensor([self.sequences.index(b) for b in sequences], device=self._last.device)
        self._backbone.keep(rows)
        self._patches, self._last = self._patches[:, rows], self._last[rows]
        self.sequences = sequences
        self._choose_rows()
        self._graph = None

    def _advance(self) -> None:
        if not self._fed:
            if self._backbone.make_room():
                self._graph = None
            if self._graph is None and self._records and self._warm:
                self._record()
        if self._graph is not None:
            self._graph.replay()
            return
        if self._fed:
            self._draw(self._backbone.hidden)
            self._fed = False
        else:
            self._feed_and_draw()
            self._warm = True

    def _record(self) -> None:
        """One step as a CUDA graph; nothing runs meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._last.device), torch.cuda.graph(graph):
                self._feed_and_draw()
        except RuntimeError as error:
            self._records = False
            _log.warning("generation runs without a CUDA graph: %s", str(error).split("\n")[0])
            return
        self._graph = graph

    def _feed_and_draw(self) -> None:
        self._draw(self._backbone.step(self._last))

    def _draw(self, hidden: Tensor) -> None:
        """The next patch of each sequence, given what the head reads: [B, H]."""
        seed = self._seeds.index_select(0, self._step)
        width = self._drawer.noise_size
        noise = philox_uniform(seed, self._noise_rows, width, Stream.HEAD_NOISE) - 0.5
        noise = noise.reshape(self.num_candidates, len(self._rows), width)
        contenders = None
        if self._fewest is None:
            candidates = self._drawer.patches(hidden, noise)
        else:
            latents = self._drawer.latents(hidden, noise)
            contenders = Contenders(self._drawer.decoder, latents, self._fewest)
            candidates = contenders.tokens
        chosen = candidates[0]
        if self._votes:
            voted = batch_temperature_sample(
                candidates.transpose(0, 1), self._device_temperatures, seed=seed, rows=self._rows
            )
            if contenders is not None:
                voted = contenders.complete(voted)
            chosen = voted if self._at_one is None else chosen.where(self._at_one, voted)
        self._last.copy_(chosen)
        self._patches.index_copy_(0, self._step, chosen.unsqueeze(0))
        self._step += 1
