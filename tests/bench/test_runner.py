from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from calm_kernels import _dispatch
from calm_kernels.bench.limits import Limits
from calm_kernels.bench.rows import Row, failed, with_ratios
from calm_kernels.bench.runner import poison, prepare_case, run, run_case

LIMITS = Limits(torch.device("cpu"), quick=True)


def square(inputs):
    return inputs["x"] ** 2


def row(variant: str, role: str, median: float | None) -> Row:
    return Row("w", variant, role, {"P": 1}, "float32", "cpu", 1, median=median)


def test_a_right_variant_is_timed_beside_its_error(make_workload, make_case, plan) -> None:
    workload = make_workload()
    (found,) = run_case(workload, make_case(workload), plan, LIMITS)
    assert found.status == "ok"
    assert found.error is not None and found.error <= found.bound
    assert 0 < found.p20 <= found.median <= found.p80
    assert found.count >= 3
    assert found.gb_per_s == pytest.approx(16 * 64 / found.median * 1e-9)
    assert found.limit_percent > 0
    assert found.limit_by in ("copy", "matmul")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda inputs: inputs["x"] ** 2 * 1.001,
        lambda inputs: inputs["x"].abs(),
        lambda inputs: torch.full_like(inputs["x"], math.nan),
        lambda inputs: inputs["x"][:-1] ** 2,
        lambda inputs: torch.cat((inputs["x"][:-1] ** 2, inputs["x"].new_empty(1).fill_(math.nan))),
    ],
    ids=["scaled", "another function", "NaN", "too short", "one entry not written"],
)
@pytest.mark.parametrize("role", ["native", "compiled"])
def test_a_wrong_variant_fails_and_is_not_timed(
    wrong, role, make_workload, make_variant, make_case, plan
) -> None:
    workload = make_workload(
        make_variant("plain", square, "eager"), make_variant("wrong", wrong, role)
    )
    right, planted = run_case(workload, make_case(workload), plan, LIMITS)
    assert right.status == "ok"
    assert planted.status == "FAIL"
    assert planted.median is None and planted.memory is None and planted.times_eager is None
    assert "past its bound" in planted.note
    assert failed([right, planted]) == [planted]


@pytest.mark.parametrize(("role", "status"), [("native", "FAIL"), ("peer", "error")])
@pytest.mark.parametrize("where", ["prepare", "call"])
def test_a_variant_that_raises_fails_if_it_is_this_packages(
    role, status, where, make_workload, make_variant, make_case, plan
) -> None:
    def broken(_):
        raise RuntimeError("no such kernel\nand more")

    planted = make_variant("broken", broken, role)
    if where == "prepare":
        planted = dataclasses.replace(planted, prepare=broken)
    workload = make_workload(planted, make_variant("plain", square, "eager"))
    found, right = run_case(workload, make_case(workload), plan, LIMITS)
    assert (found.status, found.median) == (status, None)
    assert found.note == "RuntimeError: no such kernel"
    assert right.status == "ok"


def test_running_out_of_memory_is_said_in_three_words(
    make_workload, make_variant, make_case, plan
) -> None:
    def greedy(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    workload = make_workload(make_variant("plain", greedy, "eager"))
    (found,) = run_case(workload, make_case(workload), plan, LIMITS)
    assert (found.status, found.note) == ("error", "out of memory")


def test_what_cannot_run_here_is_skipped_with_the_reason(
    make_workload, make_variant, make_case, plan
) -> None:
    workload = make_workload(
        make_variant("peer", square, "peer", missing=lambda case: "not installed"),
        make_variant("triton", square, "triton", backend="triton", operators=("brier_scores",)),
    )
    peer, triton = run_case(workload, make_case(workload), plan, LIMITS)
    assert (peer.status, peer.note) == ("skipped", "not installed")
    assert triton.status == "skipped"
    assert triton.note.startswith("brier_scores: ")


def test_a_variant_runs_under_its_backend_and_leaves_it(
    make_workload, make_variant, make_case, plan
) -> None:
    seen = []

    def call(inputs):
        seen.append(_dispatch.current_backend())
        return square(inputs)

    workload = make_workload(make_variant("forced", call, backend="reference"))
    run_case(workload, make_case(workload), plan, LIMITS)
    assert set(seen) == {"reference"}
    assert _dispatch.current_backend() == "auto"


def test_timed_calls_alternate_between_variants_and_rotate_inputs(
    make_workload, make_variant, make_case, plan
) -> None:
    calls: list[tuple[str, int]] = []

    def recorded(name):
        def call(inputs):
            calls.append((name, inputs["x"].data_ptr()))
            return square(inputs)

        return call

    workload = make_workload(*(make_variant(name, recorded(name)) for name in "abc"))
    case = make_case(workload)
    prepared = prepare_case(workload, case, plan)
    assert len(prepared.input_sets) > 2
    calls.clear()
    run_case(workload, case, plan, LIMITS)
    checks_and_warm_up, memory = 3 * (1 + 2), 3
    timed = calls[checks_and_warm_up:-memory]
    rounds = [name for i, (name, _) in enumerate(timed) if i == 0 or timed[i - 1][0] != name]
    assert "".join(rounds) == "abcbcacab"
    assert all(a[1] != b[1] for a, b in itertools.pairwise(timed))


def test_the_seed_decides_the_inputs(make_workload, make_case, plan) -> None:
    workload = make_workload()
    case = make_case(workload)

    def inputs(seed):
        sets = prepare_case(workload, case, dataclasses.replace(plan, seed=seed)).input_sets
        return torch.stack([each["x"] for each in sets])

    assert torch.equal(inputs(5), inputs(5))
    assert not torch.equal(inputs(5), inputs(6))


def test_torchs_own_generator_does_not_repeat_the_inputs(
    make_workload, make_variant, make_case, plan
) -> None:
    drawn = []

    def call(inputs):
        drawn.append(torch.randn(64, dtype=torch.float64))
        return square(inputs)

    workload = make_workload(make_variant("draws", call))
    prepared = prepare_case(workload, make_case(workload), plan)
    assert not torch.allclose(drawn[0], prepared.input_sets[0]["x"])


def test_results_are_overwritten_after_the_check(
    make_workload, make_variant, make_case, plan
) -> None:
    kept = []

    def call(inputs):
        kept.append(square(inputs))
        return kept[-1]

    workload = make_workload(make_variant("keeps", call))
    prepare_case(workload, make_case(workload), plan)
    assert kept[0].isnan().all()


def test_poison_reaches_every_dtype() -> None:
    outputs = (
        torch.zeros(3, requires_grad=True) * 1.0,
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.bool),
        None,
    )
    poison(outputs)
    assert outputs[0].isnan().all() and outputs[1].isnan().all()
    assert (outputs[2] == -(2**63)).all() and outputs[3].all()


def test_a_plan_can_name_variants_and_leave_some_out(make_workload, make_variant, plan) -> None:
    workload = make_workload(
        *(make_variant(name, square) for name in ("eager", "native/a", "native/b"))
    )

    def names(**fields):
        (rows,) = run(workload, dataclasses.replace(plan, **fields), LIMITS)
        return [each.variant for each in rows]

    assert names() == ["eager", "native/a", "native/b"]
    assert names(variants=("native",)) == ["native/a", "native/b"]
    assert names(variants=("eager", "b")) == ["eager", "native/b"]
    assert names(skip=("a",)) == ["eager", "native/b"]


def test_a_sweep_names_its_size_in_every_row(make_workload, plan) -> None:
    cases = list(run(make_workload(size=64), dataclasses.replace(plan, growth=True), LIMITS))
    assert [rows[0].shape["P"] for rows in cases] == [16, 32, 64, 128, 256]
    assert {rows[0].sweep for rows in cases} == {"P"}


def test_speed_ups_are_ratios_of_medians() -> None:
    rows = with_ratios([
        row("eager", "eager", 8.0), row("compiled", "compiled", 2.0), row("native", "native", 0.5),
        row("slow", "reference", 16.0), row("wrong", "ours", None),
    ])  # fmt: skip
    assert [each.times_eager for each in rows] == [1.0, 4.0, 16.0, 0.5, None]
    assert [each.times_compiled for each in rows] == [0.25, 1.0, 4.0, 0.125, None]
    alone = with_ratios([row("native", "native", 0.5)])
    assert alone[0].times_eager is None


def test_limits_only_rise_and_apply_to_rows_again(monkeypatch) -> None:
    limits = Limits(torch.device("cpu"), quick=True)
    rates = iter([1e9, 4e9, 2e9])
    monkeypatch.setattr(limits, "_copy_rate", lambda: next(rates))
    monkeypatch.setattr(limits, "_matmul_rate", lambda unit: 1e12)
    bound = dataclasses.replace(row("native", "native", 1.0), bytes=10**9, operations=10**9)
    percent = []
    for _ in range(3):
        limits.measure("float32")
        percent.append(limits.apply([bound])[0].limit_percent)
    assert percent == [100.0, 25.0, 25.0]
    assert limits.apply([bound])[0].limit_by == "copy"
    heavy = dataclasses.replace(bound, operations=10**12)
    assert limits.apply([heavy])[0].limit_by == "matmul"
    assert limits.as_json() == {"copy_gb_per_s": 4.0, "matmul_float32_tflop_per_s": 1.0}
