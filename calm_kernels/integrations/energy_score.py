"""The method that computes the energy score: the operator in its place.

Known structure: a method ``energy_score`` (or what the caller names) with arguments ``mean`` and
``log_std`` and one more, samples [N, *, D]; it returns every position's score, [*], or minus it.
The exponent is the model's or its configuration's attribute ``alpha`` or ``beta``, else 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calm_kernels.integrations.examination import generator, is_from_here, undisturbed
from calm_kernels.integrations.patching import Finding, Patch, Patched, settings_of
from calm_kernels.ops.energy_score import Estimator, energy_score

PART = "energy"
METHOD = "energy_score"
_EXPONENTS = ("alpha", "beta", "config.alpha", "config.beta")

# Positions, samples and dimensions of the comparison. With next to no spread every estimator agrees
# to its rounding; with a large one, the mean over positions of a hundred draws is good to 0.5%.
_NUM_SAMPLES, _POSITIONS, _LATENT_SIZE = 5, (2, 32), 6
_NARROW, _WIDE = -6.0, 3.0
_NARROW_TOLERANCE, _WIDE_TOLERANCE = 0.02, 0.05


@dataclass(frozen=True)
class EnergySettings:
    """How the original takes and gives its values, and how the score is computed.

    Args:
        arguments: names of the arguments, in the original's order.
        sign: 1 if it returns the score, -1 if minus the score.
        exponent: dotted attribute that holds alpha; None for 1.
    """

    arguments: tuple[str, ...]
    sign: int
    exponent: str | None
    estimator: Estimator
    num_targets: int


class FastEnergyScore(Patched):
    """A model whose energy score the operator computes."""

    parts = (PART,)

    def calm_energy_score(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the original, with the estimator of the settings; float32 (float64 for float64)."""
        settings: EnergySettings = settings_of(self, FastEnergyScore)
        given = {**dict(zip(settings.arguments, args, strict=False)), **kwargs}
        mean, log_std = given.pop("mean"), given.pop("log_std")
        (samples,) = given.values()
        dtype = torch.promote_types(torch.promote_types(samples.dtype, mean.dtype), log_std.dtype)
        score = energy_score(
            samples.to(dtype),
            mean.to(dtype),
            log_std.to(dtype),
            alpha=_exponent(self, settings.exponent),
            estimator=settings.estimator,
            num_targets=settings.num_targets,
        )
        return settings.sign * score


def find(
    model: nn.Module, method: str, estimator: Estimator, num_targets: int
) -> Iterator[Finding]:
    """The modules that have the method."""
    for path, module in model.named_modules():
        function = getattr(type(module), method, None)
        if function is None or is_from_here(module) or method in module.__dict__:
            continue
        names = _arguments(function)
        if names is None:
            note = f"its {method} has no arguments mean, log_std and one more"
            yield Finding(PART, path, module, note)
            continue
        settings = _examine(module, method, names, estimator, num_targets)
        if isinstance(settings, str):
            yield Finding(PART, path, module, settings)
            continue
        patch = Patch(FastEnergyScore, settings, ((method, "calm_energy_score"),))
        note = f"{method}: {estimator.replace('_', ' ')} of calm_kernels.energy_score"
        yield Finding(PART, path, module, note, patch)


def _arguments(function: Any) -> list[str] | None:
    """Names of the arguments after ``self``: mean, log_std and one more in any order."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    required = [p.name for p in parameters if p.default is p.empty]
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    fits = plain and len(parameters) == len(required) == 3 and {"mean", "log_std"} < set(required)
    return required if fits else None


def _exponent(model: Any, name: str | None) -> float:
    value: Any = model
    for attribute in (name or "").split("."):
        value = getattr(value, attribute, None) if attribute else 1.0
    return value if isinstance(value, (int, float)) else float("nan")


def _examine(
    module: nn.Module, method: str, names: list[str], estimator: Estimator, num_targets: int
) -> EnergySettings | str:
    samples_name = next(name for name in names if name not in ("mean", "log_std"))
    drawn = generator()
    samples = torch.randn((_NUM_SAMPLES, *_POSITIONS, _LATENT_SIZE), generator=drawn)
    mean = 2 * torch.randn((*_POSITIONS, _LATENT_SIZE), generator=drawn)
    original = getattr(module, method)

    def run(spread: float) -> Any:
        values = {samples_name: samples, "mean": mean, "log_std": torch.full_like(mean, spread)}
        return original(**values)

    try:
        with undisturbed():
            narrow, wide = run(_NARROW), run(_WIDE)
    except Exception as error:
        return f"its {method} could not be examined: {type(error).__name__}: {error}"
    if not all(isinstance(r, Tensor) and r.shape == _POSITIONS for r in (narrow, wide)):
        return f"its {method} does not return one score for every position"
    for name in (*_EXPONENTS, None):
        alpha = _exponent(module, name)
        if not 0 < alpha < 2:
            continue
        expected = energy_score(samples, mean, torch.full_like(mean, _NARROW), alpha=alpha)
        expected_wide = energy_score(samples, mean, torch.full_like(mean, _WIDE), alpha=alpha)
        for sign in (1, -1):
            off = float((sign * narrow / expected - 1).abs().max())
            off_wide = abs(float(sign * wide.mean() / expected_wide.mean() - 1))
            if off <= _NARROW_TOLERANCE and off_wide <= _WIDE_TOLERANCE:
                return EnergySettings(tuple(names), sign, name, estimator, num_targets)
    return f"its {method} computes something else, or with another exponent"
