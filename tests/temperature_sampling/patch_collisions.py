"""Different patches that the kernels' hash cannot tell apart."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

_HEADER = Path(__file__).parents[2] / "csrc" / "common" / "temperature.h"


def _constant(name: str) -> np.uint64:
    match = re.search(rf"{name} = (0x[0-9A-F]+)u;", _HEADER.read_text())
    assert match is not None
    return np.uint64(int(match[1], 16))


MULTIPLIER, FINALIZER = _constant("kPatchMultiplier"), _constant("kPatchFinalizer")


def hash_patches(patches: np.ndarray) -> np.ndarray:
    """hash_patch of csrc/common/temperature.h: integers [*, K] -> uint64 [*]."""
    value = np.zeros(patches.shape[:-1], dtype=np.uint64)
    for k in range(patches.shape[-1]):
        value = value * MULTIPLIER + patches[..., k].astype(np.int64).view(np.uint64)
    value = (value ^ (value >> np.uint64(32))) * FINALIZER
    return value ^ (value >> np.uint64(29))


def with_one_hash(count: int, patch_size: int) -> np.ndarray:
    """``count`` different patches, int64 [count, patch_size], of the same 64-bit hash."""
    random = np.random.default_rng(patch_size)
    patches = np.tile(random.integers(0, 2**17, patch_size), (count, 1))
    before_last = random.permutation(2**17)[:count]
    step = (before_last - patches[:, -2]).view(np.uint64) * MULTIPLIER
    patches[:, -2] = before_last
    patches[:, -1] = (patches[:, -1].view(np.uint64) - step).view(np.int64)
    assert len(np.unique(hash_patches(patches))) == 1
    assert len(np.unique(patches, axis=0)) == count
    return patches


def pair_of_one_tag_and_slot() -> np.ndarray:
    """Two int32 patches [2, 2] that agree in the 2 upper and the 32 lower bits of their hash: in a
    table of four slots, all that is looked at before the ids themselves."""
    patches = np.random.default_rng(0).integers(0, 2**31, (2**20, 2)).astype(np.int32)
    seen = hash_patches(patches)
    key = (seen >> np.uint64(62) << np.uint64(32)) | (seen & np.uint64(2**32 - 1))
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(key[order][1:] == key[order][:-1])
    pair = patches[order[[same[0], same[0] + 1]]]
    assert (pair[0] != pair[1]).any()
    return pair
