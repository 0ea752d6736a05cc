"""linear_argmax on a GPU: ties, NaN, splits of the vocabulary, long weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import calm_kernels
from calm_kernels import _dispatch
from calm_kernels.ops.linear_argmax import linear_argmax

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 64, 65, 800]
NAN = float("nan")


@pytest.fixture(params=["triton", "reference"], autouse=True)
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    problem = _dispatch.operators()["linear_argmax"].why_not(request.param, "cuda")
    if problem is not None:
        pytest.skip(problem)
    with calm_kernels.backend(request.param):
        yield request.param


def operands(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(rows + vocab)
    h = torch.randn(rows, hidden, generator=generator, device=device)
    w = torch.randn(vocab, hidden, generator=generator, device=device) * hidden**-0.5
    return h.to(dtype), w.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [*ROWS, 6401])
@pytest.mark.parametrize(("vocab", "hidden"), [(128257, 512), (5003, 520), (300, 37), (100, 64)])
def test_the_chosen_logit_is_the_largest(
    rows: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> None:
    h, w = operands(rows, vocab, hidden, dtype, device)
    index, value = linear_argmax(h, w, return_max=True)
    for some in torch.arange(rows, device=device).split(256):
        exact = h[some].double() @ w.double().t()
        best = exact.amax(1)
        chosen = exact.gather(1, index[some].unsqueeze(1)).squeeze(1)
        assert float((best - chosen).max()) < 1e-5
        torch.testing.assert_close(value[some].double(), chosen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
def test_ties_go_to_the_lowest_index_across_tiles_and_splits(
    rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    vocab = 128257
    h, w = operands(rows, vocab, 64, dtype, device)
    w *= 0.1
    generator = torch.Generator().manual_seed(rows)
    low = torch.randint(0, vocab - 1, (rows,), generator=generator).unique()
    high = low + 1
    high[::3] = vocab - 1
    for row, (first, second) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        w[[first, second]] = h[row]
    index = linear_argmax(h, w).cpu()
    expected = (h.float() @ w.float().t()).argmax(1).cpu()
    ties = torch.arange(len(low))[:: max(1, len(low) // 40)]
    for row in ties.tolist():
        # A later pair may have overwritten this one's.
        if torch.equal(w[low[row]], h[row]):
            assert int(index[row]) == int(low[row])
    assert (index == expected).float().mean() > 0.95
    assert not linear_argmax(torch.zeros_like(h), w).any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("position", [0, 255, 256, 70000, 128256])
def test_the_first_nan_wins(
    position: int, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    h, w = operands(rows, 128257, 64, dtype, device)
    h[:, 0] = 1.0
    w[position:, 0][::4999] = NAN
    w[5:7, 0] = torch.inf
    w[position, 0] = NAN
    assert linear_argmax(h, w).tolist() == [position] * rows


def test_weights_of_more_than_2_to_the_31_numbers(device: torch.device, forced: str) -> None:
    vocab, hidden = 2**20, 2056
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    w = torch.zeros(vocab, hidden, device=device, dtype=torch.bfloat16)
    assert w.numel() > 2**31
    h = torch.ones(130, hidden, device=device, dtype=torch.bfloat16)
    w[-2, -1] = 1.0
    assert linear_argmax(h, w).tolist() == [vocab - 2] * 130
    assert linear_argmax(h[:3], w).tolist() == [vocab - 2] * 3


def test_no_tensor_of_logits_is_made(device: torch.device, forced: str) -> None:
    h, w = operands(6400, 128257, 512, torch.bfloat16, device)
    linear_argmax(h, w)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_argmax(h, w)
    assert torch.cuda.max_memory_allocated() - before < 6400 * 128257 * 2 / 50
