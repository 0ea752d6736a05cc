"""A vote among draws decoded only as far as they can win is the vote among all their tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calm_kernels.models.contenders import Contenders, fewest_equal_draws
from calm_kernels.nn.patch_codec import PatchDecoder
from calm_kernels.ops.temperature_sampling import batch_temperature_sample

LATENT, PATCH = 6, 4
TEMPERATURES = (0.5, 0.45, 1 / 3, 0.2, 0.05)


def decoder(vocab_size: int) -> PatchDecoder:
    torch.manual_seed(vocab_size)
    return PatchDecoder(vocab_size, 16, 24, LATENT, PATCH).double().requires_grad_(False)


def latents_of(law: str, num_draws: int, num_sequences: int, seed: int) -> Tensor:
    """[S, A, D]: from a few points, from points and their neighbours, or all far apart."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_draws, num_sequences)
    spread = {"points": 0.0, "clusters": 0.4, "apart": 3.0}[law]
    centres = torch.randn(12, LATENT, generator=generator, dtype=torch.float64)
    chosen = centres[torch.randint(0, 12, shape, generator=generator)]
    noise = torch.randn(*shape, LATENT, generator=generator, dtype=torch.float64)
    return chosen + spread * noise


@pytest.mark.parametrize("law", ["points", "clusters", "apart"])
@pytest.mark.parametrize("vocab_size", [3, 50, 3000])
@pytest.mark.parametrize(("num_draws", "num_sequences"), [(1, 1), (2, 3), (7, 5), (90, 4)])
def test_the_vote_is_that_of_all_tokens(
    law: str, vocab_size: int, num_draws: int, num_sequences: int
) -> None:
    model = decoder(vocab_size)
    for seed, temperature in enumerate(TEMPERATURES):
        latents = latents_of(law, num_draws, num_sequences, seed)
        temperatures = torch.full((num_sequences,), temperature, dtype=torch.float64)
        temperatures[1::3] = 0.7  # sequences of which every draw may win
        full = model.decode(latents.flatten(0, 1)).unflatten(0, (num_draws, num_sequences))
        contenders = Contenders(model, latents, fewest_equal_draws(temperatures))
        rows = torch.arange(num_sequences) + 5
        votes = [
            batch_temperature_sample(tokens.transpose(0, 1), temperatures, seed=seed, rows=rows)
            for tokens in (full, contenders.tokens)
        ]
        assert torch.equal(contenders.complete(votes[1]), votes[0])


def test_only_what_stands_alone_is_left() -> None:
    model = decoder(50)
    latents = latents_of("clusters", 90, 4, 0)
    temperatures = torch.tensor([0.5, 0.3, 1.0, 0.5], dtype=torch.float64)
    full = model.decode(latents.flatten(0, 1)).unflatten(0, (90, 4))
    tokens = Contenders(model, latents, fewest_equal_draws(temperatures)).tokens
    known = tokens >= 0
    assert torch.equal(tokens[known], full[known])
    assert torch.equal(tokens[:, 2], full[:, 2])
    left = 0
    for a in (0, 1, 3):
        patches, counts = full[:, a].unique(dim=0, return_counts=True)
        often = {tuple(p) for p, c in zip(patches.tolist(), counts.tolist(), strict=True) if c > 1}
        for s in range(90):
            complete = bool(known[s, a].all())
            assert complete or tuple(full[s, a].tolist()) not in often
            assert complete or tokens[s, a, -1] == -1 - s
            left += not complete
    assert left > 0


def test_draws_left_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(3000)
    decoded: list[int] = []
    decode_places = PatchDecoder.decode_places

    def counted(self: PatchDecoder, states: Tensor, first: int, stop: int) -> Tensor:
        decoded.append(len(states) * (stop - first))
        return decode_places(self, states, first, stop)

    monkeypatch.setattr(PatchDecoder, "decode_places", counted)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    Contenders(model, latents_of("apart", 90, 4, 0), fewest_equal_draws(half))
    assert 90 * 4 <= sum(decoded) < 0.6 * 90 * 4 * PATCH


def test_fewest_equal_draws() -> None:
    temperatures = torch.tensor([1.0, 0.51, 0.5, 0.4, 0.05], dtype=torch.float64)
    assert fewest_equal_draws(temperatures).tolist() == [1, 1, 2, 2, 2]


def test_places_are_columns_of_the_whole() -> None:
    model = decoder(50)
    latents = latents_of("clusters", 9, 1, 0).squeeze(1)
    states = model.patch_states(latents)
    whole = model.decode(latents)
    for first, stop in ((0, 1), (1, 2), (3, 4), (0, 4), (1, 4), (2, 3)):
        assert torch.equal(model.decode_places(states, first, stop), whole[:, first:stop])
