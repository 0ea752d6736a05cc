"""The count of operations against torch's own counter, on plain PyTorch at odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from calm_kernels.models import (
    Autoencoder,
    AutoencoderConfig,
    AutoregressiveBaseline,
    CalmConfig,
    EnergyTransformer,
    flops,
)
from calm_kernels.models.configuration import as_plain_dict
from calm_kernels.models.draws import Drawer

MakeModel = Callable[..., EnergyTransformer]
ODD: dict[str, Any] = {
    "hidden_size": 20, "intermediate_size": 27, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip


def plain_block(e: Tensor, condition: Tensor, *weights: Tensor, eps: float) -> Tensor:
    """The energy head's block: the half of its first layer that reads the condition runs once."""
    norm, norm_bias, first, first_bias, mid, mid_bias, last, last_bias, down, down_bias = weights
    size = e.shape[-1]
    normed = F.layer_norm(e, (size,), norm, norm_bias, eps)
    shared = F.linear(condition, first[:, size:], first_bias).unsqueeze(-2)
    x = F.linear(F.silu(F.linear(normed, first[:, :size]) + shared), mid, mid_bias)
    gate, up = F.linear(F.silu(x), last, last_bias).chunk(2, dim=-1)
    return e + F.linear(F.silu(gate) * up, down, down_bias)


def plain_ffn(
    x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, eps: float
) -> Tensor:
    normed = F.rms_norm(x, (x.shape[-1],), norm, eps)
    return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def plain_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, **settings: Any) -> Any:
    loss = F.cross_entropy(F.linear(hidden, weight).flatten(0, -2), target.flatten())
    info = SimpleNamespace(correct=torch.zeros(1), num_rows=torch.ones(1))
    return (loss, info) if settings.get("return_info") else loss


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers in plain PyTorch: the counter does not look into the package's operators."""
    monkeypatch.setattr("calm_kernels.nn.energy_head.energy_head_block", plain_block)
    for name in ("why_not_first_block", "why_not_output"):
        monkeypatch.setattr(
            f"calm_kernels.nn.energy_head.{name}", lambda *_: "operations are counted"
        )
    monkeypatch.setattr("calm_kernels.nn.gated_ffn.gated_ffn", plain_ffn)
    monkeypatch.setattr("calm_kernels.models.decoder_layer.gated_ffn", plain_ffn)
    for name in ("nn.linear_cross_entropy", "models.baseline"):
        monkeypatch.setattr(f"calm_kernels.{name}.linear_cross_entropy", plain_cross_entropy)
    monkeypatch.setattr(
        "calm_kernels.nn.patch_codec.linear_argmax",
        lambda hidden, weight: F.linear(hidden, weight).argmax(dim=-1),
    )


def measured(run: Callable[[], Any], *, backward: bool = False) -> int:
    """Operations that torch sees, without those of the rotary angles."""
    counter = FlopCounterMode(display=False)
    with counter:
        result = run()
        if backward:
            result.backward()
    angles = sum(
        sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.endswith(".rotary_emb")
    )
    return int(counter.get_total_flops()) - angles


def eager(model: Any) -> Any:
    """With attention as two products: the counter does not know the fused one of CPUs."""
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("patch_size", [1, 3])
@pytest.mark.parametrize("head", ["energy", "flow", "diffusion"])
def test_a_training_step_of_calm_is_counted(
    make_energy_transformer: MakeModel, patch_size: int, head: str
) -> None:
    model = eager(make_energy_transformer(patch_size, head_type=head, num_samples=5, **ODD))
    model.train().ae_model.fold()
    ids = torch.randint(0, 23, (2, 7 * patch_size))

    def loss() -> Tensor:
        value: Tensor = model(ids, seed=0).loss
        return value

    expected = flops.training_step(model.config, 2, 7 * patch_size)
    assert measured(loss, backward=True) == expected.total
    with torch.no_grad():
        assert measured(loss) == expected.forward


def test_a_frozen_encoder_too_large_for_tables_keeps_its_squeeze(
    make_energy_transformer: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("autoencoder", "flops"):
        monkeypatch.setattr(f"calm_kernels.models.{name}.LARGEST_SQUEEZED_TABLES", 1)
    model = eager(make_energy_transformer(3, **ODD)).train()
    assert model.ae_model.fold().encoder.folded.mode == "table"
    ids = torch.randint(0, 23, (2, 12))
    expected = flops.training_step(model.config, 2, 12)
    assert measured(lambda: model(ids, seed=0).loss, backward=True) == expected.total


def test_a_training_step_of_the_baseline_is_counted(
    make_baseline: Callable[..., AutoregressiveBaseline],
) -> None:
    model = eager(make_baseline(**ODD)).train()
    ids = torch.randint(0, 23, (3, 11))
    expected = flops.training_step(model.config, 3, 11)
    assert measured(lambda: model(ids, labels=ids).loss, backward=True) == expected.total


@pytest.mark.parametrize("sequences", [1, 5], ids=["few tokens", "more tokens than ids"])
@pytest.mark.parametrize("layers", [2, 4])
def test_a_training_step_of_the_autoencoder_is_counted(
    make_autoencoder: Callable[..., Autoencoder], sequences: int, layers: int
) -> None:
    model = make_autoencoder(3, num_encoder_layers=layers, num_decoder_layers=layers).train()
    ids = torch.randint(0, 23, (sequences, 9))
    expected = flops.training_step(model.config, sequences, 9)
    assert measured(lambda: model(ids, seed=0).loss, backward=True) == expected.total


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 3])
@pytest.mark.parametrize(
    ("head", "steps"), [("energy", None), ("flow", 3), ("flow", None), ("diffusion", 4)]
)
def test_a_generated_patch_of_calm_is_counted(
    make_energy_transformer: MakeModel, patch_size: int, head: str, steps: int | None
) -> None:
    """One step from a cache, its draws and their decode."""
    settings = {"head_type": head, "sampling_steps": steps}
    model = eager(make_energy_transformer(patch_size, **settings, **ODD))
    patches = torch.randint(0, 23, (1, 6, patch_size))
    cache = DynamicCache(config=model.config)
    model.hidden_states(patches[:, :5], cache=cache)
    noise = torch.rand(9, 1, model.mlp_generator.noise_size) - 0.5
    drawer = Drawer(model, 9)

    def step() -> Tensor:
        return drawer.patches(model.hidden_states(patches[:, 5:], cache=cache)[:, 0], noise)

    expected = flops.per_token(model.config, 6 * patch_size, num_candidates=9)
    assert measured(step) == pytest.approx(patch_size * expected, rel=1e-12)


@torch.no_grad()
def test_a_latent_without_its_decode_is_counted(make_energy_transformer: MakeModel) -> None:
    model = eager(make_energy_transformer(3, **ODD))
    patches = torch.randint(0, 23, (1, 6, 3))
    cache = DynamicCache(config=model.config)
    model.hidden_states(patches[:, :5], cache=cache)

    def step() -> Tensor:
        hidden = model.hidden_states(patches[:, 5:], cache=cache)[:, 0]
        latents: Tensor = model.mlp_generator(hidden, 1, seed=0)
        return latents

    expected = flops.per_token_without_decode(model.config, 18)
    assert measured(step) == pytest.approx(3 * expected, rel=1e-12)


@torch.no_grad()
def test_a_generated_token_of_the_baseline_is_counted(
    make_baseline: Callable[..., AutoregressiveBaseline],
) -> None:
    model = eager(make_baseline(**ODD))
    ids = torch.randint(0, 23, (1, 8))
    cache = DynamicCache(config=model.config)
    model.hidden_states(ids[:, :7], cache=cache)
    counted = measured(lambda: model.lm_head(model.hidden_states(ids[:, 7:], cache=cache)))
    assert counted == flops.per_token(model.config, 8, num_candidates=200)


def test_the_decode_dominates_at_the_sizes_of_the_paper() -> None:
    """From the sizes alone: 200 candidates of four tokens over 128257 entries of width 512."""
    autoencoder = AutoencoderConfig()
    config = CalmConfig(autoencoder_config=as_plain_dict(autoencoder))
    logits = 2 * 512 * 128257 * 200
    blocks = 200 * (2 * 3 * 512 * 1280 * (1 + 4) + 2 * 128 * 512 + 2 * 512 * 2048) / 4
    head = 200 * (2 * 64 * 1024 + 4 * 10 * 1024**2 + 2 * 1024**2 + 2 * 1024 * 128) / 4
    total = flops.per_token(config, 2048, num_candidates=200)
    shared = total - logits - blocks - head
    layer = 2 * 4 * 1024**2 + 2 * 3 * 1024 * 2752 + 4 * 512 * 1024
    own = 16 * layer + 2 * 4 * 1024 * 2048 + 2 * 2048 * 1024 + 5 * 2 * 1024**2
    assert shared == pytest.approx(own / 4, rel=1e-9)
    assert logits / total > 0.8


def test_a_language_model_without_its_autoencoder_s_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="autoencoder"):
        flops.per_token(CalmConfig(), 64)


def linear_modules(model: nn.Module) -> int:
    return sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def test_the_backbone_costs_two_operations_a_weight_and_its_attention(
    make_baseline: Callable[..., AutoregressiveBaseline],
) -> None:
    model = make_baseline(**ODD)
    expected = linear_modules(model.model) + 3 * 4 * 9 * (4 * 6)
    assert flops.backbone_step(model.config, 9).forward == expected
