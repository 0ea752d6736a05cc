"""``ffn``: the gated feed-forward block of the autoencoder, alone and with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from calm_kernels.bench import checks
from calm_kernels.bench.variants import call_of, compiled, eager, package
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
from calm_kernels.ops.gated_ffn import gated_ffn

EPS = 1e-6
WEIGHTS = ("norm_weight", "gate_weight", "up_weight", "down_weight")
PASSES = ("forward", "forward+backward")


def _settings(
    rows: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Setting, ...]:
    sizes = {"R": rows, "H": hidden_size, "I": intermediate_size}
    return tuple(Setting({**sizes, "pass": kind}, dtype) for kind in PASSES)


def _gradients(case: Case) -> tuple[str, ...]:
    return ("x", *WEIGHTS) if case.shape["pass"] == PASSES[1] else ()


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    hidden_size, size = case.size("H"), case.size("I")

    def weight(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=case.device)
        drawn *= float(shape[-1]) ** -0.5
        return drawn.to(case.dtype).requires_grad_()

    scale = 1.0 + 0.1 * torch.randn(hidden_size, generator=generator, device=case.device)
    return {
        "norm_weight": scale.to(case.dtype).requires_grad_(),
        "gate_weight": weight(size, hidden_size),
        "up_weight": weight(size, hidden_size),
        "down_weight": weight(hidden_size, size),
    }


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    shape = (case.size("R"), case.size("H"))
    x = torch.randn(shape, generator=generator, device=case.device).to(case.dtype)
    if case.shape["pass"] == PASSES[0]:
        return {"x": x}
    cotangent = torch.randn(shape, generator=generator, device=case.device).to(case.dtype)
    return {"x": x.requires_grad_(), "cotangent": cotangent}


def plain(inputs: Inputs) -> Tensor:
    x = inputs["x"]
    normed = F.rms_norm(x, x.shape[-1:], inputs["norm_weight"], EPS)
    gate = F.linear(normed, inputs["gate_weight"])
    up = F.linear(normed, inputs["up_weight"])
    out: Tensor = x + F.linear(F.silu(gate) * up, inputs["down_weight"])
    return out


def operator(inputs: Inputs) -> Tensor:
    return gated_ffn(inputs["x"], *(inputs[name] for name in WEIGHTS), eps=EPS)


def exact(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The plain formulation in float64."""
    names = _gradients(case)
    wide = {
        name: tensor.detach().double().requires_grad_(name in names)
        for name, tensor in inputs.items()
    }
    outputs = call_of(plain, names)(wide)
    return outputs if names else (outputs,)


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    results = outputs if _gradients(case) else (outputs,)
    return checks.largest_relative_error(results, exact, checks.ROUNDING[case.dtype])


def cost(case: Case) -> Cost:
    """x and weights read and the result written; the backward does so again, with gradients.

    Activations kept for the backward are not counted: they can be recomputed.
    """
    rows, hidden_size, size = (case.size(name) for name in "RHI")
    width = torch.empty(0, dtype=case.dtype).element_size()
    activations, weights = rows * hidden_size, 3 * hidden_size * size + hidden_size
    moved, matmuls = 2 * activations + weights, 3
    if _gradients(case):
        moved, matmuls = moved + 3 * activations + 2 * weights, 9
    return Cost(width * moved, 2 * matmuls * rows * hidden_size * size, case.dtype)


register(
    Workload(
        name="ffn",
        summary="RMSNorm, SwiGLU and residual of the autoencoder's block",
        settings={
            "small": _settings(7, 16, 24),
            "cpu": _settings(4096, 512, 1280),
            "cuda": _settings(16384, 512, 1280, torch.bfloat16),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(
            eager(plain, _gradients),
            compiled(plain, _gradients),
            *package(operator, ("gated_ffn", "gated_ffn_backward"), _gradients),
        ),
        exact=exact,
        check=check,
        cost=cost,
    )
)
