"""Runs commands of the command line one after the other in this process, or under torchrun in
each of its processes, and keeps a record of what every process trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer

from calm_kernels.cli import main
from calm_kernels.training import presets, stages
from calm_kernels.training.trainer import CalmTrainer, Progress


@dataclass(frozen=True)
class Command:
    """What to type after ``calm-kernels``, and where to write this process's record."""

    arguments: list[str]
    record: str
    interrupt_at: int | None = None
    """The step at which Ctrl-C is pressed."""


def tiny_with_muon() -> presets.Preset:
    tiny = presets.preset("tiny")
    optimization = replace(tiny.energy.optimization, optimizer="muon")
    return replace(tiny, name="muon", energy=replace(tiny.energy, optimization=optimization))


def run(command: Command) -> int:
    """Run a command; its record holds ``code``, ``batches``, ``shard`` and ``folders`` made."""
    record: dict[str, Any] = {"batches": [], "shard": None, "folders": 0}
    with contextlib.ExitStack() as watched:
        watched.enter_context(mock.patch.dict(presets.PRESETS, {"muon": tiny_with_muon}))
        watched.enter_context(_recording(record))
        if command.interrupt_at is not None:
            watched.enter_context(_interrupting(command.interrupt_at))
        record["code"] = main(command.arguments)
    path = Path(f"{command.record}.{os.environ.get('RANK', '0')}.json")
    path.write_text(json.dumps(record), encoding="utf-8")
    return int(record["code"])


@contextlib.contextmanager
def _recording(record: dict[str, Any]) -> Iterator[None]:
    compute_loss, create_optimizer = Trainer.compute_loss, CalmTrainer.create_optimizer
    make_folder = stages.make_folder

    def watch_batch(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = [hashlib.sha1(ids.numpy().tobytes()).hexdigest() for ids in inputs["input_ids"]]
        noise = [inputs.get("seed"), inputs.get("first_sequence")]
        record["batches"].append({"step": self.state.global_step, "blocks": blocks, "noise": noise})
        return compute_loss(self, model, inputs, *args, **kwargs)

    def watch_optimizer(self: Any, model: Any = None) -> Any:
        optimizer = create_optimizer(self, model)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        record["shard"] = {
            "whole": sum(p.numel() for p in held),
            "here": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in held),
        }
        return optimizer

    def watch_folder(folder: Path) -> None:
        record["folders"] += 1
        make_folder(folder)

    with (
        mock.patch.object(stages, "make_folder", watch_folder),
        mock.patch.object(Trainer, "compute_loss", watch_batch),
        mock.patch.object(CalmTrainer, "create_optimizer", watch_optimizer),
    ):
        yield


def _interrupting(step: int) -> Any:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    return mock.patch.object(Progress, "on_step_end", on_step_end)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(Command(**given))
