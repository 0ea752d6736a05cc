"""The energy score's CUDA kernels on the host executor, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from calm_kernels.reference import energy_score_gradient as reference
from calm_kernels.reference.expected_distance import correction_nodes, unit_mean_law

# Errors of score and gradients over the largest value; then what storing a gradient may round by,
# relative, and absolute below the smallest normal number.
TOLERANCE = {"float32": 4e-6, "bfloat16": 4e-6, "float16": 4e-6, "float64": 1e-13}
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 0.0}
UNDERFLOW = {"float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-25, "float64": 0.0}
DTYPES = list(TOLERANCE)
Shape = tuple[int, ...]


class Law(NamedTuple):
    samples: Tensor
    mean: Tensor
    log_std: Tensor


def law(shape: Sequence[int], dtype: str, *, spread: float = 0.3, seed: int = 0) -> Law:
    """Samples around a Gaussian, scale 1; ``spread`` is that of log_std over the dimensions."""
    num_samples, positions, size = shape
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(positions, size, generator=generator)
    log_std = -0.5 + spread * torch.randn(positions, size, generator=generator)
    noise = torch.randn(num_samples, positions, size, generator=generator)
    samples = mean + 0.3 * noise * log_std.exp() + 0.2
    return Law(*(t.to(getattr(torch, dtype)) for t in (samples, mean, log_std)))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A view; 16-bit values as uint16."""
    bits = tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor
    result: np.ndarray = bits.numpy()
    return result


def to_tensor(array: np.ndarray | None, like: Tensor) -> Tensor | None:
    if array is None:
        return None
    tensor = torch.from_numpy(array)
    return tensor.view(like.dtype) if like.element_size() == 2 else tensor


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Result(NamedTuple):
    kernel: str
    score: Tensor
    gradients: list[Tensor | None]


def run(
    simt: ModuleType,
    tensors: Law,
    *,
    alpha: float = 1.0,
    seed: int | None = None,
    num_targets: int = 100,
    needs: Sequence[bool] = (True, True, True),
    **how: Any,
) -> Result:
    function = getattr(simt, f"energy_score_{dtype_name(tensors.samples)}")
    arrays = [to_numpy(tensor) for tensor in tensors]
    score, kernel, *gradients = function(*arrays, seed, alpha, num_targets, tuple(needs), **how)
    pairs = zip(gradients, tensors, strict=True)
    return Result(kernel, torch.from_numpy(score), [to_tensor(g, like) for g, like in pairs])


def run_from_targets(
    simt: ModuleType,
    samples: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    needs: Sequence[bool] = (True, True),
    **how: Any,
) -> Result:
    function = getattr(simt, f"energy_score_from_targets_{dtype_name(samples)}")
    score, kernel, *gradients = function(
        to_numpy(samples), to_numpy(targets), alpha, tuple(needs), **how
    )
    likes = zip(gradients, (samples, targets), strict=True)
    return Result(kernel, torch.from_numpy(score), [to_tensor(g, like) for g, like in likes])


def exact(
    tensors: Law,
    *,
    alpha: float = 1.0,
    seed: int | None = None,
    num_targets: int = 100,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor, ...]:
    samples, mean, log_std = (tensor.double() for tensor in tensors)
    words = None if seed is None else torch.tensor([seed])
    estimator = "closed_form" if seed is None else "monte_carlo"
    return reference.energy_score_with_gradients(
        samples, mean, log_std, words, alpha, estimator, num_targets, *needs
    )


def assert_close(result: Result, expected: tuple[Tensor, ...], dtype: str) -> None:
    score, *gradients = expected
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        result.score.double(), score, rtol=tolerance, atol=tolerance * float(score.abs().max())
    )
    for got, want in zip(result.gradients, gradients, strict=True):
        if got is None:
            assert want.numel() == 0
            continue
        assert dtype_name(got) == dtype
        scale = float(want.abs().amax()) if want.numel() else 0.0
        torch.testing.assert_close(
            got.double(),
            want,
            rtol=tolerance + 1.01 * ROUNDING[dtype],
            atol=tolerance * scale + UNDERFLOW[dtype],
        )


def with_dtypes(shapes: Sequence[Shape], dtypes: Sequence[str]) -> list[tuple[Shape, str]]:
    """The first two shapes with every dtype, the others with the first."""
    return [*product(shapes[:2], dtypes), *product(shapes[2:], dtypes[:1])]


# (N, P, D) of the fast kernel of the closed form: 8, 16 and 32 lanes for a row, rows that end
# inside them, a warp's positions partly past the last one, every number of samples.
CLOSED_FORM_SHAPES = [
    (8, 5, 128),
    (8, 3, 256),
    (7, 9, 72),
    (6, 4, 64),
    (5, 2, 24),
    (4, 6, 120),
    (3, 5, 32),
    (2, 9, 8),
]


CLOSED_FORM_CASES = with_dtypes(CLOSED_FORM_SHAPES, ["bfloat16", "float16"])
CLOSED_FORM_CASES += [((*shape[:2], shape[2] // 2), "float32") for shape in CLOSED_FORM_SHAPES]


@pytest.mark.parametrize(("shape", "dtype"), CLOSED_FORM_CASES)
def test_the_fast_closed_form_equals_the_reference(
    simt: ModuleType, shape: Shape, dtype: str
) -> None:
    for alpha, spread in ((1.0, 0.1), (0.5, 0.5), (1.5, 1.5)):
        tensors = law(shape, dtype, spread=spread)
        result = run(simt, tensors, alpha=alpha)
        assert result.kernel == "closed_form"
        assert_close(result, exact(tensors, alpha=alpha), dtype)


BLOCK_SHAPES = [(9, 3, 33), (2, 5, 1), (3, 4, 2), (64, 1, 3), (16, 2, 130), (5, 2, 64)]


@pytest.mark.parametrize(("shape", "dtype"), with_dtypes(BLOCK_SHAPES, DTYPES))
def test_the_block_kernel_equals_the_reference(simt: ModuleType, shape: Shape, dtype: str) -> None:
    for alpha, spread in ((1.0, 0.1), (0.5, 0.5), (1.5, 1.5)):
        tensors = law(shape, dtype, spread=spread)
        result = run(simt, tensors, alpha=alpha, allow_fast=False, most_blocks=2)
        assert result.kernel == "block"
        assert_close(result, exact(tensors, alpha=alpha), dtype)


@pytest.mark.parametrize("allow_fast", [True, False])
def test_positions_with_no_8_and_16_nodes_share_a_warp(simt: ModuleType, allow_fast: bool) -> None:
    tensors = law((8, 8, 64), "float32")
    for p, spread in enumerate([0.1, 0.5, 2.0, 0.0, 2.0, 2.0, 0.5, 0.5]):
        tensors.log_std[p] = spread * torch.randn(64, generator=torch.Generator().manual_seed(p))
    offset = (tensors.samples - tensors.mean).double()
    _, moments = unit_mean_law(offset, tensors.log_std.exp().double())
    assert set(correction_nodes(moments, 0.5).unique().tolist()) == {0, 8, 16}
    result = run(simt, tensors, allow_fast=allow_fast)
    assert_close(result, exact(tensors), "float32")


# (N, P, D, M): one warp, lanes past the end of a row, a partial batch, a single target.
TARGET_SHAPES = [
    (8, 3, 128, 9),
    (7, 2, 100, 4),
    (6, 3, 64, 5),
    (5, 2, 20, 1),
    (4, 5, 32, 6),
    (3, 2, 16, 7),
    (2, 3, 44, 13),
]
# The same for the block kernel: several batches of targets, rows no Philox block is aligned with.
BLOCK_TARGET_SHAPES = [(9, 3, 33, 40), (2, 2, 1, 17), (8, 2, 8, 5), (3, 2, 130, 3), (4, 1, 2050, 9)]


def targets_like(tensors: Law, num_targets: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_targets)
    noise = torch.randn(num_targets, *tensors.mean.shape, generator=generator)
    targets = tensors.mean.float() + noise * tensors.log_std.float().exp()
    return targets.to(tensors.mean.dtype)


TARGET_CASES = [*with_dtypes(TARGET_SHAPES, DTYPES), *with_dtypes(BLOCK_TARGET_SHAPES, DTYPES)]


@pytest.mark.parametrize(("shape", "dtype"), TARGET_CASES)
def test_drawn_targets_are_those_of_the_reference(
    simt: ModuleType, shape: Shape, dtype: str
) -> None:
    *sizes, num_targets = shape
    tensors = law(sizes, dtype)
    for alpha, seed in ((1.0, 2**62 + 12345), (1.5, -7)):
        options: dict[str, Any] = {"alpha": alpha, "seed": seed, "num_targets": num_targets}
        result = run(simt, tensors, **options)
        fast = shape in TARGET_SHAPES and dtype != "float64"
        assert result.kernel == ("targets" if fast else "block")
        assert_close(result, exact(tensors, **options), dtype)


@pytest.mark.parametrize(("shape", "dtype"), [*TARGET_CASES, ((4, 3, 4, 6), "float32")])
def test_given_targets_equal_the_reference(simt: ModuleType, shape: Shape, dtype: str) -> None:
    *sizes, num_targets = shape
    tensors = law(sizes, dtype)
    samples, targets = tensors.samples, targets_like(tensors, num_targets)
    for alpha, most_blocks in ((1.0, 1), (0.5, 0)):
        result = run_from_targets(
            simt, samples, targets, alpha=alpha, most_blocks=most_blocks, allow_fast=not most_blocks
        )
        expected = reference.energy_score_from_targets_with_gradients(
            samples.double(), targets.double(), alpha, True, True
        )
        assert_close(result, expected, dtype)


@pytest.mark.parametrize("allow_fast", [True, False])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(
    simt: ModuleType, seed: int | None, allow_fast: bool
) -> None:
    tensors = law((3, 5, 32), "bfloat16", spread=0.5)
    options: dict[str, Any] = {"seed": seed, "num_targets": 6, "allow_fast": allow_fast}
    everything = run(simt, tensors, **options)
    for needs in product((False, True), repeat=3):
        result = run(simt, tensors, needs=needs, **options)
        assert torch.equal(result.score, everything.score)
        triples = zip(result.gradients, everything.gradients, needs, strict=True)
        for got, want, needed in triples:
            assert (got is not None) == needed
            assert got is None or want is None or torch.equal(got, want)
    samples, targets = tensors.samples, targets_like(tensors, 5)
    both = run_from_targets(simt, samples, targets, allow_fast=allow_fast)
    for pair in product((False, True), repeat=2):
        result = run_from_targets(simt, samples, targets, needs=pair, allow_fast=allow_fast)
        assert torch.equal(result.score, both.score)
        for got, want, needed in zip(result.gradients, both.gradients, pair, strict=True):
            assert (got is not None) == needed
            assert got is None or want is None or torch.equal(got, want)


@pytest.mark.parametrize("allow_fast", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_coinciding_samples_have_finite_gradients(
    simt: ModuleType, alpha: float, allow_fast: bool
) -> None:
    tensors = law((8, 3, 32), "float32")
    tensors.samples[:] = tensors.samples[:1].clone()
    for seed in (None, 5):
        options: dict[str, Any] = {"alpha": alpha, "seed": seed, "num_targets": 5}
        result = run(simt, tensors, allow_fast=allow_fast, **options)
        assert_close(result, exact(tensors, **options), "float32")
    # Everything in one point: no distance, no gradient.
    point = Law(tensors.samples, tensors.samples[0].clone(), torch.full((3, 32), -torch.inf))
    for seed in (None, 5):
        result = run(simt, point, alpha=alpha, seed=seed, num_targets=5, allow_fast=allow_fast)
        for tensor in (result.score, *result.gradients):
            assert tensor is not None and torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distance", [1e-2, 1e-5])
def test_samples_that_nearly_coincide_keep_their_digits(
    simt: ModuleType, distance: float, dtype: str
) -> None:
    tensors = law((8, 5, 64), dtype)
    generator = torch.Generator().manual_seed(1)
    near = tensors.samples[:, 1:4].float()
    near[1:] = near[:1] * (1.0 + distance * torch.randn(near[1:].shape, generator=generator))
    tensors.samples[:, 1:4] = near.to(tensors.samples.dtype)
    assert_close(run(simt, tensors), exact(tensors), dtype)


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12])
@pytest.mark.parametrize("allow_fast", [True, False])
def test_any_scale_serves(simt: ModuleType, scale: float, allow_fast: bool) -> None:
    tensors = law((4, 3, 32), "float32", spread=0.5)
    scaled = Law(
        tensors.samples * scale, tensors.mean * scale, tensors.log_std + float(np.log(scale))
    )
    for alpha in (0.5, 1.0):
        result = run(simt, scaled, alpha=alpha, allow_fast=allow_fast)
        score, *gradients = exact(scaled, alpha=alpha)
        # Squares of 1e-18 leave few digits of a float.
        tolerance = 3e-2 if scale == 1e-18 else 2e-5
        torch.testing.assert_close(result.score.double(), score, rtol=tolerance, atol=0.0)
        for got, want in zip(result.gradients, gradients, strict=True):
            assert got is not None
            bound = tolerance * float(want.abs().max())
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=bound)


@pytest.mark.parametrize("allow_fast", [True, False])
@pytest.mark.parametrize("log_std", [-np.inf, -45.0, -20.0])
def test_a_target_almost_without_spread(simt: ModuleType, log_std: float, allow_fast: bool) -> None:
    tensors = law((4, 5, 16), "float32")
    tensors.log_std[:3] = log_std
    tensors.log_std[1, 0] = -1.0
    assert_close(run(simt, tensors, allow_fast=allow_fast), exact(tensors), "float32")


@pytest.mark.parametrize("allow_fast", [True, False])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_value_that_is_not_finite_stays_in_its_position(
    simt: ModuleType, which: int, value: float, seed: int | None, allow_fast: bool
) -> None:
    tensors = law((3, 6, 32), "float32", spread=0.8)
    options: dict[str, Any] = {"seed": seed, "num_targets": 5, "allow_fast": allow_fast}
    clean = run(simt, tensors, **options)
    tensors[which][..., 2, 7] = value
    result = run(simt, tensors, **options)
    others = [0, 1, 3, 4, 5]
    assert torch.isnan(result.score[2])
    assert torch.equal(result.score[others], clean.score[others])
    for got, want in zip(result.gradients, clean.gradients, strict=True):
        assert got is not None and want is not None
        assert not got[..., 2, :].isfinite().all()
        assert torch.equal(got[..., others, :], want[..., others, :])


def test_a_position_does_not_depend_on_its_neighbours(simt: ModuleType) -> None:
    """Bitwise, whichever path the other positions of its warp take."""
    tensors = law((8, 7, 64), "float32", spread=0.1)
    tensors.log_std[2] *= 20.0  # nodes
    tensors.samples[1, 4] = tensors.samples[0, 4] * (1.0 + 1e-6)  # direct differences
    together = run(simt, tensors)
    for p in range(7):
        alone = run(simt, Law(*(t[..., p : p + 1, :].contiguous() for t in tensors)))
        assert torch.equal(alone.score, together.score[p : p + 1])
        for got, want in zip(alone.gradients, together.gradients, strict=True):
            assert got is not None and want is not None
            assert torch.equal(got, want[..., p : p + 1, :])


def test_strides_are_followed(simt: ModuleType) -> None:
    dense = law((3, 6, 32), "float32")
    transposed = dense.samples.transpose(0, 1).contiguous().transpose(0, 1)
    one_law = Law(transposed, dense.mean[:1].expand(6, 32), dense.log_std[:1].expand(6, 32))
    spaced = Law(*(torch.stack((t, t), dim=-1)[..., 0] for t in dense))
    unaligned = Law(*(torch.cat((t[..., :1], t), dim=-1)[..., 1:] for t in dense))
    for tensors, kernel in ((one_law, "closed_form"), (spaced, "block"), (unaligned, "block")):
        for seed in (None, 3):
            result = run(simt, tensors, seed=seed, num_targets=5)
            assert result.kernel == (kernel if seed is None or kernel == "block" else "targets")
            expected = exact(tensors, seed=seed, num_targets=5)
            assert_close(result, expected, "float32")
    targets = targets_like(dense, 5)
    result = run_from_targets(simt, transposed, targets.transpose(1, 2).contiguous().mT)
    expected = reference.energy_score_from_targets_with_gradients(
        dense.samples.double(), targets.double(), 1.0, True, True
    )
    assert_close(result, expected, "float32")


@pytest.mark.parametrize("kind", ["closed_form", "nodes", "drawn", "given"])
@pytest.mark.parametrize("allow_fast", [True, False])
def test_every_order_of_threads_gives_the_same_bits(
    simt: ModuleType, kind: str, allow_fast: bool
) -> None:
    tensors = law((4, 9, 32), "bfloat16", spread=2.0 if kind == "nodes" else 0.1)
    seed = 3 if kind == "drawn" else None
    results = []
    for order, poison in ((0, 0x00), (1, 0xFF), (2, 0x7F), (3, 0xA5)):
        how: dict[str, Any] = {"order": order, "poison": poison, "allow_fast": allow_fast}
        if kind == "given":
            targets = targets_like(tensors, 6)
            results.append(run_from_targets(simt, tensors.samples, targets, **how))
        else:
            results.append(run(simt, tensors, seed=seed, num_targets=6, **how))
    first, *others = results
    for other in others:
        assert torch.equal(first.score, other.score)
        for got, want in zip(other.gradients, first.gradients, strict=True):
            assert got is not None and want is not None
            assert torch.equal(got, want)


def test_the_largest_sizes_fit_shared_memory(simt: ModuleType) -> None:
    tensors = law((64, 1, 512), "bfloat16")
    options: dict[str, Any] = {"seed": 1, "num_targets": 17, "needs": (True, False, True)}
    assert_close(run(simt, tensors, **options), exact(tensors, **options), "bfloat16")


@pytest.mark.parametrize("size", [256, 1000, 4096])
def test_many_equal_small_spreads_beside_a_large_one_lose_no_digits(
    simt: ModuleType, size: int
) -> None:
    # A node multiplies D factors barely above 1: rounded one by one, all would err alike.
    generator = torch.Generator().manual_seed(size)
    log_std = torch.full((3, size), math.log(0.7 / math.sqrt(size)))
    log_std[:, 0] = 0.0
    mean = torch.zeros(3, size)
    samples = 0.01 * torch.randn(2, 3, size, generator=generator)
    tensors = Law(samples, mean, log_std)
    _, moments = unit_mean_law((samples - mean).double(), log_std.exp().double())
    assert int(correction_nodes(moments, 0.5).min()) > 0, "the case must need nodes"
    assert_close(run(simt, tensors), exact(tensors), "float32")
