from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from calm_kernels.bench import timing
from calm_kernels.bench.limits import Limits
from calm_kernels.bench.runner import Plan, run
from calm_kernels.bench.variants import call_of
from calm_kernels.bench.workload import (
    Case,
    Check,
    Inputs,
    Outputs,
    Variant,
    Workload,
    register,
    workloads,
)
from calm_kernels.bench.workloads import energy, exact, vote

CPU = torch.device("cpu")
NAMES = list(workloads())
QUICK = dataclasses.replace(timing.QUICK, seconds=0.05, min_rounds=1)


def inputs_of(workload: Workload, case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(2 * seed)
    torch.manual_seed(2 * seed + 1)
    state = workload.make_state(case, generator)
    return {**state, **workload.make_inputs(case, state, generator)}


def check_of(
    workload: Workload, variant: Variant, case: Case, inputs: Inputs, outputs: Outputs
) -> Check:
    answer = (variant.exact or workload.exact)(case, inputs)
    return (variant.check or workload.check)(case, inputs, outputs, answer)


def variant_of(workload: Workload, name: str) -> Variant:
    return next(variant for variant in workload.variants if variant.name == name)


def test_the_workloads_come_in_the_order_of_the_documentation() -> None:
    assert NAMES == [
        "energy", "brier", "vote", "exact", "decode", "ae-ce", "ae-ce-trained", "ffn", "encode",
        "head", "ae-step", "lm-step", "generate",
    ]  # fmt: skip


def test_the_official_shapes_are_those_of_the_paper() -> None:
    official = {
        (name, device): [dict(setting.shape) for setting in workload.settings[device]]
        for name, workload in workloads().items()
        for device in ("cpu", "cuda")
    }
    assert official["energy", "cpu"] == [{"P": 512, "N": 8, "M": 100, "D": 128}]
    assert official["energy", "cuda"] == [{"P": 8188, "N": 8, "M": 100, "D": 128}]
    assert official["brier", "cuda"] == [{"S": 8, "P": 8188, "K": 4}]
    assert [shape["R"] for shape in official["decode", "cuda"]] == [800, 6400, 51200]
    assert {shape["V"] for shape in official["decode", "cpu"]} == {128257}
    assert {shape["T"] for shape in official["vote", "cpu"]} == {0.5, 0.37}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_counts_bytes_and_operations(name: str) -> None:
    workload = workloads()[name]
    assert {"small", "cpu", "cuda"} <= set(workload.settings)
    assert workload.variants[0].role == "eager"
    for kind in ("small", "cpu", "cuda"):
        for setting in workload.settings[kind]:
            case = Case(name, setting.shape, setting.dtype, CPU)
            for cost in {v.cost or workload.cost for v in workload.variants}:
                assert cost(case).bytes > 0
                assert cost(case).operations > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_right_on_small_shapes(name: str) -> None:
    plan = Plan(CPU, size="small", skip=("compiled",), budget=QUICK, seed=3)
    ran = []
    for rows in run(workloads()[name], plan, Limits(CPU, quick=True)):
        for row in rows:
            assert row.status in ("ok", "skipped"), (row.variant, row.note)
            assert row.status == "ok" or row.note
            ran += [row.role] if row.status == "ok" else []
    assert {"eager"} < set(ran)


# The results of "exact" are random and not a function of its seed: its law has its own test.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "exact"])
def test_a_small_error_in_any_output_is_seen(name: str) -> None:
    workload = workloads()[name]
    case = workload.cases(CPU, "small")[-1]
    inputs = inputs_of(workload, case)
    chosen = [v for v in workload.variants if v.role in ("reference", "ours")]
    for variant in chosen:
        outputs = variant.prepare(case)(inputs)
        assert check_of(workload, variant, case, inputs, outputs).passed
        parts = list(outputs) if isinstance(outputs, tuple) else [outputs]
        for i, part in enumerate(parts):
            planted = part.clone(memory_format=torch.contiguous_format)
            flat = planted.view(-1)
            if part.is_floating_point():
                flat[-1] += 0.02 * flat.norm()
            else:
                flat[-1] += 1
            wrong = (*parts[:i], planted, *parts[i + 1 :])
            check = check_of(workload, variant, case, inputs, wrong if len(parts) > 1 else planted)
            assert not check.passed, (variant.name, i, check)


def energy_case() -> tuple[Workload, Case, Inputs]:
    workload = workloads()["energy"]
    case = workload.cases(CPU, "small")[0]
    return workload, case, inputs_of(workload, case)


def planted_energy(change: Callable[[dict[str, Any]], None]) -> Check:
    """The check of the plain formulation on inputs that were tampered with."""
    workload, case, inputs = energy_case()
    wrong = dict(inputs)
    change(wrong)
    outputs = call_of(energy.plain, ("samples",))(wrong)
    return check_of(workload, variant_of(workload, "eager"), case, inputs, outputs)


def test_the_plain_energy_score_agrees_in_law_with_the_exact_one() -> None:
    assert planted_energy(lambda inputs: None).passed


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs.update(log_std=inputs["log_std"] + 0.3),
        lambda inputs: inputs.update(mean=inputs["mean"] + 0.1),
        lambda inputs: inputs.update(samples=inputs["samples"][:3].detach().requires_grad_()),
        lambda inputs: inputs.update(
            samples=inputs["samples"][[0, 1, 2, 0]].detach().requires_grad_()
        ),
    ],
    ids=["too wide a target", "a shifted target", "a sample left out", "a sample used twice"],
)
def test_the_law_of_the_energy_score_has_power(change: Callable[[dict[str, Any]], None]) -> None:
    assert not planted_energy(change).passed


def test_the_law_of_the_energy_score_sees_a_wrong_gradient() -> None:
    workload, case, inputs = energy_case()
    score, gradient = call_of(energy.plain, ("samples",))(inputs)
    eager = variant_of(workload, "eager")
    assert check_of(workload, eager, case, inputs, (score, gradient)).passed
    assert not check_of(workload, eager, case, inputs, (score, 0.8 * gradient)).passed


def test_the_exact_sampler_at_another_temperature_is_seen() -> None:
    workload = workloads()["exact"]
    case = Case("exact", {"B": 400, "K": 4, "T": 0.5}, torch.int64, CPU)
    inputs = inputs_of(workload, case)
    right = exact.plain(inputs)
    assert workload.check(case, inputs, right, workload.exact(case, inputs)).passed
    wrong = exact.plain({**inputs, "temperature": 1.0})
    assert not workload.check(case, inputs, wrong, workload.exact(case, inputs)).passed


def test_the_expected_draws_are_those_that_the_sampler_takes() -> None:
    workload = workloads()["exact"]
    case = Case("exact", {"B": 400, "K": 4, "T": 0.5}, torch.int64, CPU)
    _, num_draws, accepted = exact.operator(inputs_of(workload, case))
    assert accepted.all()
    mean, error = num_draws.double().mean(), num_draws.double().std() / math.sqrt(400)
    assert abs(float(mean) - exact.expected_draws(0.5)) < 5.0 * float(error)


def test_the_vote_that_ignores_the_temperature_is_seen() -> None:
    workload = workloads()["vote"]
    case = Case("vote", {"B": 300, "N": 50, "K": 2, "T": 0.5}, torch.int64, CPU)
    inputs = inputs_of(workload, case)
    laws = vote.exact_law(case, inputs)
    assert vote.check_in_law(case, inputs, vote.plain(inputs), laws).passed
    wrong = vote.plain({**inputs, "temperature": 1.0})
    assert not vote.check_in_law(case, inputs, wrong, laws).passed
    foreign = torch.full_like(wrong, -1)
    assert not vote.check_in_law(case, inputs, foreign, laws).passed


def planted_lm_step(change: Callable[[dict[str, Any]], None]) -> Check:
    """The check of the plain training step on inputs that were tampered with."""
    workload = workloads()["lm-step"]
    case = workload.cases(CPU, "small")[0]
    inputs = inputs_of(workload, case)
    wrong = {**inputs, "model": copy.deepcopy(inputs["model"])}
    change(wrong)
    eager = variant_of(workload, "eager")
    return check_of(workload, eager, case, inputs, eager.prepare(case)(wrong))


def test_the_plain_training_step_agrees_in_law_with_the_exact_one() -> None:
    assert planted_lm_step(lambda inputs: None).passed


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs["model"].ae_model.encoder.hidden_to_latent.bias.data.add_(0.2),
        lambda inputs: inputs.update(noise=inputs["noise"].roll(1, dims=1)),
        lambda inputs: inputs.update(noise=inputs["noise"][[0, 1, 2, 0]]),
    ],
    ids=["another target", "noise of another position", "a sample used twice"],
)
def test_the_law_of_the_training_step_has_power(change: Callable[[dict[str, Any]], None]) -> None:
    assert not planted_lm_step(change).passed


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs.update(temperature=1.0),
        lambda inputs: inputs.update(draws=19),
        lambda inputs: inputs.update(seed=inputs["seed"] + 1),
        lambda inputs: inputs.update(prompt=inputs["prompt"].roll(1, dims=1)),
    ],
    ids=["temperature", "draws", "seed", "prompt"],
)
def test_generation_with_another_argument_is_seen(
    change: Callable[[dict[str, Any]], None],
) -> None:
    workload = workloads()["generate"]
    case = workload.cases(CPU, "small")[0]
    inputs = inputs_of(workload, case)
    wrong = dict(inputs)
    change(wrong)
    ours = variant_of(workload, "ours")
    assert check_of(workload, ours, case, inputs, ours.prepare(case)(inputs)).passed
    assert not check_of(workload, ours, case, inputs, ours.prepare(case)(wrong)).passed


def test_inputs_are_random_and_differ_from_set_to_set() -> None:
    for workload in workloads().values():
        case = workload.cases(CPU, "small")[0]
        generator = torch.Generator().manual_seed(0)
        state = workload.make_state(case, generator)
        first, second = (workload.make_inputs(case, state, generator) for _ in range(2))
        for name, value in first.items():
            if isinstance(value, torch.Tensor):
                assert not torch.equal(value, second[name]), (workload.name, name)


def test_two_workloads_or_variants_of_one_name_are_refused(make_workload) -> None:
    with pytest.raises(ValueError, match="'energy' is taken"):
        register(make_workload(name="energy"))
    twice = make_workload().variants * 2
    with pytest.raises(ValueError, match="two variants share a name"):
        register(make_workload(*twice, name="twice"))
    assert list(workloads()) == NAMES


def test_a_variant_answers_to_its_name_and_to_either_part() -> None:
    variant = Variant("native/closed_form", "native", lambda case: lambda inputs: None)
    assert all(variant.answers_to(n) for n in ("native/closed_form", "native", "closed_form"))
    assert not any(variant.answers_to(n) for n in ("closed", "eager", ""))


def test_a_sweep_changes_one_size_and_keeps_the_others() -> None:
    workload = workloads()["energy"]
    sweeps: dict[str, list[int]] = {}
    for axis, case in workload.growth_cases(CPU, "official"):
        base = workload.growth.base["cpu"].shape
        assert {k: v for k, v in case.shape.items() if k != axis} == {
            k: v for k, v in base.items() if k != axis
        }
        sweeps.setdefault(axis, []).append(case.size(axis))
    assert set(sweeps) == {"P", "N", "M", "D"}
    assert sweeps["M"] == [25, 50, 100, 200, 400]
