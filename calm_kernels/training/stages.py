"""One stage of a run: train a model, save it, score it, remember what it was made from.

A stage that was finished with the same settings is reused, one that was interrupted continues from
its last checkpoint, and nothing that is there is replaced without being asked to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.errors import UserError
from calm_kernels.training.files import disk_errors, make_folder, read_json, write_json
from calm_kernels.training.presets import Optimization
from calm_kernels.training.processes import (
    check_processes,
    global_batch_size,
    is_main_process,
    num_processes,
    on_main_process,
    wait_for_everyone,
)
from calm_kernels.training.progress import Reporter
from calm_kernels.training.runs import CHECKPOINTS, HISTORY, STAGE, load_model, save_model
from calm_kernels.training.sharding import ShardedTrainer, whole_weights
from calm_kernels.training.tokenizers import Tokenizer
from calm_kernels.training.trainer import (
    CalmTrainer,
    History,
    last_checkpoint,
    make_trainer,
    training_arguments,
)

FORMAT = 1
WHEN_PRESENT = ("refuse", "resume", "overwrite", "automatic")
_UNTRAINED = ("log_every", "evaluate_every", "save_every")
_TITLES = {
    "autoencoder": "training the autoencoder",
    "energy": "training the language model",
    "baseline": "training the baseline",
}


@dataclass(frozen=True)
class StageOptions:
    """How to train, apart from what."""

    seed: int = 0
    bf16: bool | None = None
    cpu: bool = False
    fsdp: bool = False
    """Share weights, gradients and optimizer state out among the processes (FSDP2)."""
    when_present: str = "refuse"
    """What to do about a model or checkpoints in the folder: ``refuse`` to touch them, ``resume``
    an interrupted stage, ``overwrite``, or ``automatic``: reuse or resume what was made with the
    same settings and replace anything else."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of transformers' TrainingArguments."""


@dataclass(frozen=True)
class Stage:
    """What to train and how to score it."""

    kind: str
    preset: str
    folder: Path
    settings: dict[str, Any]
    """All that the trained weights depend on, as JSON types."""
    evaluation_settings: dict[str, Any]
    optimization: Optimization
    tokenizer: Tokenizer
    blocks: PackedBlocks
    build: Callable[[], nn.Module]
    running_evaluation: Callable[[Any], Mapping[str, float]]
    final_evaluation: Callable[[Any], Mapping[str, Any]]
    cpu_bf16: bool = False


@dataclass(frozen=True)
class StageResult:
    """A trained and scored model."""

    kind: str
    folder: Path
    model: Any
    parameters: int
    metrics: dict[str, Any]
    training_seconds: float
    evaluation_seconds: float
    reused: bool


def digest(settings: Mapping[str, Any]) -> str:
    """A fingerprint of JSON values."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def trained_settings(
    kind: str, sizes: Mapping[str, Any], seed: int, **inputs: Any
) -> dict[str, Any]:
    """The settings that decide the weights: sizes and optimisation, seed, inputs."""
    kept = dict(sizes)
    optimization = dict(sizes["optimization"])
    shares = (optimization.pop("batch_size"), optimization.pop("gradient_accumulation"))
    kept["optimization"] = {
        "global_batch_size": global_batch_size(*shares),
        **{name: value for name, value in optimization.items() if name not in _UNTRAINED},
    }
    plain = {"format": FORMAT, "kind": kind, "seed": seed, **kept, **inputs}
    loaded: dict[str, Any] = json.loads(json.dumps(plain))
    return loaded


def file_digest(folder: Path) -> str:
    """A fingerprint of the weights in a model folder."""
    result = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin") and path.name != "training_args.bin":
            result.update(path.name.encode())
            with open(path, "rb") as handle:
                while chunk := handle.read(1 << 22):
                    result.update(chunk)
    return result.hexdigest()


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in _differences(old.get(key), new.get(key), key)
        ]
    if old == new:
        return []
    if isinstance(old, str) and len(old) == 64:
        return [name.replace("_", " ")]
    return [f"{name.replace('_', ' ')} {old} -> {new}"]


def _start(stage: Stage, options: StageOptions, reporter: Reporter) -> Path | str | None:
    """The checkpoint to continue from, ``"finished"``, or None to start at step 0."""
    record = read_json(stage.folder / STAGE)
    checkpoints = stage.folder / CHECKPOINTS
    checkpoint = last_checkpoint(checkpoints)
    interrupted = read_json(checkpoints / STAGE) if checkpoint is not None else None
    mode = options.when_present
    if mode == "overwrite":
        return None
    if mode == "refuse":
        if record is not None or (stage.folder / "config.json").is_file():
            raise UserError(
                f"{stage.folder} already holds a trained model: choose another --output, or pass "
                f"--overwrite to replace it"
            )
        if checkpoint is not None:
            raise UserError(
                f"{stage.folder} holds an interrupted training ({checkpoint.name}): pass --resume "
                f"to continue it or --overwrite to start again"
            )
        return None
    if interrupted is not None and checkpoint is not None:
        changed = _differences(interrupted, stage.settings)
        if not changed:
            step = checkpoint.name.rpartition("-")[2]
            reporter.message(f"{stage.kind}: continuing from step {step}")
            return checkpoint
        if mode == "resume":
            raise UserError(_changed(stage, interrupted, changed, "was interrupted"))
    if record is not None:
        settings = record.get("settings") or {}
        changed = _differences(settings, stage.settings)
        if not changed:
            return "finished"
        if mode == "resume":
            raise UserError(_changed(stage, settings, changed, "was trained"))
        reporter.message(f"{stage.kind}: settings changed ({', '.join(changed)}): training again")
    elif mode == "resume":
        reporter.message(f"{stage.kind}: nothing to resume in {stage.folder}: starting at step 0")
    return None


def _changed(stage: Stage, old: Mapping[str, Any], changed: list[str], what: str) -> str:
    return (
        f"{stage.folder} {what} with other settings ({', '.join(changed)}): "
        f"{_same_batch(stage, old)}pass the same settings, another --output or --overwrite"
    )


def _same_batch(stage: Stage, old: Mapping[str, Any]) -> str:
    """How these processes can share the former global batch, if that is what changed."""
    batch = old.get("optimization", {}).get("global_batch_size")
    if batch in (None, stage.settings["optimization"]["global_batch_size"]):
        return ""
    processes, accumulation = num_processes(), stage.optimization.gradient_accumulation
    if batch % processes:
        return (
            f"{batch} blocks a step cannot be shared among {processes} processes: start a number "
            f"of them that divides {batch}, or "
        )
    if batch % (processes * accumulation):
        accumulation = 1
    return (
        f"{batch} blocks a step are --batch-size {batch // (processes * accumulation)} "
        f"--accumulation {accumulation} with {processes} process{'es' * (processes > 1)}; "
    )


def run_stage(stage: Stage, options: StageOptions, reporter: Reporter) -> StageResult:
    """Train, save and score the model of a stage, or reuse what is there.

    Raises:
        UserError: the folder holds something that ``options.when_present`` does not let go of, the
            training diverged, there are too few processes or blocks to share. DiskFullError: no
            space; complete files and checkpoints survive.
    """
    check_processes(options.fsdp)
    _check_blocks(stage)
    start = on_main_process(lambda: _start(stage, options, reporter), options.cpu)
    if start == "finished":
        record = read_json(stage.folder / STAGE) or {}
        model = load_model(stage.kind, stage.folder)
        _place(model, options)
        seconds = float(record["training_seconds"])
        if record.get("evaluation_settings") == stage.evaluation_settings:
            reporter.message(f"{stage.kind}: reusing {stage.folder} (same settings)")
            return StageResult(
                stage.kind, stage.folder, model, record["parameters"], record["metrics"],
                seconds, float(record["evaluation_seconds"]), reused=True,
            )  # fmt: skip
        reporter.message(f"{stage.kind}: reusing {stage.folder} (same settings), scoring it anew")
        return _score(stage, model, seconds, reused=True)
    model, seconds = _train(stage, options, reporter, start if isinstance(start, Path) else None)
    return _score(stage, model, seconds, reused=False)


def _check_blocks(stage: Stage) -> None:
    batch = stage.settings["optimization"]["global_batch_size"]
    if len(stage.blocks) < batch and num_processes() > 1:
        raise UserError(
            f"a step takes {batch} blocks from {num_processes()} processes, but the training text "
            f"has {len(stage.blocks)}: lower --batch-size or --accumulation, or start fewer"
        )


def _place(model: Any, options: StageOptions) -> None:
    if torch.cuda.is_available() and not options.cpu:
        model.to("cuda")


def _make_checkpoints_folder(stage: Stage, anew: bool) -> None:
    """For one process: another that looks at the folder meanwhile could find it gone."""
    checkpoints = stage.folder / CHECKPOINTS
    with disk_errors(stage.folder, "a checkpoint"):
        make_folder(checkpoints)
        if anew:
            shutil.rmtree(checkpoints, ignore_errors=True)
            make_folder(checkpoints)
            write_json(checkpoints / STAGE, stage.settings)


def _train(
    stage: Stage, options: StageOptions, reporter: Reporter, checkpoint: Path | None
) -> tuple[Any, float]:
    checkpoints = stage.folder / CHECKPOINTS
    on_main_process(lambda: _make_checkpoints_folder(stage, checkpoint is None), options.cpu)
    with disk_errors(stage.folder, "a checkpoint"):
        arguments = training_arguments(
            checkpoints,
            stage.optimization,
            seed=options.seed,
            bf16=options.bf16,
            cpu=options.cpu,
            cpu_bf16=stage.cpu_bf16,
            options=options.trainer,
        )
        torch.manual_seed(options.seed)
        history = History(stage.folder / HISTORY)
        trainer = make_trainer(
            stage.build(), arguments, stage.optimization, stage.blocks, stage.running_evaluation,
            reporter, _TITLES[stage.kind], history,
            ShardedTrainer if options.fsdp else CalmTrainer,
        )  # fmt: skip
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            reporter.end()
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
        weights = whole_weights(model) if options.fsdp else None
        if is_main_process():
            (stage.folder / STAGE).unlink(missing_ok=True)
            save_model(model, stage.tokenizer, stage.folder, weights)
        wait_for_everyone()
    if options.fsdp:
        model = load_model(stage.kind, stage.folder)
        _place(model, options)
    return model, history.seconds


def _score(stage: Stage, model: Any, training_seconds: float, *, reused: bool) -> StageResult:
    started = time.perf_counter()
    metrics = dict(stage.final_evaluation(model))
    seconds = time.perf_counter() - started
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = sum(parameter.numel() for parameter in trained)
    if is_main_process():
        write_json(
            stage.folder / STAGE,
            {
                "kind": stage.kind,
                "preset": stage.preset,
                "settings": stage.settings,
                "evaluation_settings": stage.evaluation_settings,
                "parameters": parameters,
                "training_seconds": training_seconds,
                "evaluation_seconds": seconds,
                "metrics": metrics,
            },
        )
        shutil.rmtree(stage.folder / CHECKPOINTS, ignore_errors=True)
    wait_for_everyone()
    return StageResult(
        stage.kind, stage.folder, model, parameters, metrics, training_seconds, seconds, reused
    )
