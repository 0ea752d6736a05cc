"""The energy score: N samples of a model against a Gaussian, or against explicit targets."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from calm_kernels import _checks
from calm_kernels._dispatch import define
from calm_kernels.reference import energy_score_gradient as reference

ESTIMATORS = ("closed_form", "monte_carlo")
Estimator = Literal["closed_form", "monte_carlo"]


class _FirstDerivative(torch.autograd.Function):
    """Passes a gradient on; its own derivative, the score's second, is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "energy_score: the operator has no second derivative; "
            "calm_kernels.reference.energy_score is plain PyTorch and has"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gradients = output[1:]
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.num_inputs = len(inputs)
    # The inputs are kept to tie a second derivative to its refusal, not for their values.
    ctx.save_for_backward(*gradients, *inputs[: len(gradients)])


def _backward(ctx: Any, grad_score: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    count = len(saved) // 2
    gradients, inputs = saved[:count], saved[count:]
    results: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_score is None:
        return tuple(results)
    for i, (gradient, source) in enumerate(zip(gradients, inputs, strict=True)):
        if not ctx.needs_input_grad[i]:
            continue
        if gradient.shape != source.shape:
            raise RuntimeError(
                f"energy_score: the gradient of tensor argument {i} was not requested from the "
                f"forward pass; set its needs_* argument"
            )
        # Straight into the gradient's dtype: a GPU then makes no float32 copy of 16-bit gradients.
        result = torch.empty_like(gradient)
        with torch.no_grad():
            torch.mul(gradient, grad_score.unsqueeze(-1), out=result)
        if torch.is_grad_enabled():
            result = _FirstDerivative.apply(result, grad_score, *inputs)  # type: ignore[no-untyped-call]
        results[i] = result
    return tuple(results)


def _score_like(samples: Tensor) -> Tensor:
    dtype = torch.float64 if samples.dtype == torch.float64 else torch.float32
    return samples.new_empty((samples.shape[1],), dtype=dtype)


def _gradient_like(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else (0,))


def _fake_gaussian(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    seed: Tensor | None,
    alpha: float,
    estimator: str,
    num_targets: int,
    needs_samples: bool,
    needs_mean: bool,
    needs_log_std: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _score_like(samples),
        _gradient_like(samples, needs_samples),
        _gradient_like(mean, needs_mean),
        _gradient_like(log_std, needs_log_std),
    )


def _fake_from_targets(
    samples: Tensor, targets: Tensor, alpha: float, needs_samples: bool, needs_targets: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _score_like(samples),
        _gradient_like(samples, needs_samples),
        _gradient_like(targets, needs_targets),
    )


_energy_score = define(
    "energy_score",
    "(Tensor samples, Tensor mean, Tensor log_std, Tensor? seed, float alpha, str estimator, "
    "int num_targets, bool needs_samples, bool needs_mean, bool needs_log_std) "
    "-> (Tensor score, Tensor grad_samples, Tensor grad_mean, Tensor grad_log_std)",
    reference=reference.energy_score_with_gradients,
    fake=_fake_gaussian,
    backward=_backward,
    setup_context=_setup_context,
)

_energy_score_from_targets = define(
    "energy_score_from_targets",
    "(Tensor samples, Tensor targets, float alpha, bool needs_samples, bool needs_targets) "
    "-> (Tensor score, Tensor grad_samples, Tensor grad_targets)",
    reference=reference.energy_score_from_targets_with_gradients,
    fake=_fake_from_targets,
    backward=_backward,
    setup_context=_setup_context,
)


def energy_score(
    samples: Tensor,
    mean: Tensor,
    log_std: Tensor,
    *,
    alpha: float = 1.0,
    estimator: Estimator = "closed_form",
    num_targets: int = 100,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Energy score of N samples against the Gaussian N(mean, exp(log_std)^2), position by position.

    S = mean over pairs of ||x_n - x_k||^alpha - 2 * mean over n of E ||x_n - y||^alpha, y from the
    Gaussian. Strictly proper for 0 < alpha < 2; higher is better, so a loss is the negative mean.

    Args:
        samples: independent draws of the model, float32, bfloat16, float16 or float64 [N, *, D],
            N >= 2. Any strides.
        mean: mean of the target law, same dtype and device, [*, D].
        log_std: natural logarithm of its standard deviation in every dimension, [*, D]; -inf is a
            target without spread.
        alpha: exponent of the distance, in (0, 2).
        estimator: ``"closed_form"`` takes the expectation over y analytically: no random numbers,
            no noise, relative error below 1e-5. ``"monte_carlo"`` averages over ``num_targets``
            draws, as the paper does.
        num_targets: draws of ``"monte_carlo"``.
        seed: of ``"monte_carlo"``: an int, an int64 tensor of one element on the same device, or
            None to draw one from torch's generator. The same seed gives the same draws everywhere.

    Returns:
        [*], float32 (float64 for float64); computed in that precision also under autocast, where
        tensors of different dtypes are accepted. A score that is not finite is NaN, at its own
        position alone.

    Gradients: samples, mean and log_std, once. Score and gradients come from one forward pass;
    coinciding points contribute zero for every alpha. The second derivative raises
    NotImplementedError; :mod:`calm_kernels.reference.energy_score` has it.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, fewer than two samples, alpha
            outside (0, 2), unknown estimator, num_targets < 1, devices differ.

    Source: Gneiting and Raftery (2007), section 4.3; arXiv 2510.27688; the closed form is this
    package's (docs/energy_score.md).
    """
    _checks.tensor("mean", mean, _checks.FLOAT_DTYPES, ("*", "D"))
    _checks.tensor("log_std", log_std, _checks.FLOAT_DTYPES, mean.shape)
    _checks.tensor("samples", samples, _checks.FLOAT_DTYPES, ("N", *mean.shape))
    device = _checks.same_device(samples=samples, mean=mean, log_std=log_std)
    samples, mean, log_std = _same_dtype(samples=samples, mean=mean, log_std=log_std)
    alpha = _check_score(samples, alpha)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}; got {estimator!r}")
    _checks.at_least("num_targets", num_targets, 1)
    words = _checks.seed_tensor(seed, device) if estimator == "monte_carlo" else None
    score, *_ = _energy_score(
        device,
        _flatten_positions(samples),
        _flatten_positions(mean.unsqueeze(0)).squeeze(0),
        _flatten_positions(log_std.unsqueeze(0)).squeeze(0),
        words,
        alpha,
        estimator,
        num_targets,
        *_needs_grad(samples, mean, log_std),
    )
    result: Tensor = score.reshape(mean.shape[:-1])
    return result


def energy_score_from_targets(samples: Tensor, targets: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Energy score of N samples against M explicit targets, position by position.

    S = mean over pairs of ||x_n - x_k||^alpha - 2 * mean over n, m of ||x_n - y_m||^alpha. Unbiased
    and strictly proper for 0 < alpha < 2 however few targets, M = 1 included: the form for plain
    data, where the law of the target is not known. Higher is better.

    Args:
        samples: independent draws of the model, float32, bfloat16, float16 or float64 [N, *, D],
            N >= 2. Any strides.
        targets: draws of the truth, same dtype and device, [M, *, D], M >= 1.
        alpha: exponent of the distance, in (0, 2).

    Returns:
        [*], float32 (float64 for float64), as :func:`energy_score`.

    Gradients: samples and targets, once, as :func:`energy_score`.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, fewer than two samples, no target,
            alpha outside (0, 2), devices differ.

    Source: Gneiting and Raftery (2007), section 4.3; arXiv 2510.27688.
    """
    _checks.tensor("samples", samples, _checks.FLOAT_DTYPES, ("*", "D"))
    _checks.at_least("samples.dim()", samples.dim(), 2, ", [N, *, D]")
    _checks.tensor("targets", targets, _checks.FLOAT_DTYPES, ("M", *samples.shape[1:]))
    device = _checks.same_device(samples=samples, targets=targets)
    samples, targets = _same_dtype(samples=samples, targets=targets)
    alpha = _check_score(samples, alpha)
    _checks.at_least("targets.shape[0]", targets.shape[0], 1, " target")
    score, *_ = _energy_score_from_targets(
        device,
        _flatten_positions(samples),
        _flatten_positions(targets),
        alpha,
        *_needs_grad(samples, targets),
    )
    result: Tensor = score.reshape(samples.shape[1:-1])
    return result


def _check_score(samples: Tensor, alpha: float) -> float:
    """Checks that both forms share; returns alpha as a float."""
    _checks.at_least("samples.shape[0]", samples.shape[0], 2, " samples (a pair is needed)")
    _checks.at_least("samples.shape[-1]", samples.shape[-1], 1, " dimension")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise TypeError(f"alpha: expected a float, got {type(alpha).__name__}")
    if not 0.0 < alpha < 2.0:
        raise ValueError(
            f"alpha: expected a number in (0, 2), where the score is strictly proper; got {alpha}"
        )
    return float(alpha)


def _same_dtype(**tensors: Tensor) -> list[Tensor]:
    """The tensors, of one dtype: autocast makes lower precisions meet in float32."""
    first, *rest = tensors.values()
    mixed = any(tensor.dtype != first.dtype for tensor in rest)
    if mixed and torch.is_autocast_enabled(first.device.type):
        tensors = {
            name: tensor if tensor.dtype == torch.float64 else tensor.float()
            for name, tensor in tensors.items()
        }
    _checks.same_dtype(**tensors)
    return list(tensors.values())


def _flatten_positions(tensor: Tensor) -> Tensor:
    """[N, *, D] -> [N, P, D]."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


def _needs_grad(*tensors: Tensor) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and tensor.requires_grad for tensor in tensors]
