"""``ae-ce``: cross entropy over the vocabulary, forward and backward, on random weights."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from calm_kernels.bench import checks
from calm_kernels.bench.variants import call_of, compiled, eager, needs_package, package
from calm_kernels.bench.workload import (
    Call,
    Case,
    Check,
    Cost,
    Inputs,
    Outputs,
    Setting,
    Variant,
    Workload,
    register,
)
from calm_kernels.ops.linear_cross_entropy import linear_cross_entropy

DROP_MASS = 1e-3
ROWS_PER_CHUNK = 512
OPERATORS = ("linear_cross_entropy_reduced",)


def _gradients(case: Case) -> tuple[str, ...]:
    return ("hidden", "weight")


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    shape = (case.size("V"), case.size("H"))
    weight = torch.randn(shape, generator=generator, device=case.device) * shape[1] ** -0.5
    return {"weight": weight.to(case.dtype).requires_grad_()}


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    rows = case.size("R")
    hidden = torch.randn(rows, case.size("H"), generator=generator, device=case.device)
    target = torch.randint(0, case.size("V"), (rows,), generator=generator, device=case.device)
    return {"hidden": hidden.to(case.dtype).requires_grad_(), "target": target}


def plain(inputs: Inputs) -> Tensor:
    """All logits, and their cross entropy in float32."""
    logits = F.linear(inputs["hidden"], inputs["weight"])
    return F.cross_entropy(logits.float(), inputs["target"])


def operator(inputs: Inputs, drop_mass: float = 0.0) -> Tensor:
    return linear_cross_entropy(
        inputs["hidden"], inputs["weight"], inputs["target"], drop_mass=drop_mass
    )


def _torch_chunked(case: Case) -> Call:
    options = torch.nn.LinearCrossEntropyOptions()

    def forward(inputs: Inputs) -> Any:
        return F.linear_cross_entropy(
            inputs["hidden"], inputs["weight"], inputs["target"], options=options
        )

    return call_of(forward, _gradients(case))


def _needs_torch_2_13(case: Case) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has"


def _cut_cross_entropy(case: Case) -> Call:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def forward(inputs: Inputs) -> Any:
        return function(inputs["hidden"], inputs["weight"], inputs["target"])

    return call_of(forward, _gradients(case))


def _liger(case: Case) -> Call:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def forward(inputs: Inputs) -> Any:
        return loss(inputs["weight"], inputs["hidden"], inputs["target"])

    return call_of(forward, _gradients(case))


def exact(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, some rows at a time."""
    weight = inputs["weight"].detach().double()
    targets = inputs["target"].split(ROWS_PER_CHUNK)
    loss, grad_hidden = weight.new_zeros(()), []
    grad_weight = torch.zeros_like(weight)
    for rows, target in zip(inputs["hidden"].detach().split(ROWS_PER_CHUNK), targets, strict=True):
        hidden = rows.double()
        log_p = (hidden @ weight.t()).log_softmax(-1)
        chosen = target.unsqueeze(1)
        loss -= log_p.gather(1, chosen).sum()
        residual = log_p.exp_().scatter_add_(1, chosen, -log_p.new_ones(chosen.shape))
        grad_hidden.append(residual @ weight)
        grad_weight += residual.t() @ hidden
    rows = case.size("R")
    return loss / rows, torch.cat(grad_hidden) / rows, grad_weight / rows


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    return checks.largest_relative_error(outputs, exact, checks.ROUNDING[case.dtype])


def check_dropped(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """Beside the rounding, each row may leave out DROP_MASS of its gradient."""
    bound = checks.ROUNDING[case.dtype] + DROP_MASS
    return checks.largest_relative_error(outputs, exact, bound)


def cost(case: Case) -> Cost:
    """Inputs read and gradients written once; three matmuls, logits made once."""
    rows, hidden_size, vocab_size = (case.size(name) for name in "RHV")
    width = torch.empty(0, dtype=case.dtype).element_size()
    moved = 2 * width * hidden_size * (rows + vocab_size) + 8 * rows
    return Cost(moved, 6 * rows * hidden_size * vocab_size, case.dtype)


VARIANTS = (
    eager(plain, _gradients),
    compiled(plain, _gradients),
    Variant("torch chunked", "peer", _torch_chunked, missing=_needs_torch_2_13),
    Variant(
        "cut-cross-entropy",
        "peer",
        _cut_cross_entropy,
        missing=needs_package("cut_cross_entropy", "cuda"),
    ),
    Variant("liger", "peer", _liger, missing=needs_package("liger_kernel", "cuda")),
    *package(operator, OPERATORS, _gradients),
    *package(
        functools.partial(operator, drop_mass=DROP_MASS),
        OPERATORS,
        _gradients,
        "drop_mass",
        check=check_dropped,
    ),
)

register(
    Workload(
        name="ae-ce",
        summary="cross entropy of the vocabulary head, forward and backward, random weights",
        settings={
            "small": (Setting({"R": 9, "H": 16, "V": 131}),),
            "cpu": (Setting({"R": 1024, "H": 256, "V": 16384}),),
            "cuda": (Setting({"R": 16384, "H": 512, "V": 128257}, torch.bfloat16),),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=VARIANTS,
        exact=exact,
        check=check,
        cost=cost,
    )
)
