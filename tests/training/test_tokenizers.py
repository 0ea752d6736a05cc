"""Text survives the way to ids and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_kernels.training.errors import UserError
from calm_kernels.training.tokenizers import (
    EOS,
    PAD,
    ByteTokenizer,
    FileTokenizer,
    checked_specification,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)

TEXTS = [
    "the people of the union and the congress of the people, which passed every important bill "
    "before the winter, hold that peaceful commerce among neighboring nations improves them all "
    * 10,
    "Ünïcödé 🙂 € " * 10,
]


@pytest.fixture(scope="module")
def bpe() -> FileTokenizer:
    return train_bpe(TEXTS, 330)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip_any_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_have_the_agreed_vocabulary_and_decode_leaves_special_ids_out() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 256, 257)
    assert tokenizer.decode([72, 105, 256, 257, 33]) == "Hi!"
    assert tokenizer.decode([0xC3]) == "\ufffd"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bpe_round_trips_any_text(bpe: FileTokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_has_the_size_asked_for_and_shortens_what_it_was_trained_on(bpe: FileTokenizer) -> None:
    assert bpe.vocab_size == 330
    assert (bpe.eos_token_id, bpe.pad_token_id) == (0, 1)
    ids = bpe.encode(TEXTS[0])
    assert len(ids) < 0.6 * len(TEXTS[0])
    assert int(ids.max()) < 330


def test_special_tokens_in_the_text_stay_text(bpe: FileTokenizer) -> None:
    text = f"before {EOS} between {PAD} after"
    ids = bpe.encode(text)
    assert not np.isin(ids, [bpe.eos_token_id, bpe.pad_token_id]).any()
    assert bpe.decode(ids) == text


def test_training_the_same_bpe_twice_gives_the_same_ids(bpe: FileTokenizer) -> None:
    assert train_bpe(TEXTS, 330).identity == bpe.identity


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_tokenizer_loads_as_the_same(kind: str, bpe: FileTokenizer, tmp_path: Path) -> None:
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.identity == tokenizer.identity
    assert loaded.encode("the people é").tolist() == tokenizer.encode("the people é").tolist()


def given_file(tmp_path: Path, bpe: FileTokenizer, names: dict[str, str]) -> Path:
    """The tokenizer's file with its special tokens renamed."""
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    path.write_text(text, encoding="utf-8")
    return path


def test_a_given_file_without_padding_gets_one_more_id(bpe: FileTokenizer, tmp_path: Path) -> None:
    path = given_file(tmp_path, bpe, {EOS: "<|end_of_text|>", PAD: "<|reserved|>"})
    tokenizer = make_tokenizer(str(path), ())
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (0, 330, 331)
    assert tokenizer.decode(tokenizer.encode("the union")) == "the union"


def test_an_unusual_end_token_has_to_be_named(bpe: FileTokenizer, tmp_path: Path) -> None:
    path = given_file(tmp_path, bpe, {EOS: "<finis>"})
    with pytest.raises(UserError, match="name it with --eos-token"):
        make_tokenizer(str(path), ())
    assert make_tokenizer(str(path), (), "<finis>").eos_token_id == 0


@pytest.mark.parametrize("specification", ["words", "bpe:", "bpe:abc", "bpe:100", "no/such.json"])
def test_a_specification_that_names_nothing_is_an_error(specification: str) -> None:
    with pytest.raises(UserError, match="expected"):
        checked_specification(specification)


def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        make_tokenizer(str(tmp_path / "t.json"), ())


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
