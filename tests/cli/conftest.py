"""The command line called in this process, and one finished run to look at."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from calm_kernels.cli import main

WORDS = "the people of this nation have peace and union with congress under law".split()  # noqa: SIM905


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of an error of the user."""
        assert self.code == 2
        assert "Traceback" not in self.err + self.out
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert self.err.splitlines()[-1] == lines[0]
        return lines[0]


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line with arguments."""
    monkeypatch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six years of text."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(1)
    for year in range(2001, 2007):
        words = " ".join(generator.choice(WORDS) for _ in range(700))
        (folder / f"{year}.txt").write_text(words + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished demo run; copy it before changing it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "demo"
    arguments = ["demo", "--preset", "tiny", "--corpus", str(corpus), "--output", str(folder)]
    assert main([*arguments, "--cpu"]) == 0
    return folder


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
