"""Draws that vote, decoded only as far as they can win.

At T <= 1/2 a patch that is drawn once has no weight in the vote if another is drawn twice. Tokens
are decoded place by place, so a draw whose first tokens no other draw of its sequence shares is
left there: it stays alone whatever follows. The vote is the same as over all tokens. If no patch is
drawn twice, every draw has the same chance, and the one that wins is decoded then.

What is left out depends on the law: a quarter of the tokens of the demo's trained model, half where
two tokens already tell most draws apart. The number of rows depends on the draws, so every place
costs a GPU a look from the host: for CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calm_kernels.nn.packed import PackedDecoder
from calm_kernels.nn.patch_codec import PatchDecoder
from calm_kernels.ops.repeated_draws import repeated_draws

_WORTH_NO_LOOK = 64
"""So few tokens are decoded at once: reading the weights takes longer than multiplying."""


def fewest_equal_draws(temperatures: Tensor) -> Tensor:
    """How many equal draws a patch needs to win, if any patch has them: [A] -> int64 [A], 1 or 2.

    The vote gives no weight below floor(1/T) draws. More than 2 would rule out more draws, and have
    to be taken back wherever no patch is drawn as often.
    """
    return (1.0 / temperatures.double()).floor().clamp_max(2.0).long()


class Contenders:
    """The draws of some sequences, as far as they must be decoded for a vote.

    Args:
        decoder: of the autoencoder.
        latents: S draws for each of A sequences, [S, A, D].
        fewest: of :func:`fewest_equal_draws`, [A].
    """

    def __init__(
        self, decoder: PatchDecoder | PackedDecoder, latents: Tensor, fewest: Tensor
    ) -> None:
        self._decoder = decoder
        self._states = decoder.patch_states(latents.flatten(0, 1))
        num_draws, self._num_sequences = latents.shape[:2]
        unknown = -1 - torch.arange(num_draws, device=latents.device).view(-1, 1, 1)
        self.tokens = unknown.repeat(1, self._num_sequences, decoder.patch_size)
        """int64 [S, A, K]; where draw s was left, -1 - s, so that it equals no other draw."""
        self._decode(fewest.to(latents.device))

    def _decode(self, fewest: Tensor) -> None:
        tokens = self.tokens.flatten(0, 1)
        rows = torch.arange(len(tokens), device=tokens.device)
        groups = rows % self._num_sequences
        patch_size = tokens.shape[1]
        place = 0
        while len(rows) > 0:
            few = len(rows) * (patch_size - place) <= _WORTH_NO_LOOK
            stop = patch_size if few else place + 1
            states = self._states if len(rows) == len(tokens) else self._states[rows]
            decoded = self._decoder.decode_places(states, place, stop)
            tokens[rows, place:stop] = decoded
            if stop == patch_size:
                return
            place = stop
            rows, groups = repeated_draws(rows, groups, decoded.squeeze(1), fewest)

    def complete(self, patches: Tensor) -> Tensor:
        """Patches of which the vote chose one for each sequence, int64 [A, K], fully decoded."""
        left = (patches[:, -1] < 0).nonzero().squeeze(1)
        if len(left) == 0:
            return patches
        draws = -1 - patches[left, -1]
        states = self._states[draws * self._num_sequences + left]
        known = int((patches[left] >= 0).sum(dim=1).min())
        decoded = self._decoder.decode_places(states, known, self._decoder.patch_size)
        return patches.index_copy(0, left, torch.cat((patches[left, :known], decoded), dim=1))
