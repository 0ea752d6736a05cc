from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from calm_kernels.bench.rows import load
from calm_kernels.bench.workload import workloads
from calm_kernels.cli import bench, main


def test_the_workloads_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in workloads())


def test_quick_mode_measures_and_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "md", "png")}
    code = main([
        "bench", "energy", "brier", "--quick", "--device", "cpu", "--skip", "compiled",
        "--seed", "3", "--json", str(files["json"]), "--markdown", str(files["md"]),
        "--plot", str(files["png"]),
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    rows, conditions = load(files["json"])
    assert conditions["seed"] == 3
    assert {row.workload for row in rows} == {"energy", "brier"}
    eager = next(row for row in rows if row.variant == "eager")
    assert eager.status == "ok" and eager.times_eager == 1.0
    assert all(row.median is not None for row in rows if row.role == "reference")
    for row in rows:
        assert row.variant in printed
        assert row.variant in files["md"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["json"].read_text())["limits"]["copy_gb_per_s"] > 0


def test_growth_sweeps_come_in_place_of_the_cases(tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    code = main([
        "bench", "energy", "--growth", "--quick", "--device", "cpu", "--seconds", "0.01",
        "--variants", "eager", "--json", str(path), "--plot", str(tmp_path / "growth.png"),
    ])  # fmt: skip
    assert code == 0
    rows, _ = load(path)
    assert {row.sweep for row in rows} == {"P", "N", "M", "D"}
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_a_wrong_result_makes_exit_code_1(
    make_workload, make_variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    planted = make_variant("planted", lambda inputs: inputs["x"], "native")
    workload = make_workload(*make_workload().variants, planted)
    monkeypatch.setattr(bench, "workloads", lambda: {"square": workload})
    path = tmp_path / "record.json"
    arguments = ["bench", "--quick", "--device", "cpu", "--json", str(path)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "FAIL: square P=64 float64 planted: error" in printed
    rows, _ = load(path)
    assert {row.variant: row.status for row in rows} == {"plain": "ok", "planted": "FAIL"}
    assert main([*arguments, "--variants", "plain"]) == 0


def test_what_was_measured_is_kept_when_a_later_case_ends_the_run(
    make_workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(case, state, generator):
        raise KeyboardInterrupt

    good = make_workload(name="good")
    bad = dataclasses.replace(make_workload(name="bad"), make_inputs=interrupted)
    monkeypatch.setattr(bench, "workloads", lambda: {"good": good, "bad": bad})
    path = tmp_path / "record.json"
    assert main(["bench", "--quick", "--device", "cpu", "--json", str(path)]) == 130
    assert [row.workload for row in load(path)[0]] == ["good"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no workload nothing; there are energy, brier"),
        (["energy", "--variants", "fast"], "no variant fast; there are"),
        (["energy", "--skip", "fast"], "no variant fast; there are"),
        (["--threads", "0", "--device", "cpu"], "threads: expected at least 1"),
        (["--seed", "-1", "--device", "cpu"], "seed: expected 0 to"),
        (["brier", "--growth", "--device", "cpu"], "no chosen workload has growth sweeps"),
    ],
)
def test_a_mistake_is_explained_with_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
