from __future__ import annotations

import pytest
import torch

from calm_kernels import energy_score
from calm_kernels.bench.memory import peak_bytes
from calm_kernels.bench.timing import Budget, Runnable, distribution, time_interleaved
from calm_kernels.bench.variants import call_of
from calm_kernels.bench.workload import Case, workloads

CPU = torch.device("cpu")
MEGABYTE = 1 << 20


def peak(call, backend: str = "auto", inputs=None) -> int:
    runnable = Runnable(call, backend)
    call(inputs)
    found = peak_bytes(runnable, inputs, CPU)
    if found is None:
        pytest.skip("/proc does not tell the peak")
    return found


def test_the_distribution_is_that_of_the_samples() -> None:
    found = distribution([float(i) for i in range(11)])
    assert (found.p20, found.median, found.p80, found.count) == (2.0, 5.0, 8.0, 11)
    assert distribution([9.0, 1.0, 5.0]).median == 5.0
    single = distribution([3.0])
    assert (single.p20, single.median, single.p80) == (3.0, 3.0, 3.0)


def test_every_variant_is_called_as_often_as_the_budget_says() -> None:
    calls = {"a": 0, "b": 0}

    def counted(name):
        def call(inputs):
            calls[name] += 1

        return call

    runnables = {name: Runnable(counted(name), "auto") for name in calls}
    times = time_interleaved(runnables, [{}, {}], CPU, Budget(0.0, 4, 9, 1))
    assert all(4 <= times[name].count <= 40 for name in calls)
    assert {name: times[name].count + 2 for name in calls} == calls


def test_nothing_to_time_is_no_time() -> None:
    assert time_interleaved({}, [{}], CPU, Budget(0.1, 1, 1, 1)) == {}


def test_the_peak_counts_temporaries_that_are_gone_at_the_end() -> None:
    found = peak(lambda inputs: torch.ones(16 * MEGABYTE).sum())
    assert 63 * MEGABYTE < found < 80 * MEGABYTE


def test_the_peak_counts_results_and_not_inputs() -> None:
    x = torch.ones(8 * MEGABYTE)
    assert 31 * MEGABYTE < peak(lambda inputs: x * 2.0) < 40 * MEGABYTE
    assert peak(lambda inputs: x.mul_(1.0)) < 4 * MEGABYTE


def test_the_peak_is_not_hidden_by_memory_that_an_earlier_call_freed() -> None:
    torch.ones(32 * MEGABYTE).sum()
    blocks = [torch.ones(MEGABYTE // 16) for _ in range(256)]
    del blocks
    found = peak(lambda inputs: [torch.ones(MEGABYTE // 16) for _ in range(128)])
    assert 30 * MEGABYTE < found < 48 * MEGABYTE


@pytest.mark.parametrize("estimator", ["closed_form", "monte_carlo"])
def test_memory_of_the_energy_score_is_flat_in_the_number_of_targets(estimator: str) -> None:
    workload = workloads()["energy"]
    plain = workload.variants[0]
    variant = next(v for v in workload.variants if v.name == f"native/{estimator}")
    found = []
    for num_targets in (20, 1600):
        case = Case("energy", {"P": 16, "N": 4, "M": num_targets, "D": 64}, torch.float32, CPU)
        if (problem := variant.why_not(case)) is not None:
            pytest.skip(problem)
        generator = torch.Generator().manual_seed(0)
        state = workload.make_state(case, generator)
        inputs = {**state, **workload.make_inputs(case, state, generator)}
        found.append(
            [
                peak(variant.prepare(case), "native", inputs),
                peak(plain.prepare(case), "auto", inputs),
            ]
        )
    (ours, materialised), (ours_later, materialised_later) = found
    assert ours_later - ours < 2 * MEGABYTE
    assert materialised_later - materialised > 25 * MEGABYTE


def test_gradients_are_those_asked_for() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    mean, log_std = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4)
    inputs = {"x": x, "mean": mean}

    def forward(inputs):
        return energy_score(inputs["x"], inputs["mean"], log_std)

    score = call_of(forward, ())(inputs)
    assert not score.requires_grad
    value, grad_mean = call_of(forward, ("mean",))(inputs)
    assert not value.requires_grad and torch.equal(value, score)
    (expected,) = torch.autograd.grad(forward(inputs).sum(), mean)
    assert torch.equal(grad_mean, expected)
    weights = torch.tensor([1.0, 0.0, -2.0])
    _, weighted = call_of(forward, ("mean",))({**inputs, "cotangent": weights})
    torch.testing.assert_close(weighted, expected * weights.unsqueeze(1))
