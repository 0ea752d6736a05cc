"""transformers' Trainer with the few differences that these models need."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from calm_kernels.models.sequences import seed_of_step
from calm_kernels.training.blocks import PackedBlocks, collate
from calm_kernels.training.errors import UserError
from calm_kernels.training.optimizer import make_optimizer, native_bf16
from calm_kernels.training.presets import Optimization
from calm_kernels.training.processes import global_batch_size
from calm_kernels.training.progress import Reporter

SAVE_TOTAL_LIMIT = 2
_SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}
_SHOWN = ("loss", "eval_token_accuracy", "eval_brier_lm")

Evaluate = Callable[[nn.Module], Mapping[str, float]]


class CalmTrainer(Trainer):
    """The Trainer for the models here: its own evaluation, little work between steps.

    The loss of these models is a mean over positions, never scaled by a token count, so
    accumulated batches are averaged. A frozen autoencoder inside the model stays in evaluation
    mode, because the model sees to it in ``train()``.

    A step is a function of the weights, the seed, the step's number and the blocks of its global
    batch: it comes out the same, but for rounding, however many processes and accumulated batches
    share it. So do checkpoints.
    """

    def __init__(
        self,
        *args: Any,
        evaluation: Evaluate,
        optimization: Optimization,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._optimization = optimization
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self._evaluation = evaluation
        model: Any = self.model
        self._is_noisy = "seed" in inspect.signature(model.forward).parameters
        self._parts_done = (-1, 0)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the preset asks for."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = make_optimizer(trained, self._optimization)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch; its noise depends on the step and the place in the global batch."""
        if self._is_noisy:
            step, done = self._parts_done
            done = done + 1 if step == self.state.global_step else 0
            self._parts_done = (self.state.global_step, done)
            part = done * self.args.world_size + self.args.process_index
            inputs = {
                **inputs,
                "seed": seed_of_step(self.args.seed, self.state.global_step),
                "first_sequence": part * self.args.per_device_train_batch_size,
            }
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> RandomSampler:
        """As many shuffled blocks as fill global batches; the rest has its turn in other epochs.

        Processes never see a block twice in an epoch, nor batches of other sizes than one process
        would. Where there is less than one batch, all of it is one.
        """
        dataset: Any = self.train_dataset
        blocks = len(dataset)
        batch = global_batch_size(
            self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        )
        return RandomSampler(dataset, num_samples=blocks - blocks % batch or blocks)

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: counting parameters anew at every step costs more than it tells."""
        return 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score held-out blocks; draws no number from the generators that training uses."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                values = self._evaluation(model)
        finally:
            model.train(training)
        metrics = {f"eval_{name}": float(value) for name, value in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class StopOnDivergence(TrainerCallback):
    """Ends a run whose loss is no number any more, before a checkpoint replaces a good one."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise UserError(
                f"training diverged: the loss is {logs['loss']} at step {state.global_step}; "
                f"lower --lr or raise --batch-size and start again with --resume or --overwrite"
            )


class LogAtCheckpoints(TrainerCallback):
    """Leaves no loss at a checkpoint that is still to be averaged with later ones: the Trainer
    forgets it, and a resumed run would log other values than one that was not interrupted."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= control.should_save


class History(TrainerCallback):
    """Keeps what is logged as JSON lines: step, values and seconds of training so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = 0.0
        self._before = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._before + time.perf_counter() - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()
        if not state.is_world_process_zero:
            return
        kept = [e for e in read_history(self.path) if e["step"] <= state.global_step]
        kept = kept if state.global_step else []
        self._before = kept[-1]["seconds"] if kept else 0.0
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        entry = {"step": state.global_step, "seconds": round(self.seconds, 3), **logs}
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")


def read_history(path: Path) -> list[dict[str, float]]:
    """The whole entries of a history file, none if there is no file."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


class Progress(TrainerCallback):
    """Passes steps and figures on to a reporter."""

    def __init__(self, reporter: Reporter, title: str) -> None:
        self._reporter = reporter
        self._title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._reporter.begin(self._title, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._reporter.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            shown = {name.removeprefix("eval_"): logs[name] for name in _SHOWN if name in logs}
            self._reporter.step(state.global_step, shown)


def training_arguments(
    folder: Path,
    optimization: Optimization,
    *,
    seed: int,
    bf16: bool | None,
    cpu: bool,
    cpu_bf16: bool,
    options: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """The Trainer's arguments for one stage.

    Args:
        bf16: mixed precision; None turns it on where the hardware has bfloat16 matmuls, on a CPU
            only with ``cpu_bf16``.
        cpu: stay on the CPU although there is a GPU.
        cpu_bf16: see ``bf16``.
        options: further arguments of the Trainer, by name.
    """
    cuda = torch.cuda.is_available() and not cpu
    device = torch.device("cuda" if cuda else "cpu")
    mixed = bf16 if bf16 is not None else (cuda or cpu_bf16) and native_bf16(device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=optimization.steps,
        per_device_train_batch_size=optimization.batch_size,
        gradient_accumulation_steps=optimization.gradient_accumulation,
        learning_rate=optimization.learning_rate,
        lr_scheduler_type=_SCHEDULES[optimization.schedule],
        warmup_steps=min(optimization.warmup_steps, max(0, optimization.steps - 1)),
        max_grad_norm=optimization.max_grad_norm,
        logging_steps=optimization.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=optimization.evaluate_every,
        save_steps=optimization.save_every,
        save_total_limit=SAVE_TOTAL_LIMIT,
        seed=seed,
        bf16=mixed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        ddp_find_unused_parameters=False,
        **(options or {}),
    )
    # One process drives one GPU: several GPUs are for torchrun, not for torch's DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def make_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    optimization: Optimization,
    blocks: PackedBlocks,
    evaluation: Evaluate,
    reporter: Reporter,
    title: str,
    history: History,
    trainer: type[CalmTrainer] = CalmTrainer,
) -> CalmTrainer:
    """A trainer for one stage; ``train()`` starts it."""
    return trainer(
        model=model,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=blocks,
        data_collator=collate,
        callbacks=[
            LogAtCheckpoints(),
            history,
            StopOnDivergence(),
            Progress(reporter, title),
        ],
        evaluation=evaluation,
        optimization=optimization,
    )


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state last."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint.

    Unfinished ones, left by a kill or a full disk, are removed.
    """
    while folder.is_dir():
        newest = get_last_checkpoint(str(folder))
        if newest is None:
            return None
        if is_complete(Path(newest)):
            return Path(newest)
        shutil.rmtree(newest)
    return None
