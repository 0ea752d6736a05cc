"""The demo leaves what it promises, and a second one reuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calm_kernels.training.environment import operators

PROMISED = {
    "ae_token_accuracy", "brier_lm", "brier_1", "brier_2", "brier_3", "brier_4",
    "unigram_brier_lm", "seconds",
}  # fmt: skip


def metrics_of(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return loaded


def test_a_demo_leaves_metrics_a_picture_a_sample_and_models(finished: Path) -> None:
    metrics = metrics_of(finished)
    assert set(metrics) >= PROMISED
    assert all(isinstance(metrics[name], float) for name in PROMISED)
    assert 0 < metrics["ae_token_accuracy"] <= 1
    assert 0 < metrics["unigram_brier_lm"] < 100
    assert metrics["seconds"] > 0
    assert metrics["backends"] == {n: s["serves"] for n, s in operators("cpu").items()}
    assert (metrics["preset"], metrics["seed"], metrics["device"]) == ("tiny", 0, "cpu")
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "The people: |" in (finished / "sample.txt").read_text(encoding="utf-8")
    for kind in ("autoencoder", "energy"):
        names = {path.name for path in (finished / kind).iterdir()}
        assert names == {
            "config.json", "model.safetensors", "calm_tokenizer.json", "history.jsonl",
            "stage.json",
        }  # fmt: skip


def test_a_second_demo_reuses_everything_and_says_so(command: Any, corpus: Path,
                                                     run_copy: Path) -> None:  # fmt: skip
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in run_copy.rglob("*")
        if path.suffix in (".safetensors", ".bin")
    }
    old = metrics_of(run_copy)
    outcome = command("demo", "--preset", "tiny", "--corpus", corpus, "--output", run_copy, "--cpu")
    assert outcome.code == 0
    for kind in ("data", "autoencoder", "energy", "sample"):
        assert any(line.startswith(f"{kind}: reusing") for line in outcome.err.splitlines()), kind
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before
    new = metrics_of(run_copy)
    assert sorted(new["reused"]) == ["autoencoder", "data", "energy", "sample"]
    assert {name: new[name] for name in PROMISED} == {name: old[name] for name in PROMISED}
    assert "CALM demo" in outcome.out and "The people: |" in outcome.out


def test_a_changed_seed_trains_again_but_keeps_the_data(
    command: Any, corpus: Path, run_copy: Path
) -> None:
    outcome = command(
        "demo", "--preset", "tiny", "--corpus", corpus, "--output", run_copy, "--cpu",
        "--seed", "5",
    )  # fmt: skip
    assert outcome.code == 0
    assert "settings changed (seed 0 -> 5)" in outcome.err
    metrics = metrics_of(run_copy)
    assert metrics["reused"] == ["data"]
    assert metrics["seed"] == 5


def test_progress_and_losses_are_shown_while_training(
    command: Any, corpus: Path, tmp_path: Path
) -> None:
    outcome = command(
        "train", "autoencoder", "--preset", "tiny", "--corpus", corpus, "--output",
        tmp_path / "r", "--steps", "6", "--cpu",
    )  # fmt: skip
    assert outcome.code == 0
    assert "training the autoencoder: 6/6" in outcome.err
    assert "loss" in outcome.err
    assert "token accuracy" in outcome.out
