"""``calm-kernels doctor``: who serves each operator here, and why the others do not."""

from __future__ import annotations

import argparse
import json
from typing import Any

from calm_kernels.cli.console import print_table
from calm_kernels.training.environment import report


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    versions = ", ".join(f"{name} {version or '-'}" for name, version in found["versions"].items())
    print(versions)
    print(found["platform"])
    for device in found["devices"]:
        print(_device(device))
    for name, library in found["libraries"].items():
        state = f"loaded from {library['path']}" if library["loaded"] else library["problem"]
        print(f"{name} library: {state}")
    if found["forced_backend"] != "auto":
        print(f"backend forced by CALM_KERNELS_BACKEND: {found['forced_backend']}")
    for device_type, operators in found["operators"].items():
        rows = [
            (name, state["serves"] or "none", _reasons(state["others"]))
            for name, state in operators.items()
        ]
        print()
        print_table(
            f"operators on {device_type} tensors", ("operator", "served by", "others"), rows,
            left=3,
        )  # fmt: skip


def _device(device: dict[str, Any]) -> str:
    if device["type"] == "cpu":
        return f"CPU: {device['name']}, {device['capability']}, {device['threads']} threads"
    memory = device["memory_bytes"] / 2**30
    return f"GPU: {device['name']}, compute capability {device['capability']}, {memory:.0f} GiB"


def _reasons(others: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in others.items())
