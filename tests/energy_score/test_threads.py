"""The native kernels split positions over threads: the result must not know how many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from calm_kernels import backend, energy_score, energy_score_from_targets


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(form: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(5, 203, 33, generator=generator).requires_grad_()
    mean = torch.randn(203, 33, generator=generator).requires_grad_()
    log_std = (torch.randn(203, 33, generator=generator) - 1.0).requires_grad_()
    if form == "targets":
        sources = [samples, mean]
        score = energy_score_from_targets(samples, torch.stack([mean, mean + 1.0]))
    else:
        sources = [samples, mean, log_std]
        score = energy_score(
            samples, mean, log_std, alpha=1.3, estimator=form, num_targets=7, seed=11
        )
    return [score.detach(), *torch.autograd.grad(score.sum(), sources)]


@pytest.mark.parametrize("form", ["closed_form", "monte_carlo", "targets"])
def test_the_same_bits_for_any_number_of_threads(form: str) -> None:
    with backend("native"):
        torch.set_num_threads(1)
        alone = results(form)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for one, many in zip(alone, results(form), strict=True):
                assert torch.equal(one, many)
