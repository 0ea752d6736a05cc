"""Presets are complete, and numbers out of range are errors that say the range."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calm_kernels.cli import parser
from calm_kernels.training.errors import UserError
from calm_kernels.training.presets import PRESETS, checked, preset, with_overrides


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_valid_stages(name: str) -> None:
    chosen = preset(name)
    assert chosen.name == name
    for stage in (chosen.autoencoder, chosen.energy, chosen.baseline):
        assert checked(stage.optimization, chosen.patch_size) is stage.optimization
    assert chosen.energy.num_samples >= 2
    assert chosen.energy.hidden_size % chosen.energy.num_heads == 0


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_prompts_of_byte_presets_end_with_a_patch(name: str) -> None:
    chosen = preset(name)
    assert chosen.tokenizer == "bytes"
    assert [len(p.encode()) % chosen.patch_size for p in chosen.sample.prompts] == [
        0 for _ in chosen.sample.prompts
    ]


def test_the_command_line_lists_the_presets_there_are() -> None:
    assert set(parser.PRESETS) == set(PRESETS)


def test_small_widths_are_scaled_and_the_paper_is_not() -> None:
    schemes = {name: preset(name).init_scheme for name in PRESETS}
    assert schemes == {
        "tiny": "width_scaled", "demo": "width_scaled", "small": "width_scaled", "paper": "normal",
    }  # fmt: skip


def test_the_paper_preset_has_the_paper_s_sizes() -> None:
    chosen = preset("paper")
    autoencoder, energy = chosen.autoencoder, chosen.energy
    sizes = (autoencoder.hidden_size, autoencoder.intermediate_size, autoencoder.latent_size)
    assert (chosen.patch_size, *sizes) == (4, 512, 1280, 128)
    assert (energy.hidden_size, energy.intermediate_size) == (1024, 2752)
    assert (energy.num_layers, energy.num_heads) == (16, 16)
    assert (energy.head_blocks, energy.noise_size, energy.num_samples) == (4, 64, 8)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'huge'.*tiny, demo, small, paper"):
        preset("huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"batch_size": -1}, "batch size: expected at least 1"),
        ({"gradient_accumulation": 0}, "gradient accumulation: expected at least 1"),
        ({"learning_rate": 0.0}, "learning rate: expected a positive number"),
        ({"learning_rate": float("nan")}, "learning rate: expected a positive number"),
        ({"schedule": "linear"}, "schedule: expected cosine or constant"),
        ({"optimizer": "sgd"}, "optimizer: expected adamw or muon"),
        ({"block_length": 66}, "block length 66 is not a multiple of the patch size 4.*64"),
        ({"block_length": 4}, "less than two patches"),
    ],
)
def test_a_number_out_of_range_is_an_error(change: dict[str, object], message: str) -> None:
    optimization = preset("tiny").autoencoder.optimization
    with pytest.raises(UserError, match=message):
        checked(replace(optimization, **change), 4)  # type: ignore[arg-type]


def test_overrides_that_are_none_change_nothing() -> None:
    optimization = preset("tiny").autoencoder.optimization
    assert with_overrides(optimization, steps=None, learning_rate=None) == optimization
    assert with_overrides(optimization, steps=7).steps == 7
