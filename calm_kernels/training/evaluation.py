"""Scoring models on held-out blocks, shared out among the processes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.progress import Reporter, SilentReporter
from calm_kernels.training.scores import (
    NGRAMS,
    AutoencoderResult,
    BrierResult,
    Floats,
    scored_tokens,
    summarize,
    unigram_brier,
)

AUTOENCODER_BATCH = 4096
"""Tokens a batch."""
BRIER_BATCH = 4096
"""Tokens times samples a batch: bounds the memory of candidates decoded at once."""


def _batches(indices: list[int], size: int) -> Iterator[tuple[int, list[int], bool]]:
    """This process's batches of block indices, each with its place in the whole list.

    The last item says whether the batch counts: every process gets as many, because they gather
    sharded weights together, and those that have run out repeat the last one.
    """
    rank, world = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    starts = range(0, len(indices), size)
    for number in range(rank, rank + len(starts), world):
        start = starts[min(number, len(starts) - 1)]
        yield start, indices[start : start + size], number < len(starts)


def _summed(values: Floats, device: torch.device) -> Floats:
    """Sums over all processes; every process gets them."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = torch.from_numpy(values).to(device)
    dist.all_reduce(total)
    result: Floats = total.cpu().numpy()
    return result


def _stack(blocks: PackedBlocks, indices: list[int], device: torch.device) -> Tensor:
    return torch.stack([blocks.block(index) for index in indices]).to(device)


def evaluate_autoencoder(
    model: Any, blocks: PackedBlocks, count: int, *, reporter: Reporter | None = None
) -> AutoencoderResult:
    """Token accuracy and cross entropy of ``count`` blocks spread over the held-out text.

    Args:
        model: an ``Autoencoder`` in evaluation mode.
        blocks: held-out blocks.
        count: number of blocks, all if there are fewer.
        reporter: told about the progress.
    """
    reporter = reporter or SilentReporter()
    indices = blocks.spread(count)
    totals = np.zeros(3)
    reporter.begin("evaluating the autoencoder", len(indices))
    size = max(1, AUTOENCODER_BATCH // blocks.block_length)
    for start, chosen, counts in _batches(indices, size):
        ids = _stack(blocks, chosen, model.device)
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
        tokens = ids.numel()
        correct = round(float(output.token_accuracy) * tokens)
        if counts:
            totals += (correct, float(output.loss) * tokens, tokens)
        reporter.step(start + len(chosen))
    reporter.end()
    right, loss, count_of_tokens = _summed(totals, model.device).tolist()
    return AutoencoderResult(right / count_of_tokens, loss / count_of_tokens, int(count_of_tokens))


def evaluate_brier(
    model: Any,
    blocks: PackedBlocks,
    count: int,
    *,
    num_samples: int,
    seed: int,
    stride: int | None = None,
    reporter: Reporter | None = None,
) -> BrierResult:
    """BrierLM of ``count`` blocks spread over the held-out text.

    Args:
        model: an ``EnergyTransformer`` or ``AutoregressiveBaseline`` in evaluation mode.
        blocks: held-out blocks.
        count: number of blocks, all if there are fewer.
        num_samples: draws a position.
        seed: of the draws; the result does not depend on the number of processes.
        stride: tokens from one scored position to the next; the model's patch size if None.
        reporter: told about the progress.
    """
    reporter = reporter or SilentReporter()
    indices = blocks.spread(count)
    sums = np.zeros((len(indices), NGRAMS + 1))
    size = max(1, BRIER_BATCH // (blocks.block_length * num_samples))
    reporter.begin("evaluating BrierLM", len(indices))
    for start, chosen, counts in _batches(indices, size):
        ids = _stack(blocks, chosen, model.device)
        with torch.no_grad():
            scores = _block_sums(model, ids, num_samples, seed + start, stride)
        if counts:
            sums[start : start + len(chosen)] = scores
        reporter.step(start + len(chosen))
    reporter.end()
    sums = _summed(sums, model.device)
    return summarize(sums[:, :NGRAMS], sums[:, NGRAMS].astype(np.int64), num_samples)


def _block_sums(model: Any, ids: Tensor, num_samples: int, seed: int, stride: int | None) -> Floats:
    """Sums of Brier-1..4 over each block's positions, and how many counted, [B, 5]."""
    result = model.evaluate_brier(ids, num_samples=num_samples, seed=seed, stride=stride)
    sums = torch.zeros(len(ids), NGRAMS + 1, dtype=torch.float64)
    rows = result.positions[:, 0].cpu()
    sums[:, :NGRAMS].index_add_(0, rows, result.scores.double().cpu())
    sums[:, NGRAMS] = torch.bincount(rows, minlength=len(ids))
    array: Floats = sums.numpy()
    return array


def evaluate_unigram(
    frequencies: Floats, blocks: PackedBlocks, count: int, stride: int
) -> BrierResult:
    """The unigram model's exact scores on the blocks and positions that models are scored on.

    ``stride``: tokens from one position to the next, the patch size for a model's own positions.
    """
    ids = np.stack([blocks.block(index).numpy() for index in blocks.spread(count)])
    return unigram_brier(frequencies, scored_tokens(ids, stride))
