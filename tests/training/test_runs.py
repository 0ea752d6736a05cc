"""Models are found by kind, and what is no run or damaged is an error with the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from calm_kernels.models import Autoencoder, AutoencoderConfig
from calm_kernels.training.errors import UserError
from calm_kernels.training.runs import (
    find_model,
    load_model,
    model_kind,
    models_in,
    run_folder_of,
    save_model,
)
from calm_kernels.training.tokenizers import ByteTokenizer, load_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Autoencoder(
        AutoencoderConfig(vocab_size=258, hidden_size=8, intermediate_size=8, latent_size=4)
    )
    save_model(model, ByteTokenizer(), tmp_path / "run" / "autoencoder")
    (tmp_path / "run" / "data").mkdir()
    return tmp_path / "run"


def test_a_saved_model_loads_equal_with_its_tokenizer(run: Path) -> None:
    folder = run / "autoencoder"
    torch.manual_seed(0)
    expected = Autoencoder(
        AutoencoderConfig(vocab_size=258, hidden_size=8, intermediate_size=8, latent_size=4)
    ).state_dict()
    loaded = load_model("autoencoder", folder)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name])
    assert load_tokenizer(folder).identity == "bytes"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "calm_autoencoder"}, "autoencoder"),
        ({"model_type": "calm"}, "energy"),
        ({"model_type": "calm_baseline"}, "baseline"),
        ({"model_type": "other", "num_mlp_layers": 4}, "energy"),
        ({"num_encoder_layers": 2, "latent_size": 8}, "autoencoder"),
        ({"model_type": "llama"}, None),
    ],
)
def test_the_configuration_tells_the_kind(
    tmp_path: Path, config: dict[str, object], kind: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert model_kind(tmp_path) == kind


def test_a_run_and_a_model_folder_both_lead_to_the_model(run: Path) -> None:
    assert find_model(run, "autoencoder") == ("autoencoder", run / "autoencoder")
    assert find_model(run / "autoencoder", "autoencoder")[1] == run / "autoencoder"
    assert run_folder_of(run / "autoencoder") == run


def test_a_model_of_another_kind_is_an_error_that_says_both(run: Path) -> None:
    with pytest.raises(UserError, match=r"holds an autoencoder, but an energy model or a baseline"):
        find_model(run, "energy", "baseline")


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        models_in(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        models_in(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "config", "shapes"])
def test_a_damaged_checkpoint_is_one_sentence_with_the_fix(run: Path, damage: str) -> None:
    folder = run / "autoencoder"
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"not a checkpoint")
    elif damage == "config":
        config.write_text('{"model_type": "calm_autoencoder", ', encoding="utf-8")
    else:
        values = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**values, "hidden_size": 16}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_model("autoencoder", folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert "--resume" in message or "--overwrite" in message
