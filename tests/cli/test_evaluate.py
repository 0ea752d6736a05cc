"""Several runs in one table: asked the same, beside what they cost."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from calm_kernels.cli import main
from calm_kernels.models import AutoregressiveBaseline, BaselineConfig, flops
from calm_kernels.training.comparison import training_flops
from calm_kernels.training.runs import load_model

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_models.py"
FEW = ("--steps", "2", "--batch-size", "2", "--cpu")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of K = 2, an energy model and a baseline, with blocks of 64 tokens."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("pair") / "k2"
    text = ["--preset", "tiny", "--corpus", str(corpus), "--output", str(run)]
    commands = (
        ["autoencoder", *text, "--patch-size", "2"],
        ["energy", "--autoencoder", str(run / "autoencoder"), "--accumulation", "3"],
        ["baseline", *text, "--block-length", "48"],
    )
    for arguments in commands:
        assert main(["train", *arguments, *FEW]) == 0
    return run


def evaluated(command: Any, *arguments: object) -> list[dict[str, Any]]:
    outcome = command("evaluate", *arguments, "--blocks", "3", "--samples", "2", "--json", "--cpu")
    assert outcome.code == 0, outcome.err
    rows: list[dict[str, Any]] = json.loads(outcome.out)
    return rows


def test_all_language_models_are_scored_on_the_same_positions(
    command: Any, pair: Path, finished: Path
) -> None:
    rows = evaluated(command, pair, finished)
    assert [row["model"] for row in rows] == [
        "autoencoder", "energy", "baseline", "autoencoder", "energy",
    ]  # fmt: skip
    models = [row for row in rows if row["model"] != "autoencoder"]
    assert [row["patch_size"] for row in models] == [2, None, 4]
    for row in models:
        assert (row["block_length"], row["stride"]) == (48, 4)
        assert row["positions"] == 3 * 11
        assert row["unigram_brier_lm"] == models[0]["unigram_brier_lm"]
        assert row["context"] == 48
    alone = evaluated(command, pair / "energy")[0]
    assert (alone["block_length"], alone["stride"], alone["positions"]) == (64, 2, 3 * 30)


def test_costs_follow_the_sizes_and_the_record_of_the_training(
    command: Any, pair: Path, tmp_path: Path
) -> None:
    autoencoder, energy, baseline = evaluated(command, pair, "--candidates", "50")
    layer = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    per_token = 2 * (layer + 4 * 48 * 32) + 2 * 32 * 258
    assert baseline["flops_per_token"] == baseline["flops_per_token_with_candidates"] == per_token
    trained = 2 * (layer + 4 * 47 * 32) + 2 * 32 * 258
    assert baseline["flops_training"] == 2 * 2 * 47 * 3 * trained
    assert baseline["flops_autoencoder_training"] is None
    assert energy["flops_autoencoder_training"] == autoencoder["flops_training"] > 0
    draw = 2 * (8 * 32 + 5 * 32 * 32 + 32 * 32 + 32 * 16)
    ffn = 6 * 32 * 64
    decode = 2 * 16 * 32 + ffn + 2 * 32 * 64 + 2 * (ffn + 2 * 32 * 258)
    shown = ("flops_per_token", "flops_per_token_with_candidates", "flops_per_token_without_decode")
    one, many, latent = (energy[name] for name in shown)
    assert many - one == 49 * (draw + decode) / 2
    assert one - latent == decode / 2

    step = flops.training_step(load_model("energy", pair / "energy").config, 2, 64).total
    assert energy["flops_training"] == 2 * 3 * step  # steps and accumulation

    copy = Path(shutil.copytree(pair, tmp_path / "copy"))
    record = json.loads((copy / "energy" / "stage.json").read_text(encoding="utf-8"))
    record["settings"]["autoencoder"] = "0" * 64  # another than the one that lies there
    (copy / "energy" / "stage.json").write_text(json.dumps(record))
    assert evaluated(command, copy / "energy")[0]["flops_autoencoder_training"] is None
    (copy / "energy" / "stage.json").unlink()
    assert evaluated(command, copy / "energy")[0]["flops_training"] is None


def test_the_table_is_written_as_markdown_and_drawn(
    command: Any, pair: Path, finished: Path, tmp_path: Path
) -> None:
    markdown, plot = tmp_path / "docs" / "table.md", tmp_path / "docs" / "plot.png"
    outcome = command(
        "evaluate", pair, finished, "--blocks", "2", "--samples", "2", "--cpu",
        "--markdown", markdown, "--plot", plot,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = markdown.read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 5 and len({line.count("|") for line in table}) == 1
    assert "the same 22 positions, multiples of 4" in lines[-1]
    shown = [line for line in outcome.out.splitlines() if " ± " in line]
    assert len(shown) == 3 and max(map(len, shown)) <= 120


def test_models_of_other_texts_are_said_not_to_be_comparable(
    command: Any, pair: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    for year in range(1990, 1996):
        (tmp_path / "texts" / f"{year}.txt").write_text("some other words " * 200)
    other = tmp_path / "other"
    trained = command(
        "train", "baseline", "--preset", "tiny", "--corpus", tmp_path / "texts", "--output", other,
        *FEW,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    outcome = command("evaluate", pair, other, "--blocks", "2", "--samples", "2", "--cpu")
    assert outcome.code == 0
    assert "2 different texts or tokenizers" in outcome.out


def test_a_plot_that_cannot_be_drawn_is_refused_at_once(command: Any, pair: Path) -> None:
    error = command("evaluate", pair, "--plot", "plot.txt").error()
    assert ".png, .svg, .pdf" in error and "plot.txt" in error
    error = command("evaluate", pair / "autoencoder", "--plot", "plot.png", "--blocks", "1").error()
    assert "no language model" in error
    assert (
        "candidates: expected at least 1" in command("evaluate", pair, "--candidates", "0").error()
    )


@pytest.fixture(scope="session")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("compare_models", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["compare_models"] = module
    specification.loader.exec_module(module)
    return module


def test_a_comparison_trains_at_equal_operations_and_goes_on_where_it_was(
    script: ModuleType,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, output = tmp_path / "runs", tmp_path / "page.md"
    arguments = [
        "compare_models.py", folder, "--preset", "tiny", "--patch-sizes", "1", "4", "--steps", "5",
        "--autoencoder-steps", "2", "--corpus", corpus, "--blocks", "3", "--output", output,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    script.main()
    weights = sorted(folder.glob("*/*/model.safetensors"))
    assert len(weights) == 5
    times = [path.stat().st_mtime_ns for path in weights]
    rows = [r for r in output.read_text(encoding="utf-8").splitlines() if r.startswith("|")]
    assert sum("±" in line for line in rows) == 3
    assert output.with_suffix(".png").is_file()
    costs = {}
    for kind, run in (("energy", "k1"), ("energy", "k4"), ("baseline", "baseline")):
        record = json.loads((folder / run / kind / "stage.json").read_text(encoding="utf-8"))
        costs[run] = training_flops(load_model(kind, folder / run / kind).config, record)
    assert costs["k1"] == pytest.approx(costs["k4"], rel=0.15)
    assert costs["baseline"] == pytest.approx(costs["k4"], rel=0.15)

    capsys.readouterr()
    script.main()
    assert "training the" not in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in weights] == times


@torch.no_grad()
def test_draws_alone_give_the_baseline_the_score_that_its_probabilities_give(
    script: ModuleType,
) -> None:
    torch.manual_seed(3)
    config = BaselineConfig(
        vocab_size=3, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, init_scheme="width_scaled",
    )  # fmt: skip
    model = AutoregressiveBaseline(config).eval()
    model.lm_head.weight.mul_(2)
    ids = torch.randint(0, 3, (1, 16)).expand(500, -1)
    exact = model.evaluate_brier(ids, num_samples=8, seed=1, stride=4).scores.double()
    drawn = script.BlackBox(model).evaluate_brier(ids, num_samples=4, seed=2, stride=4)
    difference = drawn.scores.double().unflatten(0, (500, 3)) - exact.unflatten(0, (500, 3))
    error = difference.std(dim=0) / 500**0.5
    # Twelve scores: false alarm below 1e-5 at five standard errors.
    assert (difference.mean(dim=0).abs() < 5 * error).all()
    assert (error < 0.05).all() and (error > 0).all()
