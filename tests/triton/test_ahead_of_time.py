"""Every instance of every Triton kernel compiles without a GPU, into what it was written for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest

from calm_kernels.triton import ahead_of_time
from calm_kernels.triton.specialization import Specialization

INSTANCES = ahead_of_time.specializations()


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda each: f"{each.name} {each.capability}")
def test_a_kernel_compiles_without_spills_and_with_matrix_instructions(
    instance: Specialization, record_property: Callable[[str, object], None]
) -> None:
    resources = ahead_of_time.measure(instance)
    # Printed as a table at the end of the run: tests/conftest.py.
    record_property("triton_resources", json.dumps(dataclasses.asdict(resources)))
    assert not resources.problems()


GOOD = ahead_of_time.Resources(
    "kernel", "sm_90a", 8, 200, 0, 1024, 4, 0, 4, 0, serialized=False, tensor_cores=True
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spill_bytes": 8}, "8 bytes of spills"),
        ({"serialized": True}, "serialised"),
        ({"warps": 16}, "more registers"),
        ({"shared_bytes": 240 * 1024}, "more shared memory"),
        ({"wgmma": 0, "mma": 4}, "no matrix instruction"),
        ({"target": "sm_80"}, "no matrix instruction"),
    ],
)
def test_each_fault_is_told(change: dict[str, object], problem: str) -> None:
    assert GOOD.problems() == []
    assert problem in dataclasses.replace(GOOD, **change).problems()[0]
    assert problem in ahead_of_time.markdown([dataclasses.replace(GOOD, **change)])


def test_spills_are_read_from_the_assembler() -> None:
    instance = next(each for each in INSTANCES if each.tensor_cores and each.capability == 80)
    ptx, _ = ahead_of_time.compile_ptx(instance)
    crowded = ptx.replace(".reqntid", ".maxnreg 64\n.reqntid", 1)
    assert ahead_of_time.spilled_bytes(ahead_of_time.assemble(ptx, "sm_80")) == 0
    assert ahead_of_time.spilled_bytes(ahead_of_time.assemble(crowded, "sm_80")) > 0
