"""``encode``: the frozen encoder, token ids to the posterior of each patch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from calm_kernels.bench import checks
from calm_kernels.bench.parameters import draw_parameters
from calm_kernels.bench.variants import compiled, eager, ours
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
from calm_kernels.nn.patch_codec import PatchEncoder

EPS = 1e-6


def _setting(
    positions: int, hidden_size: int, size: int, vocab_size: int, latent: int, dtype: torch.dtype
) -> Setting:
    return Setting(
        {"P": positions, "K": 4, "H": hidden_size, "I": size, "V": vocab_size, "D": latent}, dtype
    )


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    """Weights by name, and modules that hold them: as they are, and folded both ways."""
    vocab_size, hidden_size, size, latent, patch_size = (case.size(name) for name in "VHIDK")
    encoder = PatchEncoder(vocab_size, hidden_size, size, latent, patch_size, eps=EPS)
    draw_parameters(encoder, generator, case.dtype, case.device).requires_grad_(False).eval()
    return {
        "weights": encoder.state_dict(),
        "unfolded": encoder,
        "table": copy.deepcopy(encoder).fold("table"),
        "squeezed": copy.deepcopy(encoder).fold("squeezed"),
    }


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    shape = (case.size("P"), case.size("K"))
    ids = torch.randint(0, case.size("V"), shape, generator=generator, device=case.device)
    return {"ids": ids}


def _block(x: Tensor, weights: dict[str, Tensor], layer: int) -> Tensor:
    prefix = f"encoder_layers.{layer}."
    normed = F.rms_norm(x, x.shape[-1:], weights[prefix + "layernorm.weight"], EPS)
    gate = F.linear(normed, weights[prefix + "mlp.gate_proj.weight"])
    up = F.linear(normed, weights[prefix + "mlp.up_proj.weight"])
    return x + F.linear(F.silu(gate) * up, weights[prefix + "mlp.down_proj.weight"])


def _plain(ids: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    x = _block(F.embedding(ids, weights["embed_tokens.weight"]), weights, 0)
    x = F.linear(x.flatten(1), weights["squeeze_layer.weight"], weights["squeeze_layer.bias"])
    x = _block(x, weights, 1)
    x = F.rms_norm(x, x.shape[-1:], weights["norm.weight"], EPS)
    both = F.linear(x, weights["hidden_to_latent.weight"], weights["hidden_to_latent.bias"])
    return both.chunk(2, dim=-1)


def plain(inputs: Inputs) -> tuple[Tensor, ...]:
    """Every token of every patch through the first block."""
    return _plain(inputs["ids"], inputs["weights"])


def squeezed(inputs: Inputs) -> Outputs:
    return inputs["squeezed"](inputs["ids"])


def table(inputs: Inputs) -> Outputs:
    return inputs["table"](inputs["ids"])


def unfolded(inputs: Inputs) -> Outputs:
    return inputs["unfolded"](inputs["ids"])


def exact(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The plain formulation in float64."""
    wide = {name: weight.double() for name, weight in inputs["weights"].items()}
    return _plain(inputs["ids"], wide)


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    return checks.largest_relative_error(outputs, exact, checks.ROUNDING[case.dtype])


def cost(case: Case) -> Cost:
    """Folded, the least there is: K table rows a patch, the second stage's weights, the result."""
    positions, patch_size, hidden_size, size, latent = (case.size(name) for name in "PKHID")
    width = torch.empty(0, dtype=case.dtype).element_size()
    weights = hidden_size * (3 * size + 2 * latent)
    moved = width * (positions * (patch_size * hidden_size + 2 * latent) + weights)
    return Cost(moved + 8 * positions * patch_size, 2 * positions * weights, case.dtype)


register(
    Workload(
        name="encode",
        summary="frozen encoder; ours/squeezed and ours/table: folded",
        settings={
            "small": (_setting(6, 16, 24, 37, 8, torch.float32),),
            "cpu": (_setting(8188, 256, 640, 16384, 128, torch.float32),),
            "cuda": (_setting(8188, 512, 1280, 128257, 128, torch.bfloat16),),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(
            eager(plain),
            compiled(plain),
            ours(squeezed, name="ours/squeezed"),
            ours(table, name="ours/table"),
            ours(unfolded, name="ours/unfolded"),
        ),
        exact=exact,
        check=check,
        cost=cost,
    )
)
