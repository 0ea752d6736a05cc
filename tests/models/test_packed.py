"""Head and decoder from packed weights compute what the modules compute, where they serve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import calm_kernels
from calm_kernels.models import EnergyTransformer
from calm_kernels.models.draws import Drawer
from calm_kernels.nn import EnergyHead, PatchDecoder
from calm_kernels.nn.packed import PackedDecoder, PackedEnergyHead, why_not_packed

MakeModel = Callable[..., EnergyTransformer]
SERVES = why_not_packed(nn.Linear(1, 1)) is None
needs_fast_cpu = pytest.mark.skipif(
    not SERVES, reason="needs the CPU library and AVX-512: " + str(why_not_packed(nn.Linear(1, 1)))
)


def perturbed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


def near(result: Tensor, exact: Tensor, plain: Tensor) -> bool:
    error = float((result.double() - exact).norm())
    bound = max(2 * float((plain.double() - exact).norm()), 1e-6 * float(exact.norm()))
    return result.shape == exact.shape and error <= bound


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize(
    ("hidden_size", "latent_size", "noise_size"), [(32, 8, 64), (40, 5, 7), (19, 33, 1)]
)
@pytest.mark.parametrize(("num_positions", "num_samples"), [(1, 200), (3, 17), (5, 1), (0, 4)])
def test_head_draws_the_samples_of_the_module(
    num_positions: int,
    num_samples: int,
    hidden_size: int,
    latent_size: int,
    noise_size: int,
    num_blocks: int,
) -> None:
    head = perturbed(EnergyHead(hidden_size, latent_size, noise_size, num_blocks))
    assert isinstance(head, EnergyHead)
    packed = PackedEnergyHead(head)
    hidden = torch.randn(num_positions, hidden_size)
    noise = torch.rand(num_samples, num_positions, noise_size) - 0.5
    result, plain = packed(hidden, num_samples, noise), head(hidden, num_samples, noise=noise)
    exact = head.double()(hidden.double(), num_samples, noise=noise.double())
    assert near(result, exact, plain)


@pytest.mark.parametrize("num_layers", [2, 6])
@pytest.mark.parametrize("patch_size", [1, 4])
@pytest.mark.parametrize(("hidden_size", "size"), [(32, 64), (21, 50)])
@pytest.mark.parametrize("num_rows", [0, 1, 90])
@pytest.mark.parametrize("vocab_size", [300, 2100])
def test_decoder_gives_states_and_tokens_of_the_module(
    vocab_size: int, num_rows: int, hidden_size: int, size: int, patch_size: int, num_layers: int
) -> None:
    decoder = perturbed(PatchDecoder(vocab_size, hidden_size, size, 6, patch_size, num_layers))
    assert isinstance(decoder, PatchDecoder)
    packed = PackedDecoder(decoder)
    latents = torch.randn(num_rows, 6)
    plain = decoder.patch_states(latents)
    states = packed.patch_states(latents)
    tokens, places = packed.decode(latents), packed.decode_places(plain, 0, patch_size)
    some = packed.decode_places(plain, patch_size // 2, patch_size)
    decoder.double()
    assert near(states, decoder.patch_states(latents.double()), plain)
    exact = decoder.decode(latents.double())
    assert tokens.shape == exact.shape and tokens.dtype == torch.int64
    # Two logits may lie within rounding of each other.
    assert (tokens != exact).sum() <= num_rows * patch_size / 50
    assert (places != exact).sum() <= num_rows * patch_size / 50
    assert torch.equal(some, places[:, patch_size // 2 :])


@needs_fast_cpu
def test_many_draws_are_packed_and_few_are_not(make_energy_transformer: MakeModel) -> None:
    model = make_energy_transformer(4)
    many, few = Drawer(model, 64), Drawer(model, 63)
    assert isinstance(many.head, PackedEnergyHead) and isinstance(many.decoder, PackedDecoder)
    assert few.head is model.mlp_generator and few.decoder is model.ae_model.decoder
    flow = Drawer(make_energy_transformer(4, head_type="flow"), 64)
    assert not isinstance(flow.head, PackedEnergyHead) and isinstance(flow.decoder, PackedDecoder)
    with torch.autocast("cpu", torch.bfloat16):
        assert Drawer(model, 64).head is model.mlp_generator
    hidden, noise = torch.randn(3, 16), torch.rand(70, 3, many.noise_size) - 0.5
    with torch.no_grad():
        assert torch.equal(many.patches(hidden, noise), few.patches(hidden, noise))


@needs_fast_cpu
def test_what_packed_weights_do_not_know_of_is_not_packed() -> None:
    head = EnergyHead(16, 4, 8, 2)
    assert why_not_packed(head) is None
    with calm_kernels.backend("reference"):
        assert "backend 'reference' is forced" in (why_not_packed(head) or "")
    assert "not torch.float32" in (why_not_packed(EnergyHead(16, 4, 8, 2).bfloat16()) or "")

    hooked = EnergyHead(16, 4, 8, 2)
    hooked.final_layer.in_ln.register_forward_hook(lambda *_: None)
    assert "LayerNorm computes what" in (why_not_packed(hooked) or "")

    class Adapted(nn.Linear):
        """A layer with more to it."""

    adapted = EnergyHead(16, 4, 8, 2)
    adapted.hidden_embd = Adapted(16, 16)
    assert "Adapted computes what" in (why_not_packed(adapted) or "")


@needs_fast_cpu
def test_generation_gives_the_tokens_of_the_modules(
    make_energy_transformer: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_energy_transformer(4).float()
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 6, 1, 8, 0, 3]]
    for sampler, temperature in (("batch", 0.5), ("batch", 0.7), ("exact", 0.5)):
        options = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
        options |= {"num_candidates": 40, "sampler": sampler, "max_draws": 400}
        packed = model.generate(prompts, **options)
        with monkeypatch.context() as patch:
            patch.setattr("calm_kernels.models.draws._WORTH_PACKING", 10**9)
            patch.setattr("calm_kernels.models.cached_backbone._MOST_ROWS_OF_ONE_OPERATOR", -1)
            plain = model.generate(prompts, **options)
        assert torch.equal(packed.sequences, plain.sequences)
