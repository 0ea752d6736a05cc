from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from calm_kernels.nn.patch_codec import PatchDecoder, PatchEncoder, fold_encoder

VOCAB, HIDDEN, INTERMEDIATE, LATENT, PATCH = 37, 16, 24, 6, 4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "latent_size": LATENT,
    "patch_size": PATCH,
}
MODES = ("table", "squeezed")


def encoder(layers: int = 2, dtype: torch.dtype = torch.float64, **options) -> PatchEncoder:
    torch.manual_seed(3)
    module = PatchEncoder(**SIZES, num_encoder_layers=layers, **options).to(dtype)
    return randomized(module)


def decoder(layers: int = 2, dtype: torch.dtype = torch.float64) -> PatchDecoder:
    torch.manual_seed(4)
    return randomized(PatchDecoder(**SIZES, num_decoder_layers=layers).to(dtype))


def randomized(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name or "bias" in name:  # at their defaults they would hide mistakes
                parameter += 0.3 * torch.randn_like(parameter)
    return module


def token_ids(patches: int) -> Tensor:
    generator = torch.Generator().manual_seed(patches)
    return torch.randint(0, VOCAB, (patches, PATCH), generator=generator)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def block(state: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    n = norm(x, state[f"{prefix}.layernorm.weight"])
    gate = n @ state[f"{prefix}.mlp.gate_proj.weight"].t()
    up = n @ state[f"{prefix}.mlp.up_proj.weight"].t()
    return x + (silu(gate) * up) @ state[f"{prefix}.mlp.down_proj.weight"].t()


def encoder_formula(state: dict[str, Tensor], ids: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    x = state["embed_tokens.weight"][ids]
    for i in range(layers // 2):
        x = block(state, f"encoder_layers.{i}", x)
    x = x.flatten(1) @ state["squeeze_layer.weight"].t() + state["squeeze_layer.bias"]
    for i in range(layers // 2, layers):
        x = block(state, f"encoder_layers.{i}", x)
    x = norm(x, state["norm.weight"])
    x = x @ state["hidden_to_latent.weight"].t() + state["hidden_to_latent.bias"]
    return x[:, :LATENT], x[:, LATENT:]


def decoder_formula(state: dict[str, Tensor], latents: Tensor, layers: int) -> Tensor:
    x = latents @ state["latent_to_hidden.weight"].t() + state["latent_to_hidden.bias"]
    for i in range(layers // 2):
        x = block(state, f"decoder_layers.{i}", x)
    x = x @ state["expand_layer.weight"].t() + state["expand_layer.bias"]
    x = x.reshape(-1, PATCH, HIDDEN)
    for i in range(layers // 2, layers):
        x = block(state, f"decoder_layers.{i}", x)
    return norm(x, state["norm.weight"]) @ state["lm_head_weight"].t()


# 5 patches hold fewer tokens than the vocabulary, 50 hold more.
@pytest.mark.parametrize("patches", [0, 1, 5, 50])
@pytest.mark.parametrize("layers", [2, 4])
def test_encoder_equals_its_formula(layers: int, patches: int) -> None:
    module, ids = encoder(layers), token_ids(patches)
    expected = encoder_formula(dict(module.state_dict()), ids, layers)
    for value, truth in zip(module(ids), expected, strict=True):
        assert value.shape == (patches, LATENT)
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("patches", [1, 5, 50])
def test_encoder_gradients_equal_those_of_its_formula(patches: int) -> None:
    module, ids = encoder(4), token_ids(patches)
    parameters = dict(module.named_parameters())

    def gradients(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        mean, log_std = outputs
        loss = (mean * log_std.exp()).square().sum()
        return torch.autograd.grad(loss, list(parameters.values()))

    expected = gradients(encoder_formula(parameters, ids, 4))
    for value, truth in zip(gradients(module(ids)), expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layers", [2, 4])
def test_decoder_equals_its_formula(layers: int) -> None:
    module, latents = decoder(layers), torch.randn(9, LATENT, dtype=torch.float64)
    logits = module(latents)
    expected = decoder_formula(dict(module.state_dict()), latents, layers)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    assert logits.shape == (9, PATCH, VOCAB)
    assert torch.equal(module.decode(latents), logits.argmax(dim=-1))
    assert module.hidden_states(latents).shape == (9 * PATCH, HIDDEN)
    assert module(latents[:0]).shape == (0, PATCH, VOCAB)
    assert module.decode(latents[:0]).shape == (0, PATCH)


def test_parameters_have_the_checkpoint_names() -> None:
    blocks = ["layernorm.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight"]
    blocks.append("mlp.up_proj.weight")
    assert set(encoder(4).state_dict()) == {
        "embed_tokens.weight",
        "squeeze_layer.weight",
        "squeeze_layer.bias",
        "norm.weight",
        "hidden_to_latent.weight",
        "hidden_to_latent.bias",
        *(f"encoder_layers.{i}.{name}" for i in range(4) for name in blocks),
    }
    assert set(decoder(4).state_dict()) == {
        "latent_to_hidden.weight",
        "latent_to_hidden.bias",
        "expand_layer.weight",
        "expand_layer.bias",
        "norm.weight",
        "lm_head_weight",
        *(f"decoder_layers.{i}.{name}" for i in range(4) for name in blocks),
    }


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_odd_layer_counts_are_refused(layers: int) -> None:
    with pytest.raises(ValueError, match=r"num_encoder_layers: expected an even number"):
        encoder(layers)
    with pytest.raises(ValueError, match=r"num_decoder_layers: expected an even number"):
        decoder(layers)


@pytest.mark.parametrize("patches", [5, 200])
def test_token_dropout_acts_in_training_only_and_follows_the_seed(patches: int) -> None:
    module, ids = encoder(token_dropout=0.5), token_ids(patches)
    dropped = module.train()(ids, seed=1)[0]
    assert torch.equal(module(ids, seed=1)[0], dropped)
    assert not torch.equal(module(ids, seed=2)[0], dropped)
    kept = module.eval()(ids, seed=1)[0]
    assert torch.equal(module(ids)[0], kept)
    changed = (dropped != kept).any(dim=1).double().mean()
    assert changed > 0.7  # a patch of 4 keeps all its tokens once in 16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("patches", [0, 1, 50])
@pytest.mark.parametrize("layers", [2, 4])
def test_folded_encoder_equals_the_unfolded_one(layers: int, patches: int, mode: str) -> None:
    module, ids = encoder(layers).eval().requires_grad_(False), token_ids(patches)
    unfolded = module(ids)
    assert module.fold(mode).folded.mode == mode
    for value, truth in zip(module(ids), unfolded, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-12)
    module.unfold()
    assert module.folded is None
    assert torch.equal(module(ids)[0], unfolded[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folding_adds_no_error_beyond_rounding(dtype: torch.dtype, mode: str) -> None:
    module, ids = encoder(dtype=dtype).eval().requires_grad_(False), token_ids(400)
    exact = copy.deepcopy(module).double()(ids)
    unfolded, folded = module(ids), module.fold(mode)(ids)
    for value, other, truth in zip(folded, unfolded, exact, strict=True):
        assert value.dtype == dtype
        error, usual = ((t.double() - truth).norm() for t in (value, other))
        assert error <= 1.5 * usual


def test_tables_serve_only_where_no_gradient_is_wanted() -> None:
    module, ids = encoder(token_dropout=0.5).eval().fold(), token_ids(50)
    mean, _ = module(ids)
    mean.sum().backward()  # weights want gradients: the unfolded encoder ran
    assert module.embed_tokens.weight.grad.any()

    def poison() -> None:
        module.folded.tables.fill_(torch.nan)

    poison()
    assert module(ids)[0].isfinite().all()
    assert module.train()(ids)[0].isfinite().all()
    module.eval()
    with torch.no_grad():
        assert module(ids)[0].isnan().all()
    module.requires_grad_(False)
    assert module(ids)[0].isnan().all()


SOURCES = [
    "embed_tokens.weight",
    "encoder_layers.0.layernorm.weight",
    "encoder_layers.0.mlp.gate_proj.weight",
    "encoder_layers.0.mlp.up_proj.weight",
    "encoder_layers.0.mlp.down_proj.weight",
    "squeeze_layer.weight",
    "squeeze_layer.bias",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SOURCES)
def test_a_written_source_weight_makes_the_tables_stale(name: str, mode: str) -> None:
    module, ids = encoder().eval().fold(mode), token_ids(3)
    with torch.no_grad():
        module(ids)
        module.get_parameter(name).flatten()[0] += 1.0
        assert module.folded.is_stale()
        with pytest.raises(RuntimeError, match="a weight changed after folding"):
            module(ids)
        module.fold(mode)(ids)


def optimizer_step(module: PatchEncoder) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    with torch.enable_grad():
        module(token_ids(50))[0].sum().backward()
    optimizer.step()


def assign_data(module: PatchEncoder) -> None:
    module.squeeze_layer.weight.data = module.squeeze_layer.weight.data + 1.0


def assign_data_where_the_old_lay(module: PatchEncoder) -> None:
    weight = module.squeeze_layer.weight
    address = weight.data_ptr()
    for _ in range(50):  # what the allocator just got back it gives out first
        weight.data = torch.randn_like(weight)
        assert weight.data_ptr() != address


def write_through_data(module: PatchEncoder) -> None:
    module.embed_tokens.weight.data.mul_(1.01)


def replace_parameter(module: PatchEncoder) -> None:
    module.squeeze_layer.bias = torch.nn.Parameter(module.squeeze_layer.bias.detach() + 1.0)


def load_by_assignment(module: PatchEncoder) -> None:
    module.load_state_dict(encoder().state_dict(), assign=True)


def convert_to_new_parameters(module: PatchEncoder) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def replace_norm(module: PatchEncoder) -> None:
    weight = torch.ones(HIDDEN, dtype=torch.float64)
    module.encoder_layers[0].layernorm.weight = torch.nn.Parameter(weight)


CHANGES = {
    "optimizer step": optimizer_step,
    "load_state_dict": lambda module: module.load_state_dict(encoder().state_dict()),
    "load_state_dict, assigning": load_by_assignment,
    "dtype": lambda module: module.float(),
    "dtype, new parameters": convert_to_new_parameters,
    "data assigned": assign_data,
    "data assigned again and again": assign_data_where_the_old_lay,
    "write through data": write_through_data,
    "parameter replaced": replace_parameter,
    "norm weight replaced": replace_norm,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_way_of_changing_weights_makes_the_tables_stale(change, mode: str) -> None:
    module, ids = encoder().eval().fold(mode), token_ids(3)
    assert not module.is_stale()
    change(module)
    assert module.is_stale()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="a weight changed after folding"):
            module(ids)
        with pytest.raises(RuntimeError, match="a weight changed after folding"):
            copy.deepcopy(module)(ids)
        folded = module.fold(mode)(ids)[0]
        assert not module.is_stale()
        torch.testing.assert_close(folded, module.unfold()(ids)[0], rtol=1e-5, atol=1e-6)
    assert not module.is_stale()


def test_weights_behind_the_tables_may_change() -> None:
    module, ids = encoder().eval().fold(), token_ids(3)
    with torch.no_grad():
        before = module(ids)[0]
        module.hidden_to_latent.bias += 1.0
        torch.testing.assert_close(module(ids)[0], before + 1.0)


def test_a_copy_of_a_folded_encoder_is_folded_over_its_own_weights() -> None:
    module, ids = encoder().eval().requires_grad_(False).fold(), token_ids(3)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        module.embed_tokens.weight += 1.0
        folded = twin(ids)[0]
        torch.testing.assert_close(folded, twin.unfold()(ids)[0])
        with pytest.raises(RuntimeError, match="a weight changed after folding"):
            copy.deepcopy(module)(ids)


def test_compiled_code_notices_changed_weights() -> None:
    module = encoder().eval().requires_grad_(False).fold()
    compiled = torch.compile(lambda ids: module.folded(ids), fullgraph=True, dynamic=True)
    for patches in (3, 50):
        assert torch.equal(compiled(token_ids(patches)), module.folded(token_ids(patches)))
    module.squeeze_layer.bias += 1.0
    with pytest.raises(RuntimeError, match="a weight changed after folding"):
        compiled(token_ids(3))
    module.fold()
    assert torch.equal(compiled(token_ids(3)), module.folded(token_ids(3)))


@pytest.mark.parametrize("mode", MODES)
def test_folded_encoder_is_traced_without_graph_breaks(mode: str) -> None:
    module = encoder().eval().requires_grad_(False).fold(mode)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for patches in (3, 50):
        ids = token_ids(patches)
        for value, truth in zip(compiled(ids), module(ids), strict=True):
            torch.testing.assert_close(value, truth)


def test_unknown_fold_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode: expected one of table, squeezed; got 'half'"):
        encoder().fold("half")


def test_fold_encoder_without_blocks_does_not_share_memory_with_the_embedding() -> None:
    embedding = torch.randn(5, 2)
    folded = fold_encoder(embedding, [], torch.randn(2, 6), torch.randn(2), mode="table")
    assert folded.tables.data_ptr() != embedding.data_ptr()


def test_an_id_outside_the_vocabulary_is_refused_folded_or_not() -> None:
    module, ids = encoder().eval(), token_ids(3)
    ids[1, 2] = VOCAB
    message = rf"ids: expected token ids in \[0, {VOCAB}\).* got {VOCAB}"
    with torch.no_grad():
        for folding in (module.unfold, lambda: module.fold("table"), module.fold):
            with pytest.raises(ValueError, match=message):
                folding()(ids)


def test_codec_is_traced_without_graph_breaks_at_any_patch_count() -> None:
    enc, dec = encoder(dtype=torch.float32), decoder(dtype=torch.float32)

    def reconstruct(ids: Tensor) -> Tensor:
        mean, log_std = enc(ids)
        return dec.hidden_states(mean + log_std.exp())

    compiled = torch.compile(reconstruct, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters = [
        *enc.parameters(),
        *(p for n, p in dec.named_parameters() if n != "lm_head_weight"),
    ]
    for patches in (3, 50, 61):
        outcomes = []
        for run in (reconstruct, compiled):
            out = run(token_ids(patches))
            outcomes.append([out, *torch.autograd.grad(out.square().mean(), parameters)])
        for value, truth in zip(*outcomes, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6)
