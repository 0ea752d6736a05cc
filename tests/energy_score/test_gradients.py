"""Gradients: of the value computed, zero at zero distance, finite, and only once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import calm_kernels
from calm_kernels.ops.energy_score import energy_score, energy_score_from_targets
from calm_kernels.reference import energy_score as reference
from calm_kernels.reference import energy_score_gradient

ALPHAS = (0.2, 0.5, 1.0, 1.5, 1.9)
ESTIMATORS = ("closed_form", "monte_carlo")
Case = tuple[Tensor, Tensor, Tensor]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradients(score: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(0.5, 1.5, score.numel(), dtype=score.dtype).reshape(score.shape)
    return torch.autograd.grad((score * weights).sum(), inputs)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("alpha", [0.5, 1.5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_operator_gradient_is_that_of_the_value_with_every_number_of_nodes(
    estimator: str, alpha: float, every_correction: Case
) -> None:
    def score(*inputs: Tensor) -> Tensor:
        return energy_score(*inputs, alpha=alpha, estimator=estimator, num_targets=3, seed=9)

    assert torch.autograd.gradcheck(score, leaves(*every_correction))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_operator_gradient_with_explicit_targets_is_that_of_the_value(
    alpha: float, every_correction: Case
) -> None:
    samples, mean, _ = every_correction
    targets = torch.stack([mean, mean + 1.0, 0.5 * mean - 1.0])
    assert torch.autograd.gradcheck(
        lambda x, y: energy_score_from_targets(x, y, alpha=alpha), leaves(samples, targets)
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_operator_gradients_are_those_of_the_specification(
    estimator: str, dtype: torch.dtype, alpha: float, every_correction: Case
) -> None:
    inputs = leaves(*(tensor.to(dtype) for tensor in every_correction))
    options = {"alpha": alpha, "estimator": estimator, "num_targets": 5}
    actual = gradients(energy_score(*inputs, **options, seed=1), inputs)  # type: ignore[arg-type]
    inputs = leaves(*(tensor.double() for tensor in inputs))
    seed = torch.tensor([1])
    expected = gradients(reference.energy_score(*inputs, **options, seed=seed), inputs)  # type: ignore[arg-type]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        assert float(error.max()) < tolerance


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_blocks_of_positions_and_targets_leave_no_seam(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = leaves(
        *(
            torch.randn(*shape, 7, dtype=torch.float64, generator=generator)
            for shape in ((4, 5), (5,), (5,))
        )
    )
    options = {"estimator": estimator, "num_targets": 25}
    expected = gradients(reference.energy_score(*inputs, **options, seed=torch.tensor([1])), inputs)  # type: ignore[arg-type]
    # One position and nine targets at a time: 63 elements, no multiple of Philox' four.
    monkeypatch.setitem(energy_score_gradient.BLOCK_ELEMENTS, "cpu", 64)
    with calm_kernels.backend("reference"):
        score = energy_score(*inputs, **options, seed=1)  # type: ignore[arg-type]
    torch.testing.assert_close(
        score, reference.energy_score(*inputs, **options, seed=torch.tensor([1]))
    )  # type: ignore[arg-type]
    for ours, theirs in zip(gradients(score, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("backend")
def test_explicit_target_gradients_are_those_of_the_specification() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(count, 2, 3, 9, dtype=torch.float64, generator=generator) for count in (4, 6)
    ]
    inputs = leaves(*inputs)
    actual = gradients(energy_score_from_targets(*inputs, alpha=0.7), inputs)
    expected = gradients(reference.energy_score_from_targets(*inputs, alpha=0.7), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_any_subset_of_gradients_can_be_asked_for(
    estimator: str, wanted: int, every_correction: Case
) -> None:
    options = {"estimator": estimator, "num_targets": 2, "seed": 0}
    inputs = leaves(*every_correction)
    expected = gradients(energy_score(*inputs, **options), inputs)  # type: ignore[arg-type]
    some = [
        tensor.detach().requires_grad_(bool(wanted >> i & 1)) for i, tensor in enumerate(inputs)
    ]
    score = energy_score(*some, **options)  # type: ignore[arg-type]
    actual = iter(gradients(score, [tensor for tensor in some if tensor.requires_grad]))
    for tensor, gradient in zip(some, expected, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(next(actual), gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_rounded_once_from_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    low = [torch.randn(*shape, 48, generator=generator).to(dtype) for shape in ((8, 5), (5,), (5,))]
    actual_inputs = leaves(*low)
    energy_score(*actual_inputs).sum().backward()
    exact_inputs = leaves(*(tensor.float() for tensor in low))
    energy_score(*exact_inputs).sum().backward()
    for ours, exact in zip(actual_inputs, exact_inputs, strict=True):
        assert ours.grad is not None and exact.grad is not None and ours.grad.dtype == dtype
        # Half a unit in the last place of the dtype, and float32's own noise.
        bound = 0.5 * torch.finfo(dtype).eps * exact.grad.abs() + 1e-6
        assert bool(((ours.grad.float() - exact.grad).abs() <= bound).all())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("alpha", [0.01, *ALPHAS, 1.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestZeroDistance:
    def test_coinciding_samples_get_the_gradient_of_the_target_term_alone(
        self, dtype: torch.dtype, alpha: float
    ) -> None:
        mean, log_std = torch.ones(3, 8, dtype=dtype), torch.full((3, 8), -1.2, dtype=dtype)
        samples = torch.zeros(4, 3, 8, dtype=dtype, requires_grad=True)
        energy_score(samples, mean, log_std, alpha=alpha).sum().backward()
        assert samples.grad is not None and bool(samples.grad.isfinite().all())
        # Uphill is towards the mean, alike for all samples and dimensions.
        assert float(samples.grad.min()) > 0.0
        torch.testing.assert_close(samples.grad, samples.grad[:1, :1, :1].expand_as(samples))

    def test_samples_on_explicit_targets_get_exactly_zero(
        self, dtype: torch.dtype, alpha: float
    ) -> None:
        point = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        samples, targets = leaves(point.expand(4, 3, 8), point.expand(2, 3, 8))
        score = energy_score_from_targets(samples, targets, alpha=alpha)
        assert torch.equal(score, torch.zeros_like(score))
        for gradient in gradients(score, [samples, targets]):
            assert torch.equal(gradient, torch.zeros_like(gradient))

    @pytest.mark.parametrize("log_std", [-math.inf, -1000.0, -60.0, -50.0])
    def test_vanishing_spread_around_the_sample_has_finite_gradients(
        self, log_std: float, dtype: torch.dtype, alpha: float
    ) -> None:
        inputs = leaves(
            torch.ones(3, 2, 5, dtype=dtype),
            torch.ones(2, 5, dtype=dtype),
            torch.full((2, 5), log_std, dtype=dtype),
        )
        for gradient in gradients(energy_score(*inputs, alpha=alpha), inputs):
            assert bool(gradient.isfinite().all())
        zero_std = math.exp(log_std) == 0.0
        for gradient in gradients(energy_score(*inputs, alpha=alpha), inputs)[: 3 * zero_std]:
            assert torch.equal(gradient, torch.zeros_like(gradient))

    def test_tiny_distances_have_finite_gradients(self, dtype: torch.dtype, alpha: float) -> None:
        for distance in (1e-6, 1e-18, 1e-21, 1e-30):
            samples = torch.zeros(2, 1, 4, dtype=dtype)
            samples[1] = distance
            inputs = leaves(samples, torch.zeros(1, 4, dtype=dtype))
            score = energy_score_from_targets(inputs[0], inputs[1].unsqueeze(0), alpha=alpha)
            for gradient in gradients(score, inputs):
                assert bool(gradient.isfinite().all())
            log_std = torch.full((1, 4), math.log(distance), dtype=dtype)
            inputs = leaves(*inputs, log_std)
            for gradient in gradients(energy_score(*inputs, alpha=alpha), inputs):
                assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("alpha", [0.01, *ALPHAS, 1.99])
def test_the_specification_has_zero_gradient_at_zero_distance(alpha: float) -> None:
    inputs = leaves(torch.zeros(3, 2, 5), torch.zeros(2, 5), torch.full((2, 5), -math.inf))
    for gradient in gradients(reference.energy_score(*inputs, alpha=alpha), inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    inputs = leaves(torch.ones(3, 2, 5), torch.ones(4, 2, 5))
    for gradient in gradients(reference.energy_score_from_targets(*inputs, alpha=alpha), inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_value_that_is_not_finite_makes_the_gradients_of_its_position_nan(
    which: int, estimator: str, value: float, every_correction: Case
) -> None:
    options = {"estimator": estimator, "num_targets": 2, "seed": 0}
    inputs = leaves(*every_correction)
    clean = gradients(energy_score(*inputs, **options), inputs)  # type: ignore[arg-type]
    broken = [tensor.detach().clone() for tensor in every_correction]
    broken[which][..., 1, 4] = value
    broken = leaves(*broken)
    others = torch.tensor([0, 2])
    for gradient, expected in zip(
        gradients(energy_score(*broken, **options), broken),  # type: ignore[arg-type]
        clean,
        strict=True,
    ):
        assert bool(gradient[..., 1, :].isnan().all())
        assert torch.equal(gradient[..., others, :], expected[..., others, :])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_the_specification_differentiates_twice(alpha: float, every_correction: Case) -> None:
    inputs = leaves(*every_correction)
    assert torch.autograd.gradcheck(
        lambda *tensors: reference.energy_score(*tensors, alpha=alpha), inputs
    )
    assert torch.autograd.gradgradcheck(
        lambda *tensors: reference.energy_score(*tensors, alpha=alpha), inputs, fast_mode=True
    )
    samples, targets = leaves(every_correction[0], every_correction[0] + 1.0)
    assert torch.autograd.gradgradcheck(
        lambda x, y: reference.energy_score_from_targets(x, y, alpha=alpha),
        (samples, targets),
        fast_mode=True,
    )


def test_second_derivatives_of_the_specification_are_finite_at_zero_distance() -> None:
    samples, mean = leaves(torch.zeros(3, 2, 5), torch.zeros(2, 5))
    score = reference.energy_score(samples, mean, torch.full((2, 5), -math.inf), alpha=0.5)
    first = torch.autograd.grad(score.sum(), (samples, mean), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), (samples, mean))
    for gradient in second:
        assert bool(gradient.isfinite().all())


@pytest.mark.usefixtures("backend")
def test_the_operator_refuses_its_second_derivative_and_names_the_reference() -> None:
    samples, mean, log_std = leaves(torch.randn(3, 2, 4), torch.randn(2, 4), torch.zeros(2, 4))
    score = energy_score(samples, mean, log_std)
    (first,) = torch.autograd.grad(score.sum(), samples, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"calm_kernels\.reference\.energy_score"):
        first.square().sum().backward()
    targets = torch.randn(2, 2, 4)
    score = energy_score_from_targets(samples, targets)
    (first,) = torch.autograd.grad(score.sum(), samples, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"calm_kernels\.reference\.energy_score"):
        (first.sum() + samples.sum()).backward()


@pytest.mark.usefixtures("backend")
def test_a_gradient_for_a_graph_is_the_gradient() -> None:
    inputs = leaves(torch.randn(3, 2, 4), torch.randn(2, 4), torch.zeros(2, 4))
    plain = torch.autograd.grad(energy_score(*inputs).sum(), inputs)
    for_graph = torch.autograd.grad(energy_score(*inputs).sum(), inputs, create_graph=True)
    for one, other in zip(plain, for_graph, strict=True):
        assert torch.equal(one, other.detach())


@pytest.mark.usefixtures("backend")
def test_strided_inputs_get_their_gradients_in_place() -> None:
    base = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, log_std = base[0] + 0.5, base[1] * 0.3
    straight, turned = leaves(base, base.transpose(0, 2).contiguous())
    energy_score(straight, mean, log_std).sum().backward()
    energy_score(turned.transpose(0, 2), mean, log_std).sum().backward()
    assert straight.grad is not None and turned.grad is not None
    torch.testing.assert_close(turned.grad.transpose(0, 2), straight.grad, rtol=1e-12, atol=1e-14)
