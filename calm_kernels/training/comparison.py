"""Models of several runs, scored alike and set beside what they cost.

BrierLM of two models can be compared where both are asked the same: the same tokens, the same
held-out blocks, the same positions in them and so the same context. Patch models predict at the
multiples of their patch size; those compared here are scored at the common multiples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from calm_kernels.models import flops
from calm_kernels.training import evaluation
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.data import TokenData, open_data
from calm_kernels.training.errors import UserError
from calm_kernels.training.files import read_json
from calm_kernels.training.presets import EvaluationSettings
from calm_kernels.training.progress import Reporter
from calm_kernels.training.runs import DATA, STAGE, load_model, models_in, run_folder_of
from calm_kernels.training.stages import file_digest

DEFAULT_PATCHES = 64
"""Patches a block, where the training does not say."""


@dataclass(frozen=True)
class Scoring:
    """How models are scored and their inference is counted."""

    blocks: int = EvaluationSettings.brier_blocks
    """Held-out blocks, spread over the text."""
    samples: int = EvaluationSettings.brier_samples
    """Draws a position."""
    seed: int = 1
    candidates: int = 200
    """Patches drawn to choose one below temperature 1."""
    data: Path | None = None
    """Data folder in place of each run's own."""
    cpu: bool = False


@dataclass(frozen=True)
class Cost:
    """What a model cost and costs, in floating-point operations; None where unknown."""

    training: int | None = None
    autoencoder_training: int | None = None
    """Of the autoencoder that a language model stands on, if it lies in the same run."""
    training_seconds: float | None = None
    context: int | None = None
    """Tokens before the one generated."""
    candidates: int | None = None
    per_token: float | None = None
    """To generate a token at temperature 1: one draw a patch."""
    per_token_with_candidates: float | None = None
    per_token_without_decode: float | None = None
    """At temperature 1 if the drawn latent were not decoded."""


@dataclass(frozen=True)
class Compared:
    """One row of a comparison."""

    run: str
    kind: str
    patch_size: int | None
    """None for a baseline, which has no patches."""
    parameters: int
    cost: Cost
    metrics: dict[str, Any]
    group: str
    """Fingerprint of the held-out text: only rows of one group are asked the same."""

    def as_json(self) -> dict[str, Any]:
        """Flat JSON values."""
        head = {"run": self.run, "model": self.kind, "patch_size": self.patch_size}
        cost = {f"flops_{name}": value for name, value in asdict(self.cost).items()}
        for name in ("training_seconds", "context", "candidates"):
            cost[name] = cost.pop(f"flops_{name}")
        return {**head, "parameters": self.parameters, **cost, **self.metrics}


@dataclass(frozen=True)
class _Loaded:
    run: str
    kind: str
    folder: Path
    model: Any
    data: TokenData
    record: dict[str, Any]

    @property
    def block_length(self) -> int:
        default = DEFAULT_PATCHES * int(self.model.config.patch_size)
        return int(_optimization(self.record).get("block_length", default))


def compare(runs: Sequence[Path], scoring: Scoring, reporter: Reporter) -> list[Compared]:
    """Score every model of every run.

    Raises:
        UserError: no model in a folder, data that does not fit a model, numbers out of range,
            models whose patch sizes have no common multiple that fits into a block twice.
    """
    if scoring.blocks < 1:
        raise UserError(f"blocks: expected at least 1; got {scoring.blocks}")
    if scoring.samples < 2:
        raise UserError(f"samples: expected at least 2 (a pair is needed); got {scoring.samples}")
    if scoring.candidates < 1:
        raise UserError(f"candidates: expected at least 1; got {scoring.candidates}")
    names = _names(runs)
    found = [(name, kind, folder) for name, run in zip(names, runs, strict=True)
             for kind, folder in models_in(run).items()]  # fmt: skip
    loaded = [_load(name, kind, folder, scoring) for name, kind, folder in found]
    positions = {
        fingerprint: common_positions([m for m in loaded if _is_of(m, fingerprint)])
        for fingerprint in {m.data.fingerprint for m in loaded if m.kind != "autoencoder"}
    }
    rows = []
    for model in loaded:
        reporter.message(f"{model.folder}")
        length, stride = positions.get(model.data.fingerprint, (0, 0))
        rows.append(_compared(model, length, stride, scoring, reporter))
    return rows


def common_positions(models: Sequence[Any]) -> tuple[int, int]:
    """Block length L and stride: the positions scored are the multiples of the stride in blocks.

    The stride is the least common multiple of the patch sizes; a baseline can be scored anywhere
    and only sets it where there is nothing else. L is the shortest block length that a model was
    trained with, cut to a multiple of the stride.

    Raises:
        UserError: no block holds two strides.
    """
    patches = [m for m in models if m.kind == "energy"] or models
    stride = math.lcm(*(int(m.model.config.patch_size) for m in patches))
    shortest = min(m.block_length for m in models)
    length = shortest // stride * stride
    if length < 2 * stride:
        raise UserError(
            f"these models have no position in common: the least common multiple of their patch "
            f"sizes is {stride}, their blocks have {shortest} tokens; compare fewer of them"
        )
    return length, stride


def training_flops(config: flops.ModelConfig, record: dict[str, Any]) -> int | None:
    """Operations of a whole training from what ``stage.json`` says; None if it does not say.

    A step's blocks are those of all accumulated batches and processes: ``global_batch_size`` where
    it is recorded.
    """
    optimization = _optimization(record)
    batch_size = optimization.get("global_batch_size")
    if batch_size is None:
        batch_size = optimization.get("batch_size", 0) * optimization.get(
            "gradient_accumulation", 1
        )
    length, steps = optimization.get("block_length", 0), optimization.get("steps", 0)
    return flops.training_step(config, batch_size, length).total * steps or None


def _optimization(record: dict[str, Any]) -> dict[str, Any]:
    optimization: dict[str, Any] = record.get("settings", {}).get("optimization", {})
    return optimization


def _names(runs: Sequence[Path]) -> list[str]:
    """Short names: what tells the folders apart."""
    parts = [run.parts for run in runs]
    shared = 0
    if len(set(parts)) == len(parts) > 1:
        while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
            shared += 1
    return [str(Path(*p[shared:])) for p in parts]


def _is_of(model: _Loaded, fingerprint: str) -> bool:
    return model.kind != "autoencoder" and model.data.fingerprint == fingerprint


def _load(name: str, kind: str, folder: Path, scoring: Scoring) -> _Loaded:
    data = open_data(scoring.data or run_folder_of(folder) / DATA)
    model = load_model(kind, folder)
    if model.config.vocab_size != data.tokenizer.vocab_size:
        raise UserError(
            f"{folder} knows {model.config.vocab_size} token ids, the data in {data.folder} has "
            f"{data.tokenizer.vocab_size}: give the data of its training with --data"
        )
    return _Loaded(name, kind, folder, model, data, read_json(folder / STAGE) or {})


def _compared(
    loaded: _Loaded, length: int, stride: int, scoring: Scoring, reporter: Reporter
) -> Compared:
    model, data, kind = loaded.model, loaded.data, loaded.kind
    if torch.cuda.is_available() and not scoring.cpu:
        model.to("cuda")
    if kind == "autoencoder":
        held_out = PackedBlocks(data.validation, loaded.block_length, model.config.patch_size)
        metrics = evaluation.evaluate_autoencoder(
            model, held_out, scoring.blocks, reporter=reporter
        ).as_metrics()
    else:
        held_out = PackedBlocks(data.validation, length, stride)
        result = evaluation.evaluate_brier(
            model, held_out, scoring.blocks, num_samples=scoring.samples, seed=scoring.seed,
            stride=stride, reporter=reporter,
        )  # fmt: skip
        unigram = evaluation.evaluate_unigram(
            data.train.frequencies(), held_out, scoring.blocks, stride
        )
        metrics = {
            **result.as_metrics(), "unigram_brier_lm": unigram.brier_lm,
            "block_length": length, "stride": stride,
        }  # fmt: skip
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    patch_size = None if kind == "baseline" else int(model.config.patch_size)
    cost = _cost(loaded, length, scoring.candidates)
    model.to("cpu")
    return Compared(loaded.run, kind, patch_size, trained, cost, metrics, data.fingerprint)


def _cost(loaded: _Loaded, context: int, candidates: int) -> Cost:
    config, record = loaded.model.config, loaded.record
    training, seconds = training_flops(config, record), record.get("training_seconds")
    if loaded.kind == "autoencoder":
        return Cost(training=training, training_seconds=seconds)
    autoencoder = None
    folder = run_folder_of(loaded.folder) / "autoencoder"
    own = read_json(folder / STAGE)
    # The folder may have come to hold another autoencoder than the model was trained on.
    if own is not None and file_digest(folder) == record.get("settings", {}).get("autoencoder"):
        autoencoder = training_flops(loaded.model.ae_model.config, own)
    return Cost(
        training=training,
        autoencoder_training=autoencoder,
        training_seconds=seconds,
        context=context,
        candidates=candidates,
        per_token=flops.per_token(config, context),
        per_token_with_candidates=flops.per_token(config, context, candidates),
        per_token_without_decode=flops.per_token_without_decode(config, context),
    )
