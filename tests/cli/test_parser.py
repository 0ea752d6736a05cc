"""Help teaches, and unknown words are refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

COMMANDS = (
    ["doctor"], ["demo"], ["train", "autoencoder"], ["train", "energy"], ["train", "baseline"],
    ["evaluate"], ["generate"],
)  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_explains_every_option_and_gives_an_example(command: Any, words: list[str]) -> None:
    outcome = command(*words, "--help")
    assert outcome.code == 0
    assert f"example:\n  calm-kernels {' '.join(words)}" in outcome.out


def test_the_first_page_names_every_command(command: Any) -> None:
    outcome = command("--help")
    assert outcome.code == 0
    for words in COMMANDS:
        assert words[0] in outcome.out


@pytest.mark.parametrize("words", [[], ["fly"], ["train"], ["generate"], ["demo", "--fast"]])
def test_a_wrong_word_is_refused_with_code_2(command: Any, words: list[str]) -> None:
    outcome = command(*words)
    assert outcome.code == 2
    assert "usage: calm-kernels" in outcome.err


def test_the_command_line_loads_no_training_library_before_it_needs_one() -> None:
    program = (
        "import sys, calm_kernels.cli; "
        "sys.exit(any(name in sys.modules for name in ('transformers', 'rich', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
