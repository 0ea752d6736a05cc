"""``ae-ce-trained``: the workload ``ae-ce`` on rows of an autoencoder that was really trained.

``benchmarks/make_trained_autoencoder.py`` makes the file of hidden states, targets and weight; the
environment variable ``CALM_KERNELS_TRAINED_HEAD`` says where it is. Without it, or where its sizes
are not those of a setting, the workload is skipped. The size ``small`` draws rows that are about as
sure of their tokens, so that it needs no file.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm_kernels import _dispatch
from calm_kernels.bench import checks
from calm_kernels.bench.workload import (
    Case,
    Check,
    Inputs,
    Outputs,
    Setting,
    Variant,
    Workload,
    register,
)
from calm_kernels.bench.workloads import cross_entropy
from calm_kernels.ops.linear_cross_entropy import linear_cross_entropy

VARIABLE = "CALM_KERNELS_TRAINED_HEAD"
MAKER = "benchmarks/make_trained_autoencoder.py"
DROPOUTS = ("on", "off")
DRAWN_VOCABULARY = 1100
"""Vocabulary of the size ``small``, whose rows are drawn."""


@functools.cache
def _read(path: Path, modified: int) -> dict[str, Tensor]:
    content: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _file() -> dict[str, Tensor] | None:
    path = Path(os.environ.get(VARIABLE, ""))
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else None


def why_absent(case: Case) -> str | None:
    """Why there are no trained rows for a case."""
    if case.size("V") == DRAWN_VOCABULARY:
        return None
    content = _file()
    if content is None:
        return f"no trained rows: set {VARIABLE} to a file made by {MAKER}"
    vocab_size, hidden_size = content["weight"].shape
    rows = content["target"].shape[0]
    if (vocab_size, hidden_size) != (case.size("V"), case.size("H")) or rows < case.size("R"):
        return f"{VARIABLE} holds {rows} rows of H={hidden_size}, V={vocab_size}"
    return None


def make_state(case: Case, generator: torch.Generator) -> dict[str, Any]:
    content = _file()
    if case.size("V") == DRAWN_VOCABULARY or why_absent(case) is not None or content is None:
        return cross_entropy.make_state(case, generator)
    return {"weight": content["weight"].to(case.device, case.dtype, copy=True).requires_grad_()}


def make_inputs(case: Case, state: Inputs, generator: torch.Generator) -> dict[str, Any]:
    """Neighbouring rows from a random place on."""
    content, rows = _file(), case.size("R")
    if case.size("V") == DRAWN_VOCABULARY or why_absent(case) is not None or content is None:
        inputs = cross_entropy.make_inputs(case, state, generator)
        sure = 12.0 * state["weight"].detach()[inputs["target"]]
        return {**inputs, "hidden": (inputs["hidden"].detach() + sure).requires_grad_()}
    last = content["target"].shape[0] - rows
    first = int(torch.randint(0, last + 1, (), generator=generator, device=case.device))
    part = slice(first, first + rows)
    hidden = content[str(case.shape["dropouts"])][part].to(case.device, case.dtype, copy=True)
    return {"hidden": hidden.requires_grad_(), "target": content["target"][part].to(case.device)}


def _check(bound: float, case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    """Errors relative to the gradients of rows that are all wrong, and to a loss of one.

    The gradients of rows that are right are small differences of nearly equal numbers: relative to
    these, every float32 result is rough, and what ``drop_mass`` promises is relative to a row that
    is all wrong as well.
    """
    rows, hidden, weight = case.size("R"), inputs["hidden"].detach(), inputs["weight"].detach()
    mean_norm = weight.double().norm() * case.size("V") ** -0.5
    scales = (1.0, float(mean_norm) * rows**-0.5, float(hidden.double().norm()) / rows)
    errors = [
        float((result.detach().double() - truth.double()).norm()) / scale
        for result, truth, scale in zip(outputs, exact, scales, strict=True)
    ]
    worst = math.nan if any(math.isnan(error) for error in errors) else max(errors)
    return Check(worst, bound, "relative to rows that are wrong")


def check(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    return _check(checks.ROUNDING[case.dtype], case, inputs, outputs, exact)


def check_dropped(case: Case, inputs: Inputs, outputs: Outputs, exact: Any) -> Check:
    bound = checks.ROUNDING[case.dtype] + cross_entropy.DROP_MASS
    return _check(bound, case, inputs, outputs, exact)


def share_of_sparse_rows(backend: str, case: Case, inputs: Inputs) -> str:
    with _dispatch.backend(backend):
        _, info = linear_cross_entropy(
            inputs["hidden"],
            inputs["weight"],
            inputs["target"],
            drop_mass=cross_entropy.DROP_MASS,
            return_info=True,
        )
    share = float(info.num_sparse_rows / info.num_rows)
    return f"{case.label}: {share:.1%} of rows sparse"


def _variants() -> tuple[Variant, ...]:
    def missing(variant: Variant, case: Case) -> str | None:
        own = variant.missing(case) if variant.missing is not None else None
        return why_absent(case) or own

    found = []
    for variant in cross_entropy.VARIANTS:
        changed = replace(variant, missing=functools.partial(missing, variant))
        if variant.name.endswith("drop_mass"):
            note = functools.partial(share_of_sparse_rows, variant.backend)
            changed = replace(changed, note=note, check=check_dropped)
        found.append(changed)
    return tuple(found)


def _settings(
    rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Setting, ...]:
    shape = {"R": rows, "H": hidden_size, "V": vocab_size}
    return tuple(Setting({**shape, "dropouts": dropouts}, dtype) for dropouts in DROPOUTS)


register(
    Workload(
        name="ae-ce-trained",
        summary="the same on rows and weight of a trained autoencoder, dropouts on and off",
        settings={
            "small": _settings(40, 16, DRAWN_VOCABULARY),
            "cpu": _settings(1024, 256, 4096),
            "cuda": _settings(16384, 512, 32768, torch.bfloat16),
        },
        make_state=make_state,
        make_inputs=make_inputs,
        variants=_variants(),
        exact=cross_entropy.exact,
        check=check,
        cost=cross_entropy.cost,
    )
)
