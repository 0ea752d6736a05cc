from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import calm_kernels
from calm_kernels import _dispatch, _native


def draws(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(0, 3, (5, 7, 4), generator=generator)
    return samples, torch.randint(0, 3, (7, 4), generator=generator)


def called_overloads(function: Callable[..., Any], *args: Any) -> list[str]:
    """Names of this package's overloads that a call reaches."""
    names: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == _dispatch.NAMESPACE:
                names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        function(*args)
    return names


def test_a_forced_backend_is_the_one_that_runs() -> None:
    with calm_kernels.backend("reference"):
        assert called_overloads(calm_kernels.brier_scores, *draws()) == [
            "calm_kernels.brier_scores.reference"
        ]


def test_the_automatic_choice_takes_the_native_library_where_it_is_built() -> None:
    expected = "default" if _native.library("cpu").loaded else "reference"
    assert called_overloads(calm_kernels.brier_scores, *draws()) == [
        f"calm_kernels.brier_scores.{expected}"
    ]


def test_the_native_cpu_library_is_built_in_the_test_environment() -> None:
    assert _native.library("cpu").problem is None
    assert _native.serves("calm_kernels::brier_scores", "cpu")


def test_backend_is_restored_after_an_exception() -> None:
    before = _dispatch.current_backend()
    with pytest.raises(ZeroDivisionError), calm_kernels.backend("reference"):
        raise ZeroDivisionError
    assert _dispatch.current_backend() == before


def test_an_unknown_backend_names_the_valid_ones() -> None:
    with (
        pytest.raises(ValueError, match="auto, native, triton, reference"),
        calm_kernels.backend("fast"),
    ):
        pass


def test_a_forced_backend_that_cannot_serve_says_why_and_how_to_fix_it() -> None:
    with (
        pytest.raises(RuntimeError, match=r"'triton' cannot serve cpu.*no Triton kernel.*'auto'"),
        calm_kernels.backend("triton"),
    ):
        calm_kernels.brier_scores(*draws())


def test_a_missing_library_leaves_the_reference_and_an_explanation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = _native.Library("cpu", None, False, "the cpu library was not built")
    monkeypatch.setitem(_native._libraries, "cpu", missing)
    monkeypatch.setattr(_dispatch, "_choices", {})
    assert called_overloads(calm_kernels.brier_scores, *draws()) == [
        "calm_kernels.brier_scores.reference"
    ]
    with pytest.raises(RuntimeError, match="was not built"), calm_kernels.backend("native"):
        calm_kernels.brier_scores(*draws())


def test_a_library_that_does_not_load_is_reported_not_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    state = _native._open("cpu")
    assert not state.loaded
    assert state.problem is not None and "reinstall" in state.problem


def test_changing_the_backend_recompiles_a_compiled_function() -> None:
    graphs = CompileCounterWithBackend("eager")

    @torch.compile(backend=graphs, fullgraph=True)
    def scored(samples: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return calm_kernels.brier_scores(samples, target) * 2

    samples, target = draws()
    with calm_kernels.backend("native"):
        native = scored(samples, target)
    with calm_kernels.backend("reference"):
        reference = scored(samples, target)
    targets = [
        str(node.target)
        for graph in graphs.graphs
        for node in graph.graph.nodes
        if "brier" in str(node.target)
    ]
    assert [name.rpartition(".")[2] for name in targets] == ["default", "reference"]
    torch.testing.assert_close(native, reference, rtol=1e-6, atol=1e-6)


def test_every_operator_has_a_reference_overload_and_a_fake() -> None:
    assert _dispatch.operators()
    for name, operator in _dispatch.operators().items():
        packet = getattr(torch.ops.calm_kernels, name)
        assert "reference" in packet.overloads()
        assert operator.why_not("reference", "meta") is None


def test_importing_loads_no_extra_and_touches_no_device() -> None:
    code = (
        "import sys, torch, calm_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "extras = {'transformers', 'triton', 'accelerate', 'tokenizers', 'rich', 'matplotlib'}\n"
        "assert not extras & set(sys.modules), extras & set(sys.modules)\n"
        "calm_kernels.nn\n"
        "assert not extras & set(sys.modules), extras & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bad_backend_in_the_environment_is_refused_with_its_name() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import calm_kernels"],
        env={"CALM_KERNELS_BACKEND": "gpu", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "CALM_KERNELS_BACKEND" in run.stderr


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in calm_kernels.__all__:
        value = getattr(calm_kernels, name)
        assert getattr(value, "__doc__", None) or isinstance(value, str), name
