"""Who speaks and who waits when torchrun starts several processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def is_main_process() -> bool:
    """Whether this process speaks and writes: the only one, or rank 0 under torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Let rank 0 run the block before the others do, so that they find what it made."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield
