"""Everything that needs an NVIDIA GPU, in one command: build, tests, memory checkers, benchmarks.

    make gpu-check OUT=folder
    python3 benchmarks/gpu_check.py --output folder

Uses the Python that runs it, with its torch, triton and nvcc; fetches nothing. The package is built
for the GPU at hand and installed into a temporary folder. Phases have time limits; one that fails
is reported and the next still runs. ``gpu-check.json`` (a benchmark record, with the phases) and
``gpu-check.md`` are rewritten after every phase, so whatever is done is kept.

Exit code: 0; 1 if a build, a test, a checker or a benchmark's result failed; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from gpu_report import Phase, Report

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 465.0
"""Seconds for everything: 8 minutes, less what stopping takes."""

BUILD_LIMIT, TEST_LIMIT, CHECKER_LIMIT = 170.0, 90.0, 50.0
WORKLOADS = ("energy", "brier", "vote", "decode", "ffn", "ae-ce", "encode", "head", "exact")
FIRST_PASS_SECONDS, SECOND_PASS_SECONDS = 2.0, 4.0
SHORTEST_PHASE = 8.0
"""Importing torch alone takes a few seconds: with less left, a phase is not begun."""
CHECKERS = ("memcheck", "racecheck")
KERNELS = "kns=calm"
"""This package's, by their namespace."""
CHECKER_ERROR = 86
CANNOT_CHECK = ("Device not supported", "not supported on this", "Failed to initialize")
TAIL = 3000


@dataclass
class Outcome:
    """Exit code of a program, None if it ran out of time; the end of what it printed."""

    code: int | None
    output: str
    seconds: float


class Checker:
    """Runs the phases within the deadline."""

    def __init__(self, python: str, folder: Path, deadline: float = DEADLINE) -> None:
        self.python = python
        self.scratch = Path(tempfile.mkdtemp(prefix="calm-gpu-check-"))
        self.site = self.scratch / "site"
        self.report = Report(folder)
        self.ends = time.monotonic() + deadline
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(self.site),
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            "TRITON_CACHE_DIR": str(self.scratch / "triton"),
        }

    def left(self) -> float:
        return self.ends - time.monotonic()

    def execute(
        self, command: list[str], limit: float, folder: Path | None = None, **environment: str
    ) -> Outcome:
        """Run a program; when its time is up, it and what it started are killed."""
        started = time.monotonic()
        log = self.scratch / "log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=folder or self.scratch,
                env={**self.environment, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout=max(1.0, min(limit, self.left())))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # Also what a finished program left running.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = log.read_text(errors="replace")
        return Outcome(code, text, time.monotonic() - started)

    def phase(self, name: str, outcome: Outcome, detail: str | None = None) -> Phase:
        """Record a phase by the exit code of its program."""
        status = {0: "ok", None: "time limit"}.get(outcome.code, "failed")
        if detail is None:
            detail = "" if status == "ok" else outcome.output[-TAIL:]
        phase = Phase(name, status, outcome.seconds, detail)
        self.report.add(phase)
        return phase

    def describe(self) -> bool:
        """The GPU, its architecture and driver; False if there is none."""
        query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total"]
        if shutil.which(query[0]) is None:
            self.report.add(Phase("environment", "failed", 0.0, "nvidia-smi is not on PATH"))
            return False
        outcome = self.execute([*query, "--format=csv,noheader"], 30.0)
        lines = outcome.output.strip().splitlines()
        if outcome.code != 0 or not lines:
            self.phase("environment", outcome)
            return False
        name, capability, driver, memory = (part.strip() for part in lines[0].split(","))
        self.environment["TORCH_CUDA_ARCH_LIST"] = architecture(capability)
        self.report.conditions = {
            "device_name": name,
            "driver": driver,
            "commit": os.environ.get("CALM_KERNELS_COMMIT") or commit(),
            "gpus": len(lines),
        }
        self.environment["CALM_KERNELS_COMMIT"] = self.report.conditions["commit"]
        found = f"{len(lines)} x {name}, {memory}, driver {driver}, {architecture(capability)}"
        self.phase("environment", outcome, found)
        return True

    def build(self) -> bool:
        """Install for this GPU into the temporary folder; see that both libraries load."""
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "install"]
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(self.site)]
        outcome = self.execute(
            [*pip, *options, str(ROOT)],
            BUILD_LIMIT,
            CALM_KERNELS_BUILD="cuda",
            MAX_JOBS=str(os.cpu_count() or 1),
        )
        if self.phase("build", outcome).status != "ok":
            return False
        sys.path.insert(0, str(self.site))
        outcome = self.execute([self.python, "-c", _LOADS, str(self.site)], 60.0)
        return self.phase("libraries load", outcome, outcome.output[-TAIL:]).status == "ok"

    def test(self) -> None:
        """The GPU tests."""
        results = self.scratch / "tests.xml"
        outcome = self.execute(
            [
                *(self.python, "-m", "pytest", str(ROOT / "tests" / "gpu")),
                *("-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={results}"),
                *(f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")),
            ],
            TEST_LIMIT,
        )
        counts = count_tests(results)
        if outcome.code == 0 and counts["passed"] == 0:
            outcome.code = 1
        detail = ", ".join(f"{number} {what}" for what, number in counts.items())
        if outcome.code != 0:
            detail += "\n" + outcome.output[-TAIL:]
        self.phase("tests", outcome, detail)

    def check_memory(self, tool: str) -> None:
        """compute-sanitizer over small calls of every CUDA kernel."""
        sanitizer = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path="/usr/local/cuda/bin"
        )
        if sanitizer is None:
            self.report.add(Phase(tool, "not available", 0.0, "no compute-sanitizer"))
            return
        outcome = self.execute(
            [
                *(sanitizer, "--tool", tool, "--kernel-name", KERNELS),
                *("--report-api-errors", "no", "--error-exitcode", str(CHECKER_ERROR)),
                *(self.python, str(ROOT / "tests" / "gpu" / "operator_calls.py")),
            ],
            CHECKER_LIMIT,
            # Otherwise an access past a tensor lands in memory that torch keeps.
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        if outcome.code != 0 and any(text in outcome.output for text in CANNOT_CHECK):
            detail = outcome.output[-TAIL:]
            self.report.add(Phase(tool, "not available", outcome.seconds, detail))
            return
        summary = re.findall(r"ERROR SUMMARY.*|RACECHECK SUMMARY.*|ran \d+ calls", outcome.output)
        self.phase(tool, outcome, "; ".join(summary) if outcome.code == 0 else None)

    def benchmark(self, workload: str, compiled: bool) -> None:
        """One workload; compiled variants make a pass of their own, since compiling is slow."""
        path = self.scratch / f"{workload}-{compiled}.json"
        seconds = SECOND_PASS_SECONDS if compiled else FIRST_PASS_SECONDS
        command = [self.python, "-m", "calm_kernels", "bench", workload, "--device", "cuda"]
        command += ["--json", str(path), "--seconds", str(seconds)]
        command += [] if compiled else ["--skip", "compiled"]
        outcome = self.execute(command, self.left())
        measured = self.report.merge(path)
        detail = f"{measured} rows"
        if outcome.code not in (0, None):
            detail += "\n" + outcome.output[-TAIL:]
        self.phase(f"bench {workload}{' compiled' if compiled else ''}", outcome, detail)

    def run(self) -> int:
        """All phases; the exit code."""
        try:
            if not self.describe():
                return 2
            if self.build():
                self.test()
                for tool in CHECKERS:
                    self.check_memory(tool)
                for compiled in (False, True):
                    for workload in WORKLOADS:
                        if self.left() > SHORTEST_PHASE:
                            self.benchmark(workload, compiled)
            print(f"\n{self.report.summary()}")
            return int(self.report.failed())
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)


_LOADS = """
import sys, torch, calm_kernels
from calm_kernels import _native
assert calm_kernels.__file__.startswith(sys.argv[1]), calm_kernels.__file__
for name in ("cpu", "cuda"):
    assert _native.library(name).loaded, _native.library(name).problem
torch.cuda.synchronize()
print("torch", torch.__version__, "CUDA", torch.version.cuda, "Python", sys.version.split()[0])
"""


def architecture(capability: str) -> str:
    """TORCH_CUDA_ARCH_LIST for one compute capability, as csrc/build.json spells it."""
    known = json.loads((ROOT / "csrc" / "build.json").read_text())["cuda_architectures"]
    digits = capability.replace(".", "")
    suffix = next((arch.lstrip("0123456789") for arch in known if arch.rstrip("a") == digits), "")
    return capability + suffix


def commit() -> str:
    """The checkout's commit; ``unknown`` without git or repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=20
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def count_tests(path: Path) -> dict[str, int]:
    """Numbers of passed, failed and skipped tests from a JUnit file; zeros if there is none."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    try:
        suites = ElementTree.parse(path).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return counts
    for suite in suites:
        number = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
        failed = number["failures"] + number["errors"]
        counts["failed"] += failed
        counts["skipped"] += number["skipped"]
        counts["passed"] += number["tests"] - failed - number["skipped"]
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--python", default=sys.executable, help="interpreter to check with")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds in all")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    return Checker(arguments.python, arguments.output.resolve(), arguments.deadline).run()


if __name__ == "__main__":
    sys.exit(main())
