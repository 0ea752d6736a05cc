"""The program of ``make gpu-check``, on stand-ins for the interpreter and ``nvidia-smi``."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from calm_kernels.bench.rows import Row, load, record

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu_check.py"
SMI = "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 580.1, 81559 MiB'\n"

# Stands for python3 of the machine: logs its arguments; what it does is up to each test.
INTERPRETER = """#!/bin/sh
echo "$TORCH_CUDA_ARCH_LIST $CALM_KERNELS_BUILD $*" >> "{log}"
case "$*" in
  *"-m pip"*) {pip} ;;
  *"import sys, torch"*) {loads} ;;
  *"-m pytest"*) {pytest} ;;
  *operator_calls.py*) {calls} ;;
  *"calm_kernels bench"*) {bench} ;;
esac
"""
SUITE = '<testsuites><testsuite tests="9" failures="{}" errors="0" skipped="3"/></testsuites>'
WRITE_TESTS = "for a; do case $a in --junitxml=*) echo '{}' > \"${{a#*=}}\" ;; esac; done"
WRITE_BENCH = (
    'while [ "$1" != --json ]; do w=$1; test "$w" = bench && n=$2; shift; done; '
    'sed "s/NAME/$n/" {record} > "$2"'
)


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    sys.path.insert(0, str(PROGRAM.parent))
    try:
        return importlib.import_module("gpu_check")
    finally:
        sys.path.remove(str(PROGRAM.parent))


def a_row(status: str = "ok") -> Row:
    return Row(
        "NAME", "native", "native", {"P": 3}, "float32", "cuda", 1, status=status, error=1e-7,
        bound=1e-5, median=1e-3, p20=1e-3, p80=1e-3,
    )  # fmt: skip


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., tuple[int, dict, str, list[str]]]:
    """Runs the program; returns exit code, record, Markdown and what the interpreter was asked."""

    def run(smi: str | None = SMI, deadline: float = 60.0, status: str = "ok", **actions: str):
        conditions = {
            "device": "cuda", "device_name": "H100", "driver": "580.1", "torch": "2.11.0",
            "triton": "3.6.0", "commit": "abc", "date": "2026-01-01", "load_average": 0.1,
            "threads": 1,
        }  # fmt: skip
        rows = tmp_path / "record"
        rows.write_text(json.dumps(record([a_row(status)], conditions, {"copy_gb_per_s": 3e3})))
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        log = tmp_path / "log"
        defaults = {
            "pip": "true", "loads": "true", "calls": "true",
            "pytest": WRITE_TESTS.format(SUITE.format(0)),
            "bench": WRITE_BENCH.format(record=rows),
        }  # fmt: skip
        scripts = {"python": INTERPRETER.format(log=log, **{**defaults, **actions})}
        scripts["compute-sanitizer"] = '#!/bin/sh\nshift 8\nexec "$@"\n'
        if smi is not None:
            scripts["nvidia-smi"] = smi
        for name, text in scripts.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        output = tmp_path / "out"
        outcome = subprocess.run(
            [
                *(sys.executable, str(PROGRAM), "--output", str(output)),
                *("--python", str(programs / "python"), "--deadline", str(deadline)),
            ],
            env={
                **os.environ,
                "PATH": f"{programs}:/usr/bin:/bin",
                "PYTHONPATH": str(ROOT),
                "CALM_KERNELS_COMMIT": "abc",
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in outcome.stderr, outcome.stderr
        found = json.loads((output / "gpu-check.json").read_text())
        load(output / "gpu-check.json")
        asked = log.read_text().splitlines() if log.exists() else []
        return outcome.returncode, found, (output / "gpu-check.md").read_text(), asked

    return run


def statuses(found: dict) -> dict[str, str]:
    return {phase["name"]: phase["status"] for phase in found["phases"]}


def test_all_phases_run_and_leave_one_record_and_one_table(check) -> None:
    code, found, markdown, asked = check()
    assert code == 0
    assert set(statuses(found).values()) == {"ok"}
    first = ["environment", "build", "libraries load", "tests", "memcheck", "racecheck"]
    assert list(statuses(found))[:6] == first
    assert [row["workload"] for row in found["rows"]][:2] == ["energy", "brier"]
    assert len(found["rows"]) == 9
    assert "| energy P=3 float32 | native |" in markdown
    assert "6 passed, 0 failed, 3 skipped" in markdown
    assert found["conditions"]["device_name"] == "H100"
    build = next(line for line in asked if "-m pip" in line)
    assert build.startswith("9.0a cuda ")
    assert "--no-build-isolation --no-deps --no-index --target" in build
    benches = [line for line in asked if " bench " in line]
    assert sum("--skip compiled" in line for line in benches) == 9
    assert len(benches) == 18


def test_the_build_failing_ends_the_check_and_keeps_the_compilers_last_words(check) -> None:
    code, found, markdown, asked = check(pip="echo 'error: no such header' >&2; exit 1")
    assert code == 1
    assert statuses(found) == {"environment": "ok", "build": "failed"}
    assert "no such header" in markdown
    assert not any("pytest" in line for line in asked)


def test_whatever_fails_is_reported_and_the_next_phase_still_runs(check) -> None:
    code, found, markdown, _ = check(
        pytest=WRITE_TESTS.format(SUITE.format(2)) + "; echo 'assert 1 == 2'; exit 1",
        calls="echo '========= ERROR SUMMARY: 3 errors'; exit 86",
        status="FAIL",
    )
    assert code == 1
    failed = {name for name, status in statuses(found).items() if status == "failed"}
    assert failed == {"tests", "memcheck", "racecheck"}
    assert "4 passed, 2 failed, 3 skipped" in json.dumps(found["phases"])
    assert "assert 1 == 2" in markdown and "3 errors" in markdown
    assert len(found["rows"]) == 9
    assert {row["status"] for row in found["rows"]} == {"FAIL"}


def test_tests_that_all_skip_fail_and_a_checker_that_cannot_run_does_not(check) -> None:
    suite = SUITE.replace('tests="9"', 'tests="3"').format(0)
    code, found, _, _ = check(
        pytest=WRITE_TESTS.format(suite),
        calls="echo '========= Error: Device not supported'; exit 1",
        bench="true",
    )
    assert code == 1
    assert statuses(found)["tests"] == "failed"
    assert statuses(found)["memcheck"] == statuses(found)["racecheck"] == "not available"


def test_a_wrong_row_alone_fails_the_check(gpu_check: ModuleType, tmp_path: Path) -> None:
    report = gpu_check.Report(tmp_path)
    report.phases.append(gpu_check.Phase("tests", "ok"))
    report.phases.append(gpu_check.Phase("bench energy", "time limit"))
    assert not report.failed()
    report.cases["energy", "", ""] = [{"status": "FAIL"}]
    assert report.failed()
    report.cases.clear()
    report.phases.append(gpu_check.Phase("memcheck", "time limit"))
    assert report.failed()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_phase_that_hangs_is_killed_with_what_it_started(check, tmp_path: Path) -> None:
    child = tmp_path / "child"
    started = time.monotonic()
    hang = f"sh -c 'echo $$ > {child}; sleep 300; true'; true"
    code, found, _, _ = check(pytest=hang, deadline=2.0)
    assert time.monotonic() - started < 60
    assert code == 1
    assert statuses(found)["tests"] == "time limit"
    assert not is_running(int(child.read_text()))


def test_without_a_gpu_it_says_so(check) -> None:
    code, found, markdown, asked = check(smi=None)
    assert (code, asked) == (2, [])
    assert "nvidia-smi is not on PATH" in markdown
    code, found, _, _ = check(smi="#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert code == 2
    assert statuses(found) == {"environment": "failed"}


@pytest.mark.parametrize(
    ("capability", "listed"),
    [("8.0", "8.0"), ("8.6", "8.6"), ("9.0", "9.0a"), ("10.0", "10.0a"), ("12.0", "12.0")],
)
def test_the_architecture_is_spelled_as_the_build_spells_it(
    gpu_check: ModuleType, capability: str, listed: str
) -> None:
    assert gpu_check.architecture(capability) == listed


def test_a_case_measured_again_replaces_its_rows(gpu_check: ModuleType, tmp_path: Path) -> None:
    report = gpu_check.Report(tmp_path)
    path = tmp_path / "record.json"
    for variants in (["eager", "native"], ["eager", "native", "compiled"]):
        rows = [Row("energy", v, "native", {"P": 3}, "float32", "cuda", 1) for v in variants]
        path.write_text(json.dumps(record(rows, {"date": str(len(variants))}, {})))
        assert report.merge(path) == len(variants)
    assert [row["variant"] for row in report.rows] == ["eager", "native", "compiled"]
    assert report.conditions["date"] == "3"
    assert report.merge(tmp_path / "absent.json") == 0
