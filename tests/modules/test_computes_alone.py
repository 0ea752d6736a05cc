"""When weights may be read in place of calling the modules that hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calm_kernels._modules import computes_alone


class Quantised(Tensor):
    """Weights that are not what they hold."""


class Initialised(nn.Linear):
    """Linear but for where it starts."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Adapted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input.sum()


def quantised(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))


@pytest.mark.parametrize(
    "modules",
    [
        (),
        (nn.Linear(3, 2),),
        (nn.Linear(3, 2, bias=False), nn.LayerNorm(2), nn.LayerNorm(2, elementwise_affine=False)),
        (nn.Embedding(5, 3), nn.Sequential(nn.Linear(3, 2), nn.SiLU())),
        (Initialised(3, 2),),
        (nn.Linear(3, 2).requires_grad_(False).eval(), nn.Linear(3, 2, device="meta")),
    ],
    ids=str,
)
def test_plain_modules_compute_alone(modules: tuple[nn.Module, ...]) -> None:
    assert computes_alone(*modules)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "forward with kwargs": lambda m: m.register_forward_hook(lambda *_: None, with_kwargs=True),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_module_with_a_hook_does_not_until_it_is_removed(kind: str) -> None:
    watched, other = nn.Linear(3, 2), nn.Linear(3, 2)
    handle = HOOKS[kind](watched)
    assert not computes_alone(watched)
    assert not computes_alone(other, watched) and computes_alone(other)
    handle.remove()
    assert computes_alone(other, watched)


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "forward on the instance": lambda m: setattr(m, "forward", lambda x: 2 * m.weight @ x),
    "weight of another class": quantised,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_module_does_not(kind: str) -> None:
    module = nn.Linear(3, 2)
    CHANGES[kind](module)
    assert not computes_alone(module)
    assert not computes_alone(nn.LayerNorm(2), module)


def test_a_layer_with_a_forward_of_its_own_does_not() -> None:
    assert not computes_alone(Adapted(3, 2))


def test_it_is_about_the_modules_given_and_not_what_they_hold() -> None:
    inner = nn.Linear(3, 2)
    outer = nn.Sequential(inner)
    inner.register_forward_hook(lambda *_: None)
    assert computes_alone(outer) and not computes_alone(outer, inner)


def test_it_is_known_when_a_graph_is_traced() -> None:
    """Of a hook that comes later, torch takes no notice in a compiled graph."""

    def scaled(x: Tensor, layer: nn.Module) -> Tensor:
        return 2 * x if computes_alone(layer) else layer(x)

    plain, watched, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    watched.register_forward_hook(lambda *_: None)
    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, plain), 2 * x)
    torch._dynamo.reset()
    assert torch.equal(compiled(x, watched), watched(x))
