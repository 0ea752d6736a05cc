"""``head``: the energy head, N samples a position, alone and with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from calm_kernels.bench import checks
from calm_kernels.bench.parameters import draw_parameters
from calm_kernels.bench.variants import call_of, compiled, eager, ours
from calm_kernels.bench.workload import (
    Case,
    Check,
    Cost,
    Inputs,
    Outputs,
    Setting,
    Workload,
    register,
)
from calm_kernels.nn.energy_head import EnergyHead

EPS = 1e-6
PASSES = ("forward", "forward+backward")


def _settings(
    positions: int, hidden_size: int, blocks: int, latent: int, noise: int, dtype: torch.dtype
) -> tuple[Setting, ...]:
    sizes = {"P": positions, "N": 8, "H": hidden_size, "blocks": blocks, "D": latent, "E": noise}
    return tuple(Setting({**sizes, "pass": kind}, dtype) for kind in PASSES)


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    head = EnergyHead(*(case.size(name) for name in ("H", "D", "E", "blocks")))
    draw_parameters(head, generator, case.dtype, case.device)
    return {"head": head, **dict(head.named_parameters())}


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    positions, samples = case.size("P"), case.size("N")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device).to(case.dtype)

    noise = draw(samples, positions, case.size("E")).clamp(-0.5, 0.5)
    hidden = draw(positions, case.size("H"))
    if case.shape["pass"] == PASSES[0]:
        return {"hidden": hidden, "noise": noise}
    cotangent = draw(samples, positions, case.size("D"))
    return {"hidden": hidden.requires_grad_(), "noise": noise, "cotangent": cotangent}


def _gradients(case: Case) -> tuple[str, ...]:
    if case.shape["pass"] == PASSES[0]:
        return ()
    head = EnergyHead(1, 1, 1, case.size("blocks"))
    return ("hidden", *(name for name, _ in head.named_parameters()))


def plain(inputs: Inputs) -> Tensor:
    """The hidden state repeated for every sample and joined to it in every block."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, inputs[f"{name}.weight"], inputs[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], inputs[f"{name}.weight"], inputs[f"{name}.bias"], EPS)

    noise = inputs["noise"]
    hidden = inputs["hidden"].expand(noise.shape[0], -1, -1)
    e = norm(linear(noise, "noise_embd"), "norm_noise")
    condition = norm(linear(hidden, "hidden_embd"), "norm_hidden")
    block = 0
    while f"mlp_blocks.{block}.in_ln.weight" in inputs:
        name = f"mlp_blocks.{block}"
        x = torch.cat((norm(e, f"{name}.in_ln"), condition), dim=-1)
        x = F.silu(linear(x, f"{name}.linears.0"))
        x = F.silu(linear(x, f"{name}.linears.2"))
        gate, up = linear(x, f"{name}.linears.4").chunk(2, dim=-1)
        e = e + linear(F.silu(gate) * up, f"{name}.down_proj")
        block += 1
    x = F.silu(linear(norm(e, "final_layer.in_ln"), "final_layer.linears.0"))
    return linear(x, "final_layer.linears.2")


def module(inputs: Inputs) -> Tensor:
    noise = inputs["noise"]
    latents: Tensor = inputs["head"](inputs["hidden"], noise.shape[0], noise=noise)
    return latents


def exact(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The plain formulation in float64."""
    names = _gradients(case)
    wide = {
        name: tensor.detach().double().requires_grad_(name in names)
        for name, tensor in inputs.items()
        if isinstance(tensor, Tensor)
    }
    outputs = call_of(plain, names)(wide)
    return outputs if names else (outputs,)


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    results = outputs if _gradients(case) else (outputs,)
    return checks.largest_relative_error(results, exact, checks.ROUNDING[case.dtype])


def cost(case: Case) -> Cost:
    """What depends on the position alone once, the rest once a sample; weights read once."""
    positions, samples, hidden_size, blocks, latent, noise = (
        case.size(name) for name in ("P", "N", "H", "blocks", "D", "E")
    )
    width = torch.empty(0, dtype=case.dtype).element_size()
    square = hidden_size * hidden_size
    per_position = (1 + blocks) * square
    per_sample = hidden_size * (noise + latent) + (5 * blocks + 1) * square
    weights = per_position + per_sample
    moved = positions * (hidden_size + samples * (noise + latent)) + weights
    operations = 2 * positions * (per_position + samples * per_sample)
    if _gradients(case):
        # Once more with gradients in place of results; two matmuls for every one.
        moved, operations = 2 * moved + weights, 3 * operations
    return Cost(width * moved, operations, case.dtype)


register(
    Workload(
        name="head",
        summary="energy head, N samples a position",
        settings={
            "small": _settings(5, 16, 2, 6, 4, torch.float32),
            "cpu": _settings(512, 256, 2, 128, 64, torch.float32),
            "cuda": _settings(8188, 1024, 4, 128, 64, torch.bfloat16),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(
            eager(plain, _gradients),
            compiled(plain, _gradients),
            ours(module, _gradients),
        ),
        exact=exact,
        check=check,
        cost=cost,
    )
)
