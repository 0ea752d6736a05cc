"""What the processes of test_vocabulary_parallel.py run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import calm_kernels


def bounds(rank: int, world: int, vocab_size: int) -> slice:
    """Shards of different sizes: the last process has what is left."""
    size = vocab_size // world + 1
    return slice(rank * size, min((rank + 1) * size, vocab_size))


def argmax(rank: int, world: int, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    own = bounds(rank, world, weight.shape[0])
    return calm_kernels.vocabulary_parallel_linear_argmax(
        hidden, weight[own], None if bias is None else bias[own], vocab_start=own.start
    )


def cross_entropy(rank: int, world: int, call: dict[str, Any], grad: Tensor | None) -> list[Tensor]:
    """Loss, gradients of hidden and of the own rows of weight and bias."""
    call = dict(call)
    backend = call.pop("backend")
    own = bounds(rank, world, call["weight"].shape[0])
    hidden = call.pop("hidden").requires_grad_()
    weight = call.pop("weight")[own].clone().requires_grad_()
    bias = call.pop("bias")
    bias = None if bias is None else bias[own].clone().requires_grad_()
    with calm_kernels.backend(backend):
        loss = calm_kernels.vocabulary_parallel_linear_cross_entropy(
            hidden, weight, bias=bias, vocab_start=own.start, **call
        )
        leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
        grads = torch.autograd.grad(loss, leaves, grad)
    return [loss.detach(), *grads]
