"""Text from a trained model."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calm_kernels.training.errors import UserError
from calm_kernels.training.tokenizers import ByteTokenizer, Tokenizer

SAMPLERS = ("batch", "exact")

OnText = Callable[[int, str], None]
"""Called with the prompt's number and the text that its continuation has grown by."""


def check_sampling(temperature: float, num_candidates: int, max_new_tokens: int) -> None:
    """Check what a user can set.

    Raises:
        UserError: a value out of its range, with the range.
    """
    if not 0 < temperature <= 1:
        raise UserError(
            f"temperature: expected 0 < T <= 1 (1 samples the model as it is, less sharpens it); "
            f"got {temperature}"
        )
    if num_candidates < 1:
        raise UserError(f"number of candidates: expected at least 1; got {num_candidates}")
    if max_new_tokens < 1:
        raise UserError(f"max new tokens: expected at least 1; got {max_new_tokens}")


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    text: str
    ended: bool
    """The model ended the text; otherwise the number of tokens asked for was reached."""
    accepted: bool
    """False if the exact sampler ran out of its budget somewhere and a vote decided instead."""
    prompt_matched: bool
    """False if no draw continued a prompt that ends inside a patch."""


class _Stream:
    """Turns tokens that come in pieces into text that only grows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Sequence[int]) -> str:
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes.decode(bytes(token for token in tokens if token < 256))
        self._tokens.extend(tokens)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("\ufffd"):
            return ""
        grown, self._shown = text[self._shown :], len(text)
        return grown


def generate_text(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    num_candidates: int = 200,
    sampler: str = "batch",
    seed: int = 0,
    on_text: OnText | None = None,
) -> list[Continuation]:
    """Continue prompts.

    Args:
        model: an ``EnergyTransformer`` or ``AutoregressiveBaseline``.
        tokenizer: the one it was trained with.
        prompts: texts to continue; an empty one starts a new document.
        max_new_tokens: tokens to add; fewer if the model ends the text.
        temperature: in (0, 1].
        num_candidates: draws a patch that the temperature sampler votes among.
        sampler: ``"batch"`` or ``"exact"``.
        seed: of every draw.
        on_text: told about new text as it comes.

    Returns:
        one continuation a prompt.

    Raises:
        UserError: a value out of its range.
    """
    check_sampling(temperature, num_candidates, max_new_tokens)
    patches = hasattr(model, "ae_model")
    start: list[int] = [] if patches else [tokenizer.eos_token_id]
    ids = [tokenizer.encode(prompt).tolist() or start for prompt in prompts]
    streams = [_Stream(tokenizer) for _ in prompts]

    def on_patch(new: list[list[int]]) -> None:
        for row, tokens in enumerate(new):
            if on_text is not None and (text := streams[row].feed(tokens)):
                on_text(row, text)

    options: dict[str, Any] = {"temperature": temperature, "seed": seed}
    if patches:
        options.update(num_candidates=num_candidates, sampler=sampler)
    if on_text is not None:
        options["on_patch"] = on_patch
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=max_new_tokens, **options)
    return [
        Continuation(
            tokenizer.decode(output.new_tokens(row)),
            bool(output.finished[row]),
            bool(output.accepted[row]),
            bool(output.prompt_matched[row]),
        )
        for row in range(len(prompts))
    ]
