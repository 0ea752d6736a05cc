from __future__ import annotations

import pytest
import torch
from operator_calls import CALLS, OperatorCall
from torch import Tensor

import calm_kernels
from calm_kernels import _dispatch, _native

# Relative L2 error of a few roundings in a dtype, and of float32 sums.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
MANY_ELEMENTS = 2**31


def in_float64(call: OperatorCall, arguments: dict) -> list[Tensor]:
    """The same values through the reference on the CPU: float64, or the integers as they are."""
    dtype = torch.int64 if call.ids else torch.float64
    with calm_kernels.backend("reference"):
        return call.results(call.cast(arguments, dtype, torch.device("cpu")))


def assert_near(result: Tensor, exact: Tensor, tolerance: float) -> None:
    assert result.shape == exact.shape
    if not result.is_floating_point():
        assert torch.equal(result.cpu().to(exact.dtype), exact)
        return
    difference = (result.cpu().double() - exact.double()).norm()
    assert float(difference) <= tolerance * float(exact.double().norm()), float(difference)


def assert_same(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for result, other in zip(results, expected, strict=True):
        assert_near(result, other.cpu(), tolerance)


def test_every_operator_with_a_cuda_kernel_has_a_call() -> None:
    assert _native.library("cuda").problem is None
    served = {
        name
        for name, operator in _dispatch.operators().items()
        if operator.why_not("native", "cuda") is None
    }
    assert served <= {name for call in CALLS for name in call.operators}


def test_values_and_gradients_equal_float64(
    call: OperatorCall, backend: str, device: torch.device
) -> None:
    for seed, dtype in enumerate(call.dtypes):
        arguments = call.arguments(seed, dtype, device)
        results = call.results(arguments)
        tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
        for result, exact in zip(results, in_float64(call, arguments), strict=True):
            assert result.device == device
            assert_near(result, exact, tolerance)


def capture(call: OperatorCall, arguments: dict) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The call in a CUDA graph, and the tensors that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call.results(arguments)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.results(arguments)
    return graph, results


def replay(graph: torch.cuda.CUDAGraph, results: list[Tensor]) -> list[Tensor]:
    for result in results:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return [result.clone() for result in results]


def skip_what_no_graph_can_hold(call: OperatorCall, backend: str) -> None:
    if backend == "reference" or not call.capturable:
        pytest.skip("needs the host between kernels")


def test_a_replayed_graph_computes_on_what_its_inputs_hold_now(
    call: OperatorCall, backend: str, device: torch.device
) -> None:
    skip_what_no_graph_can_hold(call, backend)
    dtype = call.dtypes[0]
    static = call.arguments(0, dtype, device)
    graph, results = capture(call, static)
    seen = []
    for seed in (1, 2):
        fresh = call.arguments(seed, dtype, device)
        with torch.no_grad():
            for name, value in fresh.items():
                if isinstance(value, Tensor):
                    static[name].copy_(value)
        seen.append(replay(graph, results))
        assert_same(seen[-1], call.results(fresh), TOLERANCE[torch.float32])
    assert any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_replayed_graph_draws_fresh_numbers_for_a_fresh_seed(
    call: OperatorCall, backend: str, device: torch.device
) -> None:
    skip_what_no_graph_can_hold(call, backend)
    arguments = call.arguments(0, call.dtypes[0], device)
    if "seed" not in arguments:
        pytest.skip("draws no random numbers")
    graph, results = capture(call, arguments)
    runs = []
    for seed in (5, 5, 6):
        arguments["seed"].fill_(seed)
        runs.append(replay(graph, results))
    first, again, other = runs
    assert_same(again, first, TOLERANCE[torch.float32])
    assert torch.equal(again[0], first[0])
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_fixed_rounds_of_the_exact_sampler_run_in_a_graph(device: torch.device) -> None:
    seed = torch.tensor([3], device=device)

    def sample() -> tuple[Tensor, Tensor, Tensor]:
        position = 0

        def draw(active: Tensor, count: int) -> Tensor:
            nonlocal position
            u = calm_kernels.philox_uniform(seed, active, count, 9, first=position)
            position += count
            return (6 * u * u).long().unsqueeze(-1)

        return calm_kernels.exact_temperature_sample(
            draw, 64, 0.37, round_size=8, num_rounds=4, seed=seed, device=device
        )

    sample()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample()
    runs = []
    for value in (3, 8):
        seed.fill_(value)
        runs.append(replay(graph, list(captured)))
        assert_same(runs[-1], list(sample()), 0.0)
    assert not torch.equal(runs[0][0], runs[1][0])


def test_two_streams_at_once_do_not_disturb_each_other(
    call: OperatorCall, backend: str, device: torch.device
) -> None:
    dtype = call.dtypes[0]
    arguments = [call.arguments(seed, dtype, device) for seed in (0, 1)]
    expected = [call.results(each) for each in arguments]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in arguments]
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(8):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[which].append(call.results(arguments[which]))
    torch.cuda.synchronize()
    for which, runs in enumerate(found):
        for results in runs:
            assert_same(results, expected[which], TOLERANCE[torch.float32])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees one GPU, two are needed")
def test_the_device_of_the_tensors_is_used_whichever_is_current(
    call: OperatorCall, backend: str, device: torch.device
) -> None:
    second = torch.device("cuda", 1)
    dtype = call.dtypes[0]
    expected = call.results(call.arguments(0, dtype, device))
    with torch.cuda.device(0):
        results = call.results(call.arguments(0, dtype, second))
        assert torch.cuda.current_device() == 0
    assert all(result.device == second for result in results)
    assert_same(results, expected, TOLERANCE[torch.float32])


def needs_memory(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


def test_the_energy_score_indexes_beyond_31_bits(device: torch.device) -> None:
    needs_memory(40)
    size = 64
    positions = MANY_ELEMENTS // (2 * size) + 3
    samples = torch.randn(2, positions, size, device=device, dtype=torch.bfloat16)
    mean = torch.randn(positions, size, device=device, dtype=torch.bfloat16)
    log_std = torch.full_like(mean, -1.0)
    samples.requires_grad_()
    score = calm_kernels.energy_score(samples, mean, log_std)
    (gradient,) = torch.autograd.grad(score, samples, torch.ones_like(score))
    assert samples.numel() > MANY_ELEMENTS
    last = samples.detach()[:, -5:].clone().requires_grad_()
    expected = calm_kernels.energy_score(last, mean[-5:], log_std[-5:])
    (expected_gradient,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
    assert_near(score[-5:], expected.detach().cpu(), TOLERANCE[torch.float32])
    assert_near(gradient[:, -5:], expected_gradient.cpu(), TOLERANCE[torch.bfloat16])


def test_brier_scores_index_beyond_31_bits(device: torch.device) -> None:
    needs_memory(40)
    positions = MANY_ELEMENTS // 2 + 5
    samples = torch.randint(0, 3, (2, positions, 1), device=device, dtype=torch.int32)
    target = torch.randint(0, 3, (positions, 1), device=device, dtype=torch.int32)
    scores = calm_kernels.brier_scores(samples, target)
    tail = calm_kernels.brier_scores(samples[:, -7:].cpu(), target[-7:].cpu())
    assert_near(scores[-7:], tail, TOLERANCE[torch.float32])
