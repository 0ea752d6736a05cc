from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import calm_kernels
from calm_kernels import _dispatch, _native
from calm_kernels.ops.patch_codec import (
    embed_flatten,
    expand_patches,
    folded_squeezed_gather,
    folded_table_gather,
    squeeze_patches,
    squeezed_tables,
)
from calm_kernels.reference.philox import Stream, uniform

OPERATORS = torch.ops.calm_kernels
BACKENDS = ["reference"]
if _native.serves("calm_kernels::embed_flatten", "cpu"):
    BACKENDS.append("native")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest):
    with calm_kernels.backend(request.param):
        yield request.param


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def token_ids(patches: int, patch_size: int, vocab: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (patches, patch_size), generator=generator)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("patches", "patch_size", "vocab", "hidden"),
    [(1, 1, 1, 1), (3, 4, 257, 8), (127, 5, 31, 7), (0, 4, 9, 8)],
)
def test_embed_flatten_puts_token_vectors_side_by_side(
    patches: int,
    patch_size: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype,
    ids_dtype: torch.dtype,
) -> None:
    ids, embedding = token_ids(patches, patch_size, vocab), normal(vocab, hidden, dtype=dtype)
    flat = embed_flatten(ids.to(ids_dtype), embedding)
    assert torch.equal(flat, embedding[ids].reshape(patches, patch_size * hidden))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_embedding_gradient_passes_gradcheck(dropout: float) -> None:
    ids, embedding = token_ids(6, 3, 5), normal(5, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda table: embed_flatten(ids, table, dropout=dropout, seed=3), embedding
    )


def test_dropped_tokens_are_those_that_the_stream_says() -> None:
    ids, embedding = token_ids(50, 6, 20), normal(20, 4).requires_grad_()
    for seed, dropout in ((0, 0.15), (7, 0.5), (2**40 + 1, 0.99)):
        u = uniform(torch.tensor([seed]), torch.arange(50), 6, Stream.TOKEN_DROPOUT)
        used = torch.where(u < dropout, 0, ids)
        assert 0 < (used != ids).sum() < ids.numel()
        flat = embed_flatten(ids, embedding, dropout=dropout, seed=seed)
        assert torch.equal(flat, embedding[used].flatten(1))
        grad_flat = normal(50, 24, seed=1)
        (grad,) = torch.autograd.grad(flat, embedding, grad_flat)
        expected = torch.zeros(20, 4, dtype=torch.float64)
        expected.index_add_(0, used.flatten(), grad_flat.reshape(-1, 4))
        torch.testing.assert_close(grad, expected)


def test_dropout_follows_the_seed_and_torchs_generator() -> None:
    ids, embedding = token_ids(50, 4, 20), normal(20, 4)

    def draw(seed: int | Tensor | None = None) -> Tensor:
        return embed_flatten(ids, embedding, dropout=0.5, seed=seed)

    assert torch.equal(draw(5), draw(torch.tensor([5])))
    assert not torch.equal(draw(5), draw(6))
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_16_bit_embedding_gradients_are_summed_in_float32() -> None:
    # 4096 ones summed in bfloat16 stall at 256.
    embedding = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    embed_flatten(torch.ones(1024, 4, dtype=torch.long), embedding).sum().backward()
    assert embedding.grad.tolist() == [[0, 0], [4096, 4096], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squeeze_and_expand_are_linear_layers_with_tokens_in_order(dtype: torch.dtype) -> None:
    patches, patch_size, hidden = 5, 3, 7
    flat = normal(patches, patch_size * hidden, dtype=dtype)
    weight, bias = normal(hidden, patch_size * hidden, dtype=dtype), normal(hidden, dtype=dtype)
    assert torch.equal(squeeze_patches(flat, weight, bias), linear(flat, weight, bias))

    x = normal(patches, hidden, dtype=dtype)
    weight, bias = normal(patch_size * hidden, hidden), normal(patch_size * hidden)
    tokens = expand_patches(x, weight.to(dtype), bias.to(dtype), patch_size)
    assert tokens.shape == (patches * patch_size, hidden)
    for p in range(patches):
        for k in range(patch_size):
            rows = slice(k * hidden, (k + 1) * hidden)
            expected = weight[rows] @ x[p].double() + bias[rows]
            tolerance = 8 * torch.finfo(dtype).eps * 7**0.5
            token = tokens[p * patch_size + k].double()
            torch.testing.assert_close(token, expected, rtol=tolerance, atol=tolerance)


def test_squeeze_and_expand_gradients_pass_gradcheck() -> None:
    squeeze = [normal(3, 8), normal(4, 8), normal(4)]
    expand = [normal(3, 4), normal(8, 4), normal(8)]
    assert torch.autograd.gradcheck(squeeze_patches, [t.requires_grad_() for t in squeeze])
    assert torch.autograd.gradcheck(
        lambda *t: expand_patches(*t, 2), [t.requires_grad_() for t in expand]
    )


@pytest.mark.parametrize("patch_size", [1, 2, 5])
def test_squeezed_tables_stand_for_gather_and_squeeze(patch_size: int) -> None:
    vocab, hidden, patches = 11, 6, 40
    table, bias = normal(vocab, hidden), normal(hidden)
    weight = normal(hidden, patch_size * hidden, seed=1)
    ids = token_ids(patches, patch_size, vocab)
    tables = squeezed_tables(table, weight)
    assert tables.shape == (patch_size, vocab, hidden)
    expected = squeeze_patches(embed_flatten(ids, table), weight, bias)
    result = folded_squeezed_gather(ids.int(), tables, bias)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(folded_table_gather(ids.int(), table), embed_flatten(ids, table))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tables_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    tables, bias = normal(8, 13, 6, dtype=dtype), normal(6, dtype=dtype)
    ids = token_ids(200, 8, 13)
    exact = bias.double() + sum(tables[k].double()[ids[:, k]] for k in range(8))
    result = folded_squeezed_gather(ids, tables, bias)
    assert result.dtype == dtype
    one_rounding = exact.abs() * torch.finfo(dtype).eps * 0.5001 + 1e-6
    assert ((result.double() - exact).abs() <= one_rounding).all()


def test_gathers_from_tables_have_no_gradient() -> None:
    tables, bias = normal(3, 5, 2).requires_grad_(), normal(2).requires_grad_()
    ids = token_ids(4, 3, 5)
    assert not folded_squeezed_gather(ids, tables, bias).requires_grad
    assert not folded_table_gather(ids, tables[0]).requires_grad


def test_autocast_casts_the_looked_up_vectors() -> None:
    ids, embedding = token_ids(4, 3, 5), normal(5, 2, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flat = embed_flatten(ids, embedding)
    assert torch.equal(flat, embedding.bfloat16()[ids].flatten(1))
    flat.sum().backward()
    assert embedding.grad.dtype == torch.float32


def zipf_ids(patches: int, patch_size: int, vocab: int) -> Tensor:
    """A few ids hold most of the tokens, as in text; some do not occur."""
    generator = torch.Generator().manual_seed(patches)
    return (torch.rand(patches, patch_size, generator=generator) ** 4 * vocab).long()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("patches", "hidden"), [(1, 5), (3, 64), (127, 33), (4097, 40)])
def test_errors_are_no_larger_than_those_of_torchs_formulation(
    patches: int, hidden: int, dtype: torch.dtype
) -> None:
    vocab, patch_size = 301, 4
    ids = zipf_ids(patches, patch_size, vocab)
    embedding = normal(vocab, hidden, dtype=dtype).requires_grad_()
    tables = normal(patch_size, vocab, hidden, dtype=dtype)
    bias, grad_flat = normal(hidden, dtype=dtype), normal(patches, patch_size * hidden, dtype=dtype)

    def torchs(embedding: Tensor, tables: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = torch.nn.functional.embedding(ids, embedding).flatten(1)
        (grad,) = torch.autograd.grad(flat, embedding, grad_flat.to(embedding.dtype))
        total = bias
        for k in range(patch_size):
            total = total + tables[k][ids[:, k]]
        return flat, grad, total

    flat = embed_flatten(ids, embedding)
    (grad,) = torch.autograd.grad(flat, embedding, grad_flat)
    results = (flat, grad, folded_squeezed_gather(ids, tables, bias))
    exact = torchs(embedding.detach().double().requires_grad_(), tables.double(), bias.double())
    for value, other, truth in zip(results, torchs(embedding, tables, bias), exact, strict=True):
        assert value.dtype == dtype and value.shape == truth.shape
        error, usual = ((t.double() - truth).norm() for t in (value, other))
        # Where torch's order of summation happens to give no error at all: one rounding.
        assert error <= 1.5 * usual or error <= torch.finfo(dtype).eps / 2 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("patches", "hidden", "patch_size"), [(3, 7, 1), (127, 300, 3), (0, 4, 2)])
def test_values_equal_the_reference_bitwise(
    patches: int, hidden: int, patch_size: int, dtype: torch.dtype
) -> None:
    vocab = 50
    ids = zipf_ids(patches, patch_size, vocab).int()
    tables = normal(patch_size, vocab, hidden, dtype=dtype)
    # Strided operands, as slices of larger ones are.
    wide_ids = torch.stack((ids, ids), dim=2)[:, :, 0]
    strided = torch.stack((tables, tables), dim=3)[..., 0]
    bias = normal(2 * hidden, dtype=dtype)[::2]
    results = []
    for name in (_dispatch.current_backend(), "reference"):
        with calm_kernels.backend(name):
            gathered = folded_squeezed_gather(wide_ids, strided, bias)
            results.append((gathered, embed_flatten(wide_ids, strided[0], dropout=0.2, seed=5)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("patches", [127, 4097])
def test_the_embedding_gradient_does_not_depend_on_threads(patches: int) -> None:
    ids, grad_flat = zipf_ids(patches, 4, 300), normal(patches, 4 * 24, dtype=torch.float32)
    used = torch.get_num_threads()
    grads = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            embedding = torch.zeros(300, 24, requires_grad=True)
            flat = embed_flatten(ids, embedding)
            grads.append(torch.autograd.grad(flat, embedding, grad_flat)[0])
    finally:
        torch.set_num_threads(used)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


# Where no check reads the ids beforehand: torch.compile leaves it out.
@pytest.mark.parametrize("bad", [-1, 5, 10**12])
def test_operators_themselves_refuse_ids_outside_the_vocabulary(bad: int, backend: str) -> None:
    overload = "default" if backend == "native" else backend
    ids = torch.zeros(4, 3, dtype=torch.long)
    ids[2, 1] = bad
    calls = [
        (OPERATORS.embed_flatten, (ids, torch.ones(5, 2), 0.0, None)),
        (OPERATORS.folded_squeezed_gather, (ids, torch.ones(3, 5, 2), torch.ones(2))),
    ]
    if backend == "native":  # in torch, what the forward lets through may write where it likes
        calls.append((OPERATORS.embed_flatten_backward, (torch.ones(4, 6), ids, 5)))
    message = r"ids: expected|out of (range|bounds)"
    for operator, arguments in calls:
        with pytest.raises((RuntimeError, IndexError), match=message):
            getattr(operator, overload)(*arguments)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_embed_flatten_passes_opcheck(dropout: float, backend: str) -> None:
    overload = "default" if backend == "native" else backend
    ids, embedding = token_ids(4, 3, 5), normal(5, 2, dtype=torch.float32).requires_grad_()
    seed = torch.tensor([3]) if dropout else None
    operator = getattr(OPERATORS.embed_flatten, overload)
    torch.library.opcheck(operator, (ids, embedding, dropout, seed))
    operator = getattr(OPERATORS.embed_flatten_backward, overload)
    torch.library.opcheck(operator, (torch.randn(4, 6), ids, 5))


def test_folded_gather_passes_opcheck(backend: str) -> None:
    overload = "default" if backend == "native" else backend
    operator = getattr(OPERATORS.folded_squeezed_gather, overload)
    arguments = (token_ids(4, 3, 5), torch.randn(3, 5, 2), torch.randn(2))
    torch.library.opcheck(operator, arguments)


def test_staleness_check_passes_opcheck() -> None:
    # Without weights: opcheck passes copies of them, which is what this operator refuses.
    torch.library.opcheck(OPERATORS.fresh_ids.default, (token_ids(4, 3, 5), [], []))


def test_compiled_equals_eager_bitwise_at_any_patch_count() -> None:
    def function(ids: Tensor, table: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        flat = embed_flatten(ids, table, dropout=0.3, seed=9)
        gathered = folded_squeezed_gather(ids, squeezed_tables(table, weight), bias)
        return squeeze_patches(flat, weight, bias) * gathered

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for patches in (4, 9):
        ids = token_ids(patches, 3, 5)
        tensors = [normal(5, 4), normal(4, 12, seed=1), normal(4, seed=2)]
        tensors = [t.requires_grad_() for t in tensors]
        outcomes = []
        for run in (function, compiled):
            out = run(ids, *tensors)
            outcomes.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


IDS, TABLE = torch.zeros(4, 3, dtype=torch.long), torch.ones(5, 2)


@pytest.mark.parametrize("bad", [-1, 5, 10**12])
def test_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    ids = IDS.clone()
    ids[2, 1] = bad
    message = rf"ids: expected token ids in \[0, 5\).* got {bad}"
    for call in (
        lambda: embed_flatten(ids, TABLE),
        lambda: folded_table_gather(ids, TABLE),
        lambda: folded_squeezed_gather(ids, torch.ones(3, 5, 2), torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "error_type", "message"),
    [
        (lambda: embed_flatten(IDS.float(), TABLE), TypeError, "ids: expected dtype int64, int32"),
        (lambda: embed_flatten(IDS[0], TABLE), ValueError, r"ids: expected shape \[P, K\]"),
        (lambda: embed_flatten(IDS[:, :0], TABLE), ValueError, "expected at least 1 token"),
        (lambda: embed_flatten(IDS, TABLE.long()), TypeError, "embedding: expected dtype float32"),
        (lambda: embed_flatten(IDS, TABLE[0]), ValueError, r"embedding: expected shape \[V, H\]"),
        (lambda: embed_flatten(IDS, TABLE, dropout=1.0), ValueError, r"dropout: .* \[0, 1\)"),
        (lambda: embed_flatten(IDS, TABLE, dropout=0.5, seed="a"), TypeError, "seed: expected"),
        (lambda: embed_flatten(IDS, TABLE.to("meta")), ValueError, "embedding: expected device"),
        (
            lambda: squeeze_patches(torch.ones(3, 8), torch.ones(4, 6), torch.ones(4)),
            ValueError,
            r"weight: expected shape \[H, 8\]; got \[4, 6\]",
        ),
        (
            lambda: squeeze_patches(torch.ones(3, 8), torch.ones(4, 8), torch.ones(8)),
            ValueError,
            r"bias: expected shape \[4\]; got \[8\]",
        ),
        (
            lambda: expand_patches(torch.ones(3, 4), torch.ones(8, 4), torch.ones(8), 3),
            ValueError,
            r"weight: expected shape \[12, 4\]; got \[8, 4\]",
        ),
        (
            lambda: expand_patches(torch.ones(3, 4), torch.ones(8, 4), torch.ones(8), 0),
            ValueError,
            "patch_size: expected at least 1; got 0",
        ),
        (
            lambda: squeezed_tables(torch.ones(5, 4), torch.ones(4, 6)),
            ValueError,
            "squeeze_weight: expected a multiple of H = 4 columns; got 6",
        ),
        (
            lambda: folded_squeezed_gather(IDS, torch.ones(4, 5, 2), torch.ones(2)),
            ValueError,
            r"ids: expected shape \[P, 4\]; got \[4, 3\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error_type: type, message: str) -> None:
    with pytest.raises(error_type, match=message):
        call()
