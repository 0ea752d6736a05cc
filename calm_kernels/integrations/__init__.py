"""Fast parts for models of other packages."""

from calm_kernels.integrations.apply import apply_calm_kernels, remove_calm_kernels
from calm_kernels.integrations.report import Entry, Report

__all__ = ["Entry", "Report", "apply_calm_kernels", "remove_calm_kernels"]
