"""Generation from the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


def generate(command: Any, run: Path, *more: object) -> Any:
    return command(
        "generate", "--model", run, "--max-new-tokens", "12", "--num-candidates", "8", "--cpu",
        *more,
    )  # fmt: skip


def test_a_prompt_is_printed_with_its_continuation(command: Any, finished: Path) -> None:
    outcome = generate(command, finished, "--prompt", "the people: ")
    assert outcome.code == 0
    assert outcome.out.startswith("the people: ")
    assert len(outcome.out) > len("the people: \n")
    assert generate(command, finished, "--prompt", "the people: ").out == outcome.out


def test_several_prompts_make_a_batch(command: Any, finished: Path) -> None:
    outcome = generate(
        command, finished / "energy", "--prompt", "the nation: ", "--prompt", "law ",
        "--temperature", "1", "--sampler", "exact",
    )  # fmt: skip
    assert outcome.code == 0
    first, second = outcome.out.split("\n\n", 1)
    assert first.startswith("the nation: ") and second.startswith("law")


def test_a_folder_without_tokenizer_takes_one_from_the_option(command: Any, run_copy: Path) -> None:
    (run_copy / "energy" / "calm_tokenizer.json").unlink()
    outcome = generate(command, run_copy, "--prompt", "law ")
    assert "holds no tokenizer" in outcome.error()
    assert generate(command, run_copy, "--prompt", "law ", "--tokenizer", "bytes").code == 0


@pytest.mark.parametrize("temperature", ["0", "-1", "1.01", "nan"])
def test_a_temperature_outside_its_range_is_an_error(
    command: Any, finished: Path, temperature: str
) -> None:
    outcome = generate(command, finished, "--prompt", "x", "--temperature", temperature)
    assert "temperature: expected 0 < T <= 1" in outcome.error()


def test_an_autoencoder_cannot_generate(command: Any, run_copy: Path) -> None:
    outcome = generate(command, run_copy / "autoencoder", "--prompt", "x")
    assert "holds an autoencoder, but an energy model or a baseline is needed" in outcome.error()
    shutil.rmtree(run_copy / "energy")
    assert "is needed" in generate(command, run_copy, "--prompt", "x").error()
