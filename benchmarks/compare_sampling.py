"""Both ways of sampling at a temperature, from one trained model after the same prompts.

    python benchmarks/compare_sampling.py runs/demo --output docs/sampling_comparison.md

Continues many copies of a prompt by one patch with ``generate``, once by the vote among 200 draws
and once exactly, and sets both beside P^(1/T) / Z of the patch frequencies among many plain draws.
Exact sampling is dear where the next patch is uncertain, so the prompts are those of many held-out
ones after which the model repeats itself most, and one of middling certainty. Distances are total
variations over the ten patches most likely at T and all others as one; the distance between the
two halves of the exact sample says how much of it is noise.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from calm_kernels.models import EnergyTransformer
from calm_kernels.training.blocks import PackedBlocks
from calm_kernels.training.data import open_data
from calm_kernels.training.runs import load_model
from calm_kernels.training.tokenizers import load_tokenizer

PROMPT_PATCHES = 12
NUM_CANDIDATES = 200
NUM_PROMPTS = 40
"""Held-out prompts to choose from."""

DRAWS_TO_CHOOSE = 200
COPIES_AT_ONCE = 2000
"""Bounds the memory of keys and values, which every copy of the prompt has its own of."""

NAMED = 10
"""Patches told apart in a distance."""

Patch = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Patches that followed a prompt."""

    patches: list[Patch]
    draws_per_patch: float
    accepted: float


def continue_by_a_patch(
    model: EnergyTransformer, prompt: list[int], copies: int, seed: int, **how: object
) -> Sample:
    """The patches after ``copies`` copies of a prompt."""
    patches: list[Patch] = []
    draws = accepted = 0.0
    for first in range(0, copies, COPIES_AT_ONCE):
        ids = torch.tensor([prompt]).expand(min(COPIES_AT_ONCE, copies - first), -1)
        output = model.generate(
            ids, max_new_tokens=model.config.patch_size, seed=(seed << 32) + first, **how
        )
        patches += (tuple(output.new_tokens(row)) for row in range(len(ids)))
        draws += float(output.mean_draws.sum())
        accepted += float(output.accepted.sum())
    return Sample(patches, draws / copies, accepted / copies)


def shares(patches: list[Patch], named: list[Patch]) -> torch.Tensor:
    """Share of every named patch, and of all others as one."""
    counts = Counter(patches)
    known = torch.tensor([counts[patch] for patch in named], dtype=torch.float64)
    return torch.cat((known, len(patches) - known.sum(0, keepdim=True))) / len(patches)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return 0.5 * float((one - other).abs().sum())


def powered(counts: Counter[Patch], temperature: float) -> dict[Patch, float]:
    """P^(1/T) / Z of the frequencies."""
    total = counts.total()
    powers = {patch: (count / total) ** (1 / temperature) for patch, count in counts.items()}
    norm = sum(powers.values())
    return {patch: power / norm for patch, power in powers.items()}


def choose(model: EnergyTransformer, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The prompts whose draws coincide most, and the one in the upper quarter's end."""

    def coincidences(prompt: list[int]) -> int:
        sample = continue_by_a_patch(model, prompt, DRAWS_TO_CHOOSE, 0, temperature=1.0)
        return sum(n * (n - 1) for n in Counter(sample.patches).values())

    ranked = sorted(prompts, key=coincidences, reverse=True)
    return [*ranked[: count - 1], ranked[len(ranked) // 4]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished demo run")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 0.37])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--copies", type=int, default=2000)
    parser.add_argument("--plain-draws", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file to write the tables to as well")
    arguments = parser.parse_args()

    model = load_model("energy", arguments.run / "energy", arguments.run / "autoencoder")
    assert isinstance(model, EnergyTransformer)
    model.eval()
    tokenizer = load_tokenizer(arguments.run / "energy")
    length = PROMPT_PATCHES * model.config.patch_size
    blocks = PackedBlocks(
        open_data(arguments.run / "data").validation, length, model.config.patch_size
    )
    prompts = choose(
        model, [blocks.block(i).tolist() for i in blocks.spread(NUM_PROMPTS)], arguments.prompts
    )
    plain_draws = [
        Counter(
            continue_by_a_patch(model, prompt, arguments.plain_draws, 1, temperature=1.0).patches
        )
        for prompt in prompts
    ]

    lines = [
        "| prompt ends | T | draws a patch, exact | accepted | exact to P_T | vote to P_T "
        "| exact to vote | exact to exact |",
        "|---|---|---|---|---|---|---|---|",
    ]
    examples = []
    for (number, prompt), temperature in itertools.product(
        enumerate(prompts), arguments.temperatures
    ):
        seed = arguments.seed + 1000 * (number + 1)
        law = powered(plain_draws[number], temperature)
        named = sorted(law, key=law.__getitem__, reverse=True)[:NAMED]
        expected = torch.tensor([law[patch] for patch in named], dtype=torch.float64)
        expected = torch.cat((expected, 1 - expected.sum(0, keepdim=True)))
        exact, vote = (
            continue_by_a_patch(
                model,
                prompt,
                arguments.copies,
                seed + 1 + offset,
                temperature=temperature,
                sampler=sampler,
                num_candidates=NUM_CANDIDATES,
            )
            for offset, sampler in enumerate(("exact", "batch"))
        )
        by_exact, by_vote = shares(exact.patches, named), shares(vote.patches, named)
        middle = arguments.copies // 2
        halves = (shares(part, named) for part in (exact.patches[:middle], exact.patches[middle:]))
        ending = repr(tokenizer.decode(prompt)[-16:]).replace("|", "\\|")
        lines.append(
            f"| `{ending}` | {temperature} | {exact.draws_per_patch:.0f} "
            f"| {100 * exact.accepted:.1f}% "
            f"| {distance(by_exact, expected):.3f} | {distance(by_vote, expected):.3f} "
            f"| {distance(by_exact, by_vote):.3f} | {distance(*halves):.3f} |"
        )
        print(lines[-1], flush=True)
        examples.append(
            f"| `{ending}` | {temperature} | "
            + ", ".join(
                f"`{tokenizer.decode(patch)!r}` {law[patch]:.3f} / {e:.3f} / {v:.3f}"
                for patch, e, v in zip(named[:4], by_exact.tolist(), by_vote.tolist(), strict=False)
            ).replace("|", "\\|")
            + " |"
        )
    text = "\n".join(
        [
            *lines,
            "",
            "Shares of the most likely patches: P_T / exact / vote.",
            "",
            "| prompt ends | T | patches |",
            "|---|---|---|",
            *examples,
            "",
            f"{arguments.copies} continuations by each way, P_T from {arguments.plain_draws} plain "
            f"draws, the vote among {NUM_CANDIDATES}, prompts of {length} held-out bytes, seed "
            f"{arguments.seed}. Where not all copies were accepted within the draw budget, the "
            "others fell back to a vote, as `accepted` of the result says.",
        ]
    )
    print(text)
    if arguments.output is not None:
        title = "# Temperature sampling after the same prompts: exact and by vote\n\n"
        arguments.output.write_text(title + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
