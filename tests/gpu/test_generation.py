"""Generation on a GPU: one CUDA graph a step, nothing read back, the tokens of plain steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calm_kernels.models import (
    Autoencoder,
    AutoencoderConfig,
    CalmConfig,
    EnergyTransformer,
    generation,
)
from calm_kernels.models.cached_backbone import DynamicBackbone
from calm_kernels.models.device_steps import DeviceSteps

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6], list(range(20))]


@pytest.fixture
def model(device: torch.device) -> EnergyTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 37, "latent_size": 16, "init_scheme": "width_scaled"}
    autoencoder = Autoencoder(AutoencoderConfig(hidden_size=32, intermediate_size=48, **sizes))
    config = CalmConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        noise_size=8,
        num_mlp_layers=2,
        **sizes,
    )
    model = EnergyTransformer(config, autoencoder=autoencoder).eval()
    with torch.no_grad():
        model.mlp_generator.final_layer.linears[2].weight.normal_()
    return model.to(device).double()


def generate(model: EnergyTransformer, **options: Any) -> torch.Tensor:
    return model.generate(PROMPTS, max_new_tokens=100, num_candidates=50, **options).sequences


@pytest.mark.parametrize("temperature", [1.0, 0.5, torch.tensor([0.5, 1.0, 0.3])], ids=str)
def test_replayed_steps_give_the_tokens_of_plain_ones(
    model: EnergyTransformer, temperature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal replays
        replays += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    for seed in (1, 2):
        before = replays
        tokens = generate(model, temperature=temperature, seed=seed)
        assert replays - before >= 20
        with monkeypatch.context() as patch:
            patch.setattr(generation, "make_backbone", lambda m, c, _: DynamicBackbone(m, c))
            assert torch.equal(tokens, generate(model, temperature=temperature, seed=seed))


def test_step_that_cannot_be_recorded_runs_plainly(
    model: EnergyTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, temperature=0.5, seed=3)
    step = DeviceSteps._feed_and_draw

    def looks(steps: DeviceSteps) -> None:
        step(steps)
        steps._last.tolist()

    monkeypatch.setattr(DeviceSteps, "_feed_and_draw", looks)
    assert torch.equal(generate(model, temperature=0.5, seed=3), expected)


def test_steps_read_nothing_back(model: EnergyTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = DeviceSteps.run

    def watched(steps: DeviceSteps, count: int) -> torch.Tensor:
        if steps._graph is None:
            return run(steps, count)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(steps, count)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(DeviceSteps, "run", watched)
    generate(model, temperature=0.5, seed=4)
