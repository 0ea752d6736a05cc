"""The operators: contract, checks, dispatch. Importing this package defines their schemas."""

from calm_kernels.ops.brier import brier_lm, brier_scores

__all__ = [
    "brier_lm",
    "brier_scores",
]
