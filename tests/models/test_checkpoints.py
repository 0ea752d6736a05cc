"""Checkpoint folders: what loads, what is refused and why."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calm_kernels.models import Autoencoder, AutoregressiveBaseline, EnergyTransformer

MakeAutoencoder = Callable[..., Autoencoder]
MakeEnergyTransformer = Callable[..., EnergyTransformer]

AUTOENCODER_CONFIG_OF_TRANSFORMERS_4: dict[str, Any] = {
    "architectures": ["Autoencoder"],
    "ae_dropout": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 12,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "kl_clamp": 0.5,
    "kl_weight": 0.001,
    "latent_size": 6,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "autoencoder",
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "pad_token_id": 22,
    "patch_size": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.43.0",
    "vocab_size": 23,
}
LANGUAGE_MODEL_CONFIG_OF_TRANSFORMERS_4: dict[str, Any] = {
    "ae_path": "/somewhere/else/autoencoder",
    "architectures": ["EnergyTransformer"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "beta": 1.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "latent_size": 6,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "energy",
    "noise_size": 5,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_mlp_layers": 2,
    "num_samples": 3,
    "pad_token_id": 22,
    "patch_size": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.43.0",
    "use_cache": True,
    "vocab_size": 23,
}


def write_folder(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], kind: str
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        copies = {name: value.clone().contiguous() for name, value in weights.items()}
        save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def is_tied(autoencoder: Autoencoder) -> bool:
    return autoencoder.decoder.lm_head_weight is autoencoder.encoder.embed_tokens.weight


def test_autoencoder_survives_saving_and_stays_tied(
    make_autoencoder: MakeAutoencoder, tmp_path: Path
) -> None:
    model = make_autoencoder(4)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("decoder.lm_head_weight" in stored) != ("encoder.embed_tokens.weight" in stored)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert is_tied(loaded) and not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert_same_weights(loaded, model)
    ids = torch.randint(0, 23, (2, 8))
    assert torch.equal(loaded(ids).loss, model.eval()(ids).loss)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "left_out", [None, "decoder.lm_head_weight", "encoder.embed_tokens.weight"]
)
def test_released_autoencoder_loads_with_either_name_of_the_tied_weight(
    make_autoencoder: MakeAutoencoder, tmp_path: Path, kind: str, left_out: str | None
) -> None:
    model = make_autoencoder(4)
    weights = model.state_dict()
    if left_out is not None:
        del weights[left_out]
    write_folder(tmp_path, AUTOENCODER_CONFIG_OF_TRANSFORMERS_4, weights, kind)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert is_tied(loaded)
    assert_same_weights(loaded, model)
    assert loaded.config.pad_token_id == 22


def test_tied_weights_that_differ_are_refused(
    make_autoencoder: MakeAutoencoder, tmp_path: Path
) -> None:
    weights = make_autoencoder(4).state_dict()
    weights["decoder.lm_head_weight"] = weights["decoder.lm_head_weight"] + 1
    write_folder(tmp_path, AUTOENCODER_CONFIG_OF_TRANSFORMERS_4, weights, "safetensors")
    with pytest.raises(ValueError, match=r"tied, but different.*decoder\.lm_head_weight"):
        Autoencoder.from_pretrained(tmp_path)


def test_language_model_survives_saving_with_its_autoencoder(
    make_energy_transformer: MakeEnergyTransformer, tmp_path: Path
) -> None:
    model = make_energy_transformer(2, eos_token_id=3)
    model.save_pretrained(tmp_path)
    loaded = EnergyTransformer.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert is_tied(loaded.ae_model)
    assert not any(parameter.requires_grad for parameter in loaded.ae_model.parameters())
    assert all(p.requires_grad for n, p in loaded.named_parameters() if "ae_model" not in n)
    assert not loaded.training and not loaded.train().ae_model.training
    ids = torch.randint(0, 23, (2, 8))
    assert torch.equal(loaded(ids, seed=1).loss, model(ids, seed=1).loss)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_weights(EnergyTransformer.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("carries_autoencoder", [True, False])
@pytest.mark.parametrize("as_folder", [True, False])
def test_released_language_model_loads_with_the_autoencoder_given(
    make_energy_transformer: MakeEnergyTransformer,
    tmp_path: Path,
    kind: str,
    carries_autoencoder: bool,
    as_folder: bool,
) -> None:
    model = make_energy_transformer(4)
    weights = model.state_dict()
    if not carries_autoencoder:
        weights = {n: w for n, w in weights.items() if not n.startswith("ae_model.")}
    write_folder(tmp_path / "lm", LANGUAGE_MODEL_CONFIG_OF_TRANSFORMERS_4, weights, kind)
    write_folder(
        tmp_path / "ae", AUTOENCODER_CONFIG_OF_TRANSFORMERS_4, model.ae_model.state_dict(), kind
    )
    autoencoder: Any = tmp_path / "ae"
    if not as_folder:
        autoencoder = Autoencoder.from_pretrained(autoencoder)
    loaded = EnergyTransformer.from_pretrained(tmp_path / "lm", autoencoder=autoencoder)
    assert_same_weights(loaded, model)
    assert not any(parameter.requires_grad for parameter in loaded.ae_model.parameters())
    ids = torch.randint(0, 22, (2, 8))
    torch.testing.assert_close(loaded(ids, seed=1).loss, model(ids, seed=1).loss)


@pytest.mark.parametrize("carries_autoencoder", [True, False])
def test_released_language_model_asks_for_its_autoencoder(
    make_energy_transformer: MakeEnergyTransformer, tmp_path: Path, carries_autoencoder: bool
) -> None:
    model = make_energy_transformer(4)
    weights = model.state_dict()
    if not carries_autoencoder:
        weights = {n: w for n, w in weights.items() if not n.startswith("ae_model.")}
    folder = write_folder(
        tmp_path / "lm", LANGUAGE_MODEL_CONFIG_OF_TRANSFORMERS_4, weights, "safetensors"
    )
    with pytest.raises(ValueError, match=r"/somewhere/else/autoencoder.*pass autoencoder="):
        EnergyTransformer.from_pretrained(folder)
    model.ae_model.save_pretrained(tmp_path / "ae")
    config = {**LANGUAGE_MODEL_CONFIG_OF_TRANSFORMERS_4, "ae_path": str(tmp_path / "ae")}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_weights(EnergyTransformer.from_pretrained(folder), model)


def test_given_autoencoder_replaces_the_one_carried_with_a_warning(
    make_energy_transformer: MakeEnergyTransformer,
    make_autoencoder: MakeAutoencoder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_energy_transformer(4)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="calm_kernels"):
        same = EnergyTransformer.from_pretrained(tmp_path, autoencoder=model.ae_model)
        assert_same_weights(same, model)
        assert not caplog.records
        other = make_autoencoder(4)
        loaded = EnergyTransformer.from_pretrained(tmp_path, autoencoder=other)
    assert_same_weights(loaded.ae_model, other)
    assert len(caplog.records) == 1 and "another autoencoder" in caplog.text


def test_dtype_can_be_chosen(
    make_energy_transformer: MakeEnergyTransformer, tmp_path: Path
) -> None:
    make_energy_transformer(4).save_pretrained(tmp_path)
    loaded = EnergyTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded(torch.randint(0, 23, (2, 8))).loss.dtype == torch.float32


def test_shards_load(make_autoencoder: MakeAutoencoder, tmp_path: Path) -> None:
    model = make_autoencoder(4)
    model.save_pretrained(tmp_path, max_shard_size=4000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_same_weights(Autoencoder.from_pretrained(tmp_path), model)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        Autoencoder.from_pretrained(tmp_path)


def test_baseline_survives_saving(
    make_baseline: Callable[..., AutoregressiveBaseline], tmp_path: Path
) -> None:
    for tied in (False, True):
        model = make_baseline(tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / str(tied))
        loaded = AutoregressiveBaseline.from_pretrained(tmp_path / str(tied))
        assert_same_weights(loaded, model)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_that_do_not_fit_are_listed(
    make_autoencoder: MakeAutoencoder, tmp_path: Path, kind: str
) -> None:
    config = AUTOENCODER_CONFIG_OF_TRANSFORMERS_4
    weights = make_autoencoder(4).state_dict()
    norm = weights.pop("decoder.norm.weight")
    write_folder(tmp_path, config, weights, kind)
    with pytest.raises(ValueError, match=r"1 weights missing: decoder\.norm\.weight$"):
        Autoencoder.from_pretrained(tmp_path)
    write_folder(tmp_path, config, {**weights, "decoder.norm.weight": norm, "extra": norm}, kind)
    with pytest.raises(ValueError, match=r"1 weights unexpected: extra$"):
        Autoencoder.from_pretrained(tmp_path)
    write_folder(tmp_path, config, {**weights, "decoder.norm.weight": norm[:5]}, kind)
    with pytest.raises(ValueError, match=r"of another shape: decoder\.norm\.weight$"):
        Autoencoder.from_pretrained(tmp_path)


def test_checkpoint_of_another_model_is_refused(
    make_energy_transformer: MakeEnergyTransformer, tmp_path: Path
) -> None:
    make_energy_transformer(4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit Autoencoder.*missing.*and .* more"):
        Autoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged_file_is_refused(
    make_autoencoder: MakeAutoencoder, tmp_path: Path, name: str, damage: str
) -> None:
    weights = make_autoencoder(4).state_dict()
    kind = "safetensors" if name.endswith("safetensors") else "bin"
    write_folder(tmp_path, AUTOENCODER_CONFIG_OF_TRANSFORMERS_4, weights, kind)
    content = (tmp_path / name).read_bytes()
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "noise": b"\x93noise" * 100}
    (tmp_path / name).write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"{name}.*damaged"):
        Autoencoder.from_pretrained(tmp_path)


class _Harmful:
    def __reduce__(self) -> Any:
        return print, ("code from a checkpoint ran",)


@pytest.mark.parametrize("content", [_Harmful(), {"weights": _Harmful()}, [1, 2], {"a": 3}])
def test_file_of_other_objects_is_refused_unread(
    tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, AUTOENCODER_CONFIG_OF_TRANSFORMERS_4, {}, "bin")
    torch.save(content, tmp_path / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        Autoencoder.from_pretrained(tmp_path)
    assert "code from a checkpoint" not in capsys.readouterr().out


def test_missing_parts_of_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder.*nothing is downloaded"):
        Autoencoder.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        EnergyTransformer.from_pretrained("someone/some-model")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        AutoregressiveBaseline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        Autoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a JSON object"):
        Autoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"patch_size": "four"}')
    with pytest.raises(ValueError, match="patch_size"):
        Autoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        Autoencoder.from_pretrained(tmp_path)
