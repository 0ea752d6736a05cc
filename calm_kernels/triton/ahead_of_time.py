"""Compiling every Triton kernel without a GPU, and what the machine code says of itself.

Each module of this folder that has ``specializations()`` takes part. Triton compiles an instance to
PTX; the ``ptxas`` that comes with Triton tells registers and spills, and the PTX is searched for
matrix instructions and asynchronous copies.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import sm_arch_from_capability
from triton.compiler import ASTSource

from calm_kernels.triton.specialization import Specialization

WARP_SIZE = 32
REGISTERS_PER_PROCESSOR = 65536
SHARED_BYTES = {"sm_80": 163 * 1024}
MOST_SHARED_BYTES = 227 * 1024
"""What one program may have; sm_90 and sm_100 unless named."""
_PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
_BLACKWELL = 100


@dataclass(frozen=True)
class Resources:
    """What one instance uses.

    Attributes:
        name, target: the instance and the architecture, e.g. ``"sm_90a"``.
        warps: per program.
        registers: per thread.
        spill_bytes: written to and read from memory for lack of registers, plus the stack.
        shared_bytes: per program.
        wgmma, mma: matrix instructions in the PTX: of a warpgroup, of a warp.
        bulk_copies, async_copies: by the tensor memory accelerator, by threads.
        serialized: whether the assembler had to order wgmma one by one.
        tensor_cores: whether matrix instructions are required.
    """

    name: str
    target: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    bulk_copies: int
    async_copies: int
    serialized: bool
    tensor_cores: bool

    def problems(self) -> list[str]:
        """What must not be; empty if all is well."""
        found = []
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes of spills or stack")
        if self.serialized:
            found.append("wgmma instructions are serialised")
        if self.registers * self.warps * WARP_SIZE > REGISTERS_PER_PROCESSOR:
            found.append("more registers than a processor has")
        if self.shared_bytes > SHARED_BYTES.get(self.target, MOST_SHARED_BYTES):
            found.append("more shared memory than a program may have")
        instructions = self.wgmma if self.target.startswith("sm_90") else self.mma
        if self.tensor_cores and not instructions:
            found.append("no matrix instruction of its architecture")
        return found


def kernel_modules() -> list[ModuleType]:
    """The modules of this folder that have kernels, imported, in the order of their names."""
    folder = str(Path(__file__).parent)
    names = sorted(info.name for info in pkgutil.iter_modules([folder]))
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    return [
        each for each in modules if hasattr(each, "specializations") and each.__name__ != __name__
    ]


def specializations() -> list[Specialization]:
    """The instances of every module."""
    found: list[Specialization] = [
        instance for module in kernel_modules() for instance in module.specializations()
    ]
    names = [(each.name, each.capability) for each in found]
    if len(set(names)) != len(names):
        raise ValueError(f"specializations: two share a name: {sorted(names)}")
    return found


def compile_ptx(instance: Specialization) -> tuple[str, int]:
    """PTX and bytes of shared memory of an instance."""
    names = list(instance.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in instance.aligned}
    source = ASTSource(
        instance.kernel, dict(instance.signature), dict(instance.constants), attributes
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", instance.capability, WARP_SIZE),
        options={"num_warps": instance.num_warps, "num_stages": instance.num_stages},
    )
    return compiled.asm["ptx"], compiled.metadata.shared


def assemble(ptx: str, target: str) -> str:
    """What ``ptxas`` says of a PTX text: registers, spills, performance warnings."""
    ptxas = _PTXAS
    if int("".join(re.findall(r"\d", target))) >= _BLACKWELL:
        ptxas = _PTXAS.with_name("ptxas-blackwell")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [str(ptxas), "-v", f"-arch={target}", str(source), "-o", str(source) + ".cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refused the kernel for {target}: {done.stderr}")
    return done.stderr + done.stdout


def _number(pattern: str, text: str) -> int:
    """Sum of the numbers that a pattern captures."""
    return sum(int(found) for found in re.findall(pattern, text))


def spilled_bytes(said: str) -> int:
    """Stack, spill stores and spill loads of one kernel, from what ``ptxas`` says."""
    return _number(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)


def measure(instance: Specialization) -> Resources:
    """Compile an instance and read what it uses."""
    ptx, shared_bytes = compile_ptx(instance)
    target = sm_arch_from_capability(instance.capability)
    said = assemble(ptx, target)
    return Resources(
        name=instance.name,
        target=target,
        warps=instance.num_warps,
        registers=_number(r"Used (\d+) registers", said),
        spill_bytes=spilled_bytes(said),
        shared_bytes=shared_bytes,
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        bulk_copies=len(re.findall(r"\bcp\.async\.bulk\.tensor", ptx)),
        async_copies=len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)),
        serialized="wgmma.mma_async instructions are serialized" in said,
        tensor_cores=instance.tensor_cores,
    )


_COLUMNS = {
    "name": "kernel",
    "target": "target",
    "warps": "warps",
    "registers": "registers",
    "spill_bytes": "spilled bytes",
    "shared_bytes": "shared bytes",
    "wgmma": "wgmma",
    "mma": "mma",
    "bulk_copies": "TMA copies",
    "async_copies": "async copies",
}
assert set(_COLUMNS) <= {each.name for each in fields(Resources)}


def markdown(rows: Sequence[Resources]) -> str:
    """A table of them; what is wrong stands behind it."""
    heading = [*_COLUMNS.values(), "verdict"]
    lines = [
        "| " + " | ".join(heading) + " |",
        "|---|---|" + "---:|" * (len(heading) - 3) + "---|",
    ]
    for row in sorted(rows, key=lambda row: (row.name, row.target)):
        cells = [str(getattr(row, name)) for name in _COLUMNS]
        lines.append("| " + " | ".join([*cells, "; ".join(row.problems()) or "ok"]) + " |")
    return "\n".join(lines) + "\n"
