"""Run folders: where a model lies, what kind it is, loading and saving it.

A run is a folder with ``data/`` and one folder a model: ``autoencoder/``, ``energy/``,
``baseline/``. A model's folder holds ``config.json``, ``model.safetensors``, its tokenizer,
``history.jsonl`` and, written last, ``stage.json``: what it was trained with and how it scored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calm_kernels.training.errors import UserError
from calm_kernels.training.files import install_folder, read_json
from calm_kernels.training.tokenizers import Tokenizer

KINDS = ("autoencoder", "energy", "baseline")
STAGE = "stage.json"
HISTORY = "history.jsonl"
CHECKPOINTS = "checkpoints"
DATA = "data"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

_TYPES = {
    "calm_autoencoder": "autoencoder",
    "autoencoder": "autoencoder",
    "calm": "energy",
    "energy": "energy",
    "calm_baseline": "baseline",
}
_ARTICLE = {"autoencoder": "an autoencoder", "energy": "an energy model", "baseline": "a baseline"}


def model_kind(folder: Path) -> str | None:
    """The kind of model whose ``config.json`` lies in a folder; None if there is none."""
    config = read_json(folder / "config.json")
    if config is None:
        return None
    known = _TYPES.get(str(config.get("model_type", "")).lower())
    if known is None and "num_mlp_layers" in config:
        return "energy"
    if known is None and "num_encoder_layers" in config:
        return "autoencoder"
    return known


def models_in(folder: Path) -> dict[str, Path]:
    """The models of a run, or the one model whose folder this is, by kind.

    Raises:
        UserError: there is no such folder, or no model in it.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: give the folder of a run, made by `calm-kernels demo` or "
            f"`calm-kernels train`"
        )
    own = model_kind(folder)
    if own is not None:
        return {own: folder}
    found = {kind: folder / kind for kind in KINDS if model_kind(folder / kind) == kind}
    if not found:
        raise UserError(
            f"{folder} is not a run: neither it nor {', '.join(KINDS)} in it holds the "
            f"config.json of a model; make one with `calm-kernels demo` or `calm-kernels train`"
        )
    return found


def find_model(folder: Path, *kinds: str) -> tuple[str, Path]:
    """The first of ``kinds`` that a run or model folder holds.

    Raises:
        UserError: nothing there, or a model of another kind.
    """
    found = models_in(folder)
    for kind in kinds:
        if kind in found:
            return kind, found[kind]
    there = " and ".join(_ARTICLE[kind] for kind in found)
    wanted = " or ".join(_ARTICLE[kind] for kind in kinds)
    raise UserError(
        f"{folder} holds {there}, but {wanted} is needed: give another folder or train one with "
        f"`calm-kernels train {kinds[0]}`"
    )


def load_model(kind: str, folder: Path, autoencoder: Any = None) -> Any:
    """Load a model in evaluation mode.

    Args:
        kind: ``"autoencoder"``, ``"energy"`` or ``"baseline"``.
        folder: with ``config.json`` and weights.
        autoencoder: for an energy model whose folder carries no autoencoder: its folder or model.

    Raises:
        UserError: weights missing, damaged or of other shapes than the configuration says.
    """
    from calm_kernels import models

    if not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(
            f"{folder} has no weights ({WEIGHTS[0]}): the training was not finished; continue it "
            f"with --resume"
        )
    try:
        if kind == "autoencoder":
            return models.Autoencoder.from_pretrained(folder)
        if kind == "energy":
            return models.EnergyTransformer.from_pretrained(folder, autoencoder=autoencoder)
        return models.AutoregressiveBaseline.from_pretrained(folder)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the model in {folder} cannot be loaded: {reason.rstrip('.')}; copy it again or train "
            f"it again with --overwrite"
        ) from error


def save_model(
    model: Any, tokenizer: Tokenizer, folder: Path, weights: dict[str, Any] | None = None
) -> None:
    """Save a model with its tokenizer; files come into place when all are written.

    Args:
        weights: the whole weights of a model that has a part of them only.

    Raises:
        DiskFullError: no space; a model that was there before is untouched.
    """

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save(temporary)

    install_folder(folder, "the model", fill)


def run_folder_of(model_folder: Path) -> Path:
    """The run that a model's folder belongs to: its parent, if that holds data, or itself."""
    parent = model_folder.resolve().parent
    return parent if (parent / DATA).is_dir() else model_folder
