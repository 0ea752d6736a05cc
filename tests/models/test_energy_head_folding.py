"""The energy head's first block and last layers, in one operator each and module by module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calm_kernels
from calm_kernels.nn import energy_head
from calm_kernels.nn.energy_head import EnergyHead
from calm_kernels.ops.energy_head import why_not_first_block

H, D, NOISE, BLOCKS = 33, 7, 5, 3
POSITIONS, SAMPLES = 37, 15
FOLDED = ("energy_head_first_block", "energy_head_output")

reason = why_not_first_block(torch.empty(1), [torch.empty(1)])
needs_kernels = pytest.mark.skipif(reason is not None, reason=str(reason))


def perturbed_head(num_blocks: int = BLOCKS, dtype: torch.dtype = torch.float32) -> EnergyHead:
    head = EnergyHead(H, D, NOISE, num_blocks)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head.to(dtype)


def draw_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, noise, and the gradient of latents."""
    noise = torch.rand(SAMPLES, POSITIONS, NOISE) - 0.5
    return torch.randn(POSITIONS, H), noise, torch.randn(SAMPLES, POSITIONS, D)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators of this file that the head calls, in order."""
    called: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        operator = getattr(energy_head, name)

        def call(*args: Any, **settings: Any) -> Any:
            called.append(name)
            return operator(*args, **settings)

        return call

    for name in FOLDED:
        monkeypatch.setattr(energy_head, name, watched(name))
    return called


def outcome(
    head: EnergyHead, inputs: tuple[Tensor, Tensor, Tensor], *, noise_grad: bool = False
) -> list[Tensor]:
    """Latents and the gradients of hidden states, parameters and, if asked for, noise."""
    dtype = next(head.parameters()).dtype
    hidden, noise, cotangent = (t.to(dtype).detach() for t in inputs)
    wanted = [hidden.requires_grad_(), *head.parameters()]
    if noise_grad:
        wanted.append(noise.requires_grad_())
    latents = head(hidden, SAMPLES, noise=noise)
    return [latents.detach(), *torch.autograd.grad(latents, wanted, cotangent.to(latents.dtype))]


def exact_outcome(
    head: EnergyHead, inputs: tuple[Tensor, Tensor, Tensor], *, noise_grad: bool = False
) -> list[Tensor]:
    """The same module by module in float64."""
    wide = EnergyHead(H, D, NOISE, len(head.mlp_blocks)).double()
    wide.load_state_dict(head.state_dict())
    with calm_kernels.backend("reference"):
        return outcome(wide, inputs, noise_grad=noise_grad)


def assert_near(actual: list[Tensor], exact: list[Tensor], tolerance: float = 3e-6) -> None:
    for value, truth in zip(actual, exact, strict=True):
        assert (value.double() - truth).norm() <= tolerance * truth.norm()


@needs_kernels
@pytest.mark.parametrize("num_blocks", [1, BLOCKS])
def test_a_folded_head_gives_the_latents_and_gradients_of_its_modules(
    num_blocks: int, calls: list[str]
) -> None:
    head, inputs = perturbed_head(num_blocks), draw_inputs()
    actual = outcome(head, inputs)
    assert tuple(calls) == FOLDED
    assert_near(actual, exact_outcome(head, inputs))


@needs_kernels
def test_double_precision_is_folded_too(calls: list[str]) -> None:
    head, inputs = perturbed_head(dtype=torch.float64), draw_inputs()
    actual = outcome(head, inputs)
    assert tuple(calls) == FOLDED
    assert_near(actual, exact_outcome(head, inputs), 1e-13)


def test_noise_that_wants_its_gradient_gets_it(calls: list[str]) -> None:
    head, inputs = perturbed_head(), draw_inputs()
    actual = outcome(head, inputs, noise_grad=True)
    assert FOLDED[0] not in calls
    assert actual[-1].shape == inputs[1].shape and actual[-1].all()
    assert_near(actual, exact_outcome(head, inputs, noise_grad=True))


HOOKED = {
    "noise_embd": FOLDED[0],
    "norm_noise": FOLDED[0],
    "mlp_blocks.0": FOLDED[0],
    "mlp_blocks.1": None,
    "final_layer.in_ln": FOLDED[1],
    "final_layer.linears": FOLDED[1],
    "final_layer.linears.0": FOLDED[1],
    "final_layer.linears.1": FOLDED[1],
    "final_layer.linears.2": FOLDED[1],
}
"""Modules of the head, and the operator that does not call them."""


@needs_kernels
@pytest.mark.parametrize("name", HOOKED)
def test_a_module_with_a_hook_is_called(name: str, calls: list[str]) -> None:
    head, inputs = perturbed_head(), draw_inputs()
    exact = exact_outcome(head, inputs)
    seen: list[Tensor] = []
    handle = head.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2]))
    actual = outcome(head, inputs)
    assert len(seen) == 1 and seen[0].shape[:2] == (POSITIONS, SAMPLES)
    assert calls == [operator for operator in FOLDED if operator != HOOKED[name]]
    assert_near(actual, exact)
    handle.remove()
    calls.clear()
    outcome(head, inputs)
    assert tuple(calls) == FOLDED


@pytest.mark.parametrize("name", HOOKED)
def test_what_a_hook_makes_of_a_result_is_used(name: str) -> None:
    """As on activations that are steered or masked: the hook returns something else."""
    head, inputs = perturbed_head(), draw_inputs()
    before = outcome(head, inputs)
    module = head.get_submodule(name)
    with module.register_forward_hook(lambda *call: call[2].flip(-1)):
        after = outcome(head, inputs)
    assert (after[0] - before[0]).abs().max() > 1e-2


@needs_kernels
@pytest.mark.parametrize("name", ["mlp_blocks.0", "norm_noise", "final_layer.linears"])
def test_gradients_that_a_hook_watches_pass_through_it(name: str) -> None:
    head, inputs = perturbed_head(), draw_inputs()
    exact = exact_outcome(head, inputs)
    seen: list[Tensor] = []
    module = head.get_submodule(name)
    module.register_full_backward_hook(lambda *call: seen.append(call[2][0]))
    assert_near(outcome(head, inputs), exact)
    assert len(seen) == 1 and seen[0].any()


@pytest.mark.parametrize("name", ["noise_embd", "final_layer.linears.0"])
def test_a_layer_in_place_of_another_is_called(name: str) -> None:
    class Flipped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).flip(-1)

    head, inputs = perturbed_head(), draw_inputs()
    old = head.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = Flipped(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    head.set_submodule(name, new)
    with torch.no_grad():
        latents = head(inputs[0], SAMPLES, noise=inputs[1])
        for parameter in old.parameters():
            parameter.copy_(parameter.flip(0))
        head.set_submodule(name, old)
        torch.testing.assert_close(latents, head(inputs[0], SAMPLES, noise=inputs[1]))


def test_a_head_without_blocks_is_its_two_ends() -> None:
    head, inputs = perturbed_head(0), draw_inputs()
    with torch.no_grad():
        latents = head(inputs[0], SAMPLES, noise=inputs[1])
        expected = head.final_layer(head.norm_noise(head.noise_embd(inputs[1])))
    torch.testing.assert_close(latents, expected)


@needs_kernels
def test_frozen_weights_and_no_gradient_change_no_latent(calls: list[str]) -> None:
    head, inputs = perturbed_head(), draw_inputs()
    expected = outcome(head, inputs)
    with torch.no_grad():
        latents = head(inputs[0], SAMPLES, noise=inputs[1])
    torch.testing.assert_close(latents, expected[0])
    hidden = inputs[0].clone().requires_grad_()
    head.requires_grad_(False)(hidden, SAMPLES, noise=inputs[1]).backward(inputs[2])
    torch.testing.assert_close(hidden.grad, expected[1])
    assert tuple(calls) == 3 * FOLDED


def assert_as_near_as_its_modules(
    actual: list[Tensor], own: list[Tensor], exact: list[Tensor]
) -> None:
    for value, other, truth in zip(actual, own, exact, strict=True):
        error, own_error = ((t.double() - truth).norm() for t in (value, other))
        assert error <= 1.5 * own_error < 0.2 * truth.norm()


def test_a_head_in_bfloat16_is_as_near_as_its_modules(calls: list[str]) -> None:
    head, inputs = perturbed_head(dtype=torch.bfloat16), draw_inputs()
    inputs = tuple(t.bfloat16() for t in inputs)
    actual = outcome(head, inputs)
    assert FOLDED[0] not in calls
    assert all(value.dtype == torch.bfloat16 for value in actual)
    with calm_kernels.backend("reference"):
        own = outcome(head, inputs)
    assert_as_near_as_its_modules(actual, own, exact_outcome(head, inputs))


def test_under_autocast_latents_have_its_dtype_and_gradients_that_of_weights(
    calls: list[str],
) -> None:
    head, inputs = perturbed_head(), draw_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        actual = outcome(head, inputs)
        with calm_kernels.backend("reference"):
            own = outcome(head, inputs)
    assert FOLDED[0] not in calls
    assert actual[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in actual[1:])
    assert_as_near_as_its_modules(actual, own, exact_outcome(head, inputs))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_head_compiles_whole(backend: str) -> None:
    head, inputs = perturbed_head(2), draw_inputs()
    with calm_kernels.backend(backend):
        expected = outcome(head, inputs)
        compiled: Any = torch.compile(head, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(outcome(compiled, inputs), expected)
