"""``decode``: the most likely token of each row, from hidden states and the vocabulary head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from calm_kernels.bench import checks
from calm_kernels.bench.variants import call_of, compiled, eager, package
from calm_kernels.bench.workload import (
    Case,
    Check,
    Cost,
    Growth,
    Inputs,
    Outputs,
    Setting,
    Variant,
    Workload,
    register,
)
from calm_kernels.ops.linear_argmax import linear_argmax

ROWS_PER_CHUNK = 1024


def _setting(rows: int, dtype: torch.dtype) -> Setting:
    return Setting({"R": rows, "H": 512, "V": 128257}, dtype)


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    shape = (case.size("V"), case.size("H"))
    weight = torch.randn(shape, generator=generator, device=case.device) * shape[1] ** -0.5
    return {"weight": weight.to(case.dtype)}


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    shape = (case.size("R"), case.size("H"))
    hidden = torch.randn(shape, generator=generator, device=case.device)
    return {"hidden": hidden.to(case.dtype)}


def logits(inputs: Inputs) -> Tensor:
    return torch.nn.functional.linear(inputs["hidden"], inputs["weight"])


def plain(inputs: Inputs) -> Tensor:
    return logits(inputs).argmax(-1)


def operator(inputs: Inputs) -> Tensor:
    return linear_argmax(inputs["hidden"], inputs["weight"])


def exact_logits(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Weight in float64, and the largest logit of each row."""
    weight = inputs["weight"].double()
    best = [
        (rows.double() @ weight.t()).amax(-1) for rows in inputs["hidden"].split(ROWS_PER_CHUNK)
    ]
    return weight, torch.cat(best)


def _check(inputs: Inputs, outputs: Outputs, exact: Any, bound: float) -> Check:
    """By how much the chosen logit is below the largest, relative to that."""
    weight, best = exact
    measure = "chosen logit below the best"
    if outputs.shape != best.shape or int(outputs.min()) < 0 or int(outputs.max()) >= len(weight):
        return Check(math.inf, bound, measure)
    chosen = (inputs["hidden"].double() * weight[outputs]).sum(-1)
    return Check(float(((best - chosen) / best.abs()).max()), bound, measure)


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """Logits are compared in float32, whatever their operands."""
    return _check(inputs, outputs, exact, checks.ROUNDING[torch.float32])


def check_rounded_logits(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """Logits rounded to the dtype, so that near ties are lost."""
    return _check(inputs, outputs, exact, checks.ROUNDING[case.dtype])


def check_matmul(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """The largest logit of each row alone: the whole product in float64 would be large."""
    best = outputs.amax(-1)
    return Check(
        checks.relative_error(best, exact[1]), checks.ROUNDING[case.dtype], checks.RELATIVE
    )


def cost(case: Case) -> Cost:
    """Hidden states and weight read, ids written; one matmul."""
    rows, hidden_size, vocab_size = (case.size(name) for name in "RHV")
    width = torch.empty(0, dtype=case.dtype).element_size()
    moved = width * hidden_size * (rows + vocab_size) + 8 * rows
    return Cost(moved, 2 * rows * hidden_size * vocab_size, case.dtype)


register(
    Workload(
        name="decode",
        summary="argmax over the vocabulary; matmul: the bare product, a ceiling",
        settings={
            "small": (Setting({"R": 5, "H": 16, "V": 301}),),
            "cpu": (_setting(800, torch.float32), _setting(800, torch.bfloat16)),
            "cuda": tuple(_setting(rows, torch.bfloat16) for rows in (800, 6400, 51200)),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=(
            eager(plain, check=check_rounded_logits),
            compiled(plain, check=check_rounded_logits),
            *package(operator, ("linear_argmax",)),
            Variant("matmul", "ceiling", lambda case: call_of(logits, ()), check=check_matmul),
        ),
        exact=exact_logits,
        check=check,
        cost=cost,
        growth=Growth(
            base={
                "small": Setting({"R": 8, "H": 16, "V": 96}),
                "cpu": Setting({"R": 200, "H": 256, "V": 16384}),
                "cuda": Setting({"R": 6400, "H": 512, "V": 65536}, torch.bfloat16),
            },
            axes=("R", "H", "V"),
            variants=("eager", "native", "triton", "reference"),
        ),
    )
)
