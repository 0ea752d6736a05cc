"""The report of versions, devices and backends is complete and true."""

from __future__ import annotations

import json

import torch

import calm_kernels
from calm_kernels import _native
from calm_kernels.training import environment


def test_every_operator_is_served_and_the_others_have_a_reason() -> None:
    for device_type in environment.device_types():
        table = environment.operators(device_type)
        assert "brier_scores" in table and "energy_score" in table
        for name, state in table.items():
            assert state["serves"] in environment.BACKENDS, name
            assert set(state["others"]) == set(environment.BACKENDS) - {state["serves"]}
            assert all(state["others"].values())


def test_the_backend_named_is_the_one_that_runs() -> None:
    serves = environment.operators("cpu")["brier_scores"]["serves"]
    assert (serves == "native") == _native.serves("calm_kernels::brier_scores", "cpu")


def test_a_forced_backend_is_reported() -> None:
    with calm_kernels.backend("reference"):
        states = environment.operators("cpu").values()
        assert {state["serves"] for state in states} == {"reference"}
    with calm_kernels.backend("triton"):
        state = environment.operators("cpu")["brier_scores"]
        assert state["serves"] is None
        assert set(state["others"]) == set(environment.BACKENDS)


def test_the_report_is_json_with_the_versions_that_run() -> None:
    report = json.loads(json.dumps(environment.report()))
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["versions"]["calm_kernels"] is not None
    assert report["devices"][0]["type"] == "cpu"
    assert set(report["libraries"]) == {"cpu", "cuda"}
