"""Continuing a sequence from many of its positions at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

Run = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
"""run(inputs, mask, positions, cache) -> hidden states; inputs are what the model is fed."""

_SUPPORTED_ATTENTION = ("sdpa", "eager")


class Rollout:
    """Branches that leave a cached trunk at different positions and grow side by side.

    Branch i sees the first ``visible[i]`` entries of the trunk and its own entries, nothing of the
    other branches. One forward pass extends all branches by one entry.

    Args:
        run: runs the backbone.
        cache: keys and values of the trunk, extended in place.
        visible: trunk entries that each branch sees, int64 [m].
        config: of the backbone, for its attention implementation.

    Raises:
        ValueError: the attention implementation takes no masks of this kind.
    """

    def __init__(self, run: Run, cache: Cache, visible: Tensor, config: PreTrainedConfig) -> None:
        implementation = config._attn_implementation
        if implementation not in _SUPPORTED_ATTENTION:
            raise ValueError(
                f"attn_implementation: expected one of {', '.join(_SUPPORTED_ATTENTION)} to score "
                f"n-grams longer than a patch; got {implementation!r}; call "
                "set_attn_implementation('sdpa')"
            )
        self._run = run
        self._cache = cache
        self._visible = visible
        self._trunk_length = cache.get_seq_length()
        self._additive_mask = implementation == "eager"
        self._length = 0

    def extend(self, inputs: Tensor) -> Tensor:
        """Feed one entry to every branch, [B, m, ...]; returns hidden states [B, m, H]."""
        self._length += 1
        positions = (self._visible + self._length - 1).unsqueeze(0)
        return self._run(inputs, self._mask(), positions, self._cache)

    def rewind(self) -> None:
        """Cut the branches off, so that new ones can grow from the same trunk."""
        if self._length > 0:
            # A negative length is how many entries to remove.
            self._cache.crop(-self._length * len(self._visible))  # type: ignore[attr-defined]
        self._length = 0

    def _mask(self) -> Tensor:
        """What each branch's new entry sees, [1, 1, m, trunk + m * length]."""
        visible = self._visible
        trunk = torch.arange(self._trunk_length, device=visible.device) < visible.unsqueeze(1)
        own = torch.eye(len(visible), dtype=torch.bool, device=visible.device)
        seen = torch.cat((trunk, own.repeat(1, self._length)), dim=1)[None, None]
        if not self._additive_mask:
            return seen
        return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -1e30)
