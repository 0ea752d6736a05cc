"""What patching leaves alone, and what undoes it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import upstream_stand_in
from torch import Tensor, nn

from calm_kernels import models
from calm_kernels.integrations import apply_calm_kernels, remove_calm_kernels
from calm_kernels.integrations.patching import Patched

Make = Callable[..., Any]


def structure(model: nn.Module) -> list[Any]:
    """Everything there is to see of a model's modules, by identity."""
    seen: list[Any] = [str(model), list(model.state_dict())]
    for path, module in model.named_modules():
        seen.append((path, type(module), id(module), sorted(module.__dict__)))
    seen += [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    return seen


def ids_of(*shape: int) -> Tensor:
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(1))


def test_remove_undoes_apply_exactly(make_language_model: Make) -> None:
    model = make_language_model()
    before, state = structure(model), torch.get_rng_state()
    apply_calm_kernels(model)
    assert structure(model) != before
    assert torch.equal(torch.get_rng_state(), state)
    remove_calm_kernels(model)
    assert structure(model) == before
    remove_calm_kernels(model)
    assert structure(model) == before


def test_parameters_stay_the_same_objects_under_the_same_names(make_language_model: Make) -> None:
    model = make_language_model()
    names = [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)]
    keys = list(model.state_dict())
    apply_calm_kernels(model)
    assert [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)] == names
    assert list(model.state_dict()) == keys
    ae_model = model.ae_model
    assert ae_model.decoder.lm_head_weight is ae_model.encoder.embed_tokens.weight
    layers = ae_model.encoder.encoder_layers
    assert all(isinstance(layer, upstream_stand_in.Block) for layer in layers)


def test_applying_twice_is_applying_once(make_language_model: Make) -> None:
    model = make_language_model()
    first = apply_calm_kernels(model)
    once = structure(model)
    assert apply_calm_kernels(model) == first
    assert structure(model) == once
    apply_calm_kernels(model, ffn=False, head=False)
    assert not isinstance(model.transformer.layers[0], Patched)


def test_repr_and_report_show_what_was_replaced(make_language_model: Make) -> None:
    model = make_language_model()
    report = apply_calm_kernels(model, cross_entropy=False)
    text = repr(model)
    assert "EnergyTransformer[calm_kernels: energy, sampling](" in text
    assert "2 x LlamaDecoderLayer[calm_kernels: ffn]" in text
    assert "Decoder[calm_kernels: decode](" in text and "Encoder[calm_kernels: encode](" in text
    assert type(model).__name__ == "EnergyTransformer"  # what saved configurations name
    assert "replaced: 18" in str(report) and "kept: 0" in str(report)
    assert "transformer.layers.1 (LlamaDecoderLayer)" in str(report)


@pytest.mark.parametrize("part", ["energy", "head", "ffn", "encode", "decode", "sampling"])
def test_each_part_is_chosen_by_its_keyword(make_language_model: Make, part: str) -> None:
    parts = ["energy", "head", "ffn", "encode", "decode", "cross_entropy", "sampling"]
    report = apply_calm_kernels(make_language_model(), **{name: name == part for name in parts})
    assert {entry.part for entry in report.replaced} == {part}
    report = apply_calm_kernels(make_language_model(), **{part: False})
    assert {entry.part for entry in report.replaced} == set(parts) - {part}


def clone_by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def clone_by_saving(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle, clone_by_saving])
def test_copies_are_patched_tied_and_independent(
    make_language_model: Make, clone: Callable[[Any], Any]
) -> None:
    model = make_language_model()
    apply_calm_kernels(model)
    ids = ids_of(2, 24)
    torch.manual_seed(1)
    expected = model(ids)
    other = clone(model)
    assert repr(other) == repr(model)
    torch.manual_seed(1)
    torch.testing.assert_close(other(ids), expected)
    assert other.ae_model.decoder.lm_head_weight is other.ae_model.encoder.embed_tokens.weight
    with torch.no_grad():
        other.transformer.layers[0].mlp.up_proj.weight.zero_()
    torch.manual_seed(1)
    torch.testing.assert_close(model(ids), expected)
    torch.manual_seed(1)
    assert not torch.allclose(other(ids), expected)
    remove_calm_kernels(other)
    assert type(other) is upstream_stand_in.EnergyTransformer
    assert isinstance(model, Patched)


def test_moves_and_modes_go_through(make_autoencoder: Make) -> None:
    model = make_autoencoder()
    apply_calm_kernels(model)
    assert model.double().decoder(torch.randn(2, 6).double()).dtype == torch.float64
    assert model.to(torch.bfloat16).decoder(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
    model.train()
    assert all(module.training for module in model.modules())


def test_optimizer_made_before_trains_what_is_patched_after(make_autoencoder: Make) -> None:
    losses = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = make_autoencoder().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if patched:
            apply_calm_kernels(model)
        torch.manual_seed(5)
        for _ in range(5):
            loss = model(ids_of(4, 16)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("patched", [False, True])
def test_weights_go_both_ways_between_upstream_and_this_package(
    make_language_model: Make, make_autoencoder: Make, patched: bool
) -> None:
    theirs, theirs_ae = make_language_model(), make_autoencoder()
    config = theirs.config
    ours_ae = models.Autoencoder(
        models.AutoencoderConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            latent_size=config.latent_size,
            patch_size=config.patch_size,
            num_encoder_layers=config.num_layers,
            num_decoder_layers=config.num_layers,
        )
    )
    ours = models.EnergyTransformer(
        models.CalmConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.lm_hidden_size,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=config.patch_size,
            latent_size=config.latent_size,
            noise_size=config.noise_size,
            num_mlp_layers=config.num_blocks,
            num_samples=config.num_samples,
        ),
        autoencoder=ours_ae,
    ).eval()
    if patched:
        apply_calm_kernels(theirs)
        apply_calm_kernels(theirs_ae)
    for source, target in ((theirs, ours), (theirs_ae, ours_ae)):
        target.load_state_dict(source.state_dict(), strict=True)
        source.load_state_dict(target.state_dict(), strict=True)
    ids = ids_of(2, 24)
    patches = ids.unflatten(1, (-1, 4))
    latents = torch.randn(5, config.latent_size)
    hidden, noise = torch.randn(3, config.lm_hidden_size), torch.rand(2, 3, config.noise_size)
    pairs = [
        (theirs_ae.decoder(latents) + 0, ours_ae.decode_logits(latents)),
        (theirs_ae.encoder(patches[0]), torch.cat(ours_ae.eval().encode(patches[0]), dim=-1)),
        (theirs_ae.eval()(ids).loss, ours_ae(ids).loss),
        (theirs.hidden_states(patches), ours.hidden_states(patches)),
        (
            theirs.mlp_generator(hidden.expand(2, 3, -1), noise),
            ours.mlp_generator(hidden, 2, noise),
        ),
    ]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiled_model_equals_the_eager_one(make_autoencoder: Make) -> None:
    model = make_autoencoder()
    ids = ids_of(3, 16)
    apply_calm_kernels(model)
    expected = model(ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(ids)
    torch.testing.assert_close(actual.loss, expected.loss)
    actual.loss.backward()
    assert model.decoder.lm_head_weight.grad.abs().max() > 0


def test_compiled_language_model_block_head_and_score(make_language_model: Make) -> None:
    model = make_language_model().train()
    ids = ids_of(2, 24)
    expected = model.hidden_states(ids.unflatten(1, (-1, 4)))
    apply_calm_kernels(model)
    hidden_states = torch.compile(model.hidden_states, backend="aot_eager")
    torch.testing.assert_close(hidden_states(ids.unflatten(1, (-1, 4))), expected)
    score = torch.compile(model.energy_score, backend="aot_eager", fullgraph=True)
    samples, mean = torch.randn(3, 4, 6), torch.randn(4, 6)
    torch.testing.assert_close(
        score(samples, mean, mean - 1), model.energy_score(samples, mean, mean - 1)
    )
    head = torch.compile(model.mlp_generator, backend="aot_eager", fullgraph=True)
    hidden, noise = torch.randn(1, 4, 16).expand(3, 4, 16), torch.rand(3, 4, 5)
    torch.testing.assert_close(head(hidden, noise), model.mlp_generator(hidden, noise))


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"estimator": "exact"}, "estimator"),
        (ValueError, {"drop_mass": 1.0}, "drop_mass"),
        (ValueError, {"methods": {"loss": "f"}}, "methods"),
        (TypeError, {"model": 3}, "model"),
        (ValueError, {"model": nn.Sequential(nn.Linear(2, 2))}, "no part of CALM"),
    ],
)
def test_apply_names_what_is_wrong(
    make_autoencoder: Make, error: type[Exception], arguments: dict[str, Any], message: str
) -> None:
    model = arguments.pop("model", None) or make_autoencoder()
    with pytest.raises(error, match=message):
        apply_calm_kernels(model, **arguments)


def test_class_changed_after_the_patch_is_not_undone_silently(make_autoencoder: Make) -> None:
    model = make_autoencoder()
    apply_calm_kernels(model)
    block = model.encoder.encoder_layers[1]
    block.__class__ = type("Wrapped", (type(block),), {})
    with pytest.raises(RuntimeError, match="changed after apply_calm_kernels"):
        remove_calm_kernels(model)
    assert isinstance(model.encoder.encoder_layers[0], Patched)
