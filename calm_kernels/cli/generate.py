"""``calm-kernels generate``: continue prompts with a trained model."""

from __future__ import annotations

import argparse
import sys

from calm_kernels.cli.console import make_reporter
from calm_kernels.training.runs import find_model, load_model
from calm_kernels.training.sampling import Continuation, check_sampling, generate_text
from calm_kernels.training.tokenizers import (
    Tokenizer,
    checked_specification,
    load_tokenizer,
    make_tokenizer,
)


def run(arguments: argparse.Namespace) -> None:
    """Print each prompt with its continuation; a single one appears as it is written."""
    check_sampling(arguments.temperature, arguments.num_candidates, arguments.max_new_tokens)
    kind, folder = find_model(arguments.model, "energy", "baseline")
    if arguments.tokenizer is None:
        tokenizer: Tokenizer = load_tokenizer(folder)
    else:
        tokenizer = make_tokenizer(checked_specification(arguments.tokenizer), ())
    autoencoder = None
    if arguments.autoencoder is not None:
        autoencoder = find_model(arguments.autoencoder, "autoencoder")[1]
    model = load_model(kind, folder, autoencoder)
    import torch

    if torch.cuda.is_available() and not arguments.cpu:
        model.to("cuda")
    single = len(arguments.prompt) == 1
    if single:
        print(arguments.prompt[0], end="", flush=True)
    continuations = generate_text(
        model,
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        num_candidates=arguments.num_candidates,
        sampler=arguments.sampler,
        seed=arguments.seed,
        on_text=(lambda _, text: print(text, end="", flush=True)) if single else None,
    )
    if single:
        print()
    else:
        print("\n\n".join(
            prompt + c.text for prompt, c in zip(arguments.prompt, continuations, strict=True)
        ))  # fmt: skip
    _warn(continuations)


def _warn(continuations: list[Continuation]) -> None:
    reporter = make_reporter()
    if not all(c.accepted for c in continuations):
        reporter.message(
            "the exact sampler ran out of draws for some patches, where a vote decided: raise the "
            "temperature for exact draws"
        )
    if not all(c.prompt_matched for c in continuations):
        print(
            "a prompt ends inside a patch that the model never begins so: try a longer prompt",
            file=sys.stderr,
        )
