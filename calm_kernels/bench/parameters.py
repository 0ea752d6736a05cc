"""Random parameters for modules that are measured."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def draw_parameters(
    module: _Module, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> _Module:
    """Every parameter from the generator, none at a special value: no zeros, no unit norms.

    Matrices with variance 1 / fan-in, norm weights around one, biases around zero.
    """
    module.to(device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))
    return module
