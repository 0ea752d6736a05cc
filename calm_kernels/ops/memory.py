"""Memory that the CPU kernels keep from call to call."""

from __future__ import annotations

import torch

from calm_kernels import _native

_library = torch.library.Library("calm_kernels", "FRAGMENT")
_library.define("empty_cache() -> int")


def empty_cache() -> int:
    """Give the memory back that the CPU kernels keep for their next calls.

    They keep results that are gone, up to 256 MB a process, and working memory, up to 64 MB a
    kernel and thread; of the latter, the calling thread's is given back. Results that somebody
    holds stay. GPU memory is torch's: see ``torch.cuda.empty_cache``.

    Returns:
        how many bytes that was.
    """
    if not _native.library("cpu").loaded:
        return 0
    num_bytes: int = torch.ops.calm_kernels.empty_cache()
    return num_bytes
