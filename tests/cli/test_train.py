"""Training step by step from the command line, resumed after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def arguments(corpus: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "autoencoder", "--preset", "tiny", "--corpus", str(corpus), "--output",
        str(output), "--cpu", *more,
    ]  # fmt: skip


def test_all_models_of_a_run_are_trained_and_scored(
    command: Any, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    few = ("--steps", "4", "--batch-size", "2", "--block-length", "32", "--cpu")
    bpe = ("--tokenizer", "bpe:320")
    assert command(*arguments(corpus, run, *few, *bpe, "--patch-size", "2")).code == 0
    outcome = command(
        "train", "energy", "--autoencoder", run / "autoencoder", *few, "--num-samples", "3",
        "--estimator", "monte_carlo", "--alpha", "0.75",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "BrierLM" in outcome.out
    outcome = command(
        "train", "baseline", "--preset", "tiny", "--corpus", corpus, "--output", run, *bpe, *few,
        "--patch-size", "2",
    )  # fmt: skip
    assert outcome.code == 0
    assert "data: reusing" in outcome.err
    config = json.loads((run / "energy" / "config.json").read_text(encoding="utf-8"))
    assert (config["patch_size"], config["num_samples"], config["alpha"]) == (2, 3, 0.75)
    assert config["estimator"] == "monte_carlo"
    assert config["vocab_size"] > 257

    outcome = command("evaluate", run, "--blocks", "3", "--samples", "2", "--json", "--cpu")
    assert outcome.code == 0
    rows = json.loads(outcome.out)
    assert [row["model"] for row in rows] == ["autoencoder", "energy", "baseline"]
    assert rows[1]["positions"] == rows[2]["positions"] > 0
    assert rows[1]["unigram_brier_lm"] == rows[2]["unigram_brier_lm"]
    table = command("evaluate", run / "energy", run, "--blocks", "2", "--cpu")
    assert table.code == 0
    assert table.out.count("energy") >= 2 and "±" in table.out


def test_an_autoencoder_can_serve_a_language_model_of_another_run(
    command: Any, finished: Path, corpus: Path, tmp_path: Path
) -> None:
    outcome = command(
        "train", "energy", "--autoencoder", finished, "--output", tmp_path / "other", "--steps",
        "2", "--cpu",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    header = json.loads((tmp_path / "other" / "data" / "data.json").read_text(encoding="utf-8"))
    assert header["corpus"] == str(corpus)


def test_a_killed_training_resumes_to_the_same_weights(
    command: Any, corpus: Path, tmp_path: Path
) -> None:
    steps = ("--steps", "120", "--save-every", "10", "--evaluate-every", "1000")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "calm_kernels", *arguments(corpus, killed, *steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    checkpoints = killed / "autoencoder" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "autoencoder" / "model.safetensors").exists()

    outcome = command(*arguments(corpus, killed, *steps, "--resume"))
    assert outcome.code == 0
    assert "continuing from step" in outcome.err
    assert command(*arguments(corpus, whole, *steps)).code == 0
    first = load_file(killed / "autoencoder" / "model.safetensors")
    second = load_file(whole / "autoencoder" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_language_models_with_other_heads_are_trained_scored_and_write(
    command: Any, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    few = ("--steps", "3", "--batch-size", "2", "--block-length", "32", "--cpu")
    assert command(*arguments(corpus, run), *few[:-1]).code == 0
    for head in ("flow", "diffusion"):
        output = tmp_path / head
        trained = command(
            "train", "energy", "--autoencoder", run / "autoencoder", "--output", output, *few,
            "--head", head, "--sampling-steps", "3", "--num-samples", "2",
        )  # fmt: skip
        assert trained.code == 0, trained.err
        config = json.loads((output / "energy" / "config.json").read_text(encoding="utf-8"))
        chosen = (config["head_type"], config["sampling_steps"], config["num_samples"])
        assert chosen == (head, 3, 2)
        scored = command("evaluate", output, "--blocks", "2", "--samples", "2", "--json", "--cpu")
        assert scored.code == 0 and json.loads(scored.out)[0]["positions"] > 0
        written = command(
            "generate", "--model", output, "--prompt", "The people: ", "--max-new-tokens", "8",
            "--num-candidates", "4", "--cpu",
        )  # fmt: skip
        assert written.code == 0, written.err


def test_options_that_a_head_would_not_read_are_refused(
    command: Any, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command(*arguments(corpus, run, "--steps", "1")).code == 0
    for head, option in (("flow", "--alpha=1.5"), ("energy", "--sampling-steps=4")):
        refused = command(
            "train", "energy", "--autoencoder", run / "autoencoder", "--head", head, option, "--cpu"
        )
        assert refused.code != 0
        assert option.split("=")[0] in refused.err and f"the {head} head" in refused.err
