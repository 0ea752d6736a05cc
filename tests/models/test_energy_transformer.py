"""The energy transformer: its loss against a plain formulation, masks, frozen autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import calm_kernels
from calm_kernels.models import Autoencoder, CalmConfig, EnergyTransformer
from calm_kernels.ops.energy_score import energy_score

MakeAutoencoder = Callable[..., Autoencoder]
MakeEnergyTransformer = Callable[..., EnergyTransformer]


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, 23, shape)


def plain_scores(model: EnergyTransformer, ids: Tensor, seed: int) -> Tensor:
    """Energy scores [B, n-1] with nothing folded, shared or left out."""
    patch_size, w = model.config.patch_size, model.state_dict()
    patches = ids.unflatten(1, (-1, patch_size))
    table = w["transformer.embed_tokens.weight"]
    x = torch.cat([table[patches[..., k]] for k in range(patch_size)], dim=-1)
    x = F.silu(F.linear(x, w["embed_proj.0.weight"], w["embed_proj.0.bias"]))
    x = F.linear(x, w["embed_proj.2.weight"], w["embed_proj.2.bias"])
    x = F.layer_norm(x, x.shape[-1:], w["embed_proj.3.weight"], w["embed_proj.3.bias"], 1e-6)
    hidden = model.transformer(inputs_embeds=x).last_hidden_state
    num_samples = model.config.num_samples
    samples = model.mlp_generator(hidden[:, :-1].contiguous(), num_samples, seed=seed)
    ae_model = model.ae_model
    ae_model.encoder.unfold()
    mean, log_std = ae_model.encode(patches[:, 1:].flatten(0, 1))
    shape = samples.shape[1:]
    return energy_score(samples, mean.reshape(shape), log_std.reshape(shape), seed=seed)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_loss_equals_the_plain_formulation(
    make_energy_transformer: MakeEnergyTransformer, patch_size: int
) -> None:
    model = make_energy_transformer(patch_size).double().train()
    ids = random_ids(3, 5 * patch_size)
    loss = model(ids, seed=7).loss
    assert loss.isfinite()
    torch.testing.assert_close(loss, -plain_scores(model, ids, seed=7).mean())


def test_position_predicts_the_next_patch_from_those_before(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    model = make_energy_transformer(4).double()
    ids = random_ids(1, 24)
    changed = ids.clone()
    changed[0, 12:16] = (changed[0, 12:16] + 1) % 23  # patch 3
    same = (plain_scores(model, ids, 1) - plain_scores(model, changed, 1)).abs()[0] < 1e-12
    # Scores of patches 1 and 2 know nothing of patch 3; it is the target of the third score.
    assert same.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_gradients_reach_everything_but_the_autoencoder(
    make_energy_transformer: MakeEnergyTransformer, estimator: str
) -> None:
    model = make_energy_transformer(2, estimator=estimator, num_targets=5).train()
    model(random_ids(2, 12), seed=1).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("ae_model."):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_autoencoder_stays_frozen_and_in_evaluation_mode(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    model = make_energy_transformer(2)
    before = {name: value.clone() for name, value in model.ae_model.state_dict().items()}
    assert model.train().training
    assert not any(module.training for module in model.ae_model.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(random_ids(2, 12)).loss.backward()
        optimizer.step()
    for name, value in model.ae_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model.eval().training


def test_given_autoencoder_is_copied_and_left_alone(make_autoencoder: MakeAutoencoder) -> None:
    autoencoder = make_autoencoder(4).train()
    config = small_config()
    model = EnergyTransformer(config, autoencoder=autoencoder)
    assert autoencoder.training and all(p.requires_grad for p in autoencoder.parameters())
    with torch.no_grad():
        autoencoder.encoder.norm.weight.mul_(2)
    assert not torch.equal(model.ae_model.encoder.norm.weight, autoencoder.encoder.norm.weight)
    assert config.autoencoder_config is not None
    assert config.autoencoder_config["latent_size"] == 6


def test_targets_come_from_folded_tables_that_follow_the_weights(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    model = make_energy_transformer(4)
    patches = random_ids(2, 3, 4)
    for _ in range(2):
        actual = model.encode_targets(patches)
        assert model.ae_model.encoder.folded is not None
        model.ae_model.encoder.unfold()
        expected = model.ae_model.encode(patches.flatten(1))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        model.encode_targets(patches)
        with torch.no_grad():
            model.ae_model.encoder.embed_tokens.weight.mul_(1.5)


def test_training_reads_its_targets_from_the_tables(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    model = make_energy_transformer(4).train()
    ids = random_ids(2, 12)
    assert model(ids, seed=1).loss.isfinite()
    folded = model.ae_model.encoder.folded
    assert folded is not None
    folded.tables.fill_(torch.nan)
    assert model(ids, seed=1).loss.isnan()
    encoder = model.ae_model.encoder
    encoder.embed_tokens.weight = torch.nn.Parameter(encoder.embed_tokens.weight.detach().clone())
    assert model(ids, seed=1).loss.isfinite()


def test_patch_with_an_unreal_token_does_not_count(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    model = make_energy_transformer(4, pad_token_id=22).double()
    ids = torch.randint(0, 22, (2, 20))
    with torch.no_grad():
        scores = plain_scores(model, ids, seed=3)
    labels = ids.clone()
    labels[0, 6] = -100  # patch 1
    labels[1, 0:4] = -100  # patch 0 is nobody's target
    padded = ids.clone()
    padded[1, 18:] = 22  # patch 4
    with_labels, with_padding = model(ids, labels=labels, seed=3), model(padded, seed=3)
    torch.testing.assert_close(with_labels.loss, -scores.flatten()[1:].mean())
    torch.testing.assert_close(with_padding.loss, -scores.flatten()[:-1].mean())


def test_padding_on_the_left_changes_nothing(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    model = make_energy_transformer(4).double()
    ids = random_ids(1, 16)
    padded = torch.cat((random_ids(1, 8), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 8), torch.ones(1, 16)), dim=1)
    hidden = model.hidden_states(ids.unflatten(1, (-1, 4)))
    heads: list[Tensor] = []
    losses: list[dict[str, Any]] = []
    hooks = (
        model.mlp_generator.register_forward_pre_hook(lambda _, args: heads.append(args[0])),
        model.energy_loss.register_forward_pre_hook(
            lambda _, args, kwargs: losses.append(kwargs), with_kwargs=True
        ),
    )
    loss = model(padded, attention_mask=mask).loss
    for hook in hooks:
        hook.remove()
    assert loss.isfinite()
    torch.testing.assert_close(heads[0][:, 2:], hidden[:, :-1])
    # The first real patch follows padding, which predicts nothing.
    assert losses[0]["mask"].tolist() == [[False, False, True, True, True]]
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_seed_fixes_the_loss(make_energy_transformer: MakeEnergyTransformer) -> None:
    model, ids = make_energy_transformer(2), random_ids(2, 8)
    assert torch.equal(model(ids, seed=5).loss, model(ids, seed=torch.tensor([5])).loss)
    assert not torch.equal(model(ids, seed=5).loss, model(ids, seed=6).loss)
    torch.manual_seed(1)
    first, second = model(ids).loss, model(ids).loss
    torch.manual_seed(1)
    assert torch.equal(model(ids).loss, first) and not torch.equal(first, second)


def test_energy_loss_stays_in_float32_under_autocast(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    model, ids = make_energy_transformer(4).train(), random_ids(4, 24)
    exact = model(ids, seed=5).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids, seed=5).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)
    rough.backward()
    assert model.embed_proj[0].weight.grad.isfinite().all()


def test_gradient_checkpointing_changes_nothing(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    model, ids = make_energy_transformer(4).train(), random_ids(2, 16)
    expected = model(ids, seed=5).loss
    # transformers renamed it within version 5.
    new_name, old_name = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new_name if hasattr(model, new_name) else old_name)()
    loss = model(ids, seed=5).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.transformer.layers[0].mlp.up_proj.weight.grad is not None


def test_a_few_steps_learn(make_energy_transformer: MakeEnergyTransformer) -> None:
    model = make_energy_transformer(2, num_samples=4).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    ids = random_ids(1, 24).repeat(8, 1)
    mean, log_std = model.encode_targets(ids[:1].unflatten(1, (-1, 2))[:, 1:])
    best_samples = mean + torch.randn(64, *mean.shape) * log_std.exp()
    best = -float(energy_score(best_samples, mean, log_std).mean())
    losses = []
    for step in range(80):
        loss = model(ids, seed=step).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    excess = [float(part.mean()) - best for part in torch.stack(losses).split(20)]
    assert 0 < excess[-1] < 0.25 * excess[0]


@pytest.mark.parametrize("scheme", ["normal", "width_scaled"])
def test_initialisation_follows_its_scheme(make_autoencoder: MakeAutoencoder, scheme: str) -> None:
    config = small_config(hidden_size=64, intermediate_size=128, init_scheme=scheme)
    model = EnergyTransformer(config, autoencoder=make_autoencoder(4))
    weights = {
        256: model.embed_proj[0].weight,
        64: model.transformer.layers[1].self_attn.q_proj.weight,
        128: model.transformer.layers[0].mlp.down_proj.weight,
        5: model.mlp_generator.noise_embd.weight,
    }
    for fan_in, weight in weights.items():
        expected = 0.02 if scheme == "normal" else 0.8 / fan_in**0.5
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.15), fan_in
    assert not any(p.any() for p in model.mlp_generator.final_layer.linears[2].parameters())
    assert not model.embed_proj[0].bias.any()
    assert (model.transformer.norm.weight == 1).all()


@pytest.mark.parametrize("scheme", ["normal", "width_scaled"])
def test_pad_row_starts_at_zero_and_is_loaded_as_it_was_saved(
    make_energy_transformer: MakeEnergyTransformer, tmp_path: Path, scheme: str
) -> None:
    autoencoder = make_energy_transformer(4).ae_model
    fresh = EnergyTransformer(small_config(pad_token_id=22, init_scheme=scheme), autoencoder)
    row = fresh.transformer.embed_tokens.weight[22]
    assert not row.any() and fresh.transformer.embed_tokens.weight[21].any()
    with torch.no_grad():
        row.fill_(3.0)
    fresh.save_pretrained(tmp_path)
    loaded = EnergyTransformer.from_pretrained(tmp_path)
    assert (loaded.transformer.embed_tokens.weight[22] == 3.0).all()


def test_ids_of_32_bits_give_the_same_loss(make_energy_transformer: MakeEnergyTransformer) -> None:
    model, ids = make_energy_transformer(2), random_ids(2, 12)
    loss = model(ids, labels=ids, seed=1).loss
    assert torch.equal(model(ids.int(), labels=ids.int(), seed=1).loss, loss)
    scores = model.evaluate_brier(ids, seed=1).scores
    assert torch.equal(model.evaluate_brier(ids.int(), seed=1).scores, scores)
    generated = model.generate(ids, max_new_tokens=3, seed=1).sequences
    assert torch.equal(model.generate(ids.int(), max_new_tokens=3, seed=1).sequences, generated)
    autoencoder = model.ae_model
    assert torch.equal(autoencoder(ids.int()).loss, autoencoder(ids).loss)


def test_language_model_has_the_parameter_names_of_the_release(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    names = set(make_energy_transformer(2).state_dict())
    top = {name.split(".")[0] for name in names}
    assert top == {"embed_proj", "transformer", "mlp_generator", "ae_model"}
    assert {name for name in names if name.startswith("embed_proj")} == {
        f"embed_proj.{i}.{kind}" for i in (0, 2, 3) for kind in ("weight", "bias")
    }
    assert {
        "transformer.embed_tokens.weight",
        "transformer.layers.1.self_attn.o_proj.weight",
        "transformer.layers.1.mlp.gate_proj.weight",
        "transformer.layers.0.input_layernorm.weight",
        "transformer.layers.0.post_attention_layernorm.weight",
        "transformer.norm.weight",
        "mlp_generator.mlp_blocks.1.linears.4.bias",
        "ae_model.encoder.embed_tokens.weight",
        "ae_model.decoder.lm_head_weight",
    } <= names


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"input_ids": torch.zeros(2, 6, dtype=torch.int64)}, "multiple of.*4"),
        (ValueError, {"input_ids": torch.zeros(2, 4, dtype=torch.int64)}, "at least two patches"),
        (ValueError, {"input_ids": torch.zeros(0, 8, dtype=torch.int64)}, "at least one sequence"),
        (ValueError, {"input_ids": torch.full((2, 8), 23)}, "23"),
        (TypeError, {"input_ids": torch.zeros(2, 8)}, "dtype"),
        (ValueError, {"labels": torch.zeros(2, 4, dtype=torch.int64)}, "labels"),
        (ValueError, {"attention_mask": torch.ones(2, 4)}, "attention_mask"),
        (TypeError, {"seed": 1.5}, "seed"),
    ],
)
def test_bad_input_is_named(
    make_energy_transformer: MakeEnergyTransformer,
    error: type[Exception],
    arguments: dict[str, Any],
    message: str,
) -> None:
    valid = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        make_energy_transformer(4)(**{**valid, **arguments})


def small_config(**settings: Any) -> CalmConfig:
    values: dict[str, Any] = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "latent_size": 6,
        "noise_size": 5,
        "num_mlp_layers": 1,
    }
    return CalmConfig(**{**values, **settings})


@pytest.mark.parametrize("name", ["patch_size", "latent_size", "vocab_size"])
def test_autoencoder_that_does_not_fit_is_refused(
    make_autoencoder: MakeAutoencoder, name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        EnergyTransformer(small_config(**{name: 7}), autoencoder=make_autoencoder(4))


def test_language_model_without_an_autoencoder_is_refused() -> None:
    with pytest.raises(ValueError, match="pass autoencoder="):
        EnergyTransformer(small_config())
    with pytest.raises(ValueError, match="/nowhere"):
        EnergyTransformer(small_config(ae_path="/nowhere"))


def test_backend_can_be_forced(make_energy_transformer: MakeEnergyTransformer) -> None:
    model, ids = make_energy_transformer(4), random_ids(2, 16)
    loss = model(ids, seed=1).loss
    with calm_kernels.backend("reference"):
        torch.testing.assert_close(model(ids, seed=1).loss, loss, rtol=1e-4, atol=1e-4)
