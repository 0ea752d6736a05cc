"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from calm_kernels.training.errors import DiskFullError, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, or one that caused it, says that no space is left.

    Writers in other languages report it in words rather than by an errno.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in _FULL:
            return True
        if "No space left on device" in str(current) or "PytorchStreamWriter failed" in str(
            current
        ):
            return True
        current = current.__cause__ or current.__context__
    return False


@contextlib.contextmanager
def disk_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn "no space left" and "permission denied" inside the block into errors with a fix."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(
                f"no space left on the disk of {folder} while writing {what}: free some space or "
                f"choose another --output; files that were complete before are untouched"
            ) from error
        if isinstance(error, PermissionError):
            raise UserError(
                f"cannot write {what} to {folder}: permission denied; choose another --output"
            ) from error
        raise


@contextlib.contextmanager
def atomic_file(path: Path, what: str) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` and rename it into place once it is whole.

    Raises:
        DiskFullError: no space left; the temporary file is gone and ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path.parent, what):
        make_folder(path.parent)
        try:
            with open(temporary, "wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        UserError: a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} is or lies under a file: choose another --output") from error


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_file(path, path.name) as handle:
        handle.write((json.dumps(content, indent=2) + "\n").encode())


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path, path.name) as handle:
        handle.write(content.encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if the file is absent or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def install_folder(folder: Path, what: str, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write files to a temporary folder and rename them into ``folder`` when done.

    Files of other names in ``folder`` stay. ``config.json`` goes last, so that a folder with a new
    configuration also has the new weights.
    """
    temporary = folder / f".writing-{os.getpid()}"
    with disk_errors(folder, what):
        make_folder(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            mode = temporary.stat().st_mode & 0o666
            fill(temporary)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                path.chmod(mode)
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
