"""Checkpoint folders: read strictly, from this machine only.

A folder holds ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin`` (whole, or in
shards with an index). Whatever does not fit the model is an error that names it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

Folder = str | os.PathLike[str]
ConfigType = TypeVar("ConfigType", bound=PreTrainedConfig)
ModelType = TypeVar("ModelType", bound=PreTrainedModel)

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_SHOWN_KEYS = 4


def checked_folder(folder: Folder) -> Path:
    """A folder that has a ``config.json``.

    Raises:
        FileNotFoundError: it is not there, or holds no configuration.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"no checkpoint folder at {str(path)!r}: give the folder that save_pretrained wrote "
            "(nothing is downloaded)"
        )
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{str(path)!r} is not a checkpoint: it has no {CONFIG_FILE}; give the folder that "
            "save_pretrained wrote"
        )
    return path


def read_config(config_class: type[ConfigType], folder: Path) -> ConfigType:
    """The configuration in a folder.

    Raises:
        ValueError: the file is not JSON, or its values do not make a configuration.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        config: ConfigType = config_class.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} does not configure this kind of model: {error}") from error
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, on the CPU.

    Raises:
        FileNotFoundError: there is no weight file, or a shard is missing.
        ValueError: a file is damaged, or holds something other than tensors.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _read_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    raise FileNotFoundError(
        f"{str(folder)!r} holds no weights: expected {' or '.join(WEIGHT_FILES)}; was the run "
        "stopped before it saved?"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is no index of shards: {error}") from error
    weights: dict[str, Tensor] = {}
    for name in files:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{str(index.parent / name)!r} is missing: copy all shards")
        weights.update(_read_file(index.parent / name))
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # damaged bytes raise anything: unpickling, zip, decoding errors
        raise ValueError(
            f"{str(path)!r} cannot be read as a checkpoint, it is damaged or incomplete; copy it "
            f"again ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{str(path)!r} does not hold a dictionary of tensors")
    return weights


def load_strictly(
    model_class: type[ModelType],
    config: PreTrainedConfig,
    weights: dict[str, Tensor],
    origin: Path,
    **kwargs: Any,
) -> ModelType:
    """A model with exactly these weights, in evaluation mode.

    Args:
        weights: by name; of tied weights one name is enough.
        origin: where the weights came from, for messages.
        kwargs: what ``PreTrainedModel.from_pretrained`` takes besides, ``dtype`` for example.

    Raises:
        ValueError: a weight is missing, unexpected or of another shape; tied weights differ.
    """
    kwargs.update(config=config, state_dict=dict(weights), output_loading_info=True)
    kwargs.update(local_files_only=True, ignore_mismatched_sizes=True)
    from_pretrained = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    with quiet_transformers():
        model, info = from_pretrained(model_class, None, **kwargs)
    problems = [
        *_problem("missing", info["missing_keys"]),
        *_problem("unexpected", info["unexpected_keys"]),
        *_problem("of another shape", (key for key, *_ in info["mismatched_keys"])),
        *_problem("tied, but different", _untied(model, weights)),
        *info.get("error_msgs", ()),
    ]
    if problems:
        raise ValueError(
            f"the weights in {str(origin)!r} do not fit {model_class.__name__} as its "
            f"{CONFIG_FILE} describes it: {'; '.join(problems)}"
        )
    model.config.name_or_path = model.name_or_path = str(origin)
    loaded: ModelType = model
    return loaded


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no reports of what is raised as an error."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _problem(kind: str, keys: Any) -> list[str]:
    names = sorted(keys)
    if not names:
        return []
    more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    return [f"{len(names)} weights {kind}: {', '.join(names[:_SHOWN_KEYS])}{more}"]


def _untied(model: PreTrainedModel, weights: dict[str, Tensor]) -> list[str]:
    """Pairs that the model ties and the checkpoint holds with different values."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return [
        f"{target} and {source}"
        for target, source in tied.items()
        if target in weights
        and source in weights
        and not torch.equal(weights[target], weights[source])
    ]
