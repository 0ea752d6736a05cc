"""The autoregressive baseline against transformers' own Llama model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from calm_kernels.models import AutoregressiveBaseline

MakeBaseline = Callable[..., AutoregressiveBaseline]


def as_llama(model: AutoregressiveBaseline) -> LlamaForCausalLM:
    llama = LlamaForCausalLM(model.config).eval()
    llama.load_state_dict(model.state_dict(), strict=True)
    return llama


def test_logits_and_loss_equal_those_of_llama(make_baseline: MakeBaseline) -> None:
    model = make_baseline()
    llama = as_llama(model)
    ids = torch.randint(0, 23, (3, 12))
    labels = ids.clone()
    labels[0, 4:7] = -100
    expected = llama(ids, labels=labels)
    torch.testing.assert_close(model(ids).logits, expected.logits)
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.logits is None
    output.loss.backward()
    expected.loss.backward()
    for (name, p), q in zip(model.named_parameters(), llama.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_padding_touches_no_loss(make_baseline: MakeBaseline) -> None:
    model = make_baseline(pad_token_id=22)
    ids = torch.randint(0, 22, (1, 8))
    expected = model(ids, labels=ids).loss
    right = F.pad(ids, (0, 4), value=22)
    torch.testing.assert_close(model(right, labels=right).loss, expected)
    left = F.pad(ids, (4, 0), value=22)
    loss = model(left, labels=left, attention_mask=(left != 22).long()).loss
    torch.testing.assert_close(loss, expected)


def test_nearly_zero_temperature_is_greedy(make_baseline: MakeBaseline) -> None:
    model = make_baseline(pad_token_id=22)
    llama = as_llama(model)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    output = model.generate(prompts, max_new_tokens=8, temperature=1e-4, seed=1)
    for row, prompt in enumerate(prompts):
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(llama(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert output.sequences[row, : len(tokens)].tolist() == tokens
        assert output.new_tokens(row) == tokens[len(prompt) :]
    assert output.sequences[1, 10:].tolist() == [22] * 3


def test_tokens_follow_the_tempered_law(make_baseline: MakeBaseline) -> None:
    model = make_baseline()
    prompts = [[7, 8, 9]] * 4000
    law = (model(torch.tensor(prompts[:1])).logits[0, -1] / 0.7).softmax(-1)
    tokens = model.generate(prompts, max_new_tokens=1, temperature=0.7, seed=3).sequences[:, 3]
    counts = torch.bincount(tokens, minlength=23).double()
    expected = 4000 * law.double()
    frequent = expected > 5
    chi_square = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
    degrees = float(frequent.sum())
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_end_token_stops_a_sequence(make_baseline: MakeBaseline) -> None:
    model = make_baseline()
    prompts = [[1, 2, 3]] * 8
    free = model.generate(prompts, max_new_tokens=10, seed=3)
    end = Counter(t for row in range(8) for t in free.new_tokens(row)).most_common(1)[0][0]
    model.config.eos_token_id = end
    parts: list[list[list[int]]] = []
    output = model.generate(prompts, max_new_tokens=10, seed=3, on_patch=parts.append)
    assert output.finished.any()
    for row in range(8):
        expected = free.new_tokens(row)
        if end in expected:
            expected = expected[: expected.index(end) + 1]
        assert output.new_tokens(row) == expected
        assert [t for part in parts for t in part[row]] == expected


def test_seed_fixes_the_tokens(make_baseline: MakeBaseline) -> None:
    model = make_baseline()

    def run(seed: int) -> list[list[int]]:
        rows: list[list[int]] = model.generate(
            [[1, 2], [3]], max_new_tokens=9, seed=seed
        ).sequences.tolist()
        return rows

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"input_ids": torch.full((1, 4), 23)}, "23"),
        (ValueError, {"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, "at least one sequence"),
        (ValueError, {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}, "two tokens"),
        (TypeError, {"input_ids": torch.zeros(1, 4)}, "dtype"),
        (ValueError, {"labels": torch.full((1, 4), 30)}, "labels.*30"),
    ],
)
def test_bad_input_is_named(
    make_baseline: MakeBaseline,
    error: type[Exception],
    arguments: dict[str, Any],
    message: str,
) -> None:
    ids = arguments.get("input_ids", torch.zeros(1, 4, dtype=torch.int64))
    valid = {"input_ids": ids, "labels": ids}
    with pytest.raises(error, match=message):
        make_baseline()(**{**valid, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[]]}, "every prompt"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_generation_arguments_are_named(
    make_baseline: MakeBaseline, arguments: dict[str, Any], message: str
) -> None:
    valid: dict[str, Any] = {"input_ids": [[1]], "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        make_baseline().generate(**{**valid, **arguments})
