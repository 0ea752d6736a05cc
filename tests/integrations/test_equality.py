"""What a patched model computes: values and gradients of the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import upstream_stand_in
from torch import Tensor, nn

from calm_kernels.integrations import apply_calm_kernels, remove_calm_kernels
from calm_kernels.integrations.encoder import EncoderSettings, FastEncoder
from calm_kernels.integrations.patching import settings_of
from calm_kernels.ops.energy_score import energy_score

Make = Callable[..., Any]
DTYPES = [torch.float32, torch.bfloat16]


def ids_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(seed))


def results(model: nn.Module, run: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """A scalar loss and its gradients by parameter name."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = run(model)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_as_exact(
    actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """No entry is further from the exact value than twice what the plain model's rounding does."""
    assert actual.keys() == plain.keys() == exact.keys()
    eps = max(torch.finfo(value.dtype).eps for value in plain.values())
    for name, truth in exact.items():
        assert actual[name].dtype == plain[name].dtype
        scale = float(truth.abs().max())
        allowed = 2 * float((plain[name] - truth).abs().max())
        allowed += 8 * eps * scale
        assert scale > 0 and float((actual[name] - truth).abs().max()) <= allowed, name


def check_equality(model: nn.Module, run: Callable[[Any], Tensor], **options: Any) -> None:
    """Loss and gradients before, while and after the model is patched."""
    plain, exact = results(model, run), results(copy.deepcopy(model).double(), run)
    report = apply_calm_kernels(model, **options)
    assert report.replaced and not report.kept
    assert_as_exact(results(model, run), plain, exact)
    remove_calm_kernels(model)
    again = results(model, run)
    assert all(torch.equal(again[name], value) for name, value in plain.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_autoencoder_loss_and_gradients(
    make_autoencoder: Make, dtype: torch.dtype, training: bool
) -> None:
    ids, labels = ids_of(3, 16), ids_of(3, 16, seed=2)
    labels[0, :5] = -100
    check_equality(make_autoencoder().to(dtype).train(training), lambda m: m(ids, labels).loss)


@pytest.mark.parametrize("dtype", DTYPES)
def test_language_model_with_its_own_energy_score(
    make_language_model: Make, dtype: torch.dtype
) -> None:
    ids = ids_of(2, 24)
    check_equality(make_language_model().to(dtype).train(), lambda m: m(ids), energy=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_autoencoder_decodes_the_same_tokens(make_autoencoder: Make, dtype: torch.dtype) -> None:
    model = make_autoencoder().to(dtype)
    latents = torch.randn(40, 6, dtype=dtype)
    expected, logits = model.decode(latents), model.decoder(latents)
    apply_calm_kernels(model)
    actual = model.decode(latents)
    assert actual.dtype == torch.int64 and torch.equal(actual, expected)
    torch.testing.assert_close(model.decoder(latents) + 0, logits)
    assert len(expected.unique()) > 3


@pytest.mark.parametrize("squeezed", [True, False])
def test_frozen_encoder_codes_the_same_latents_from_tables(
    make_autoencoder: Make, monkeypatch: pytest.MonkeyPatch, squeezed: bool
) -> None:
    if not squeezed:
        monkeypatch.setattr("calm_kernels.integrations.encoder.LARGEST_SQUEEZED_TABLES", 1)
    model = make_autoencoder().requires_grad_(False)
    ids = ids_of(9, 4)
    expected = model.encoder(ids)
    apply_calm_kernels(model)
    settings: EncoderSettings = settings_of(model.encoder, FastEncoder)
    few = ids[:2]
    torch.testing.assert_close(model.encoder(few), expected[:2], rtol=1e-5, atol=1e-5)
    assert settings.tables is None  # 8 ids of a vocabulary of 23: tables do not pay yet
    torch.testing.assert_close(model.encoder(ids), expected, rtol=1e-5, atol=1e-5)
    assert settings.tables is not None
    assert settings.tables.mode == ("squeezed" if squeezed else "table")
    with torch.no_grad():
        model.encoder.encoder_layers[0].mlp.up_proj.weight.mul_(1.5)
    remove_calm_kernels(model)
    expected = model.encoder(ids)
    apply_calm_kernels(model)
    torch.testing.assert_close(model.encoder(ids), expected, rtol=1e-5, atol=1e-5)


def test_encoder_tables_follow_weights_and_moves(make_autoencoder: Make) -> None:
    model = make_autoencoder().requires_grad_(False)
    apply_calm_kernels(model)
    ids = ids_of(9, 4)
    model.encoder(ids)
    other = upstream_stand_in.Autoencoder(upstream_stand_in.Config()).eval()
    upstream_stand_in.perturb(other)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.encoder(ids), other.encoder(ids), rtol=1e-5, atol=1e-5)
    model.double()
    latent = model.encoder(ids)
    assert latent.dtype == torch.float64
    torch.testing.assert_close(latent, other.double().encoder(ids))


def test_encoder_that_learns_has_no_tables(make_autoencoder: Make) -> None:
    model = make_autoencoder()
    apply_calm_kernels(model)
    model.encoder(ids_of(9, 4)).sum().backward()
    assert model.encoder.embed_tokens.weight.grad is not None
    assert settings_of(model.encoder, FastEncoder).tables is None


@pytest.mark.parametrize("beta", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_energy_score_is_the_expectation_of_the_plain_one(
    make_language_model: Make, beta: float, estimator: str
) -> None:
    model = make_language_model(beta=beta, num_targets=20_000)
    samples, mean = torch.randn(4, 2, 5, 6), torch.randn(2, 5, 6)
    log_std = torch.randn(2, 5, 6) * 0.3 - 1
    expected = model.energy_score(samples, mean, log_std)
    model.config.num_targets = 100
    apply_calm_kernels(model, estimator=estimator, num_targets=20_000)
    actual = model.energy_score(samples, log_std=log_std, mean=mean)
    torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.03)
    if estimator == "closed_form":
        exact = energy_score(samples, mean, log_std, alpha=beta)
        assert torch.equal(actual, exact)
        model.config.beta = 0.9  # read at every call
        other = energy_score(samples, mean, log_std, alpha=0.9)
        assert torch.equal(model.energy_score(samples, mean, log_std), other)


def test_energy_loss_has_finite_gradients_where_samples_coincide(make_language_model: Make) -> None:
    model = make_language_model(beta=0.5).train()
    with torch.no_grad():
        for parameter in model.mlp_generator.final_layer.linears[2].parameters():
            parameter.zero_()
    model(ids_of(2, 16)).backward()
    last = model.mlp_generator.final_layer.linears[2].weight
    assert not last.grad.isfinite().all()
    apply_calm_kernels(model)
    model.zero_grad()
    model(ids_of(2, 16)).backward()
    assert last.grad.isfinite().all() and last.grad.abs().max() > 0


def test_generation_from_draws_that_agree(
    make_language_model: Make,
) -> None:
    """All candidates of a position agree, so that the vote has one outcome."""
    model = make_language_model()
    with torch.no_grad():
        model.mlp_generator.noise_embd.weight.zero_()
    prompt = ids_of(3, 8)
    expected = model.generate(prompt, 3, 0.25, 6)
    apply_calm_kernels(model)
    assert torch.equal(model.generate(prompt, 3, 0.25, 6), expected)


def test_vote_follows_the_law_of_the_plain_one(make_language_model: Make) -> None:
    model = make_language_model()
    draws = torch.tensor([[0, 1]] * 5 + [[1, 0]] * 3 + [[1, 1]]).expand(4000, -1, -1)
    plain = (model.temperature_sample(draws, 0.5)[:, 0] == 0).double().mean()
    apply_calm_kernels(model)
    fast = (model.temperature_sample(draws, 0.5)[:, 0] == 0).double().mean()
    # C(5, 2) of C(5, 2) + C(3, 2); five standard errors of 4000 draws: a false alarm in 10^6.
    assert abs(float(plain) - 10 / 13) < 0.034 and abs(float(fast) - 10 / 13) < 0.034


def test_head_shares_what_depends_on_the_hidden_state_alone(make_language_model: Make) -> None:
    model = make_language_model().train()
    rows: list[int] = []
    apply_calm_kernels(model, energy=False)
    linear = torch.nn.functional.linear
    first = model.mlp_generator.hidden_embd.weight

    def counting(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if weight is first:
            rows.append(x.numel() // x.shape[-1])
        return linear(x, weight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.modules.linear.F.linear", counting)
        model(ids_of(2, 16))
    assert rows == [2 * 3]  # sequences times positions, not times samples


def test_head_is_the_plain_one_where_hidden_states_differ_by_sample(
    make_language_model: Make,
) -> None:
    head = make_language_model().double().mlp_generator
    hidden = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)
    noise = torch.rand(3, 2, 5, dtype=torch.float64)
    cases = [hidden, hidden.repeat(1, 2, 1), hidden[:1].repeat(3, 1, 2)[..., :16], hidden[:, :1]]
    for case in [*cases, hidden[:1].expand(3, 2, 16), hidden[:1].repeat(3, 1, 1)]:
        n = noise[:, :1].expand(*case.shape[:-1], 5)
        expected = head(case, n)
        apply_calm_kernels(head)
        torch.testing.assert_close(head(case, n), expected)
        remove_calm_kernels(head)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_keeps_values_and_dtypes(make_autoencoder: Make, training: bool) -> None:
    model = make_autoencoder().train(training)
    ids = ids_of(3, 16)

    def run() -> Any:
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            return (
                model(ids),
                model.encoder(ids.reshape(-1, 4)),
                model.decoder.decoder_layers[0](torch.ones(2, 12)),
            )

    expected, latent, stream = run()
    apply_calm_kernels(model)
    actual, fast_latent, fast_stream = run()
    assert (actual.loss.dtype, fast_latent.dtype) == (expected.loss.dtype, latent.dtype)
    assert fast_stream.dtype == stream.dtype == torch.float32  # the residual stream stays wide
    torch.testing.assert_close(actual.loss, expected.loss, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(fast_latent, latent, rtol=5e-2, atol=5e-2)


def test_inference_mode_transforms_and_export_see_plain_values(make_autoencoder: Make) -> None:
    model = make_autoencoder()
    latents = torch.randn(5, 6)

    def total(z: Tensor) -> Tensor:
        value: Tensor = model.decoder(z).float().logsumexp(-1).sum()
        return value

    logits, gradient = model.decoder(latents), torch.func.grad(total)(latents)
    apply_calm_kernels(model)
    with torch.inference_mode():
        assert torch.equal(model.decoder(latents).argmax(-1), logits.argmax(-1))
        torch.testing.assert_close(model.decoder(latents).softmax(-1), logits.softmax(-1))
    torch.testing.assert_close(torch.func.grad(total)(latents), gradient)
    exported = torch.export.export(model.decoder, (latents,)).module()
    torch.testing.assert_close(exported(latents), logits)
