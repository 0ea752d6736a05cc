"""Models set beside each other: what they are asked, and what they cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calm_kernels.models import AutoencoderConfig, BaselineConfig, flops
from calm_kernels.training import comparison
from calm_kernels.training.comparison import Compared, Cost, common_positions, training_flops
from calm_kernels.training.comparison_plot import labels_of, plot_comparison, spread_out
from calm_kernels.training.errors import UserError


def loaded(kind: str, patch_size: int, block_length: int) -> Any:
    config = SimpleNamespace(patch_size=patch_size)
    return SimpleNamespace(
        kind=kind, model=SimpleNamespace(config=config), block_length=block_length
    )


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([("energy", 4, 256)], (256, 4)),
        ([("energy", 1, 256), ("energy", 2, 256), ("energy", 4, 256)], (256, 4)),
        ([("energy", 2, 64), ("energy", 3, 66)], (60, 6)),
        ([("energy", 2, 64), ("baseline", 4, 48)], (48, 2)),
        ([("baseline", 4, 64)], (64, 4)),
        ([("energy", 8, 64), ("energy", 1, 64)], (64, 8)),
    ],
)
def test_positions_are_the_multiples_that_all_models_can_start_at(
    models: list[tuple[str, int, int]], expected: tuple[int, int]
) -> None:
    assert common_positions([loaded(*model) for model in models]) == expected


def test_models_without_a_common_position_are_refused() -> None:
    with pytest.raises(UserError, match=r"no position in common.*35.*64 tokens"):
        common_positions([loaded("energy", 5, 64), loaded("energy", 7, 64)])


def test_a_training_costs_its_steps_times_its_batches() -> None:
    config = BaselineConfig(vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
                            num_attention_heads=2)  # fmt: skip
    step = flops.training_step(config, 3, 10).total
    optimization = {"steps": 7, "block_length": 10}
    for batch in (
        {"batch_size": 3, "gradient_accumulation": 5}, {"batch_size": 15},
        {"global_batch_size": 15},
    ):  # fmt: skip
        record = {"settings": {"optimization": {**optimization, **batch}}}
        assert training_flops(config, record) == 7 * 5 * step
    assert training_flops(config, {}) is None
    # Nine positions: projections, attention over them and FFN of two layers, and the vocabulary.
    layer = 2 * (4 * 8 * 8 + 3 * 8 * 12) + 4 * 9 * 8
    assert step == 3 * 3 * 9 * (2 * layer + 2 * 8 * 19)


def test_an_autoencoder_is_trained_on_all_its_patches() -> None:
    config = AutoencoderConfig(vocab_size=11, hidden_size=6, intermediate_size=9, latent_size=4,
                               patch_size=2)  # fmt: skip
    ffn, patches, tokens = 6 * 6 * 9, 15, 30
    encoder = 11 * ffn + patches * (2 * 12 * 6 + ffn + 2 * 6 * 8)
    decoder = patches * (2 * 4 * 6 + ffn + 2 * 6 * 12) + tokens * (ffn + 2 * 6 * 11)
    optimization = {"steps": 1, "batch_size": 3, "block_length": 10}
    record = {"settings": {"optimization": optimization}}
    assert training_flops(config, record) == 3 * (encoder + decoder)


def row(run: str, patch_size: int | None, **cost: Any) -> Compared:
    kind = "baseline" if patch_size is None else "energy"
    metrics = {"brier_lm": 3.0, "brier_lm_standard_error": 0.1}
    return Compared(run, kind, patch_size, 10, Cost(**cost), metrics, "text")


def test_points_of_a_plot_are_called_so_that_they_can_be_told_apart() -> None:
    rows = [row("a", 2), row("b", 4), row("c", 4), row("d", None)]
    assert labels_of(rows) == ["CALM K=2", "CALM K=4 (b)", "CALM K=4 (c)", "baseline"]


def test_labels_keep_their_order_and_their_distance() -> None:
    assert spread_out([5.0, 1.0, 1.1, 9.0], 0.5) == [5.0, 1.0, 1.5, 9.0]
    assert spread_out([], 0.5) == []


def test_a_plot_leaves_out_the_costs_that_are_not_known(tmp_path: Path) -> None:
    known = {"training": 10**9, "per_token": 1e6, "per_token_with_candidates": 5e7}
    rows = [row("a", 4, **known), row("b", 2)]
    for name in ("x.png", "folder/x.svg"):
        plot_comparison(rows, tmp_path / name, "caption")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "svg" in (tmp_path / "folder" / "x.svg").read_text(encoding="utf-8")
    plot_comparison(rows[1:], tmp_path / "none.png", "nothing known at all")


def test_names_of_runs_are_what_tells_them_apart() -> None:
    names = comparison._names
    assert names([Path("runs/k1"), Path("runs/k2")]) == ["k1", "k2"]
    assert names([Path("runs/a/energy"), Path("runs/a")]) == ["a/energy", "a"]
    assert names([Path("runs/a")]) == ["runs/a"]
    assert names([Path("runs/a"), Path("runs/a")]) == ["runs/a", "runs/a"]
