"""Builds the two native libraries; everything else is in pyproject.toml.

``CALM_KERNELS_BUILD`` chooses: ``auto`` (the default: CPU, and CUDA when a toolkit is found),
``cpu``, ``cuda`` (both, and fail without a toolkit) or ``none`` (pure Python).
``TORCH_CUDA_ARCH_LIST`` names the GPU architectures; no device is ever asked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
SETTINGS = json.loads((ROOT / "csrc" / "build.json").read_text())
CHOICES = ("auto", "cpu", "cuda", "none")


def fail(problem: str, fix: str) -> None:
    sys.exit(
        f"\ncalm_kernels: {problem}.\n  Fix: {fix}\n"
        "  Or install without native libraries: CALM_KERNELS_BUILD=none pip install ...\n"
    )


def cuda_root() -> Path | None:
    """The CUDA toolkit's root: what the environment says, else what nvcc itself reports."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        root = os.environ.get(variable)
        if root and (Path(root) / "bin" / "nvcc").exists():
            return Path(root)
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # nvcc on PATH may be a wrapper or a link; its dry run names the root that it uses.
        run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True
        )
        match = re.search(r"^#\$ TOP=(.+)$", run.stderr, flags=re.MULTILINE)
        if match and (Path(match[1].strip()) / "bin" / "nvcc").exists():
            return Path(match[1].strip()).resolve()
    default = Path("/usr/local/cuda")
    return default if (default / "bin" / "nvcc").exists() else None


def compiler_works() -> bool:
    command = os.environ.get("CXX", "c++").split()
    return shutil.which(command[0]) is not None


def extension(name: str, cuda_lib: Path | None) -> Extension:
    from torch.utils import cpp_extension

    definitions = SETTINGS["definitions"] + (SETTINGS["cuda_definitions"] if cuda_lib else [])
    defines = [f"-D{definition}" for definition in definitions]
    # Linked even where the build's torch defines no symbol that is used: the CUDA library's live in
    # libtorch_cuda, which a CUDA build of torch brings in through libtorch.
    link = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    library_dirs = cpp_extension.library_paths()
    if cuda_lib is not None:
        library_dirs = [*library_dirs, str(cuda_lib)]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        link.append("-Wl,--exclude-libs,libcudart_static.a")
    return Extension(
        f"calm_kernels._{name}",
        sources=SETTINGS["libraries"][name],
        depends=[
            str(path.relative_to(ROOT))
            for path in (ROOT / "csrc").rglob("*")
            if path.suffix in (".h", ".cuh", ".json")
        ],
        include_dirs=[str(ROOT / path) for path in SETTINGS["include"]]
        + cpp_extension.include_paths(),
        library_dirs=library_dirs,
        extra_compile_args={
            "cxx": SETTINGS["cxx_flags"] + defines,
            "nvcc": SETTINGS["cuda_flags"] + defines,
        },
        extra_link_args=link,
        language="c++",
        py_limited_api=True,
    )


def native_build() -> dict[str, object]:
    choice = os.environ.get("CALM_KERNELS_BUILD", "auto")
    if choice not in CHOICES:
        fail(f"CALM_KERNELS_BUILD={choice!r} is not one of {', '.join(CHOICES)}", "choose one")
    # Metadata and source distributions need no compiler and no torch.
    if choice == "none" or {"egg_info", "sdist", "dist_info"} & set(sys.argv[1:2]):
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError:
        fail(
            "building the native libraries needs torch in the build environment",
            "pip install 'torch>=2.10', or leave out --no-build-isolation",
        )
    if not compiler_works():
        fail(
            f"no C++ compiler found ({os.environ.get('CXX', 'c++')})",
            "apt-get install g++, or set CXX to a C++20 compiler",
        )
    extensions = [extension("cpu", None)]
    root = cuda_root() if choice in ("auto", "cuda") else None
    if choice == "cuda" and root is None:
        fail("CALM_KERNELS_BUILD=cuda, but no CUDA toolkit was found", "set CUDA_HOME to its root")
    if root is not None:
        # Under a CPU build of torch, cpp_extension ignores CUDA_HOME, though the stable headers
        # are all that the CUDA sources need.
        cpp_extension.CUDA_HOME = str(root)
        os.environ.setdefault(
            "TORCH_CUDA_ARCH_LIST",
            ";".join(
                re.sub(r"(\d)(a?)$", r".\1\2", arch) for arch in SETTINGS["cuda_architectures"]
            )
            + "+PTX",
        )
        lib = next(
            (p for p in (root / "lib64", root / "lib") if (p / "libcudart_static.a").exists()),
            None,
        )
        if lib is None:
            fail(f"no libcudart_static.a under {root}", "install the CUDA runtime's static library")
        extensions.append(extension("cuda", lib))

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                fail(
                    f"compiling the native libraries failed: {str(error).splitlines()[0]}",
                    "read the compiler's first error above; a C++20 compiler (g++ >= 11) and, for "
                    "CUDA, nvcc >= 12.4 are needed; CALM_KERNELS_BUILD=cpu leaves CUDA out",
                )

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        # No Python symbol is used: one library serves every Python >= 3.10.
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native_build())
