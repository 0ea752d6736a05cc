"""Training continues where it was stopped, bit for bit, and replaces nothing unasked."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calm_kernels.models import Autoencoder
from calm_kernels.training import trainer as trainer_module
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.data import TokenData
from calm_kernels.training.errors import DiskFullError, UserError
from calm_kernels.training.evaluation import evaluate_autoencoder
from calm_kernels.training.pipeline import train
from calm_kernels.training.presets import Preset
from calm_kernels.training.progress import SilentReporter
from calm_kernels.training.runs import load_model
from calm_kernels.training.stages import StageOptions, StageResult
from calm_kernels.training.trainer import last_checkpoint, read_history

CPU = StageOptions(cpu=True)
Tiny = Callable[..., Preset]


class Listener(SilentReporter):
    """Remembers messages; stops the training at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.messages: list[str] = []
        self.stop_at = stop_at

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, done: int, values: Mapping[str, float] | None = None) -> None:
        if done == self.stop_at and values is None:
            raise KeyboardInterrupt


def run(
    kind: str,
    folder: Path,
    preset: Preset,
    data: TokenData,
    *,
    mode: str = "refuse",
    reporter: Listener | None = None,
    seed: int = 0,
    autoencoder: Path | None = None,
) -> StageResult:
    options = replace(CPU, when_present=mode, seed=seed)
    return train(kind, folder, preset, data, options, reporter or Listener(), autoencoder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture
def trained_autoencoder(tiny: Tiny, data: TokenData, tmp_path: Path) -> Path:
    return run("autoencoder", tmp_path / "ae", tiny(), data).folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["autoencoder", "energy", "baseline"])
def test_an_interrupted_training_ends_bit_for_bit_as_an_uninterrupted_one(
    kind: str,
    optimizer: str,
    tiny: Tiny,
    data: TokenData,
    tmp_path: Path,
    trained_autoencoder: Path,
) -> None:
    preset = tiny(optimizer=optimizer, batch_size=20, log_every=1)
    whole = run(kind, tmp_path / "whole", preset, data, autoencoder=trained_autoencoder)
    with pytest.raises(KeyboardInterrupt):
        run(
            kind, tmp_path / "cut", preset, data, reporter=Listener(stop_at=5),
            autoencoder=trained_autoencoder,
        )  # fmt: skip
    checkpoint = last_checkpoint(tmp_path / "cut" / kind / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-3"
    listener = Listener()
    cut = run(
        kind, tmp_path / "cut", preset, data, mode="resume", reporter=listener,
        autoencoder=trained_autoencoder,
    )  # fmt: skip
    assert f"{kind}: continuing from step 3" in listener.messages
    assert_same_weights(whole.folder, cut.folder)
    assert whole.metrics == cut.metrics
    histories = [
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]
        for history in (
            read_history(whole.folder / "history.jsonl"), read_history(cut.folder / "history.jsonl")
        )
    ]  # fmt: skip
    assert histories[0] == histories[1]


def test_a_seed_governs_everything(tiny: Tiny, data: TokenData, tmp_path: Path) -> None:
    torch.manual_seed(11)
    first = run("autoencoder", tmp_path / "a", tiny(), data, seed=3)
    torch.manual_seed(12)
    second = run("autoencoder", tmp_path / "b", tiny(), data, seed=3)
    other = run("autoencoder", tmp_path / "c", tiny(), data, seed=4)
    assert_same_weights(first.folder, second.folder)
    name = "encoder.squeeze_layer.weight"
    assert not torch.equal(weights(first.folder)[name], weights(other.folder)[name])


def test_evaluating_while_training_does_not_change_the_training(
    tiny: Tiny, data: TokenData, tmp_path: Path, trained_autoencoder: Path
) -> None:
    silent = run("energy", tmp_path / "a", tiny(), data, autoencoder=trained_autoencoder)
    curious = run(
        "energy", tmp_path / "b", tiny(evaluate_every=2), data, autoencoder=trained_autoencoder
    )
    assert_same_weights(silent.folder, curious.folder)
    scored = [e for e in read_history(curious.folder / "history.jsonl") if "eval_brier_lm" in e]
    assert [entry["step"] for entry in scored] == [2, 4, 6, 8]


def test_the_autoencoder_inside_the_language_model_stays_frozen(
    tiny: Tiny, data: TokenData, tmp_path: Path, trained_autoencoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    modes: list[tuple[bool, bool]] = []
    original = trainer_module.CalmTrainer.compute_loss

    def watched(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        modes.append((model.training, any(m.training for m in model.ae_model.modules())))
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer_module.CalmTrainer, "compute_loss", watched)
    result = run(
        "energy", tmp_path / "lm", tiny(evaluate_every=3), data, autoencoder=trained_autoencoder
    )
    assert modes == [(True, False)] * 8
    inside = result.model.ae_model.state_dict()
    for name, value in Autoencoder.from_pretrained(trained_autoencoder).state_dict().items():
        assert torch.equal(inside[name], value), name


def test_a_model_trained_in_mixed_precision_is_scored_as_it_will_be_loaded(
    tiny: Tiny, data: TokenData, tmp_path: Path
) -> None:
    options = replace(CPU, bf16=True)
    preset = tiny()
    result = train("autoencoder", tmp_path, preset, data, options, Listener())
    loaded = load_model("autoencoder", result.folder)
    blocks = PackedBlocks(data.validation, 64, 4)
    again = evaluate_autoencoder(loaded, blocks, preset.evaluation.autoencoder_blocks)
    assert again.as_metrics() == result.metrics
    plain = run("autoencoder", tmp_path / "plain", preset, data)
    assert plain.metrics["loss"] != result.metrics["loss"]
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def test_training_lowers_the_loss_of_every_model(
    tiny: Tiny, data: TokenData, tmp_path: Path, trained_autoencoder: Path
) -> None:
    for kind in ("autoencoder", "energy", "baseline"):
        preset = tiny(steps=20, log_every=5, save_every=10)
        folder = run(kind, tmp_path / "r", preset, data, autoencoder=trained_autoencoder).folder
        losses = [e["loss"] for e in read_history(folder / "history.jsonl") if "loss" in e]
        assert len(losses) == 4
        assert losses[-1] < 0.95 * losses[0], kind


def test_a_finished_stage_is_reused_only_with_the_same_settings(
    tiny: Tiny, data: TokenData, tmp_path: Path
) -> None:
    first = run("autoencoder", tmp_path, tiny(), data)
    before = weights(first.folder)
    with pytest.raises(UserError, match=r"already holds a trained model.*--overwrite"):
        run("autoencoder", tmp_path, tiny(), data)
    listener = Listener()
    again = run("autoencoder", tmp_path, tiny(), data, mode="automatic", reporter=listener)
    assert again.reused and again.metrics == first.metrics
    assert any("reusing" in line for line in listener.messages)
    with pytest.raises(UserError, match=r"other settings.*steps 8 -> 9"):
        run("autoencoder", tmp_path, tiny(steps=9), data, mode="resume")
    assert torch.equal(
        weights(first.folder)["encoder.squeeze_layer.weight"],
        before["encoder.squeeze_layer.weight"],
    )
    changed = run("autoencoder", tmp_path, tiny(steps=9), data, mode="automatic", reporter=listener)
    assert not changed.reused
    assert any("settings changed (steps 8 -> 9)" in line for line in listener.messages)


def test_how_often_to_save_and_log_is_no_reason_to_train_again(
    tiny: Tiny, data: TokenData, tmp_path: Path
) -> None:
    run("autoencoder", tmp_path, tiny(), data)
    assert run("autoencoder", tmp_path, tiny(save_every=2), data, mode="automatic").reused


def test_other_evaluation_settings_score_the_same_model_anew(
    tiny: Tiny, data: TokenData, tmp_path: Path
) -> None:
    first = run("autoencoder", tmp_path, tiny(), data)
    preset = tiny()
    preset = replace(preset, evaluation=replace(preset.evaluation, autoencoder_blocks=3))
    listener = Listener()
    second = run("autoencoder", tmp_path, preset, data, mode="automatic", reporter=listener)
    assert second.reused and second.metrics["tokens"] == 3 * 64 != first.metrics["tokens"]
    assert any("scoring it anew" in line for line in listener.messages)


def test_a_new_autoencoder_makes_the_language_model_train_again(
    tiny: Tiny, data: TokenData, tmp_path: Path
) -> None:
    for seed in (0, 1):
        run("autoencoder", tmp_path / "ae", tiny(), data, mode="overwrite", seed=seed)
        folder = tmp_path / "ae" / "autoencoder"
        result = run("energy", tmp_path, tiny(), data, mode="automatic", autoencoder=folder)
        assert not result.reused


def test_an_interrupted_stage_is_neither_lost_nor_mixed_with_other_settings(
    tiny: Tiny, data: TokenData, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("autoencoder", tmp_path, tiny(), data, reporter=Listener(stop_at=5))
    with pytest.raises(UserError, match=r"interrupted training \(checkpoint-3\): pass --resume"):
        run("autoencoder", tmp_path, tiny(), data)
    with pytest.raises(UserError, match=r"learning rate 0\.003 -> 0\.1"):
        run("autoencoder", tmp_path, tiny(learning_rate=0.1), data, mode="resume")
    assert last_checkpoint(tmp_path / "autoencoder" / "checkpoints") is not None


def test_checkpoints_are_limited_while_training_and_gone_when_finished(
    tiny: Tiny, data: TokenData, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("autoencoder", tmp_path, tiny(save_every=1), data, reporter=Listener(stop_at=7))
    folder = tmp_path / "autoencoder" / "checkpoints"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-5", "checkpoint-6",
    ]  # fmt: skip
    run("autoencoder", tmp_path, tiny(save_every=1), data, mode="resume")
    assert not folder.exists()


@pytest.mark.parametrize("left", ["nothing", "half a state"])
def test_a_checkpoint_that_was_not_finished_is_passed_over(
    tiny: Tiny, data: TokenData, tmp_path: Path, left: str
) -> None:
    whole = run("autoencoder", tmp_path / "whole", tiny(), data)
    with pytest.raises(KeyboardInterrupt):
        run("autoencoder", tmp_path, tiny(), data, reporter=Listener(stop_at=7))
    state = tmp_path / "autoencoder" / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    if left == "nothing":
        state.unlink()
    else:
        state.write_text(state.read_text(encoding="utf-8")[:100], encoding="utf-8")
    listener = Listener()
    result = run("autoencoder", tmp_path, tiny(), data, mode="resume", reporter=listener)
    assert "autoencoder: continuing from step 3" in listener.messages
    assert_same_weights(whole.folder, result.folder)


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(
    tiny: Tiny, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("autoencoder", tmp_path / "whole", tiny(), data)
    save, calls = torch.save, 0

    def full(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal calls
        if "checkpoint-6" in str(path):
            Path(path).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskFullError, match="while writing a checkpoint"):
        run("autoencoder", tmp_path, tiny(), data)
    monkeypatch.undo()
    result = run("autoencoder", tmp_path, tiny(), data, mode="resume")
    assert_same_weights(whole.folder, result.folder)


def test_a_full_disk_at_the_end_leaves_the_former_model_and_the_checkpoint(
    tiny: Tiny, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("autoencoder", tmp_path, tiny(), data)
    before = weights(first.folder)
    original = Autoencoder.save_pretrained

    def full(self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        original(self, folder, *args, **kwargs)
        if "checkpoint" not in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Autoencoder, "save_pretrained", full)
    with pytest.raises(DiskFullError, match="while writing the model"):
        run("autoencoder", tmp_path, tiny(), data, mode="overwrite", seed=9)
    monkeypatch.undo()
    for name, value in weights(first.folder).items():
        assert torch.equal(value, before[name]), name
    assert not list(first.folder.glob(".writing*"))
    listener = Listener()
    run("autoencoder", tmp_path, tiny(), data, mode="resume", seed=9, reporter=listener)
    assert "autoencoder: continuing from step 8" in listener.messages


def test_a_diverging_training_stops_with_the_cure(
    tiny: Tiny, data: TokenData, tmp_path: Path
) -> None:
    preset = tiny(learning_rate=1e30, warmup_steps=0, max_grad_norm=1e30, log_every=1, save_every=9)
    with pytest.raises(UserError, match=r"training diverged: the loss is .* lower --lr"):
        run("autoencoder", tmp_path, preset, data)


def test_the_record_of_a_stage_says_what_it_was_made_from(
    tiny: Tiny, data: TokenData, tmp_path: Path
) -> None:
    result = run("autoencoder", tmp_path, tiny(), data, seed=7)
    record = json.loads((result.folder / "stage.json").read_text(encoding="utf-8"))
    assert record["preset"] == "tiny"
    assert record["settings"]["seed"] == 7
    assert record["settings"]["data"] == data.fingerprint
    assert record["settings"]["optimization"]["steps"] == 8
    assert record["metrics"] == result.metrics
    total = sum(p.numel() for p in result.model.parameters())
    assert record["parameters"] == total
