"""The command line ``calm-kernels``: errors are one sentence with the fix, exit code 2."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

from calm_kernels.cli.parser import make_parser
from calm_kernels.training.errors import UserError

OK, UNEXPECTED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

_EXTRA_OF = {
    "accelerate": "train",
    "matplotlib": "demo",
    "numpy": "train",
    "rich": "train",
    "safetensors": "models",
    "tokenizers": "train",
    "transformers": "models",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments, those of the process if None.

    Returns:
        the exit code: the command's own (0; 1 where a benchmark's result is wrong), 2 for what the
        user can put right, 130 if interrupted, 1 for a defect.
    """
    arguments = make_parser().parse_args(argv)
    module, _, function = arguments.command.partition(":")
    try:
        outcome: int | None = getattr(importlib.import_module(module), function)(arguments)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return OK
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        code, message = _explain(error)
        print(f"error: {message}", file=sys.stderr)
        return code
    return OK if outcome is None else outcome


def _explain(error: Exception) -> tuple[int, str]:
    lines = str(error).strip().splitlines()
    reason = " ".join(line.strip() for line in lines[:1]) or type(error).__name__
    if isinstance(error, UserError):
        return USER_ERROR, " ".join(lines)
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRA_OF:
            extra = _EXTRA_OF[package]
            return USER_ERROR, f"{package} is needed here: pip install 'calm_kernels[{extra}]'"
        return USER_ERROR, reason
    if type(error).__name__ == "OutOfMemoryError":
        return USER_ERROR, "the GPU is out of memory: lower --batch-size and raise --accumulation"
    if isinstance(error, (ValueError, TypeError, OSError, RuntimeError)):
        return USER_ERROR, f"{reason} (--debug shows where)"
    return UNEXPECTED, (
        f"unexpected {type(error).__name__}: {reason}; run again with --debug and report it"
    )
