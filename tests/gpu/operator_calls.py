"""A small call of every operator, at odd sizes, with every operand random.

The tests of this folder run them; as a program, ``python operator_calls.py``, each is run once on
the GPU, for a checker that watches from outside.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import calm_kernels
from calm_kernels import _dispatch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IDS = (torch.int64, torch.int32)
Arguments = dict[str, Any]


class Draws:
    """Random arguments from a seed; made on the CPU, so that every device gets the same."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def seed(self) -> Tensor:
        return torch.randint(0, 2**62, (1,), generator=self.generator)


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """One call of a public function.

    Attributes:
        name: unique, also the test's id.
        operators: those that it runs, forward and backward.
        make: arguments. Floating ones are cast to the dtype of the call, those named in ``ids`` to
            an integer dtype; the others stay.
        run: the call; a tensor or a tuple of tensors.
        dtypes: dtypes of the call.
        ids: arguments of integer dtypes that ``dtypes`` ranges over.
        gradients: arguments whose gradient is checked.
        capturable: whether it needs no host synchronisation.
    """

    name: str
    operators: tuple[str, ...]
    make: Callable[[Draws], Arguments]
    run: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    ids: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    capturable: bool = True

    def arguments(self, seed: int, dtype: torch.dtype, device: torch.device) -> Arguments:
        """Random arguments in a dtype on a device, gradients requested."""
        return self.cast(self.make(Draws(seed)), dtype, device)

    def cast(self, arguments: Arguments, dtype: torch.dtype, device: torch.device) -> Arguments:
        """The same values in another dtype, or on another device."""
        cast = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                wanted = value.is_floating_point() if not self.ids else name in self.ids
                value = value.detach().to(device, dtype if wanted else value.dtype)
                value = value.requires_grad_(name in self.gradients)
            cast[name] = value
        return cast

    def results(self, arguments: Arguments) -> list[Tensor]:
        """Outputs, then gradients for a fixed incoming gradient."""
        outputs = self.run(**arguments)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if not self.gradients:
            return [output.detach() for output in outputs]
        scalar = outputs[0]
        weights = torch.arange(1, scalar.numel() + 1, device=scalar.device).reshape(scalar.shape)
        wanted = [arguments[name] for name in self.gradients]
        incoming = (weights / scalar.numel()).to(scalar.dtype)
        return [scalar.detach(), *torch.autograd.grad(scalar, wanted, incoming)]

    def why_not(self, backend: str, device_type: str) -> str | None:
        """Why a backend does not serve all of the operators."""
        for name in self.operators:
            problem = _dispatch.operators()[name].why_not(backend, device_type)
            if problem is not None:
                return f"{name}: {problem}"
        return None


def _law(draws: Draws) -> Arguments:
    return {
        "samples": draws.normal(5, 7, 37),
        "mean": draws.normal(7, 37),
        "log_std": 0.3 * draws.normal(7, 37) - 1.0,
    }


def _head_block(draws: Draws) -> Arguments:
    weights = {"in": (24, 48), "mid": (24, 24), "out": (48, 24), "down": (24, 24)}
    arguments = {
        "e": draws.normal(7, 5, 24),
        "condition": draws.normal(7, 24),
        "norm_weight": 1 + 0.1 * draws.normal(24),
        "norm_bias": 0.1 * draws.normal(24),
    }
    for name, shape in weights.items():
        arguments[f"{name}_weight"] = draws.normal(*shape) * shape[1] ** -0.5
        arguments[f"{name}_bias"] = 0.1 * draws.normal(shape[0])
    return arguments


def _head_first_block(draws: Draws) -> Arguments:
    size, noise_size = 33, 7
    arguments = {
        "noise": draws.uniform(11, 5, noise_size) - 0.5,
        "condition": draws.normal(11, size),
        "embed_weight": draws.normal(size, noise_size) * noise_size**-0.5,
        "embed_bias": 0.3 * draws.normal(size),
    }
    for name in ("embed_norm", "norm"):
        arguments[f"{name}_weight"] = 1 + 0.3 * draws.normal(size)
        arguments[f"{name}_bias"] = 0.3 * draws.normal(size)
    shapes = {
        "in": (size, 2 * size), "mid": (size, size), "out": (2 * size, size), "down": (size, size)
    }  # fmt: skip
    for name, shape in shapes.items():
        arguments[f"{name}_weight"] = draws.normal(*shape) * shape[1] ** -0.5
        arguments[f"{name}_bias"] = 0.3 * draws.normal(shape[0])
    return arguments


def _first_block(noise: Tensor, condition: Tensor, **weights: Tensor) -> Tensor:
    return calm_kernels.energy_head_first_block(noise, condition, list(weights.values()))


def _head_output(draws: Draws) -> Arguments:
    size, latent_size = 33, 13
    return {
        "e": 0.5 + 2 * draws.normal(53, size),
        "norm_weight": 1 + 0.3 * draws.normal(size),
        "norm_bias": 0.3 * draws.normal(size),
        "hidden_weight": draws.normal(size, size) * size**-0.5,
        "hidden_bias": 0.3 * draws.normal(size),
        "latent_weight": draws.normal(latent_size, size) * size**-0.5,
        "latent_bias": 0.3 * draws.normal(latent_size),
    }


def _ffn(draws: Draws, rows: int = 13, hidden: int = 40, size: int = 72) -> Arguments:
    return {
        "x": draws.normal(rows, hidden),
        "norm_weight": 1.0 + 0.2 * draws.normal(hidden),
        "gate_weight": draws.normal(size, hidden) * hidden**-0.5,
        "up_weight": draws.normal(size, hidden) * hidden**-0.5,
        "down_weight": draws.normal(hidden, size) * size**-0.5,
    }


def _head(draws: Draws) -> Arguments:
    target = draws.ids(131, 11)
    target[3] = -100
    return {
        "hidden": draws.normal(11, 48),
        "weight": draws.normal(131, 48) * 48**-0.5,
        "target": target,
        "bias": 0.1 * draws.normal(131),
    }


def _sure_head(draws: Draws, hidden_size: int) -> Arguments:
    """From diffuse rows to sure ones, half of them right; more than one tile of rows."""
    rows, vocab = 150, 1031
    hidden = draws.normal(rows, hidden_size) * torch.linspace(0.3, 6.0, rows)[:, None]
    weight = draws.normal(vocab, hidden_size)
    target = draws.ids(vocab, rows)
    target[::2] = (hidden @ weight.T).argmax(dim=1)[::2]
    target[5::7] = -100
    # So little may be dropped that it does not show among roundings.
    return {"hidden": hidden, "weight": weight, "target": target, "drop_mass": 1e-6}


def _exact_sample(table: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Over a sampler whose draws are read off a table, so that every device sees the same."""
    position = 0

    def draw(rows: Tensor, count: int) -> Tensor:
        nonlocal position
        start, position = position, position + count
        return table[rows, start:position]

    return calm_kernels.exact_temperature_sample(
        draw, table.shape[0], 0.7, seed=seed, max_draws=table.shape[1], device=table.device
    )


CALLS = (
    OperatorCall(
        "energy_score-closed_form",
        ("energy_score",),
        _law,
        calm_kernels.energy_score,
        gradients=("samples", "mean", "log_std"),
    ),
    OperatorCall(
        "energy_score-closed_form-few_uneven_dimensions",
        ("energy_score",),
        lambda draws: {
            "samples": draws.normal(3, 9, 3),
            "mean": draws.normal(9, 3),
            "log_std": 1.5 * draws.normal(9, 3),
            "alpha": 0.7,
        },
        calm_kernels.energy_score,
        gradients=("samples", "mean", "log_std"),
    ),
    OperatorCall(
        "energy_score-monte_carlo",
        ("energy_score",),
        lambda draws: {
            **_law(draws),
            "estimator": "monte_carlo",
            "num_targets": 13,
            "seed": draws.seed(),
        },
        calm_kernels.energy_score,
        gradients=("samples", "mean", "log_std"),
    ),
    OperatorCall(
        "energy_score_from_targets",
        ("energy_score_from_targets",),
        lambda draws: {
            "samples": draws.normal(4, 6, 33),
            "targets": draws.normal(9, 6, 33),
            "alpha": 1.5,
        },
        calm_kernels.energy_score_from_targets,
        gradients=("samples", "targets"),
    ),
    OperatorCall(
        "brier_scores",
        ("brier_scores",),
        lambda draws: {"samples": draws.ids(3, 7, 45, 4), "target": draws.ids(3, 45, 4)},
        calm_kernels.brier_scores,
        dtypes=IDS,
        ids=("samples", "target"),
    ),
    OperatorCall(
        "brier_rates",
        ("brier_rates",),
        lambda draws: {"samples": draws.ids(3, 7, 45, 4), "target": draws.ids(3, 45, 4)},
        calm_kernels.brier_rates,
        dtypes=IDS,
        ids=("samples", "target"),
    ),
    OperatorCall(
        "philox_uniform",
        ("philox_uniform",),
        lambda draws: {
            "seed": draws.seed(),
            "rows": draws.ids(2**40, 19),
            "count": 67,
            "stream": 3,
            "first": 5,
        },
        calm_kernels.philox_uniform,
        dtypes=(torch.float32,),
    ),
    OperatorCall(
        "philox_normal",
        ("philox_normal",),
        lambda draws: {
            "seed": draws.seed(),
            "rows": draws.ids(2**40, 19),
            "count": 67,
            "stream": 3,
            "first": 5,
        },
        calm_kernels.philox_normal,
        dtypes=(torch.float32,),
    ),
    OperatorCall(
        "linear_argmax",
        ("linear_argmax",),
        lambda draws: {
            "hidden": draws.normal(21, 64),
            "weight": draws.normal(1001, 64),
            "bias": draws.normal(1001),
        },
        calm_kernels.linear_argmax,
    ),
    OperatorCall(
        "linear_argmax-many_rows",
        ("linear_argmax",),
        lambda draws: {
            "hidden": draws.normal(301, 72),
            "weight": draws.normal(1283, 72),
            "return_max": True,
        },
        calm_kernels.linear_argmax,
    ),
    OperatorCall(
        "linear_cross_entropy-mean",
        ("linear_cross_entropy_reduced",),
        _head,
        calm_kernels.linear_cross_entropy,
        gradients=("hidden", "weight", "bias"),
    ),
    OperatorCall(
        "linear_cross_entropy-none",
        ("linear_cross_entropy_rows", "linear_cross_entropy_rows_backward"),
        lambda draws: {**_head(draws), "reduction": "none"},
        calm_kernels.linear_cross_entropy,
        gradients=("hidden", "weight", "bias"),
    ),
    OperatorCall(
        "linear_cross_entropy-sparse-mean",
        ("linear_cross_entropy_reduced",),
        lambda draws: _sure_head(draws, 64),
        calm_kernels.linear_cross_entropy,
        gradients=("hidden", "weight"),
    ),
    OperatorCall(
        "linear_cross_entropy-sparse-none-odd_width",
        ("linear_cross_entropy_rows", "linear_cross_entropy_rows_backward"),
        lambda draws: {
            **_sure_head(draws, 45),
            "bias": draws.normal(1031),
            "reduction": "none",
        },
        calm_kernels.linear_cross_entropy,
        gradients=("hidden", "weight", "bias"),
    ),
    OperatorCall(
        "gated_ffn",
        ("gated_ffn", "gated_ffn_backward"),
        _ffn,
        calm_kernels.gated_ffn,
        gradients=("x", "norm_weight", "gate_weight", "up_weight", "down_weight"),
    ),
    OperatorCall(
        "energy_head_block",
        ("energy_head_block", "energy_head_block_backward"),
        _head_block,
        calm_kernels.energy_head_block,
        gradients=(
            "e",
            "condition",
            "norm_weight",
            "norm_bias",
            "in_weight",
            "in_bias",
            "mid_weight",
            "mid_bias",
            "out_weight",
            "out_bias",
            "down_weight",
            "down_bias",
        ),
    ),
    OperatorCall(
        "energy_head_first_block",
        ("energy_head_first_block", "energy_head_first_block_backward"),
        _head_first_block,
        _first_block,
        dtypes=(torch.float32,),
        gradients=tuple(name for name in _head_first_block(Draws(0)) if name != "noise"),
    ),
    OperatorCall(
        "energy_head_output",
        ("energy_head_output", "energy_head_output_backward"),
        _head_output,
        calm_kernels.energy_head_output,
        gradients=tuple(_head_output(Draws(0))),
    ),
    OperatorCall(
        "rms_norm",
        ("rms_norm", "rms_norm_backward"),
        lambda draws: {"x": draws.normal(131, 264), "weight": draws.normal(264), "eps": 1e-5},
        calm_kernels.rms_norm,
        gradients=("x", "weight"),
    ),
    OperatorCall(
        "rms_norm-odd_sizes",
        ("rms_norm", "rms_norm_backward"),
        lambda draws: {"x": draws.normal(67, 33), "weight": draws.normal(33), "eps": 1e-6},
        calm_kernels.rms_norm,
        gradients=("x", "weight"),
    ),
    OperatorCall(
        "gated_ffn-odd_sizes",
        ("gated_ffn", "gated_ffn_backward"),
        lambda draws: _ffn(draws, 131, 33, 51),
        calm_kernels.gated_ffn,
        gradients=("x", "norm_weight", "gate_weight", "up_weight", "down_weight"),
    ),
    OperatorCall(
        "embed_flatten-dropout",
        ("embed_flatten", "embed_flatten_backward"),
        lambda draws: {
            "ids": draws.ids(29, 17, 3),
            "embedding": draws.normal(29, 24),
            "dropout": 0.3,
            "seed": draws.seed(),
        },
        calm_kernels.embed_flatten,
        gradients=("embedding",),
    ),
    OperatorCall(
        # Rows of an odd number of elements; more tokens than a tile, most of them of few ids.
        "embed_flatten-frequent_ids",
        ("embed_flatten", "embed_flatten_backward"),
        lambda draws: {
            "ids": draws.ids(3, 251, 5) * draws.ids(2, 251, 5),
            "embedding": draws.normal(4, 37),
        },
        calm_kernels.embed_flatten,
        gradients=("embedding",),
    ),
    OperatorCall(
        "embed_flatten-int32",
        ("embed_flatten", "embed_flatten_backward"),
        lambda draws: {
            "ids": draws.ids(29, 17, 3).int(),
            "embedding": draws.normal(29, 264),
            "dropout": 0.15,
            "seed": draws.seed(),
        },
        calm_kernels.embed_flatten,
        gradients=("embedding",),
    ),
    OperatorCall(
        "folded_squeezed_gather-odd",
        ("folded_squeezed_gather",),
        lambda draws: {
            "ids": draws.ids(29, 45, 5).int(),
            "tables": draws.normal(5, 29, 37),
            "bias": draws.normal(37),
        },
        calm_kernels.folded_squeezed_gather,
    ),
    OperatorCall(
        "folded_table_gather",
        ("embed_flatten",),
        lambda draws: {"ids": draws.ids(29, 17, 3), "table": draws.normal(29, 24)},
        calm_kernels.folded_table_gather,
    ),
    OperatorCall(
        "folded_squeezed_gather",
        ("folded_squeezed_gather",),
        lambda draws: {
            "ids": draws.ids(29, 17, 3),
            "tables": draws.normal(3, 29, 24),
            "bias": draws.normal(24),
        },
        calm_kernels.folded_squeezed_gather,
    ),
    OperatorCall(
        "batch_temperature_sample",
        ("batch_temperature_sample",),
        lambda draws: {
            "tokens": draws.ids(3, 9, 37, 2),
            "temperature": 0.37,
            "seed": draws.seed(),
            "return_counts": True,
        },
        calm_kernels.batch_temperature_sample,
        dtypes=IDS,
        ids=("tokens",),
    ),
    OperatorCall(
        "exact_temperature_sample",
        ("exact_temperature_step",),
        lambda draws: {"table": draws.ids(3, 9, 4096, 2), "seed": draws.seed()},
        _exact_sample,
        dtypes=IDS,
        ids=("table",),
        capturable=False,
    ),
)


def main() -> None:
    """Run every call whose operators have CUDA kernels, in its first dtype."""
    device, ran = torch.device("cuda"), []
    for call in CALLS:
        if call.why_not("native", "cuda") is None:
            with calm_kernels.backend("native"):
                for dtype in call.dtypes:
                    call.results(call.arguments(0, dtype, device))
            ran.append(call.name)
    torch.cuda.synchronize()
    print(f"ran {len(ran)} calls: {', '.join(ran)}")
    sys.exit(0 if ran else 3)


if __name__ == "__main__":
    main()
