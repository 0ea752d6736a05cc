"""The workloads; importing this registers them, in the order of the documentation."""

import importlib

MODULES = (
    "energy",
    "brier",
    "vote",
    "exact",
    "decode",
    "cross_entropy",
    "trained_cross_entropy",
    "ffn",
    "encode",
    "head",
    "ae_step",
    "lm_step",
    "generate",
)

for _name in MODULES:
    importlib.import_module(f"{__name__}.{_name}")
