"""What generation keeps of each sequence: prompt, new tokens, whether it has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from calm_kernels import _checks
from calm_kernels.models.configuration import end_token_ids

OnPatch = Callable[[list[list[int]]], None]
"""Called after every step with the new tokens of each sequence, none for those that have ended."""

_MASK_64 = 2**64 - 1


@dataclass(frozen=True)
class GenerationOutput:
    """Generated sequences.

    Attributes:
        sequences: prompt and new tokens, int64 [B, S], filled on the right with the pad id (the
            end id, or 0, where the configuration names none).
        lengths: tokens that are real, int64 [B].
        prompt_lengths: tokens of the prompt, int64 [B].
        finished: ended by an end token, which is the last one kept, bool [B].
        accepted: bool [B]; False if, for some patch, the exact sampler ran out of its budget and
            a vote decided instead.
        prompt_matched: bool [B]; False if no draw continued a prompt that ends inside a patch, so
            that its patches were cut anew and its first tokens, less than a patch, left out.
        mean_draws: draws of the model per patch, float64 [B].
    """

    sequences: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    finished: Tensor
    accepted: Tensor
    prompt_matched: Tensor
    mean_draws: Tensor

    def new_tokens(self, row: int) -> list[int]:
        """The tokens generated for one sequence."""
        start, end = int(self.prompt_lengths[row]), int(self.lengths[row])
        tokens: list[int] = self.sequences[row, start:end].tolist()
        return tokens


def as_prompts(
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None,
    config: PreTrainedConfig,
) -> list[list[int]]:
    """Prompts without their padding.

    Args:
        input_ids: token ids [B, L], or one sequence of ids per prompt, of any lengths.
        attention_mask: [B, L], nonzero for real tokens; if None, pad ids at either end of a row
            of a tensor are padding (unless the pad id also ends sequences).

    Raises:
        TypeError, ValueError: wrong dtype or shape, no prompt, padding between tokens, an id
            outside the vocabulary.
    """
    if isinstance(input_ids, Tensor):
        prompts = _rows_without_padding(input_ids, attention_mask, config)
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None with prompts of their own lengths")
        prompts = [[int(token) for token in prompt] for prompt in input_ids]
    if not prompts:
        raise ValueError("input_ids: expected at least one prompt; got none")
    vocab_size = config.vocab_size  # type: ignore[attr-defined]
    for row, prompt in enumerate(prompts):
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"input_ids: expected token ids in [0, {vocab_size}); got {token} in prompt "
                    f"{row}; was the text tokenized with this model's tokenizer?"
                )
    return prompts


def _rows_without_padding(
    input_ids: Tensor, attention_mask: Tensor | None, config: PreTrainedConfig
) -> list[list[int]]:
    _checks.tensor("input_ids", input_ids, _checks.INTEGER_DTYPES, ("B", "L"))
    pad = getattr(config, "pad_token_id", None)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected shape {list(input_ids.shape)}, that of input_ids; "
                f"got {list(attention_mask.shape)}"
            )
        real = attention_mask != 0
    elif pad is not None and pad not in end_token_ids(config):
        real = input_ids != pad
    else:
        real = torch.ones_like(input_ids, dtype=torch.bool)
    prompts = []
    for row, (ids, mask) in enumerate(zip(input_ids.tolist(), real.tolist(), strict=True)):
        kept = [i for i, is_real in enumerate(mask) if is_real]
        if kept and kept[-1] - kept[0] + 1 != len(kept):
            raise ValueError(
                f"input_ids: expected padding at the ends of a prompt only; prompt {row} has some "
                "between its tokens"
            )
        prompts.append([ids[i] for i in kept])
    return prompts


class Sequences:
    """The sequences of one call of ``generate``: grow, stop, become a :class:`GenerationOutput`."""

    def __init__(
        self, prompts: list[list[int]], max_new_tokens: int, config: PreTrainedConfig
    ) -> None:
        _checks.at_least("max_new_tokens", max_new_tokens, 1)
        self._end_ids = frozenset(end_token_ids(config))
        pad = getattr(config, "pad_token_id", None)
        self._fill = pad if pad is not None else min(self._end_ids, default=0)
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        self._tokens = [list(prompt) for prompt in prompts]
        self._remaining = [max_new_tokens] * len(prompts)
        self._finished = [False] * len(prompts)

    @property
    def active(self) -> list[int]:
        """The sequences that want more tokens."""
        return [b for b, left in enumerate(self._remaining) if left > 0]

    def most_patches(self, patch_size: int) -> int:
        """Patches that complete all sequences if none ends early, wherever prompts end."""
        return -(-max(self._remaining) // patch_size) + 1

    def append(self, new: dict[int, list[int]]) -> list[list[int]]:
        """Append tokens to active sequences, up to an end token and to the number asked for.

        Args:
            new: tokens by sequence.

        Returns:
            what was kept, one list per sequence.
        """
        kept: list[list[int]] = [[] for _ in self._tokens]
        for b, tokens in new.items():
            for token in tokens[: self._remaining[b]]:
                kept[b].append(token)
                if token in self._end_ids:
                    self._finished[b] = True
                    break
            self._tokens[b].extend(kept[b])
            self._remaining[b] = 0 if self._finished[b] else self._remaining[b] - len(kept[b])
        return kept

    def output(
        self,
        device: torch.device,
        accepted: list[bool] | None = None,
        prompt_matched: list[bool] | None = None,
        mean_draws: list[float] | None = None,
    ) -> GenerationOutput:
        """Everything so far, on a device. Flags default to True, draws to one."""
        lengths = [len(tokens) for tokens in self._tokens]
        longest = max(lengths)
        rows = [t + [self._fill] * (longest - len(t)) for t in self._tokens]
        yes = [True] * len(rows)
        return GenerationOutput(
            sequences=torch.tensor(rows, dtype=torch.int64, device=device),
            lengths=torch.tensor(lengths, device=device),
            prompt_lengths=torch.tensor(self._prompt_lengths, device=device),
            finished=torch.tensor(self._finished, device=device),
            accepted=torch.tensor(accepted or yes, device=device),
            prompt_matched=torch.tensor(prompt_matched or yes, device=device),
            mean_draws=torch.tensor(
                mean_draws or [1.0] * len(rows), dtype=torch.float64, device=device
            ),
        )


def as_int_seed(seed: int | Tensor | None) -> int:
    """A seed as an int; ``None`` draws one from torch's generator."""
    return int(_checks.seed_tensor(seed, torch.device("cpu") if seed is None else _device(seed)))


def _device(seed: int | Tensor) -> torch.device:
    return seed.device if isinstance(seed, Tensor) else torch.device("cpu")


def seed_of_step(seed: int, step: int) -> int:
    """The seed of one step of a loop: splitmix64 of (seed, step), as a signed 64-bit integer.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z
