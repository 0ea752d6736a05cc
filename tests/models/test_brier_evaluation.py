"""BrierLM's ingredients: unbiased for any patch size, by enumeration of known models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from calm_kernels.models import AutoregressiveBaseline, BrierScores, EnergyTransformer
from calm_kernels.models.brier import chain_scores, select
from calm_kernels.models.draws import Drawer
from calm_kernels.models.rollout import Rollout
from calm_kernels.models.sequences import seed_of_step
from calm_kernels.ops.brier import brier_scores

MakeEnergyTransformer = Callable[..., EnergyTransformer]
NGRAMS, VOCAB = 4, 3


class TableModel:
    """A sampler of patches whose law given the patch before is a known table."""

    def __init__(self, patch_size: int) -> None:
        patches = itertools.product(range(VOCAB), repeat=patch_size)
        self.patches = torch.tensor(list(patches))
        generator = torch.Generator().manual_seed(patch_size)
        logits = 1.5 * torch.randn(len(self.patches), len(self.patches), generator=generator)
        self.table = logits.double().softmax(dim=-1)

    def index(self, patches: Tensor) -> Tensor:
        place = VOCAB ** torch.arange(patches.shape[-1] - 1, -1, -1)
        return (patches * place).sum(dim=-1)

    def draw(self, before: Tensor, num_samples: int) -> Tensor:
        """Draws after given patches: [*, K] -> [S, *, K]."""
        rows = self.table[self.index(before).flatten()]
        draws = torch.multinomial(rows, num_samples, replacement=True)
        return self.patches[draws.T].reshape(num_samples, *before.shape)

    def brier(self, before: Tensor, truth: Tensor) -> Tensor:
        """Exact Brier-1..4 of tokens [4..] after one patch, by enumeration."""
        law: dict[tuple[int, ...], float] = {(): 1.0}
        last = {(): int(self.index(before))}
        while len(next(iter(law))) < NGRAMS:
            longer: dict[tuple[int, ...], float] = {}
            ends = {}
            for prefix, probability in law.items():
                for j, patch in enumerate(self.patches.tolist()):
                    whole = prefix + tuple(patch)
                    longer[whole] = probability * float(self.table[last[prefix], j])
                    ends[whole] = j
            law, last = longer, ends
        scores = []
        for n in range(1, NGRAMS + 1):
            marginal: dict[tuple[int, ...], float] = {}
            for whole, probability in law.items():
                marginal[whole[:n]] = marginal.get(whole[:n], 0.0) + probability
            likelihood = marginal[tuple(truth[:n].tolist())]
            scores.append(2 * likelihood - sum(p**2 for p in marginal.values()))
        return torch.tensor(scores, dtype=torch.float64)


def standard_scores(
    patch_size: int,
    num_samples: int,
    replicates: int,
    *,
    forget_path: bool = False,
    every: int = 1,
) -> Tensor:
    """(mean - exact) / standard error of many independent estimates, [starts, 4]."""
    model = TableModel(patch_size)
    chain = -(-NGRAMS // patch_size)
    starts = 2
    text = model.draw(torch.zeros(patch_size, dtype=torch.int64), chain + starts * every)
    before = text.expand(replicates, -1, -1)[:, :-1]
    truth = text.expand(replicates, -1, -1)[:, 1:]

    def follow(path: Tensor) -> Tensor:
        return model.draw(torch.zeros_like(path) if forget_path else path, num_samples)

    scores = chain_scores(model.draw(before, num_samples), truth, starts, follow, every).double()
    positions = range(every - 1, starts * every, every)
    exact = torch.stack([model.brier(text[p], text[p + 1 :].flatten()) for p in positions])
    error = scores.std(dim=0) / replicates**0.5
    return (scores.mean(dim=0) - exact) / error


@pytest.mark.parametrize("patch_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [2, 5])
def test_chained_scores_are_unbiased(patch_size: int, num_samples: int) -> None:
    # 8 scores a case, 48 in all: false alarm below 3e-5 at five standard errors.
    assert standard_scores(patch_size, num_samples, 20_000).abs().max() < 5


@pytest.mark.parametrize(("patch_size", "every"), [(1, 4), (2, 3), (3, 2)])
def test_chained_scores_at_every_few_patches_are_unbiased(patch_size: int, every: int) -> None:
    # 8 scores a case, 24 in all: false alarm below 2e-5 at five standard errors.
    assert standard_scores(patch_size, 3, 20_000, every=every).abs().max() < 5


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_path_that_is_not_followed_would_be_noticed(patch_size: int) -> None:
    scores = standard_scores(patch_size, 4, 20_000, forget_path=True)
    assert scores[:, patch_size:].abs().max() > 10
    assert scores[:, :patch_size].abs().max() < 5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_branches_see_their_own_past_and_nothing_else(
    make_energy_transformer: MakeEnergyTransformer, implementation: str
) -> None:
    model = make_energy_transformer(1).double()
    model.set_attn_implementation(implementation)
    trunk = torch.randint(0, 23, (2, 6, 1))
    branches = torch.randint(0, 23, (3, 2, 4, 1))  # steps, B, starts, K
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model.hidden_states(trunk, cache=cache)
        visible = torch.tensor([1, 2, 4, 6])
        rollout = Rollout(model.hidden_states, cache, visible, model.config)
        for _ in range(2):  # the second time after a rewind
            for step in range(3):
                hidden = rollout.extend(branches[step])
                for i, length in enumerate(visible.tolist()):
                    own = branches[: step + 1, :, i].transpose(0, 1)
                    whole = torch.cat((trunk[:, :length], own), dim=1)
                    expected = model.hidden_states(whole)[:, -1]
                    # Attention of the "eager" kind takes its softmax in float32.
                    torch.testing.assert_close(hidden[:, i], expected, rtol=1e-5, atol=1e-6)
            rollout.rewind()
            assert cache.get_seq_length() == 6


def test_unsupported_attention_is_refused(make_energy_transformer: MakeEnergyTransformer) -> None:
    model = make_energy_transformer(1)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation.*sdpa"):
        Rollout(model.hidden_states, DynamicCache(), torch.tensor([1]), model.config)


@pytest.mark.parametrize("patch_size", [4, 8])
def test_large_patches_are_scored_by_their_first_four_tokens(
    make_energy_transformer: MakeEnergyTransformer, patch_size: int
) -> None:
    model = make_energy_transformer(patch_size)
    ids = torch.randint(0, 23, (3, 4 * patch_size))
    result = model.evaluate_brier(ids, num_samples=5, seed=11)
    patches = ids.unflatten(1, (-1, patch_size))
    with torch.no_grad():
        hidden = model.hidden_states(patches)[:, :-1].reshape(9, -1)
        noise = model.mlp_generator.draw_noise(9, 5, hidden.device, seed_of_step(11, 0))
        draws = Drawer(model, 45).patches(hidden, noise)
    expected = brier_scores(draws, patches[:, 1:].reshape(9, patch_size))
    torch.testing.assert_close(result.scores, expected)
    starts = [[row, patch * patch_size] for row in range(3) for patch in (1, 2, 3)]
    assert result.positions.tolist() == starts
    torch.testing.assert_close(result.mean(), expected.double().mean(0))


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_positions_are_those_whose_patches_all_count(
    make_energy_transformer: MakeEnergyTransformer, patch_size: int
) -> None:
    model = make_energy_transformer(patch_size, pad_token_id=22)
    length = 16
    ids = torch.randint(0, 22, (2, length))
    labels = ids.clone()
    labels[0, 9] = -100
    ids[1, 12:] = 22
    covered = patch_size * -(-4 // patch_size)
    bad = {0: {9}, 1: set(range(12, length))}
    expected = [
        [row, start]
        for row in range(2)
        for start in range(patch_size, length - covered + 1, patch_size)
        if not bad[row] & set(range(start, start + covered))
    ]
    result = model.evaluate_brier(ids, labels=labels, num_samples=2)
    assert result.positions.tolist() == expected
    assert result.scores.shape == (len(expected), 4)
    assert result.scores.isfinite().all()


@pytest.mark.parametrize("stride", [4, 8, 12])
def test_models_of_any_patch_size_are_scored_where_the_stride_says(
    make_energy_transformer: MakeEnergyTransformer,
    make_baseline: Callable[..., AutoregressiveBaseline],
    stride: int,
) -> None:
    ids = torch.randint(0, 23, (2, 24))
    expected = [[row, start] for row in (0, 1) for start in range(stride, 24, stride)]
    models: list[Any] = [make_energy_transformer(patch_size) for patch_size in (1, 2, 4)]
    for model in (*models, make_baseline(patch_size=3)):
        result = model.evaluate_brier(ids, num_samples=2, seed=1, stride=stride)
        assert result.positions.tolist() == expected
        assert result.scores.shape == (len(expected), 4)


def test_a_stride_chooses_among_the_positions_scored_without_one(
    make_energy_transformer: MakeEnergyTransformer,
    make_baseline: Callable[..., AutoregressiveBaseline],
) -> None:
    """Exact ones must agree: Brier-1 of the baseline, anything of a model that never varies."""
    ids = torch.randint(0, 23, (3, 24))
    model = make_energy_transformer(2)
    with torch.no_grad():
        model.mlp_generator.final_layer.linears[2].weight.zero_()
        token = model.ae_model.decode(model.mlp_generator.final_layer.linears[2].bias)
    ids[:, 8:12] = token.repeat(2)
    scorers: list[tuple[Any, int]] = [(model, 4), (make_baseline(patch_size=1), 1)]
    for scorer, exact in scorers:
        every = scorer.evaluate_brier(ids, num_samples=2, seed=1)
        chosen = scorer.evaluate_brier(ids, num_samples=2, seed=1, stride=4)
        rows = [every.positions.tolist().index(p) for p in chosen.positions.tolist()]
        torch.testing.assert_close(chosen.scores[:, :exact], every.scores[rows, :exact])
        assert len(chosen.scores.unique(dim=0)) > 1


@pytest.mark.parametrize("stride", [0, 3, 6])
def test_a_stride_that_splits_patches_is_refused(
    make_energy_transformer: MakeEnergyTransformer, stride: int
) -> None:
    with pytest.raises(ValueError, match=r"stride: expected a multiple of the patch size 4"):
        make_energy_transformer(4).evaluate_brier(torch.zeros(1, 24).long(), stride=stride)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_seed_fixes_the_scores(
    make_energy_transformer: MakeEnergyTransformer, patch_size: int
) -> None:
    model = make_energy_transformer(patch_size)
    ids = torch.randint(0, 23, (4, 64))
    first = model.evaluate_brier(ids, seed=1).scores
    assert torch.equal(model.evaluate_brier(ids, seed=1).scores, first)
    assert not torch.equal(model.evaluate_brier(ids, seed=2).scores, first)


def test_a_model_that_knows_the_text_scores_one(
    make_energy_transformer: MakeEnergyTransformer,
) -> None:
    model = make_energy_transformer(2)
    with torch.no_grad():
        last = model.mlp_generator.final_layer.linears[2]
        last.weight.zero_()  # every draw is the bias, whatever the noise
        token = model.ae_model.decode(last.bias)
    ids = token.repeat(2, 5)
    result = model.evaluate_brier(ids, num_samples=3)
    assert torch.equal(result.scores, torch.ones(6, 4))
    assert float(result.brier_lm()) == 100.0
    other = (ids + 1) % 23
    assert torch.equal(model.evaluate_brier(other, num_samples=3).scores, -torch.ones(6, 4))


@pytest.mark.parametrize(
    ("patch_size", "length", "num_samples", "message"),
    [(4, 8, 1, "num_samples"), (2, 4, 4, "at least 3 patches"), (1, 4, 4, "at least 5 patches")],
)
def test_too_little_is_refused(
    make_energy_transformer: MakeEnergyTransformer,
    patch_size: int,
    length: int,
    num_samples: int,
    message: str,
) -> None:
    ids = torch.zeros(1, length, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        make_energy_transformer(patch_size).evaluate_brier(ids, num_samples=num_samples)


def exact_baseline_scores(model: AutoregressiveBaseline, ids: Tensor, start: int) -> Tensor:
    """Brier-1..4 at one position, by running the model on every continuation."""
    vocab_size = model.config.vocab_size
    grams = torch.tensor(list(itertools.product(range(vocab_size), repeat=NGRAMS)))
    whole = torch.cat((ids[:start].expand(len(grams), -1), grams), dim=1)
    probabilities = model(whole).logits.double().softmax(dim=-1)[:, start - 1 : -1]
    joint = probabilities.gather(2, grams.unsqueeze(2)).squeeze(2).cumprod(dim=1)
    scores = []
    for n in range(1, NGRAMS + 1):
        # Each n-gram occurs vocab_size^(4-n) times among the continuations.
        collision = joint[:, n - 1].square().sum() / vocab_size ** (NGRAMS - n)
        match = (grams[:, :n] == ids[start : start + n]).all(dim=1)
        scores.append(2 * joint[match][0, n - 1] - collision)
    return torch.stack(scores)


@torch.no_grad()
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_baseline_scores_are_unbiased(
    make_baseline: Callable[..., AutoregressiveBaseline], patch_size: int
) -> None:
    model = make_baseline(vocab_size=4, patch_size=patch_size)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    ids = torch.randint(0, 4, (2, 12))
    runs = [model.evaluate_brier(ids, num_samples=2, seed=seed) for seed in range(80)]
    positions = runs[0].positions.tolist()
    last = 12 - patch_size * -(-4 // patch_size)
    assert positions == [[b, s] for b in range(2) for s in range(patch_size, last + 1, patch_size)]
    scores = torch.stack([run.scores for run in runs]).double()
    exact = torch.stack([exact_baseline_scores(model, ids[b], s) for b, s in positions])
    torch.testing.assert_close(scores[0, :, 0], exact[:, 0], rtol=1e-4, atol=1e-5)
    error = scores.std(dim=0) / len(runs) ** 0.5
    # Up to 48 scores a case: false alarm below 1e-4 at five standard errors.
    assert ((scores.mean(dim=0) - exact)[:, 1:].abs() < 5 * error[:, 1:]).all()
    assert (error[:, 1:] < 0.05).all() and (error[:, 1:] > 0).all()


def test_select_keeps_scores_with_their_positions() -> None:
    scores = torch.arange(16.0).reshape(2, 2, 4)
    counted = torch.tensor([[False, True, True, True], [True, True, True, False]])
    result = select(scores, counted, patch_size=2)
    assert isinstance(result, BrierScores)
    assert result.positions.tolist() == [[0, 2], [0, 4], [1, 2]]
    assert torch.equal(result.scores, scores.flatten(0, 1)[:3])
