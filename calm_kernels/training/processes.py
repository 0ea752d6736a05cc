"""Who speaks and who waits when torchrun starts several processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from calm_kernels.training.errors import UserError

T = TypeVar("T")


def num_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_batch_size(batch_size: int, accumulation: int) -> int:
    """Blocks of a step: those of all processes and accumulated batches."""
    return batch_size * accumulation * num_processes()


def is_main_process() -> bool:
    """Whether this process speaks and writes: the only one, or rank 0 under torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def check_processes(fsdp: bool) -> None:
    """Check that there are processes to share a model among, if it is to be shared.

    Raises:
        UserError: there is one only.
    """
    if fsdp and num_processes() == 1:
        raise UserError(
            "--fsdp shares a model out among processes, but there is only one: start several with "
            "`torchrun --nproc_per_node N -m calm_kernels train ...`, or leave --fsdp out"
        )


def join_processes(cpu: bool = False) -> None:
    """Let torchrun's processes find each other, if there are several.

    Args:
        cpu: they stay on the CPU although there are GPUs.
    """
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu)


@contextlib.contextmanager
def main_process_first(cpu: bool = False) -> Iterator[None]:
    """Let rank 0 run the block before the others do, so that they find what it made.

    Args:
        cpu: the processes stay on the CPU although there are GPUs.
    """
    if num_processes() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=cpu).main_process_first():
        yield


def on_main_process(function: Callable[[], T], cpu: bool = False) -> T:
    """What ``function`` gives on rank 0, on every rank; it runs nowhere else.

    Raises:
        UserError: rank 0 raised it; every rank does.
    """
    if num_processes() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    join_processes(cpu)
    outcome: list[T | UserError | None] = [None]
    if is_main_process():
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    result = broadcast_object_list(outcome)[0]
    if isinstance(result, UserError):
        raise result
    return result  # type: ignore[no-any-return]


def wait_for_everyone() -> None:
    """Wait until every process is here."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
