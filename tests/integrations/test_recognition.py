"""What is replaced, what is left alone, and the reason given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaConfig, GemmaModel, LlamaConfig, LlamaForCausalLM

from calm_kernels.integrations import apply_calm_kernels, remove_calm_kernels

Make = Callable[..., Any]
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(**settings: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ids_of(*shape: int) -> Tensor:
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_llama_values_and_gradients_are_those_of_its_own_layers(checkpointing: bool) -> None:
    model = llama().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0

    def run() -> list[Tensor]:
        """Loss, hidden states and gradients."""
        model.zero_grad()
        out = model(
            ids_of(2, 7), attention_mask=mask, labels=ids_of(2, 7), output_hidden_states=True
        )
        out.loss.backward()
        return [
            out.loss.detach(),
            *out.hidden_states,
            *(p.grad.clone() for p in model.parameters()),
        ]

    expected = run()
    report = apply_calm_kernels(model)
    assert [e.path for e in report.replaced] == ["model.layers.0", "model.layers.1"]
    for actual, plain in zip(run(), expected, strict=True):
        scale = float(plain.detach().abs().max())
        torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-5 * scale)
    remove_calm_kernels(model)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_llama_generates_the_same_tokens_with_its_cache() -> None:
    model = llama().eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids_of(2, 5), **settings)
    apply_calm_kernels(model)
    assert torch.equal(model.generate(ids_of(2, 5), **settings), expected)


def test_tied_llama_stays_tied_and_saves_as_itself(tmp_path: Any) -> None:
    model = llama(tie_word_embeddings=True)
    apply_calm_kernels(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(loaded(ids_of(2, 7)).logits, model.eval()(ids_of(2, 7)).logits)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"mlp_bias": True}, "has a bias"), ({"hidden_act": "gelu"}, "computes something else")],
)
def test_other_llama_layers_are_kept_with_the_reason(settings: Any, reason: str) -> None:
    report = apply_calm_kernels(llama(**settings))
    assert not report.replaced and len(report.kept) == 2
    assert all(reason in entry.note for entry in report.kept)


def test_layer_of_the_same_names_with_another_norm_is_kept() -> None:
    """Gemma's norm multiplies by 1 + weight, its FFN has another activation."""
    config = GemmaConfig(**SIZES, head_dim=8, hidden_activation="silu", hidden_act="silu")
    report = apply_calm_kernels(GemmaModel(config))
    assert not report.replaced
    assert all("computes something else" in e.note or "no RMSNorm" in e.note for e in report.kept)


def test_hooks_inside_keep_a_block() -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    report = apply_calm_kernels(model)
    assert [entry.path for entry in report.replaced] == ["model.layers.1"]
    assert "hooks" in report.kept[0].note


def test_hook_or_adapter_put_in_later_is_not_passed_over() -> None:
    model = llama().eval()
    apply_calm_kernels(model)
    calls: list[Any] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    plain = model(ids_of(1, 4)).logits
    assert calls == [1]
    handle.remove()
    torch.testing.assert_close(model(ids_of(1, 4)).logits, plain, rtol=1e-4, atol=1e-4)
    assert calls == [1]

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mlp = model.model.layers[1].mlp
    doubled = Doubled(16, 24, bias=False)
    doubled.weight = mlp.up_proj.weight
    mlp.up_proj = doubled
    actual = model(ids_of(1, 4)).logits
    remove_calm_kernels(model)
    torch.testing.assert_close(actual, model(ids_of(1, 4)).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(actual, plain)


def test_weights_on_the_meta_device_are_reported() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    report = apply_calm_kernels(model)
    assert not report.replaced and "meta device" in report.kept[0].note


def test_block_in_another_order_is_kept(make_autoencoder: Make) -> None:
    model = make_autoencoder()

    class NormAfter(type(model.encoder.encoder_layers[0])):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return self.layernorm(x + self.mlp(x))

    model.encoder.encoder_layers[1].__class__ = NormAfter
    report = apply_calm_kernels(model)
    (kept,) = report.kept
    assert kept.path == "encoder.encoder_layers.1" and kept.module == "NormAfter"
    assert "computes something else" in kept.note


def test_decoder_and_encoder_of_another_kind_are_kept(make_autoencoder: Make) -> None:
    model = make_autoencoder()
    decoder, encoder = type(model.decoder), type(model.encoder)

    class Scaled(decoder):  # type: ignore[misc, valid-type]
        def forward(self, latents: Tensor) -> Tensor:
            return super().forward(latents) @ torch.eye(23)

    class Normed(encoder):  # type: ignore[misc, valid-type]
        def forward(self, input_ids: Tensor) -> Tensor:
            return F.normalize(super().forward(input_ids), dim=-1)

    model.decoder.__class__, model.encoder.__class__ = Scaled, Normed
    kept = {entry.part: entry.note for entry in apply_calm_kernels(model).kept}
    assert kept.keys() == {"encode", "decode", "cross_entropy"}
    assert "computes something else" in kept["encode"] and "F.linear" in kept["decode"]


def test_energy_score_of_another_kind_is_kept(make_language_model: Make) -> None:
    model = make_language_model()
    plain = type(model)

    class Halved(plain):  # type: ignore[misc, valid-type]
        def energy_score(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
            return super().energy_score(x, mean, log_std / 2)

    class Other(plain):  # type: ignore[misc, valid-type]
        def energy_score(self, x: Tensor, mean: Tensor) -> Tensor:
            return x.mean()

    class Negative(plain):  # type: ignore[misc, valid-type]
        def energy_score(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
            return -super().energy_score(x, mean, log_std)

    for kind, reason in ((Halved, "computes something else"), (Other, "no arguments mean")):
        model.__class__ = kind
        (kept,) = apply_calm_kernels(model).kept
        remove_calm_kernels(model)
        assert kept.part == "energy" and reason in kept.note
    model.__class__ = Negative
    assert not apply_calm_kernels(model).kept
    samples, mean = torch.randn(4, 3, 6), torch.randn(3, 6)
    assert (model.energy_score(samples, mean, mean) > 0).all()


def test_methods_of_other_names_are_found_when_named(make_language_model: Make) -> None:
    model = make_language_model()
    plain = type(model)

    class Renamed(plain):  # type: ignore[misc, valid-type]
        def vote(self, draws: Tensor, temperature: float) -> Tensor:
            chosen: Tensor = plain.temperature_sample(self, draws, temperature)
            return chosen

        temperature_sample = None

    model.__class__ = Renamed
    assert "sampling" not in {e.part for e in apply_calm_kernels(model).replaced}
    report = apply_calm_kernels(model, methods={"temperature_sample": "vote"})
    assert "vote: batch_temperature_sample" in {e.note for e in report.replaced}
    draws = torch.tensor([[[4, 2]] * 3])
    assert model.vote(draws, 0.37).tolist() == [[4, 2]]  # the plain one knows integer 1/T only


def test_this_packages_own_layers_are_left_alone() -> None:
    from calm_kernels.models import Autoencoder, AutoencoderConfig

    model = Autoencoder(AutoencoderConfig(vocab_size=23, hidden_size=8, intermediate_size=8))
    with pytest.raises(ValueError, match="no part"):
        apply_calm_kernels(model)
