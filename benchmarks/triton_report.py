"""Compile every Triton kernel without a GPU; registers, spills, matrix instructions as a table.

python benchmarks/triton_report.py [--markdown docs/triton_report.md]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import triton

from calm_kernels.triton import ahead_of_time

PREFACE = """# Triton kernels, compiled ahead of time

Made by `python benchmarks/triton_report.py --markdown docs/triton_report.md` with triton {version};
no GPU takes part. The test run compiles the same instances, fails on a spill or a missing matrix
instruction, and prints this table.

Registers are a thread's, shared bytes a program's. wgmma, mma and copies are counted in the PTX,
where a loop's body stands once.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to FILE")
    options = parser.parse_args()
    rows = [ahead_of_time.measure(each) for each in ahead_of_time.specializations()]
    table = ahead_of_time.markdown(rows)
    print(table, end="")
    if options.markdown is not None:
        preface = PREFACE.format(version=triton.__version__)
        options.markdown.write_text(preface + table, encoding="utf-8")
    sys.exit(1 if any(row.problems() for row in rows) else 0)


if __name__ == "__main__":
    main()
