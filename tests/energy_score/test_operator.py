"""The operators as PyTorch sees them, and what they say to wrong arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from calm_kernels._dispatch import operators
from calm_kernels.ops.energy_score import energy_score, energy_score_from_targets

OVERLOADS = {"reference": "reference", "native": "default"}
SERVING = [
    overload
    for name, overload in OVERLOADS.items()
    if operators()["energy_score"].why_not(name, "cpu") is None
]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def gaussian(dtype: torch.dtype = torch.float32, positions: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, positions, 6), (positions, 6), (positions, 6))
    return tuple(
        torch.randn(*shape, generator=generator).mul(0.5).to(dtype).requires_grad_()
        for shape in shapes
    )


@pytest.mark.parametrize("overload", SERVING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [0, 4])
def test_opcheck_of_the_gaussian_forms(overload: str, dtype: torch.dtype, positions: int) -> None:
    operator = getattr(torch.ops.calm_kernels.energy_score, overload)
    tensors = gaussian(dtype, positions)
    torch.library.opcheck(operator, (*tensors, None, 1.3, "closed_form", 1, True, True, True))
    seed = torch.tensor([5])
    torch.library.opcheck(operator, (*tensors, seed, 0.7, "monte_carlo", 3, True, True, True))
    plain = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(operator, (*plain, None, 1.0, "closed_form", 1, False, False, False))
    torch.library.opcheck(operator, (*plain, seed, 1.0, "monte_carlo", 2, True, False, True))


@pytest.mark.parametrize("overload", SERVING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_explicit_targets(overload: str, dtype: torch.dtype) -> None:
    operator = getattr(torch.ops.calm_kernels.energy_score_from_targets, overload)
    samples, mean, _ = gaussian(dtype)
    targets = mean.detach().expand(2, 4, 6).clone().requires_grad_()
    torch.library.opcheck(operator, (samples, targets, 1.3, True, True))
    torch.library.opcheck(operator, (samples.detach(), targets.detach(), 1.0, False, False))


def value_and_gradients(function: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    score = function(*leaves)
    score.square().sum().backward()
    return [score.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_the_result_is_that_of_eager(estimator: str, dynamic: bool) -> None:
    def score(samples: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        return energy_score(
            samples * 1.5, mean, log_std, estimator=estimator, num_targets=2, seed=3
        )

    torch._dynamo.reset()
    compiled = torch.compile(score, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for positions in (4, 7, 2) if dynamic else (4,):
        tensors = gaussian(positions=positions)
        expected = value_and_gradients(score, tensors)
        actual = value_and_gradients(compiled, tensors)
        assert len(actual) == len(expected) == 4
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)


def test_compiled_by_inductor_with_explicit_targets_and_a_free_alpha() -> None:
    def score(samples: Tensor, targets: Tensor, alpha: float) -> Tensor:
        return energy_score_from_targets(samples, targets, alpha=alpha)

    torch._dynamo.reset()
    compiled = torch.compile(score, fullgraph=True)
    samples, mean, _ = gaussian()
    targets = mean.detach().expand(2, 4, 6)
    for alpha in (1.0, 0.6):
        expected = value_and_gradients(lambda *t, a=alpha: score(*t, a), (samples, targets))
        actual = value_and_gradients(lambda *t, a=alpha: compiled(*t, a), (samples, targets))
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("backend")
def test_compiled_without_gradients() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(energy_score, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        tensors = gaussian()
        assert torch.equal(compiled(*tensors), energy_score(*tensors))


@pytest.mark.usefixtures("backend")
def test_the_score_does_not_depend_on_which_gradients_are_asked_for() -> None:
    tensors = gaussian()
    for estimator in ("closed_form", "monte_carlo"):
        options: dict[str, Any] = {"estimator": estimator, "num_targets": 2, "seed": 0}
        with_all = energy_score(*tensors, **options)
        plain = [tensor.detach() for tensor in tensors]
        assert torch.equal(with_all, energy_score(*plain, **options))
        assert torch.equal(with_all, energy_score(tensors[0], *plain[1:], **options))


@pytest.mark.usefixtures("backend")
def test_autocast_leaves_the_score_in_float32_and_lets_dtypes_meet() -> None:
    samples, mean, log_std = (tensor.detach() for tensor in gaussian())
    low = samples.bfloat16().requires_grad_()
    expected = energy_score(low.float(), mean, log_std)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            energy_score(samples, mean, log_std), energy_score(samples, mean, log_std)
        )
        mixed = energy_score(low, mean, log_std)
        explicit = energy_score_from_targets(low, mean.unsqueeze(0))
    assert mixed.dtype == explicit.dtype == torch.float32
    torch.testing.assert_close(mixed, expected, rtol=1e-6, atol=1e-6)
    mixed.sum().backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="expected dtype bfloat16"):
        energy_score(low, mean, log_std)


def test_asking_the_raw_operator_for_a_gradient_it_did_not_make_is_an_error() -> None:
    operator = torch.ops.calm_kernels.energy_score.reference
    score, *_ = operator(*gaussian(), None, 1.0, "closed_form", 1, False, True, True)
    with pytest.raises(RuntimeError, match="needs_"):
        score.sum().backward()


SAMPLES, MEAN, LOG_STD = torch.zeros(3, 4, 6), torch.zeros(4, 6), torch.zeros(4, 6)
WRONG = {
    "samples not a tensor": (([1.0], MEAN, LOG_STD), {}, TypeError, r"samples: .*got list"),
    "mean not a tensor": ((SAMPLES, 0.0, LOG_STD), {}, TypeError, r"mean: .*got float"),
    "integer samples": ((SAMPLES.long(), MEAN, LOG_STD), {}, TypeError, r"samples: .*int64"),
    "mixed dtypes": ((SAMPLES, MEAN.double(), LOG_STD), {}, TypeError, r"mean: .*float32.*samples"),
    "scalar mean": (
        (SAMPLES, MEAN[0, 0], LOG_STD),
        {},
        ValueError,
        r"mean: expected shape \[\*, D\]",
    ),
    "log_std shape": (
        (SAMPLES, MEAN, LOG_STD[:, :5]),
        {},
        ValueError,
        r"log_std: .*\[4, 6\].*\[4, 5\]",
    ),
    "samples shape": ((SAMPLES[0], MEAN, LOG_STD), {}, ValueError, r"samples: .*\[N, 4, 6\]"),
    "positions differ": (
        (SAMPLES[:, :3], MEAN, LOG_STD),
        {},
        ValueError,
        r"samples: .*\[3, 3, 6\]",
    ),
    "one sample": ((SAMPLES[:1], MEAN, LOG_STD), {}, ValueError, r"at least 2 samples.*got 1"),
    "no dimension": (
        (SAMPLES[..., :0], MEAN[..., :0], LOG_STD[..., :0]),
        {},
        ValueError,
        r"at least 1 dimension",
    ),
    "alpha 0": ((SAMPLES, MEAN, LOG_STD), {"alpha": 0.0}, ValueError, r"alpha: .*\(0, 2\).*got 0"),
    "alpha 2": ((SAMPLES, MEAN, LOG_STD), {"alpha": 2}, ValueError, r"alpha: .*\(0, 2\).*got 2"),
    "alpha nan": ((SAMPLES, MEAN, LOG_STD), {"alpha": math.nan}, ValueError, r"alpha: .*got nan"),
    "alpha text": ((SAMPLES, MEAN, LOG_STD), {"alpha": "1"}, TypeError, r"alpha: .*got str"),
    "estimator": (
        (SAMPLES, MEAN, LOG_STD),
        {"estimator": "exact"},
        ValueError,
        r"estimator: expected one of closed_form, monte_carlo; got 'exact'",
    ),
    "num_targets": (
        (SAMPLES, MEAN, LOG_STD),
        {"num_targets": 0},
        ValueError,
        r"num_targets: .*1.*0",
    ),
    "seed dtype": (
        (SAMPLES, MEAN, LOG_STD),
        {"estimator": "monte_carlo", "seed": torch.zeros(1)},
        ValueError,
        r"seed: .*int64",
    ),
    "device": ((SAMPLES, MEAN.to("meta"), LOG_STD), {}, ValueError, r"mean: expected device cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named_with_what_was_expected(case: str) -> None:
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        energy_score(*arguments, **options)  # type: ignore[arg-type]


WRONG_TARGETS = {
    "targets not a tensor": ((SAMPLES, None), {}, TypeError, r"targets: .*got NoneType"),
    "targets shape": ((SAMPLES, MEAN), {}, ValueError, r"targets: expected shape \[M, 4, 6\]"),
    "no target": ((SAMPLES, SAMPLES[:0]), {}, ValueError, r"at least 1 target.*got 0"),
    "one sample": ((SAMPLES[:1], SAMPLES), {}, ValueError, r"at least 2 samples.*got 1"),
    "samples shape": ((SAMPLES[0, 0], SAMPLES), {}, ValueError, r"samples.*\[N, \*, D\]"),
    "mixed dtypes": ((SAMPLES, SAMPLES.half()), {}, TypeError, r"targets: .*float32.*float16"),
    "alpha 2": ((SAMPLES, SAMPLES), {"alpha": 2.0}, ValueError, r"alpha: .*\(0, 2\).*got 2"),
    "device": ((SAMPLES, SAMPLES.to("meta")), {}, ValueError, r"targets: expected device cpu"),
}


@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_wrong_explicit_targets_are_named_with_what_was_expected(case: str) -> None:
    arguments, options, error, message = WRONG_TARGETS[case]
    with pytest.raises(error, match=message):
        energy_score_from_targets(*arguments, **options)  # type: ignore[arg-type]


def test_closed_form_draws_no_random_number() -> None:
    state = torch.random.get_rng_state()
    energy_score(*gaussian())
    assert torch.equal(torch.random.get_rng_state(), state)
