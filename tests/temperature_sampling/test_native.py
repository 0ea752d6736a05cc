"""The native kernels return the values of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from patch_collisions import pair_of_one_tag_and_slot, with_one_hash
from torch import Tensor

from calm_kernels._dispatch import operators
from calm_kernels.reference import temperature_sampling as reference

VOTE = torch.ops.calm_kernels.batch_temperature_sample
STEP = torch.ops.calm_kernels.exact_temperature_step
WHY_NOT = operators()["batch_temperature_sample"].why_not("native", "cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

TEMPERATURES = (1.0, 0.8, 0.5, 0.37, 0.1)
# (B, N, K): single draws, single ids, the usual size, sizes around powers of two, long patches.
SHAPES = [
    (30, 1, 1),
    (1, 1, 64),
    (40, 2, 1),
    (40, 9, 3),
    (12, 64, 2),
    (12, 65, 2),
    (20, 200, 4),
    (5, 200, 64),
    (1, 8192, 4),
    (0, 7, 4),
]


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def law_of_draws(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Draws [B, N, K]: few patches, one patch nearly always, or ids that never repeat."""
    batch_size, num_draws, patch_size = shape
    generator = torch.Generator().manual_seed(num_draws + patch_size)
    top = 2**31 - 1 if dtype == torch.int32 else 2**40
    if name == "all-distinct":
        ids = torch.randperm(max(1, batch_size * num_draws), generator=generator)
        ids = (top - ids[: batch_size * num_draws]).view(batch_size, num_draws, 1)
        return ids.expand(shape).to(dtype)
    sharpness = {"zipf": 1.5, "near-degenerate": 9.0}[name]
    law = torch.arange(1, 40, dtype=torch.float64) ** -sharpness
    outcome = torch.multinomial(
        law, max(1, batch_size * num_draws), replacement=True, generator=generator
    )[: batch_size * num_draws].view(batch_size, num_draws)
    patches = top - torch.randint(0, 3, (39, patch_size), generator=generator)
    patches[:, -1] -= torch.arange(39)
    return patches[outcome].to(dtype)


def assert_vote_equals_the_reference(tokens: Tensor, exponent: Tensor, seed: int) -> None:
    rows = torch.arange(tokens.shape[0]) * 2**33 - 5
    arguments = (tokens, exponent, rows, torch.tensor([seed]))
    for got, expected in zip(VOTE.default(*arguments), VOTE.reference(*arguments), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("law", ["zipf", "near-degenerate", "all-distinct"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_vote_equals_the_reference(
    shape: tuple[int, int, int], law: str, dtype: torch.dtype
) -> None:
    tokens = law_of_draws(law, shape, dtype)
    temperatures = TEMPERATURES if shape[1] < 8192 else (0.37,)
    for seed, temperature in enumerate(temperatures):
        exponent = torch.full(shape[:1], 1 / temperature, dtype=torch.float64)
        assert_vote_equals_the_reference(tokens, exponent, seed - 2)


def test_the_vote_equals_the_reference_with_a_temperature_for_each_sequence() -> None:
    generator = torch.Generator().manual_seed(2)
    for num_draws in (1, 4, 33, 200):
        tokens = torch.randint(0, 5, (64, num_draws, 1), generator=generator)
        exponent = 1 / torch.rand(64, generator=generator, dtype=torch.float64).clamp_min(1e-4)
        exponent[::4] = exponent[::4].ceil()
        exponent[1] = 2.0**53
        for seed in range(4):
            assert_vote_equals_the_reference(tokens, exponent, seed)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("num_draws", [1, 2, 7, 15, 16, 17, 31, 32, 33, 100, 4095, 4096, 4097])
def test_patches_of_four_are_counted_at_every_length(num_draws: int, dtype: torch.dtype) -> None:
    """In vectors of draws, the last one part full, up to the longest that fits."""
    for law in ("zipf", "all-distinct"):
        tokens = law_of_draws(law, (3, num_draws, 4), dtype)
        exponent = torch.tensor([1.0, 1.6, 2.0], dtype=torch.float64)
        assert_vote_equals_the_reference(tokens, exponent, num_draws)
        interleaved = tokens.transpose(0, 1).contiguous().transpose(0, 1)
        assert_vote_equals_the_reference(interleaved, exponent, num_draws)


def test_negative_and_extreme_ids_of_four() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.int64, torch.int32):
        bounds = torch.iinfo(dtype)
        ids = torch.tensor([bounds.min, bounds.min + 1, -1, 0, bounds.max], dtype=dtype)
        tokens = ids[torch.randint(0, 5, (8, 300, 4), generator=generator)]
        assert_vote_equals_the_reference(tokens, torch.full((8,), 2.0, dtype=torch.float64), 1)


def test_strided_draws_are_read_where_they_are() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 2, (6, 8, 10), generator=generator)
    exponent = torch.linspace(1, 3, 20, dtype=torch.float64)
    for view in (
        tokens.permute(1, 0, 2),
        tokens.permute(2, 1, 0),
        tokens[::2, 1::3, 3:5],
        tokens[:1].expand(5, 8, 10),
        tokens[:, :, :1],
        tokens[:, :, 2:6],
        tokens.permute(1, 0, 2)[:, ::2, 5:9],
    ):
        assert_vote_equals_the_reference(view, exponent[: 2 * view.shape[0] : 2], 3)


@pytest.mark.parametrize("patch_size", [2, 4, 64])
def test_different_patches_of_one_hash_are_told_apart(patch_size: int) -> None:
    patches = torch.from_numpy(with_one_hash(50, patch_size))
    repeats = torch.arange(50) % 4 + 1
    tokens = patches.repeat_interleave(repeats, dim=0)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    tokens = tokens[order].expand(30, -1, -1)
    for exponent in (1.0, 2.7, 4.0):
        b = torch.full((30,), exponent, dtype=torch.float64)
        assert_vote_equals_the_reference(tokens, b, 7)
        assert VOTE.default(tokens, b, torch.arange(30), torch.tensor([7]))[2].tolist() == [50] * 30


def test_patches_that_agree_in_tag_and_slot_are_told_apart() -> None:
    pair = torch.from_numpy(pair_of_one_tag_and_slot())[None]
    one = torch.ones(1, dtype=torch.float64)
    count, distinct = VOTE.default(pair, one, torch.zeros(1).long(), torch.tensor([0]))[1:]
    assert (int(count), int(distinct)) == (1, 2)


def steps(
    dtype: torch.dtype, patch_size: int, num_draws: int, batch_size: int = 40
) -> Iterator[tuple[Tensor | int, ...]]:
    """Arguments of rounds that follow each other, at all kinds of 1/T, with a budget."""
    generator = torch.Generator().manual_seed(patch_size)
    b = 1 / torch.tensor(TEMPERATURES, dtype=torch.float64).repeat(batch_size // 5)
    num_equal = b.floor().long()
    candidate = torch.full((batch_size, patch_size), -1, dtype=dtype)
    progress = reference.exact_temperature_start(batch_size, torch.device("cpu"))
    rows = torch.arange(batch_size) * 2**31 - 3
    top = 2**31 - 1 if dtype == torch.int32 else 2**33
    for _ in range(4):
        outcome = torch.rand(batch_size, num_draws, generator=generator) ** 3 * 4
        draws = torch.full((batch_size, num_draws, patch_size), top, dtype=dtype)
        draws[:, :, -1] -= outcome.to(dtype)
        seed = torch.tensor([2**50 + 1])
        yield draws, candidate, progress, num_equal, b - num_equal, rows, seed, 3 * num_draws + 1
        candidate, progress = STEP.reference(
            draws, candidate, progress, num_equal, b - num_equal, rows, seed, 3 * num_draws + 1
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("patch_size", [1, 4, 64])
@pytest.mark.parametrize("num_draws", [0, 1, 3, 40])
def test_the_exact_step_equals_the_reference(
    dtype: torch.dtype, patch_size: int, num_draws: int
) -> None:
    accepted = 0
    for arguments in steps(dtype, patch_size, num_draws):
        before = arguments[1].clone(), arguments[2].clone()
        candidate, progress = STEP.default(*arguments)
        expected_candidate, expected_progress = STEP.reference(*arguments)
        assert torch.equal(progress, expected_progress)
        assert candidate.dtype == dtype
        assert torch.equal(candidate, expected_candidate)
        assert torch.equal(arguments[1], before[0]) and torch.equal(arguments[2], before[1])
        accepted = int(progress[:, reference.Progress.ACCEPTED].sum())
    assert (0 < accepted < 40) == (num_draws > 0)


def test_the_exact_step_reads_strided_arguments() -> None:
    for draws, candidate, progress, num_equal, fraction, rows, seed, most in steps(
        torch.int64, 3, 7
    ):
        strided = (
            draws.permute(1, 2, 0).contiguous().permute(2, 0, 1),
            candidate.t().contiguous().t(),
            progress.t().contiguous().t(),
            num_equal.repeat_interleave(2)[::2],
            fraction.repeat_interleave(2)[::2],
            rows.repeat_interleave(2)[::2],
        )
        got = STEP.default(*strided, seed, most)
        expected = STEP.reference(draws, candidate, progress, num_equal, fraction, rows, seed, most)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_any_number_of_threads_gives_the_same() -> None:
    tokens = law_of_draws("zipf", (300, 200, 4), torch.int64)
    exponent = torch.linspace(1, 4, 300, dtype=torch.float64)
    vote = (tokens, exponent, torch.arange(300), torch.tensor([4]))
    step = list(steps(torch.int64, 4, 400))[1]
    torch.set_num_threads(1)
    alone = (*VOTE.default(*vote), *STEP.default(*step))
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for one, many in zip(alone, (*VOTE.default(*vote), *STEP.default(*step)), strict=True):
            assert torch.equal(one, many)


def test_the_native_operators_pass_opcheck() -> None:
    for shape, dtype in (
        ((3, 5, 2), torch.int64),
        ((0, 4, 1), torch.int32),
        ((2, 1, 1), torch.int64),
    ):
        tokens = torch.randint(0, 2, shape, dtype=dtype)
        exponent = torch.rand(shape[0], dtype=torch.float64) * 3 + 1
        rows = torch.arange(shape[0]) * 3
        torch.library.opcheck(VOTE.default, (tokens, exponent, rows, torch.tensor([1])))
        strided = tokens.mT.contiguous().mT
        torch.library.opcheck(VOTE.default, (strided, exponent, rows, torch.tensor([2])))
    for num_draws, dtype in ((0, torch.int64), (6, torch.int32)):
        torch.library.opcheck(STEP.default, next(steps(dtype, 2, num_draws, batch_size=5)))
