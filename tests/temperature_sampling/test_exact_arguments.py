from __future__ import annotations

import pytest
import torch

from calm_kernels.ops.temperature_sampling import exact_temperature_sample


def all_different(active: torch.Tensor, count: int) -> torch.Tensor:
    return torch.arange(count)[None, :, None].expand(len(active), -1, -1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"draw": 3}, TypeError, "draw: expected a function, got int"),
        ({"batch_size": -1}, ValueError, "batch_size: expected at least 0; got -1"),
        ({"batch_size": 2.0}, TypeError, "batch_size: expected an int, got float"),
        ({"temperature": 0}, ValueError, "temperature: expected 0 < T <= 1; got 0"),
        ({"temperature": 1.01}, ValueError, "temperature: expected 0 < T <= 1; got 1.01"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: expected shape \[2\]"),
        ({"temperature": torch.zeros(2)}, ValueError, "temperature: .*everywhere"),
        ({"round_size": 0}, ValueError, "round_size: expected at least 1; got 0"),
        ({"num_rounds": 0, "round_size": 2}, ValueError, "num_rounds: expected at least 1; got 0"),
        ({"num_rounds": 2}, ValueError, "round_size: expected a number of draws with num_rounds"),
        ({"max_draws": 0}, ValueError, "max_draws: expected at least 1; got 0"),
        ({"temperature": 0.1, "max_draws": 9}, ValueError, r"at least 10 = ceil\(1/T\).*got 9"),
        ({"temperature": 1e-300}, ValueError, "max_draws: expected at least"),
        ({"temperature": 5e-324}, ValueError, "max_draws: expected at least"),
        ({"seed": "x"}, TypeError, "seed: expected"),
        ({"draw": lambda a, n: [1]}, TypeError, "result of draw: expected a torch.Tensor"),
        ({"draw": lambda a, n: torch.zeros(2, n, 3)}, TypeError, "result of draw: .*float32"),
        (
            {"draw": lambda a, n: torch.zeros(2, n + 1, 3).long()},
            ValueError,
            r"result of draw: expected shape \[2, 2, K\]; got \[2, 3, 3\]",
        ),
        (
            {"draw": lambda a, n: torch.zeros(2, n, 0).long()},
            ValueError,
            r"result of draw: shape\[2\]: expected at least 1 token per patch",
        ),
        (
            {"draw": lambda a, n: torch.zeros(2, n, 3, device="meta").long()},
            ValueError,
            "result of draw: expected device cpu; got meta; pass device=",
        ),
        (
            {"draw": lambda a, n: torch.rand(len(a), n, n).mul(1e9).long()},
            ValueError,
            r"result of draw: expected shape \[2, 4, 2\]; got \[2, 4, 4\]",
        ),
    ],
)
def test_wrong_arguments_and_draws_are_named(arguments, error, message: str) -> None:
    call = {
        "draw": all_different,
        "batch_size": 2,
        "temperature": 0.5,
        **arguments,
    }
    with pytest.raises(error, match=message):
        exact_temperature_sample(**call)
