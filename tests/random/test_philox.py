from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from calm_kernels.ops.random import philox_normal, philox_uniform
from calm_kernels.reference import philox
from calm_kernels.reference.philox import Stream

OPERATORS = torch.ops.calm_kernels
FALSE_ALARM = 1e-6
FUNCTIONS = [philox_uniform, philox_normal]


def signed(value: int) -> int:
    """The int64 with these 64 bits."""
    return value - 2**64 if value >= 2**63 else value


# Known-answer vectors of the Random123 distribution: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    block, row_low, row_high, stream = counter
    words = philox.philox_words(
        torch.tensor([signed(key[0] | key[1] << 32)]),
        torch.tensor([signed(row_low | row_high << 32)]),
        torch.tensor([block]),
        stream,
    )
    assert tuple(words[0].tolist()) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_uniforms_are_the_words_of_the_stream(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    block, row_low, row_high, stream = counter
    seed = signed(key[0] | key[1] << 32)
    rows = torch.tensor([signed(row_low | row_high << 32)])
    u = philox_uniform(seed, rows, 4, stream, first=4 * block)
    assert u.dtype == torch.float32
    assert u[0].tolist() == [((word >> 9) + 0.5) * 2.0**-23 for word in expected]


def scalar_philox(seed: int, row: int, block: int, stream: int) -> list[int]:
    """Philox4x32-10 in Python integers, from its definition."""
    mask = 0xFFFFFFFF
    key = [seed & mask, seed >> 32 & mask]
    c = [block, row & mask, row >> 32 & mask, stream]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ key[0], p1 & mask, p0 >> 32 ^ c[3] ^ key[1], p0 & mask]
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return c


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**63 - 1, -1, -(2**63), -12345])
def test_seeds_and_rows_use_all_of_their_bits(seed: int) -> None:
    rows = [0, 3, 2**32, 2**32 + 3, 2**62 + 11, -1, -(2**40)]
    u = philox_uniform(seed, torch.tensor(rows), 8, Stream.HEAD_NOISE)
    for r, row in enumerate(rows):
        words = scalar_philox(seed, row, 0, 3) + scalar_philox(seed, row, 1, 3)
        assert u[r].tolist() == [((word >> 9) + 0.5) * 2.0**-23 for word in words]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_any_slice_of_a_row_holds_the_same_numbers(function, first: int, count: int) -> None:
    rows = torch.tensor([5, 2**33, 0, 5])
    whole = function(99, rows, 20, 2)
    part = function(99, rows, count, 2, first=first)
    assert part.shape == (4, count)
    assert torch.equal(part, whole[:, first : first + count])
    assert torch.equal(whole[0], whole[3])
    assert torch.equal(function(99, rows[1:2], 20, 2), whole[1:2])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_seed_row_and_stream_each_change_every_number(function) -> None:
    base = function(1, torch.tensor([1]), 64, 1)
    for other in (
        function(2, torch.tensor([1]), 64, 1),
        function(1 + 2**32, torch.tensor([1]), 64, 1),
        function(1, torch.tensor([2]), 64, 1),
        function(1, torch.tensor([1 + 2**32]), 64, 1),
        function(1, torch.tensor([1]), 64, 2),
    ):
        assert int((base == other).sum()) == 0


def test_an_int_seed_and_a_tensor_seed_agree_and_none_follows_torchs_generator() -> None:
    rows = torch.arange(3)
    assert torch.equal(
        philox_uniform(-5, rows, 6, 0), philox_uniform(torch.tensor([-5]), rows, 6, 0)
    )
    torch.manual_seed(11)
    one, two = philox_uniform(None, rows, 6, 0), philox_uniform(None, rows, 6, 0)
    torch.manual_seed(11)
    assert torch.equal(one, philox_uniform(None, rows, 6, 0))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_extreme_words_stay_inside_the_open_interval(dtype: torch.dtype) -> None:
    low, high = philox.to_uniform(torch.tensor([0, 0xFFFFFFFF]), dtype).tolist()
    assert low == 2.0**-24
    assert high == 1.0 - 2.0**-24


def test_normals_are_box_muller_of_the_uniforms() -> None:
    rows = torch.arange(50)
    u = philox_uniform(3, rows, 8, 0).double()
    radius = (-2 * u[:, 0::2].log()).sqrt()
    angle = 2 * math.pi * u[:, 1::2]
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    torch.testing.assert_close(philox_normal(3, rows, 8, 0).double(), exact, atol=4e-6, rtol=0)


def p_value(sample: torch.Tensor, law: str) -> float:
    return float(stats.kstest(sample.flatten().double().numpy(), law).pvalue)


def test_the_numbers_follow_their_laws() -> None:
    rows = torch.arange(1000)
    u = philox_uniform(2025, rows, 200, Stream.LATENT)
    z = philox_normal(2025, rows, 200, Stream.LATENT)
    assert p_value(u, "uniform") > FALSE_ALARM
    assert p_value(z, "norm") > FALSE_ALARM
    # The same tests notice laws that are wrong by five percent.
    assert p_value(u**1.05, "uniform") < FALSE_ALARM
    assert p_value(z * 1.05, "norm") < FALSE_ALARM


def test_moments_lie_within_five_standard_errors() -> None:
    u = philox_uniform(8, torch.arange(500), 400, 0).double()
    z = philox_normal(8, torch.arange(500), 400, 1).double()
    root = math.sqrt(u.numel())
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12) / root
    assert abs(((u - 0.5) ** 2).mean() - 1 / 12) < 5 * math.sqrt(1 / 180) / root
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance) / root
    for x in (u - 0.5, z):
        neighbours = (x[:, 1:] * x[:, :-1]).mean() / (x**2).mean()
        rows_apart = (x[1:] * x[:-1]).mean() / (x**2).mean()
        assert abs(neighbours) < 5 / root
        assert abs(rows_apart) < 5 / root


@pytest.mark.parametrize("name", ["philox_uniform", "philox_normal"])
def test_operators_pass_opcheck(name: str) -> None:
    overload = getattr(OPERATORS, name).reference
    for arguments in (
        (torch.tensor([1]), torch.arange(3), 5, 2, 3),
        (torch.tensor([-1]), torch.arange(0), 4, 0),
        (torch.tensor([1]), torch.arange(3), 0, 0),
    ):
        torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_and_eager_agree(function, dynamic: bool) -> None:
    compiled = torch.compile(
        lambda seed, rows: function(seed, rows, 7, Stream.LATENT, first=2) * 2,
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    seed = torch.tensor([4])
    for num_rows in (3, 5):
        rows = torch.arange(num_rows)
        expected = function(seed, rows, 7, Stream.LATENT, first=2) * 2
        assert torch.equal(compiled(seed, rows), expected)


ROWS = torch.arange(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, ROWS.int(), 4, 0, 0), TypeError, "rows: expected dtype int64; got int32"),
        ((0, ROWS[None], 4, 0, 0), ValueError, r"rows: expected shape \[R\]; got \[1, 2\]"),
        ((0, [1], 4, 0, 0), TypeError, "rows: expected a torch.Tensor, got list"),
        ((0, ROWS, -1, 0, 0), ValueError, "count: expected at least 0; got -1"),
        ((0, ROWS, 4.0, 0, 0), TypeError, "count: expected an int, got float"),
        ((0, ROWS, 4, -1, 0), ValueError, "stream: expected at least 0; got -1"),
        ((0, ROWS, 4, 2**32, 0), ValueError, "stream: expected at most 4294967295"),
        ((0, ROWS, 4, 0, -4), ValueError, "first: expected at least 0; got -4"),
        ((0, ROWS, 4, 0, 2**34), ValueError, r"first \+ count: expected at most 2\*\*34"),
        ((2**63, ROWS, 4, 0, 0), ValueError, "seed: expected an integer of 64 bits"),
        ((1.5, ROWS, 4, 0, 0), TypeError, "seed: expected .*got float"),
        ((ROWS, ROWS, 4, 0, 0), ValueError, "seed: expected an int64 tensor of one element"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_arguments_are_named(function, arguments, error, message: str) -> None:
    seed, rows, count, stream, first = arguments
    with pytest.raises(error, match=message):
        function(seed, rows, count, stream, first=first)
