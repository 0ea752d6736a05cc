"""A corpus written here, its tokens, and small stages."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calm_kernels.training.data import TokenData, prepare_data
from calm_kernels.training.presets import Preset, preset

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside the tests

WORDS = """
the people of this nation have peace and union with congress under law for every citizen who will
work in freedom année €uro
"""
FIRST_YEAR, LAST_YEAR = 1990, 1999


def write_corpus(folder: Path) -> Path:
    """Ten years of text, two files in 1997 and 1999."""
    generator = random.Random(5)
    folder.mkdir(parents=True)
    for year in range(FIRST_YEAR, LAST_YEAR + 1):
        for part in range(2 if year in (1997, 1999) else 1):
            words = " ".join(generator.choice(WORDS.split()) for _ in range(400))
            (folder / f"{year}-Speaker-{part}.txt").write_text(words + "\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus_writer() -> Callable[[Path], Path]:
    return write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> TokenData:
    return prepare_data(tmp_path / "data", corpus=str(corpus), validation_fraction=0.2)


@pytest.fixture
def tiny() -> Callable[..., Preset]:
    """The tiny preset with another optimization, and no evaluation while it trains."""

    def make(**optimization: Any) -> Preset:
        values: dict[str, Any] = {"steps": 8, "save_every": 3, "evaluate_every": 1000}
        values.update(optimization)
        chosen = preset("tiny")
        return replace(
            chosen,
            **{
                kind: replace(
                    getattr(chosen, kind),
                    optimization=replace(getattr(chosen, kind).optimization, **values),
                )
                for kind in ("autoencoder", "energy", "baseline")
            },
        )

    return make
