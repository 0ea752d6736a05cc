"""Whatever is wrong: one sentence with the fix, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import builtins
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calm_kernels.training import environment, files


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--preset", "huge"], "unknown preset 'huge': choose one of tiny, demo"),
        (["demo", "--preset", "paper"], "preset paper needs a tokenizer.json"),
        (["train", "autoencoder", "--preset", "nope"], "unknown preset 'nope'"),
        (["train", "autoencoder", "--preset", "paper"], "pass --tokenizer PATH"),
        (["train", "autoencoder", "--preset", "tiny", "--corpus", "missing"], "does not exist"),
        (["train", "autoencoder", "--preset", "tiny", "--corpus", "."], "is empty"),
        (["train", "autoencoder", "--tokenizer", "words"], "expected bytes, bpe:<size>"),
        (["train", "autoencoder", "--preset", "tiny", "--block-length", "30"],
         "block length 30 is not a multiple of the patch size 4"),
        (["train", "autoencoder", "--preset", "tiny", "--patch-size", "0"], "patch size"),
        (["train", "autoencoder", "--preset", "tiny", "--patch-size", "5"], "not a multiple"),
        (["train", "autoencoder", "--preset", "tiny", "--steps", "0"], "steps: expected"),
        (["train", "autoencoder", "--preset", "tiny", "--lr", "-1"], "learning rate: expected"),
        (["train", "energy", "--autoencoder", "missing"], "missing does not exist"),
        (["train", "energy", "--autoencoder", "."], "is not a run"),
        (["evaluate", "missing"], "missing does not exist"),
        (["evaluate", "."], "is not a run"),
        (["evaluate", ".", "--samples", "1"], "samples: expected at least 2"),
        (["evaluate", ".", "--blocks", "0"], "blocks: expected at least 1"),
        (["generate", "--model", "missing", "--prompt", "x"], "missing does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_with_the_fix(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in command(*arguments).error()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--num-samples", "1"], "num_samples: expected at least 2"),
        (["--alpha", "2"], "alpha: expected 0 < alpha < 2"),
        (["--block-length", "33"], "not a multiple of the patch size"),
    ],
)
def test_a_bad_number_for_the_language_model_is_an_error(
    command: Any, run_copy: Path, tmp_path: Path, option: list[str], message: str
) -> None:
    before = snapshot(run_copy)
    outcome = command(
        "train", "energy", "--autoencoder", run_copy, "--output", tmp_path / "new", *option
    )
    assert message in outcome.error()
    assert snapshot(run_copy) == before


def test_a_finished_model_is_not_replaced_unasked(
    command: Any, run_copy: Path, corpus: Path
) -> None:
    before = snapshot(run_copy)
    outcome = command("train", "energy", "--autoencoder", run_copy / "autoencoder")
    assert "already holds a trained model" in outcome.error()
    outcome = command(
        "train", "autoencoder", "--preset", "tiny", "--corpus", corpus, "--output", run_copy,
        "--resume", "--lr", "0.5",
    )  # fmt: skip
    assert "other settings" in outcome.error()
    models = {p: c for p, c in before.items() if p.suffix == ".safetensors"}
    assert {path: path.read_bytes() for path in models} == models


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("what", ["evaluate", "generate", "train"])
def test_a_damaged_checkpoint_is_an_error(
    command: Any, run_copy: Path, tmp_path: Path, what: str, file: str
) -> None:
    kind = "autoencoder" if what == "train" else "energy"
    path = run_copy / kind / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    arguments: dict[str, list[object]] = {
        "evaluate": ["evaluate", run_copy / kind],
        "generate": ["generate", "--model", run_copy / kind, "--prompt", "x"],
        "train": ["train", "energy", "--autoencoder", run_copy / kind, "--output", tmp_path / "n"],
    }
    error = command(*arguments[what]).error()
    assert str(run_copy) in error
    assert "cannot be loaded" in error or "is not a run" in error


def test_a_model_without_held_out_data_is_an_error(command: Any, run_copy: Path) -> None:
    alone = run_copy.parent / "alone"
    (run_copy / "energy").rename(alone)
    assert "holds no prepared data" in command("evaluate", alone).error()
    assert command("evaluate", alone, "--data", run_copy / "data", "--blocks", "2").code == 0


def test_data_of_another_vocabulary_is_an_error(
    command: Any, run_copy: Path, corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    few = ("--tokenizer", "bpe:320", "--steps", "1", "--cpu")
    assert command(
        "train", "autoencoder", "--preset", "tiny", "--corpus", corpus, "--output", other, *few
    ).code == 0  # fmt: skip
    outcome = command("evaluate", run_copy / "energy", "--data", other / "data")
    assert "knows 258 token ids" in outcome.error()


def test_a_full_disk_is_an_error_that_keeps_the_run(
    command: Any, run_copy: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(run_copy)

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "open", full, raising=False)
    outcome = command(
        "demo", "--preset", "tiny", "--corpus", corpus, "--output", run_copy, "--cpu", "--seed", "3"
    )
    assert "no space left on the disk" in outcome.error()
    assert snapshot(run_copy) == before


def test_debug_shows_the_traceback_before_the_sentence(command: Any, tmp_path: Path) -> None:
    outcome = command("evaluate", tmp_path / "missing", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")


def raising(error: BaseException) -> Callable[[], None]:
    def report() -> None:
        raise error

    return report


def test_a_defect_says_so_and_exits_with_one(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_kernels.cli.doctor.report", raising(KeyError("x")))
    outcome = command("doctor")
    assert outcome.code == 1
    assert "unexpected KeyError" in outcome.err and "--debug" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_interrupt_exits_with_130(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_kernels.cli.doctor.report", raising(KeyboardInterrupt()))
    outcome = command("doctor")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(("missing", "extra"), [("transformers", "models"), ("rich", "train")])
def test_a_missing_extra_gives_the_pip_command(
    command: Any, monkeypatch: pytest.MonkeyPatch, missing: str, extra: str
) -> None:
    monkeypatch.setattr(
        "calm_kernels.cli.doctor.report",
        raising(ModuleNotFoundError(f"No module named '{missing}'", name=missing)),
    )
    assert f"pip install 'calm_kernels[{extra}]'" in command("doctor").error()


def test_without_matplotlib_or_tokenizers_the_error_gives_the_pip_command(
    command: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "tokenizers":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    outcome = command(
        "train", "autoencoder", "--preset", "tiny", "--corpus", corpus, "--output", tmp_path / "r",
        "--tokenizer", "bpe:320",
    )  # fmt: skip
    assert "pip install 'calm_kernels[train]'" in outcome.error()
    assert environment.versions()["torch"]
