"""The energy head against its plain formulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calm_kernels.nn.energy_head import EnergyHead
from calm_kernels.reference import philox

H, D, NOISE, BLOCKS = 10, 7, 5, 3


def perturbed_head() -> EnergyHead:
    head = EnergyHead(H, D, NOISE, BLOCKS)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head


def plain_head(w: dict[str, Tensor], hidden: Tensor, noise: Tensor) -> Tensor:
    """The head as specified: every sample carries its own copy of the hidden state."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (H,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    hidden = hidden.unsqueeze(0).repeat(len(noise), *[1] * hidden.dim())
    c = norm(linear(hidden, "hidden_embd"), "norm_hidden")
    e = norm(linear(noise, "noise_embd"), "norm_noise")
    for i in range(BLOCKS):
        block = f"mlp_blocks.{i}"
        x = torch.cat((norm(e, f"{block}.in_ln"), c), dim=-1)
        x = F.silu(linear(x, f"{block}.linears.0"))
        x = F.silu(linear(x, f"{block}.linears.2"))
        gate, up = linear(x, f"{block}.linears.4").chunk(2, dim=-1)
        e = e + linear(F.silu(gate) * up, f"{block}.down_proj")
    x = F.silu(linear(norm(e, "final_layer.in_ln"), "final_layer.linears.0"))
    return linear(x, "final_layer.linears.2")


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_head_equals_the_plain_formulation_given_noise(
    shape: tuple[int, ...], num_samples: int
) -> None:
    head = perturbed_head().double()
    hidden = torch.randn(*shape, H, dtype=torch.float64)
    noise = torch.rand(num_samples, *shape, NOISE, dtype=torch.float64) - 0.5
    expected = plain_head(head.state_dict(), hidden, noise)
    torch.testing.assert_close(head(hidden, num_samples, noise=noise), expected)


def test_head_gradients_equal_those_of_the_plain_formulation() -> None:
    head = perturbed_head().double()
    hidden = torch.randn(4, H, dtype=torch.float64, requires_grad=True)
    noise = (torch.rand(3, 4, NOISE, dtype=torch.float64) - 0.5).requires_grad_()
    weights = dict(head.named_parameters())
    sources = [hidden, noise, *weights.values()]
    upstream = torch.randn(3, 4, D, dtype=torch.float64)
    actual = torch.autograd.grad(head(hidden, 3, noise=noise), sources, upstream)
    expected = torch.autograd.grad(plain_head(weights, hidden, noise), sources, upstream)
    torch.testing.assert_close(actual, expected)
    assert all(gradient.abs().max() > 0 for gradient in actual)


def test_noise_is_uniform_and_follows_its_stream() -> None:
    head = perturbed_head()
    hidden = torch.randn(2, 3, H)
    seed = torch.tensor([77])
    rows = torch.arange(2 * 3).unsqueeze(1) * 4 + torch.arange(4)  # position * N + sample
    stream = philox.Stream.HEAD_NOISE
    noise = philox.uniform(seed, rows, NOISE, stream).permute(1, 0, 2) - 0.5
    expected = head(hidden, 4, noise=noise.reshape(4, 2, 3, NOISE))
    assert torch.equal(head(hidden, 4, seed=77), expected)
    assert torch.equal(head(hidden, 4, seed=seed), expected)
    assert not torch.equal(head(hidden, 4, seed=78), expected)
    assert noise.abs().max() < 0.5


def test_noise_without_a_seed_follows_torch_manual_seed() -> None:
    head, hidden = perturbed_head(), torch.randn(3, H)
    torch.manual_seed(5)
    first, second = head(hidden, 2), head(hidden, 2)
    torch.manual_seed(5)
    assert torch.equal(head(hidden, 2), first)
    assert not torch.equal(first, second)


def test_fresh_head_draws_zero() -> None:
    head = EnergyHead(H, D, NOISE, BLOCKS)
    assert torch.equal(head(torch.randn(3, H), 2), torch.zeros(2, 3, D))


def test_head_has_the_parameter_names_of_the_release() -> None:
    block = {
        "in_ln.weight": (H,),
        "in_ln.bias": (H,),
        "linears.0.weight": (H, 2 * H),
        "linears.0.bias": (H,),
        "linears.2.weight": (H, H),
        "linears.2.bias": (H,),
        "linears.4.weight": (2 * H, H),
        "linears.4.bias": (2 * H,),
        "down_proj.weight": (H, H),
        "down_proj.bias": (H,),
    }
    expected: dict[str, tuple[int, ...]] = {
        "noise_embd.weight": (H, NOISE),
        "noise_embd.bias": (H,),
        "hidden_embd.weight": (H, H),
        "hidden_embd.bias": (H,),
        "final_layer.linears.0.weight": (H, H),
        "final_layer.linears.0.bias": (H,),
        "final_layer.linears.2.weight": (D, H),
        "final_layer.linears.2.bias": (D,),
    }
    for name in ("norm_noise", "norm_hidden", "final_layer.in_ln"):
        expected[f"{name}.weight"] = expected[f"{name}.bias"] = (H,)
    for i in range(BLOCKS):
        expected |= {f"mlp_blocks.{i}.{name}": shape for name, shape in block.items()}
    state = EnergyHead(H, D, NOISE, BLOCKS).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_head_runs_under_autocast() -> None:
    head, hidden = perturbed_head(), torch.randn(6, H)
    exact = head(hidden, 3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = head(hidden, 3, seed=1)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"hidden": torch.zeros(2, H + 1)}, "hidden"),
        (TypeError, {"hidden": torch.zeros(2, H, dtype=torch.int64)}, "hidden"),
        (ValueError, {"num_samples": 0}, "num_samples"),
        (ValueError, {"noise": torch.zeros(2, NOISE)}, "noise"),
        (ValueError, {"noise": torch.zeros(4, 2, NOISE)}, "noise"),
        (ValueError, {"noise": torch.zeros(3, 2, NOISE + 1)}, "noise"),
    ],
)
def test_head_names_what_is_wrong(
    error: type[Exception], arguments: dict[str, object], message: str
) -> None:
    valid: dict[str, object] = {"hidden": torch.zeros(2, H), "num_samples": 3}
    with pytest.raises(error, match=message):
        perturbed_head()(**{**valid, **arguments})
