"""Time of a call: interleaved between variants, inputs rotated, warm-up outside."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calm_kernels import _dispatch
from calm_kernels.bench.workload import Call, Inputs, Outputs

GRAPH_BELOW = 1e-3
"""Seconds: on a GPU, a shorter call is also timed as replays of a CUDA graph, where no launch of
the host's stands between two kernels."""


@dataclass(frozen=True)
class Budget:
    """How long to measure."""

    seconds: float
    """for all variants of a case together"""
    min_rounds: int
    max_rounds: int
    replays: int
    """of a CUDA graph"""


THOROUGH = Budget(seconds=20.0, min_rounds=7, max_rounds=200, replays=50)
QUICK = Budget(seconds=0.3, min_rounds=3, max_rounds=5, replays=3)

_MAX_CALLS_PER_ROUND = 10
_WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Runnable:
    """A prepared variant."""

    call: Call
    backend: str


@dataclass(frozen=True)
class Distribution:
    """Seconds a call."""

    median: float
    p20: float
    p80: float
    count: int


def distribution(samples: Sequence[float]) -> Distribution:
    """Median and 20th and 80th percentile, interpolated linearly."""
    if len(samples) == 1:
        return Distribution(samples[0], samples[0], samples[0], 1)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Distribution(statistics.median(samples), fifths[0], fifths[3], len(samples))


class _HostClock:
    def __init__(self) -> None:
        self._samples: list[float] = []

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._samples.append(time.perf_counter() - self._started)

    def samples(self) -> list[float]:
        return self._samples


class _DeviceClock:
    """Events around a call that starts on an idle device: launches by the host are included."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, Any]] = []

    def start(self) -> None:
        torch.cuda.synchronize()
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        self._events.append(pair)
        pair[0].record()

    def stop(self) -> None:
        self._events[-1][1].record()

    def samples(self) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in self._events]


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    runnables: Mapping[str, Runnable],
    input_sets: Sequence[Inputs],
    device: torch.device,
    budget: Budget,
) -> dict[str, Distribution]:
    """Time all variants of a case, turn by turn.

    A round calls every variant, the quick ones several times, each time on the next input set; the
    order of the variants rotates from round to round. Results are dropped before the next call.
    """
    expected = {name: _warm_up(r, input_sets, device) for name, r in runnables.items()}
    slowest = max(expected.values(), default=0.0)
    calls = {
        name: max(1, min(_MAX_CALLS_PER_ROUND, int(slowest / (10.0 * seconds))))
        for name, seconds in expected.items()
    }
    round_seconds = sum(expected[name] * calls[name] for name in runnables)
    rounds = int(budget.seconds / round_seconds) if round_seconds > 0.0 else budget.max_rounds
    rounds = max(budget.min_rounds, min(budget.max_rounds, rounds))

    make_clock = _DeviceClock if device.type == "cuda" else _HostClock
    clocks = {name: make_clock() for name in runnables}
    names, position = list(runnables), 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                clock, call = clocks[name], runnables[name].call
                with _dispatch.backend(runnables[name].backend):
                    for _ in range(calls[name]):
                        inputs = input_sets[position % len(input_sets)]
                        position += 1
                        clock.start()
                        outputs = call(inputs)
                        clock.stop()
                        del outputs
    finally:
        if collecting:
            gc.enable()
    return {name: distribution(clock.samples()) for name, clock in clocks.items()}


def _warm_up(runnable: Runnable, input_sets: Sequence[Inputs], device: torch.device) -> float:
    """Call until nothing is done for the first time any more; returns seconds of the last call."""
    seconds = 0.0
    with _dispatch.backend(runnable.backend):
        for i in range(_WARM_UP_CALLS):
            synchronize(device)
            started = time.perf_counter()
            outputs = runnable.call(input_sets[i % len(input_sets)])
            synchronize(device)
            seconds = time.perf_counter() - started
            del outputs
    return max(seconds, 1e-7)


@dataclass
class Replay:
    """A CUDA graph of one call on every input set, one after the other."""

    graph: Any
    outputs: list[Outputs]

    def seconds(self, replays: int) -> float:
        """Median seconds of one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        samples: list[float] = []
        for _ in range(replays):
            torch.cuda.synchronize()
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e-3 / len(self.outputs))
        return statistics.median(samples)


def capture(runnable: Runnable, input_sets: Sequence[Inputs]) -> Replay:
    """Record the calls in a CUDA graph.

    Raises:
        RuntimeError: the call synchronises with the host, or does else what a graph cannot hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with _dispatch.backend(runnable.backend):
        with torch.cuda.stream(side):
            for inputs in input_sets[:_WARM_UP_CALLS]:
                runnable.call(inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [runnable.call(inputs) for inputs in input_sets]
    return Replay(graph, outputs)
