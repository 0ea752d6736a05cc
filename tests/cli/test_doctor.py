"""The doctor's table and its JSON."""

from __future__ import annotations

import json
from typing import Any

import calm_kernels


def test_json_has_the_promised_shape(command: Any) -> None:
    outcome = command("doctor", "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert set(report) == {
        "versions", "platform", "torch_cuda", "devices", "forced_backend", "libraries", "operators",
    }  # fmt: skip
    assert set(report["versions"]) >= {"python", "calm_kernels", "torch", "triton"}
    for library in report["libraries"].values():
        assert set(library) == {"path", "loaded", "problem"}
        assert library["loaded"] == (library["problem"] is None)
    for state in report["operators"]["cpu"].values():
        assert set(state) == {"serves", "others"}
        assert state["serves"] in ("native", "triton", "reference")


def test_the_table_names_every_operator_and_its_backend(command: Any) -> None:
    outcome = command("doctor")
    report = json.loads(command("doctor", "--json").out)
    for name, state in report["operators"]["cpu"].items():
        assert any(name in line and state["serves"] in line for line in outcome.out.splitlines())


def test_a_forced_backend_is_shown(command: Any) -> None:
    with calm_kernels.backend("reference"):
        outcome = command("doctor")
    assert "forced" in outcome.out and "not asked for" in outcome.out
