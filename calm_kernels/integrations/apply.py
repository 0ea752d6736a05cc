"""Replacing the slow parts of a model that was written elsewhere, and putting them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from calm_kernels.integrations import decoder, encoder, energy_head, energy_score
from calm_kernels.integrations import ffn as ffn_blocks
from calm_kernels.integrations import sampling as temperature
from calm_kernels.integrations.logits import LogitsUse
from calm_kernels.integrations.patching import (
    Finding,
    Patch,
    Patched,
    install,
    patched_modules,
    uninstall,
)
from calm_kernels.integrations.report import Entry, Report
from calm_kernels.ops.energy_score import ESTIMATORS, Estimator

METHODS = {
    "energy_score": energy_score.METHOD,
    "temperature_sample": temperature.METHOD,
}


def apply_calm_kernels(
    model: nn.Module,
    *,
    energy: bool = True,
    head: bool = True,
    ffn: bool = True,
    encode: bool = True,
    decode: bool = True,
    cross_entropy: bool = True,
    sampling: bool = True,
    estimator: Estimator = "closed_form",
    num_targets: int = 100,
    drop_mass: float = 0.0,
    methods: Mapping[str, str] | None = None,
) -> Report:
    """Let this package compute the slow parts of a model that was written elsewhere, in place.

    Parts are recognised by the names of modules, parameters and methods (the table is in
    docs/integrations.md) and confirmed by comparing values; what does not fit is left as it is.
    Parameters and buffers are the same objects as before under the same names, so optimizers,
    state dicts, weight tying, moves to another device or dtype, training mode and pickling go on
    as before. ``repr`` of the model shows what was replaced; :func:`remove_calm_kernels` undoes it.
    Applying it again looks at the model afresh, with the new arguments.

    Args:
        model: any module; its submodules are searched.
        energy: the energy score.
        head: the energy head's work that all samples of a position share.
        ffn: feed-forward blocks with norm and residual, those of Llama layers included.
        encode: tables for a frozen encoder, made when they pay. They take up to 256 MiB in float32,
            or the size of the embedding if that is more.
        decode: the argmax of the decoder's logits.
        cross_entropy: the cross entropy of the decoder's logits.
        sampling: the vote among draws at a temperature.
        estimator, num_targets: of the energy score; see :func:`calm_kernels.energy_score`.
        drop_mass: of the cross entropy; see :func:`calm_kernels.linear_cross_entropy`.
        methods: other names of the methods ``energy_score`` and ``temperature_sample``.

    Returns:
        what was replaced, and what was recognised and kept, with the reason.

    Raises:
        TypeError: ``model`` is no module. ValueError: an option is unknown or out of range, or the
            model has none of the chosen parts. RuntimeError: the class of a module was changed
            after an earlier call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}; got {estimator!r}")
    if not 0.0 <= drop_mass < 1.0:
        raise ValueError(f"drop_mass: expected a probability mass in [0, 1); got {drop_mass}")
    remove_calm_kernels(model)
    names = _method_names(methods)
    use = LogitsUse(decode, cross_entropy, drop_mass)
    searches = _searches(model, names, use, estimator, num_targets)
    chosen = {
        "energy": energy,
        "head": head,
        "ffn": ffn,
        "encode": encode,
        "decode": decode or cross_entropy,
        "sampling": sampling,
    }
    findings = [f for part, search in searches.items() if chosen[part] for f in search]
    if not findings:
        raise ValueError(_nothing_found(model, [part for part, on in chosen.items() if on]))
    _install_all(findings)
    return _report(findings)


def remove_calm_kernels(model: nn.Module) -> None:
    """Undo :func:`apply_calm_kernels`: every module has its own class and methods again.

    Raises:
        RuntimeError: the class of a module was changed after it was patched. Nothing is undone.
    """
    uninstall(*patched_modules(model))


def _searches(
    model: nn.Module,
    names: dict[str, str],
    use: LogitsUse,
    estimator: Estimator,
    num_targets: int,
) -> dict[str, Iterator[Finding]]:
    return {
        "energy": energy_score.find(model, names["energy_score"], estimator, num_targets),
        "head": energy_head.find(model),
        "ffn": ffn_blocks.find(model),
        "encode": encoder.find(model),
        "decode": decoder.find(model, use),
        "sampling": temperature.find(model, names["temperature_sample"]),
    }


def _method_names(methods: Mapping[str, str] | None) -> dict[str, str]:
    unknown = set(methods or {}) - set(METHODS)
    if unknown:
        raise ValueError(
            f"methods: expected keys among {', '.join(METHODS)}; got {', '.join(sorted(unknown))}"
        )
    return {**METHODS, **(methods or {})}


def _nothing_found(model: nn.Module, parts: list[str]) -> str:
    return (
        f"model: {type(model).__name__} has no part of CALM that this package knows (looked for: "
        f"{', '.join(parts) or 'nothing'}); docs/integrations.md lists the names it goes by"
    )


def _install_all(findings: list[Finding]) -> None:
    by_module: dict[int, tuple[nn.Module, dict[type[Patched], Patch]]] = {}
    for finding in findings:
        if finding.patch is not None:
            _, patches = by_module.setdefault(id(finding.module), (finding.module, {}))
            patches[finding.patch.kind] = finding.patch
    for module, patches in by_module.values():
        install(module, list(patches.values()))


def _report(findings: list[Finding]) -> Report:
    entries = [(f.patch, Entry(f.part, f.path, type(f.module).__name__, f.note)) for f in findings]
    return Report(
        replaced=tuple(entry for patch, entry in entries if patch is not None),
        kept=tuple(entry for patch, entry in entries if patch is None),
    )
