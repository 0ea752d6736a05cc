from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import calm_kernels
from calm_kernels._dispatch import operators
from calm_kernels.reference.expected_distance import correction_nodes, unit_mean_law

BACKENDS = [
    name
    for name in ("reference", "native")
    if operators()["energy_score"].why_not(name, "cpu") is None
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every backend that serves CPU tensors here."""
    with calm_kernels.backend(request.param):
        yield request.param


def draw_laws(dimensions: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Offsets and standard deviations [count, D] of every kind: equal, uneven, dominated by one
    dimension, 1e-3 to 10 apart; offsets zero, of the size of std, concentrated, or anything."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        values = torch.rand(*shape, dtype=torch.float64, generator=generator)
        return low + (high - low) * values

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    shape = (count, dimensions)
    scale = 10.0 ** uniform(-3.0, 1.0, count, 1)
    dominant = torch.arange(dimensions) < torch.randint(1, 4, (count, 1), generator=generator)
    stds = torch.stack(
        [
            scale.expand(shape),
            scale * torch.exp(normal(*shape) * uniform(0.0, 0.5, count, 1)),
            scale * torch.exp(normal(*shape) * uniform(0.5, 1.5, count, 1)),
            10.0 ** uniform(-3.0, 1.0, *shape),
            torch.where(dominant, 10.0 ** uniform(-1.0, 1.0, *shape), scale),
            0.3 * torch.exp(normal(*shape) * uniform(0.0, 0.3, count, 1)),
        ]
    )
    kind = torch.randint(0, len(stds), (count,), generator=generator)
    std = stds[kind, torch.arange(count)].clamp(1e-3, 10.0)
    offsets = torch.stack(
        [
            torch.zeros(shape, dtype=torch.float64),
            normal(*shape) * std * 10.0 ** uniform(-1.0, 1.0, count, 1),
            normal(*shape) * 10.0 ** uniform(-3.0, 1.0, count, 1),
            torch.where(dominant, normal(*shape) * std * 10.0 ** uniform(-1.0, 1.5, count, 1), 0.0),
            normal(*shape) * 10.0 ** uniform(-3.0, 1.0, *shape),
        ]
    )
    kind = torch.randint(0, len(offsets), (count,), generator=generator)
    return offsets[kind, torch.arange(count)], std


@pytest.fixture
def random_laws() -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    return draw_laws


@pytest.fixture
def every_correction() -> tuple[Tensor, Tensor, Tensor]:
    """samples [2, 3, 12], mean and log_std [3, 12] whose positions take 0, 8 and 16 nodes."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2, 3, 12, dtype=torch.float64, generator=generator)
    mean = torch.randn(3, 12, dtype=torch.float64, generator=generator)
    noise = torch.randn(3, 12, dtype=torch.float64, generator=generator)
    unevenness, level = torch.tensor([[0.1, 0.15, 1.2], [-3.0, 0.2, 1.5]], dtype=torch.float64)
    log_std = unevenness.unsqueeze(-1) * noise + level.unsqueeze(-1)
    for alpha in (0.2, 0.5, 1.0, 1.5, 1.9):
        _, law = unit_mean_law(samples - mean, log_std.exp())
        nodes = correction_nodes(law, alpha / 2.0)
        assert (nodes == torch.tensor([0, 8, 16])).all(), nodes
    return samples, mean, log_std


@pytest.fixture
def brute_force() -> Callable[[Tensor, Tensor, float], Tensor]:
    """The score by its definition, pair by pair in Python floats: [N, P, D], [M, P, D] -> [P]."""

    def score(samples: Tensor, targets: Tensor, alpha: float) -> Tensor:
        result = torch.empty(samples.shape[1], dtype=torch.float64)
        for p in range(samples.shape[1]):
            xs, ys = samples[:, p].double().tolist(), targets[:, p].double().tolist()
            pairs = [
                math.dist(x, other) ** alpha
                for n, x in enumerate(xs)
                for k, other in enumerate(xs)
                if n != k
            ]
            crossed = [math.dist(x, y) ** alpha for x in xs for y in ys]
            result[p] = sum(pairs) / len(pairs) - 2.0 * sum(crossed) / len(crossed)
        return result

    return score
