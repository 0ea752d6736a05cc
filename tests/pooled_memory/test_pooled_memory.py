"""Results whose memory is used again: who holds one must never notice."""

from __future__ import annotations

import copy
import io
import itertools
import mmap
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import calm_kernels
from calm_kernels import _native

SERVED = sys.platform == "linux" and all(
    _native.serves(f"calm_kernels::{name}", "cpu") for name in ("energy_head_output", "gated_ffn")
)
POOLS = SERVED and torch.__version__ >= (2, 11)
pools = pytest.mark.skipif(not POOLS, reason="memory is torch's without the library or torch 2.11")

SIZE = 64
ROWS = (1030, 1040, 2048, 5000)
"""Rows whose results, of 256 bytes a row, are pooled; the first two take as much memory."""


@pytest.fixture(autouse=True)
def _native_backend() -> Iterator[None]:
    with calm_kernels.backend("native" if SERVED else "auto"):
        yield


class Head:
    """The energy head's last layers with random weights, from SIZE to SIZE."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

        self.weights = [1 + draw(SIZE), draw(SIZE), draw(SIZE, SIZE), draw(SIZE)]
        self.weights += [draw(SIZE, SIZE), draw(SIZE)]
        self.rows = {count: torch.randn(count, SIZE, generator=generator) for count in ROWS}
        with calm_kernels.backend("reference"):
            self.expected = {count: self(count) for count in ROWS}

    def __call__(self, count: int) -> Tensor:
        with torch.no_grad():
            return calm_kernels.energy_head_output(self.rows[count], *self.weights)

    def assert_is_result(self, result: Tensor, count: int) -> None:
        torch.testing.assert_close(result, self.expected[count], rtol=1e-4, atol=1e-4)


def churn(head: Head, times: int = 24) -> None:
    """Results of every size come and go, and what they leave behind is overwritten."""
    for i in range(times):
        head(ROWS[i % len(ROWS)]).fill_(torch.nan)


def spans(tensors: list[Tensor]) -> list[tuple[int, int]]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)


def test_results_that_live_share_no_memory() -> None:
    head = Head(0)
    churn(head)
    alive = [head(count) for count in ROWS for _ in range(6)]
    places = spans(alive)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    for i, result in enumerate(alive):
        head.assert_is_result(result, ROWS[i // 6])


def test_gradients_share_no_memory_with_each_other_or_with_results() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, norm = draw(2048, SIZE), draw(SIZE)
    weights = [draw(2 * SIZE, SIZE), draw(2 * SIZE, SIZE), draw(SIZE, 2 * SIZE)]
    alive: list[Tensor] = []
    for _ in range(3):
        out = calm_kernels.gated_ffn(x, norm, *weights)
        alive += [out, *torch.autograd.grad(out.sum(), [x, norm, *weights])]
    places = spans(alive)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    for first, later in zip(alive[:6], alive[6:12], strict=True):
        assert torch.equal(first, later)


@pools
@pytest.mark.parametrize("count", ROWS)
def test_memory_of_a_dead_result_is_used_again(count: int) -> None:
    head = Head(2)
    result = head(count)
    place = result.data_ptr()
    del result
    again = head(count)
    assert again.data_ptr() == place
    head.assert_is_result(again, count)


@pools
def test_memory_goes_to_a_result_that_takes_as_much() -> None:
    head = Head(3)
    place = head(ROWS[0]).data_ptr()
    other = head(ROWS[1])
    assert other.data_ptr() == place
    head.assert_is_result(other, ROWS[1])


@pools
def test_memory_goes_to_no_result_of_another_size() -> None:
    head = Head(3)
    result = head(ROWS[2])
    place = result.data_ptr()
    del result
    others = [head(count) for count in (ROWS[0], ROWS[3])]
    assert place not in [other.data_ptr() for other in others]
    assert head(ROWS[2]).data_ptr() == place


@pools
def test_small_results_and_huge_ones_are_torch_s() -> None:
    weights = Head(4).weights
    for count in (1, 1023, (64 << 20) // (4 * SIZE) + 1):
        result = calm_kernels.energy_head_output(torch.zeros(count, SIZE), *weights)
        assert result.untyped_storage().resizable()
    assert not Head(4)(ROWS[0]).untyped_storage().resizable()


@pools
def test_no_more_than_256_mb_are_kept_free() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    size, latent_size, count = 8, 1024, 15000
    weights = [torch.randn(size), torch.randn(size), torch.randn(size, size), torch.randn(size)]
    weights += [torch.randn(latent_size, size), torch.randn(latent_size)]
    rows = torch.randn(count, size)
    alive = [calm_kernels.energy_head_output(rows, *weights) for _ in range(8)]
    assert alive[0].nbytes * len(alive) > 450 << 20
    before = resident()
    expected = alive[0].clone()
    alive.clear()
    assert before - resident() > 100 << 20
    for _ in range(3):
        alive.append(calm_kernels.energy_head_output(rows, *weights))
    assert all(torch.equal(result, expected) for result in alive)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda result: result[7],
    "columns": lambda result: result[:, 3:5],
    "transposed": lambda result: result.t(),
    "detached": lambda result: result.detach(),
    "bytes": lambda result: result.view(torch.uint8),
    "numpy": lambda result: torch.from_numpy(result.numpy()),
    "dlpack": lambda result: torch.from_dlpack(result.__dlpack__()),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_result_kept_by_a_view_stays(kind: str) -> None:
    head = Head(5)
    for count in ROWS:
        view = VIEWS[kind](head(count))
        expected = view.clone()
        churn(head)
        assert torch.equal(view, expected)


def test_a_view_made_before_the_operator_s_result_is_dropped_shares_it() -> None:
    head = Head(6)
    rows = head.rows[ROWS[2]].view(2, ROWS[2] // 2, SIZE)
    with torch.no_grad():
        result = calm_kernels.energy_head_output(rows, *head.weights)  # itself a view
    churn(head)
    head.assert_is_result(result.view(-1, SIZE), ROWS[2])


def test_what_autograd_keeps_stays() -> None:
    head = Head(7)
    weights = [weight.requires_grad_() for weight in head.weights]
    rows = head.rows[ROWS[2]].requires_grad_()

    def loss() -> Tensor:
        latents = calm_kernels.energy_head_output(rows, *weights)
        return latents.square().sum()  # which keeps latents, beside what the operator keeps

    expected = torch.autograd.grad(loss(), [rows, *weights])
    kept = [loss() for _ in range(3)]
    churn(head)
    for each in kept:
        for gradient, other in zip(
            torch.autograd.grad(each, [rows, *weights]), expected, strict=True
        ):
            assert torch.equal(gradient, other)
        churn(head, 4)


@pytest.mark.parametrize(
    "copied",
    [torch.clone, copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))],
    ids=["clone", "deepcopy", "pickle"],
)
def test_copies_stay(copied: Callable[[Tensor], Tensor]) -> None:
    head = Head(8)
    result = copied(head(ROWS[1]))
    churn(head)
    head.assert_is_result(result, ROWS[1])


def test_a_result_is_saved_and_shared_as_any_tensor() -> None:
    head, file = Head(9), io.BytesIO()
    torch.save(head(ROWS[0]), file)
    file.seek(0)
    head.assert_is_result(torch.load(file), ROWS[0])
    shared = head(ROWS[0]).share_memory_()
    assert shared.is_shared()
    churn(head)
    head.assert_is_result(shared, ROWS[0])


def run_at_once(task: Callable[[int], None], count: int) -> None:
    """``task`` of every number below ``count`` in a thread each; raises what one of them raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait()
            task(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_that_make_and_drop_results_at_once_do_not_disturb_each_other() -> None:
    heads = [Head(10 + number) for number in range(4)]

    def task(number: int) -> None:
        head, kept = heads[number], []
        for i in range(40):
            count = ROWS[(i + number) % 3]
            kept.append((head(count), count))
            if len(kept) > 3:
                result, count = kept.pop(i % 3)
                head.assert_is_result(result, count)
        for result, count in kept:
            head.assert_is_result(result, count)

    run_at_once(task, len(heads))


def test_results_may_be_dropped_by_another_thread_than_made_them() -> None:
    heads = [Head(20 + number) for number in range(2)]
    passed: list[queue.Queue[tuple[Tensor, int]]] = [queue.Queue(3) for _ in heads]

    def task(number: int) -> None:
        """The first half makes results for the second, which checks and drops them."""
        which = number % 2
        for i in range(40):
            count = ROWS[(i + which) % 3]
            if number < 2:
                passed[which].put((heads[which](count), count), timeout=60)
            else:
                result, count = passed[which].get(timeout=60)
                heads[which].assert_is_result(result, count)
                result.fill_(torch.nan)

    run_at_once(task, 4)


def test_gradients_of_threads_at_once_are_those_of_each_alone() -> None:
    heads = [Head(30 + number) for number in range(3)]

    def gradients(head: Head) -> list[Tensor]:
        wanted = [t.detach().requires_grad_() for t in (head.rows[ROWS[2]], *head.weights)]
        latents = calm_kernels.energy_head_output(*wanted)
        return list(torch.autograd.grad(latents.square().sum(), wanted))

    expected = [gradients(head) for head in heads]

    def task(number: int) -> None:
        for _ in range(12):
            torch.testing.assert_close(
                gradients(heads[number]), expected[number], rtol=1e-4, atol=1e-3
            )

    run_at_once(task, len(heads))


@pools
def test_the_cache_is_given_back_and_what_lives_stays() -> None:
    head = Head(3)
    calm_kernels.empty_cache()
    alive = head(ROWS[2])
    calm_kernels.empty_cache()  # working memory
    assert calm_kernels.empty_cache() == 0
    gone = head(ROWS[2])
    num_bytes = gone.untyped_storage().nbytes()
    del gone
    assert calm_kernels.empty_cache() >= num_bytes
    assert calm_kernels.empty_cache() == 0
    churn(head)
    head.assert_is_result(alive, ROWS[2])
