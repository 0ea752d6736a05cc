from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from calm_kernels.bench import report
from calm_kernels.bench.conditions import COMMIT_VARIABLE, commit, conditions
from calm_kernels.bench.plots import plot
from calm_kernels.bench.rows import Row, load, parse, record
from calm_kernels.training.errors import UserError

LIMITS = {"copy_gb_per_s": 40.0, "matmul_float32_tflop_per_s": 0.1}
PNG, SVG = b"\x89PNG", b"<?xml"


def row(variant: str, median: float | None = 2e-3, **fields) -> Row:
    values = {
        "role": "native", "shape": {"P": 8, "T": 0.5}, "dtype": "float32", "device": "cpu",
        "threads": 2, "error": 1e-7, "bound": 1e-5, "measure": "relative", "median": median,
        "p20": median, "p80": median, "count": 9, "memory": 3 << 20, "bytes": 1000,
        "operations": 2000,
    }  # fmt: skip
    return Row("energy", variant, **{**values, **fields})


@pytest.fixture
def context() -> dict:
    return conditions(torch.device("cpu"), 7)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234, "1.23 s"), (0.99951, "1 s"), (0.0123, "12.3 ms"), (4.5678e-5, "45.7 µs"),
        (9.996e-4, "1 ms"), (1e-8, "0.01 µs"), (1234.5, "1234 s"), (None, ""),
    ],
)  # fmt: skip
def test_durations_have_three_digits_and_a_unit(seconds: float | None, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 KiB"), (1 << 20, "1 MiB"), (1023 << 10, "1023 KiB"), (5 << 29, "2.5 GiB"), (None, "")],
)
def test_sizes_have_three_digits_and_a_unit(count: int | None, text: str) -> None:
    assert report.size(count) == text


def test_the_table_names_a_case_once_and_leaves_out_empty_columns() -> None:
    rows = [row("eager"), row("native"), row("native", shape={"P": 9})]
    columns, cells = report.table(rows)
    assert columns[:3] == ["workload", "variant", "error"]
    assert not {"graph", "× eager", "rate"} & set(columns)
    assert [line[0] for line in cells] == [
        "energy P=8 T=0.5 float32", "", "energy P=9 float32",
    ]  # fmt: skip
    assert all(len(line) == len(columns) for line in cells)


def test_a_row_that_is_not_ok_shows_its_status_in_place_of_a_time() -> None:
    wrong = row("native", None, status="FAIL", note="error 1 past its bound")
    columns, (line,) = report.table([wrong])
    assert line[columns.index("median")] == "FAIL"
    assert report.remarks([wrong, wrong]) == ["energy native: FAIL error 1 past its bound"]
    assert report.remarks([row("native", note="no CUDA graph: x")]) == [
        "energy native: no CUDA graph: x"
    ]
    assert report.remarks([row("native")]) == []


def test_the_markdown_holds_conditions_and_every_row(context: dict) -> None:
    text = report.markdown([row("eager"), row("a|b")], context, LIMITS)
    assert context["torch"] in text
    assert "copy 40 GB/s" in text and "matmul float32 0.1 TFLOP/s" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_a_record_comes_back_as_it_was(tmp_path: Path, context: dict) -> None:
    rows = [row("eager", error=math.inf), row("native", None, status="FAIL", sweep="P")]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record(rows, context, LIMITS), allow_nan=False))
    loaded, found = load(path)
    assert loaded == rows
    assert found == context


def test_a_nan_survives_the_record(context: dict) -> None:
    content = json.dumps(record([row("eager", error=math.nan)], context, {}), allow_nan=False)
    (parsed,) = parse(json.loads(content)["rows"])
    assert math.isnan(parsed.error)


def test_every_row_of_a_record_carries_its_conditions(context: dict) -> None:
    content = record([row("eager")], context, LIMITS)
    assert content["limits"] == LIMITS
    (found,) = content["rows"]
    wanted = {
        "workload", "variant", "shape", "dtype", "device", "threads", "torch", "triton", "driver",
        "commit", "date", "error", "bound", "measure", "median", "p20", "p80", "memory",
    }  # fmt: skip
    assert wanted <= set(found)
    assert found["torch"] == torch.__version__


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for content in ({"schema": 0, "rows": []}, [1]):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="expected a benchmark record"):
            load(path)


def test_conditions_say_what_was_measured_where(context: dict) -> None:
    assert context["threads"] == torch.get_num_threads()
    assert context["seed"] == 7
    assert {"date", "commit", "triton", "driver", "device_name", "load_average"} <= set(context)
    json.dumps(context, allow_nan=False)


def test_the_commit_can_be_named_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, "abc")
    assert commit() == "abc"


def test_plots_of_cases_and_of_growth_are_written(tmp_path: Path) -> None:
    growth = [
        row(name, 1e-3 * size, sweep="P", shape={"P": size, "N": 2}, memory=memory, role=role)
        for name, role, memory in (("eager", "eager", 1 << 22), ("native/a", "native", 0))
        for size in (8, 16, 32)
    ]
    cases = [row("eager", role="eager"), row("native"), row("wrong", None, status="FAIL")]
    for rows, name in ((growth, "growth.png"), (cases, "cases.svg"), ([], "empty.png")):
        plot(rows, tmp_path / name, "conditions")
        content = (tmp_path / name).read_bytes()
        assert content.startswith(PNG if name.endswith("png") else SVG)
        assert len(content) > 1000
    assert (tmp_path / "growth.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


def test_a_plot_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.png, \.svg, \.pdf"):
        plot([], tmp_path / "plot.txt", "")
