"""The autoencoder against its plain formulation: codes, losses, gradients, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calm_kernels.models import Autoencoder
from calm_kernels.reference import philox

MakeAutoencoder = Callable[..., Autoencoder]
EPS = 1e-6


def block(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    n = F.rms_norm(x, x.shape[-1:], w[f"{name}.layernorm.weight"], EPS)
    gate, up = (n @ w[f"{name}.mlp.{side}_proj.weight"].T for side in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w[f"{name}.mlp.down_proj.weight"].T


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], EPS)


def plain_encode(w: dict[str, Tensor], ids: Tensor, blocks: int = 1) -> tuple[Tensor, Tensor]:
    x = w["encoder.embed_tokens.weight"][ids]
    for i in range(blocks):
        x = block(w, f"encoder.encoder_layers.{i}", x)
    x = linear(w, "encoder.squeeze_layer", x.flatten(1))
    for i in range(blocks, 2 * blocks):
        x = block(w, f"encoder.encoder_layers.{i}", x)
    mean, log_std = linear(w, "encoder.hidden_to_latent", norm(w, "encoder.norm", x)).chunk(2, -1)
    return mean, log_std


def plain_logits(w: dict[str, Tensor], latents: Tensor, patch_size: int, blocks: int = 1) -> Tensor:
    x = linear(w, "decoder.latent_to_hidden", latents)
    for i in range(blocks):
        x = block(w, f"decoder.decoder_layers.{i}", x)
    x = linear(w, "decoder.expand_layer", x).unflatten(1, (patch_size, -1))
    for i in range(blocks, 2 * blocks):
        x = block(w, f"decoder.decoder_layers.{i}", x)
    return norm(w, "decoder.norm", x) @ w["encoder.embed_tokens.weight"].T


def plain_kl(mean: Tensor, log_std: Tensor, clamp: float) -> Tensor:
    kl = 0.5 * (mean**2 + log_std.exp() ** 2 - 1 - 2 * log_std)
    return torch.maximum(kl, torch.tensor(clamp, dtype=kl.dtype)).sum(-1)


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_codes_equal_the_plain_formulation(
    make_autoencoder: MakeAutoencoder, patch_size: int, layers: int
) -> None:
    model = make_autoencoder(
        patch_size, num_encoder_layers=layers, num_decoder_layers=layers
    ).double()
    model.eval()
    w = model.state_dict()
    ids = torch.randint(0, 23, (7, patch_size))
    mean, log_std = model.encode(ids)
    torch.testing.assert_close((mean, log_std), plain_encode(w, ids, layers // 2))
    latents = torch.randn(7, 6, dtype=torch.float64)
    logits = plain_logits(w, latents, patch_size, layers // 2)
    torch.testing.assert_close(model.decode_logits(latents), logits)
    assert torch.equal(model.decode(latents), logits.argmax(-1))


def test_shapes_follow_the_input(make_autoencoder: MakeAutoencoder) -> None:
    model = make_autoencoder(4).eval()
    ids = torch.randint(0, 23, (3, 20))
    mean, log_std = model.encode(ids)
    assert mean.shape == log_std.shape == (3, 5, 6)
    assert torch.equal(mean.flatten(0, 1), model.encode(ids.reshape(15, 4))[0])
    assert model.decode(mean).shape == (3, 5, 4)
    assert model.decode(mean[0, 0]).shape == (4,)
    assert model.decode_logits(mean).shape == (3, 5, 4, 23)
    output = model(ids)
    assert output.mean.shape == output.log_std.shape == (3, 5, 6)
    assert torch.equal(output.mean, mean)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_training_loss_equals_the_plain_formulation(
    make_autoencoder: MakeAutoencoder, patch_size: int
) -> None:
    latent_size = 6
    model = make_autoencoder(
        patch_size, kl_weight=0.07, kl_clamp=0.3, ae_dropout=0.25, token_dropout=0.4, drop_mass=0.0
    ).double()
    ids = torch.randint(1, 23, (5, 3 * patch_size))
    output = model.train()(ids, seed=99)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}

    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    patches, seed = ids.reshape(-1, patch_size), torch.tensor([99])
    rows = torch.arange(len(patches))
    dropped = philox.uniform(seed, rows, patch_size, philox.Stream.TOKEN_DROPOUT) < 0.4
    mean, log_std = plain_encode(w, patches.masked_fill(dropped, 0))
    noise = philox.normal(seed, rows, latent_size, philox.Stream.LATENT).double()
    kept = philox.uniform(seed, rows, latent_size, philox.Stream.LATENT, first=8) >= 0.25
    latents = (mean + noise * log_std.exp()) * kept / 0.75
    logits = plain_logits(w, latents, patch_size).flatten(0, 1)
    token_loss = F.cross_entropy(logits, patches.flatten())
    kl_loss = plain_kl(mean, log_std, 0.3).mean()
    loss = patch_size * token_loss + 0.07 * kl_loss
    loss.backward()
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.token_loss, token_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.kl_loss.double(), kl_loss, rtol=1e-6, atol=1e-6)
    accuracy = (logits.argmax(-1) == patches.flatten()).double().mean()
    assert float(output.token_accuracy) == pytest.approx(float(accuracy))
    for name, gradient in gradients.items():
        expected = w[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_dropouts_and_noise_have_the_stated_rates(make_autoencoder: MakeAutoencoder) -> None:
    model = make_autoencoder(4, ae_dropout=0.15).train()
    mean = torch.full((20_000, 6), 2.0)
    log_std = torch.full((20_000, 6), -1.0)
    latents = model._noisy(mean, log_std, torch.tensor([3]))
    zeros = (latents == 0).double().mean()
    kept = latents[latents != 0] * 0.85
    # 120,000 draws: five standard errors.
    assert abs(zeros - 0.15) < 5 * (0.15 * 0.85 / 120_000) ** 0.5
    assert abs(kept.mean() - 2.0) < 5 * 0.368 / 100_000**0.5
    assert abs(kept.std() / 0.36788 - 1) < 5 / 200_000**0.5


def test_evaluation_takes_the_mean_and_drops_nothing(make_autoencoder: MakeAutoencoder) -> None:
    model = make_autoencoder(4).double().eval()
    ids = torch.randint(0, 23, (3, 8))
    output = model(ids)
    w = model.state_dict()
    mean, log_std = plain_encode(w, ids.reshape(-1, 4))
    logits = plain_logits(w, mean, 4).flatten(0, 1)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, ids.flatten()))
    torch.testing.assert_close(output.token_loss, output.loss)
    torch.testing.assert_close(output.kl_loss.double(), plain_kl(mean, log_std, 0.5).mean())
    accuracy = (logits.argmax(-1) == ids.flatten()).double().mean()
    assert float(output.token_accuracy) == pytest.approx(float(accuracy))


@pytest.mark.parametrize("training", [False, True])
def test_ignored_tokens_touch_no_loss(make_autoencoder: MakeAutoencoder, training: bool) -> None:
    model = make_autoencoder(4, pad_token_id=22, ae_dropout=0.0, drop_mass=0.0).double()
    model.train(training)
    ids = torch.randint(0, 22, (1, 12))
    padded = torch.cat((ids, torch.full((1, 8), 22)), dim=1)
    labels = ids.clone()
    labels[0, :4] = -100
    alone, with_padding = model(ids, seed=1), model(padded, seed=1)
    later, labelled = model(ids[:, 4:], seed=1), model(ids, labels=labels, seed=1)
    if not training:  # the noise of a patch depends on its number
        torch.testing.assert_close(labelled.loss, later.loss)
    torch.testing.assert_close(labelled.kl_loss, later.kl_loss)
    torch.testing.assert_close(with_padding.loss, alone.loss)
    torch.testing.assert_close(with_padding.kl_loss, alone.kl_loss)
    torch.testing.assert_close(with_padding.token_accuracy, alone.token_accuracy)


def test_partly_ignored_patch_counts_its_other_tokens(make_autoencoder: MakeAutoencoder) -> None:
    model = make_autoencoder(4).eval()
    ids = torch.randint(0, 23, (1, 8))
    labels = ids.clone()
    labels[0, [1, 2, 6]] = -100
    logits = model.decode_logits(model.encode(ids)[0]).flatten(0, 2)
    expected = F.cross_entropy(logits, labels.flatten())
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_seed_fixes_the_noise(make_autoencoder: MakeAutoencoder) -> None:
    model = make_autoencoder(4).train()
    ids = torch.randint(0, 23, (4, 8))
    assert torch.equal(model(ids, seed=5).loss, model(ids, seed=torch.tensor([5])).loss)
    assert not torch.equal(model(ids, seed=5).loss, model(ids, seed=6).loss)
    torch.manual_seed(1)
    first, second = model(ids).loss, model(ids).loss
    torch.manual_seed(1)
    assert torch.equal(model(ids).loss, first)
    assert not torch.equal(first, second)


def test_embedding_is_the_output_weight_and_gets_both_gradients(
    make_autoencoder: MakeAutoencoder,
) -> None:
    model = make_autoencoder(2).train()
    assert model.decoder.lm_head_weight is model.encoder.embed_tokens.weight
    assert sum(p is model.decoder.lm_head_weight for p in model.parameters()) == 1
    model(torch.full((2, 4), 3)).loss.backward()
    gradient = model.encoder.embed_tokens.weight.grad
    assert gradient is not None
    # Token 5 never enters; only the output layer can have touched its row.
    assert gradient[5].abs().max() > 0


def test_clamped_dimensions_have_no_kl_gradient(make_autoencoder: MakeAutoencoder) -> None:
    model = make_autoencoder(4)
    mean = torch.tensor([[0.1, 3.0]], requires_grad=True)
    log_std = torch.tensor([[0.05, -2.0]], requires_grad=True)
    model._kl(mean, log_std, None).backward()
    assert mean.grad is not None and log_std.grad is not None
    assert mean.grad[0].tolist() == [0.0, 3.0]
    assert log_std.grad[0, 0] == 0.0
    assert float(log_std.grad[0, 1]) == pytest.approx(float(torch.tensor(-4.0).exp()) - 1)


def test_autoencoder_has_the_parameter_names_of_the_release(
    make_autoencoder: MakeAutoencoder,
) -> None:
    model = make_autoencoder(2, num_encoder_layers=2, num_decoder_layers=4)
    ffn = [f"mlp.{side}_proj.weight" for side in ("gate", "up", "down")] + ["layernorm.weight"]
    expected = {
        "encoder.embed_tokens.weight",
        "encoder.squeeze_layer.weight",
        "encoder.squeeze_layer.bias",
        "encoder.norm.weight",
        "encoder.hidden_to_latent.weight",
        "encoder.hidden_to_latent.bias",
        "decoder.latent_to_hidden.weight",
        "decoder.latent_to_hidden.bias",
        "decoder.expand_layer.weight",
        "decoder.expand_layer.bias",
        "decoder.norm.weight",
        "decoder.lm_head_weight",
        *(f"encoder.encoder_layers.{i}.{name}" for i in range(2) for name in ffn),
        *(f"decoder.decoder_layers.{i}.{name}" for i in range(4) for name in ffn),
    }
    assert set(model.state_dict()) == expected


def test_a_few_steps_learn(make_autoencoder: MakeAutoencoder) -> None:
    model = make_autoencoder(2, hidden_size=32, intermediate_size=64, latent_size=16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.randint(1, 23, (64, 8))
    for step in range(120):
        model(ids, seed=step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.eval()(ids).token_accuracy > 0.95


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (
            ValueError,
            {"input_ids": torch.zeros(2, 6, dtype=torch.int64)},
            "multiple of.*4.*pad to 8",
        ),
        (ValueError, {"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, "at least one sequence"),
        (ValueError, {"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "at least one sequence"),
        (ValueError, {"input_ids": torch.zeros(4, dtype=torch.int64)}, "shape"),
        (TypeError, {"input_ids": torch.zeros(2, 4)}, "dtype"),
        (ValueError, {"input_ids": torch.full((2, 4), 23)}, "23.*tokenizer"),
        (ValueError, {"input_ids": torch.full((2, 4), -1)}, "-1"),
        (ValueError, {"labels": torch.zeros(2, 4, dtype=torch.int64)}, "labels"),
        (ValueError, {"labels": torch.full((2, 8), 40)}, "labels.*40"),
    ],
)
def test_bad_input_is_named(
    make_autoencoder: MakeAutoencoder,
    error: type[Exception],
    arguments: dict[str, Any],
    message: str,
) -> None:
    valid = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        make_autoencoder(4)(**{**valid, **arguments})


def test_latents_of_another_width_are_refused(make_autoencoder: MakeAutoencoder) -> None:
    with pytest.raises(ValueError, match="latents"):
        make_autoencoder(4).decode(torch.zeros(2, 5))
