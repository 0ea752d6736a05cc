"""Token files hold every document, are reused, and survive a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calm_kernels.training import data as data_module
from calm_kernels.training import files
from calm_kernels.training.corpus import load_corpus
from calm_kernels.training.data import TokenData, open_data, prepare_data
from calm_kernels.training.errors import DiskFullError, UserError


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill_disk_after(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    """Files opened from now on take so many bytes together, then the disk is full."""
    left = capacity

    class Full:
        def __init__(self, path: Path, mode: str) -> None:
            self.handle = open(path, mode)  # noqa: SIM115

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: Any) -> None:
            self.handle.close()

        def write(self, content: bytes) -> int:
            nonlocal left
            if len(content) > left:
                self.handle.write(content[:left])
                raise OSError(errno.ENOSPC, "No space left on device")
            left -= len(content)
            return self.handle.write(content)

        def flush(self) -> None:
            self.handle.flush()

        def fileno(self) -> int:
            return self.handle.fileno()

    monkeypatch.setattr(files, "open", Full, raising=False)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:330"])
def test_tokens_are_the_documents_in_order_each_followed_by_the_end_token(
    corpus: Path, tmp_path: Path, tokenizer: str
) -> None:
    made = prepare_data(
        tmp_path / "d", corpus=str(corpus), tokenizer=tokenizer, validation_fraction=0.2
    )
    split = load_corpus(str(corpus), 0.2)
    for file, documents in ((made.train, split.train), (made.validation, split.validation)):
        ends = np.flatnonzero(file.tokens == made.tokenizer.eos_token_id)
        assert len(ends) == len(documents)
        assert ends[-1] == len(file.tokens) - 1
        starts = [0, *(ends[:-1] + 1)]
        for document, start, end in zip(documents, starts, ends, strict=True):
            assert made.tokenizer.decode(file.tokens[start:end]) == document.read()
    assert not (made.train.tokens == made.tokenizer.pad_token_id).any()


def test_small_vocabularies_take_two_bytes_a_token(data: TokenData) -> None:
    assert data.train.tokens.dtype == np.uint16
    assert isinstance(data.train.tokens, np.memmap)
    assert data.train.path.stat().st_size == 2 * len(data.train.tokens)


def test_frequencies_are_shares_of_all_tokens(
    data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "_COUNT_CHUNK", 1000)
    tokens = np.asarray(data.train.tokens)
    expected = [np.mean(tokens == v) for v in range(258)]
    np.testing.assert_allclose(data.train.frequencies(), expected, rtol=1e-12)


def test_the_same_request_reuses_the_files(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = prepare_data(tmp_path / "d", corpus=str(corpus), tokenizer="bpe:330")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*")}
    second = prepare_data(
        tmp_path / "d", corpus=str(corpus), tokenizer="bpe:330", report=said.append
    )
    assert (first.reused, second.reused) == (False, True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*")} == before
    assert any("reusing" in line for line in said)
    third = prepare_data(tmp_path / "d", corpus=str(corpus), tokenizer=first.tokenizer)
    assert third.reused


@pytest.mark.parametrize("change", ["text", "tokenizer", "split"])
def test_a_changed_request_makes_new_files_and_drops_the_old(
    corpus: Path, tmp_path: Path, change: str
) -> None:
    first = prepare_data(tmp_path / "d", corpus=str(corpus), validation_fraction=0.2)
    if change == "text":
        (corpus / "1990-Speaker-0.txt").write_text("other words", encoding="utf-8")
    second = prepare_data(
        tmp_path / "d",
        corpus=str(corpus),
        tokenizer="bpe:330" if change == "tokenizer" else "bytes",
        validation_fraction=0.4 if change == "split" else 0.2,
    )
    assert not second.reused
    assert second.fingerprint != first.fingerprint
    assert len(list((tmp_path / "d").glob("*.bin"))) == 2


@pytest.mark.parametrize("share_of_training_file", [0.0, 0.1, 1.0])
def test_a_full_disk_leaves_the_former_data_and_no_half_file(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share_of_training_file: float
) -> None:
    folder = tmp_path / "d"
    old = prepare_data(folder, corpus=str(corpus), validation_fraction=0.2)
    before = snapshot(folder)
    capacity = int(share_of_training_file * old.train.path.stat().st_size)
    (corpus / "1990-Speaker-0.txt").write_text("other words", encoding="utf-8")
    fill_disk_after(monkeypatch, capacity)
    with pytest.raises(DiskFullError, match=r"no space left on the disk of .* free some space"):
        prepare_data(folder, corpus=str(corpus), validation_fraction=0.2)
    monkeypatch.undo()
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if "tmp" in name]
    opened = open_data(folder)
    assert len(opened.train.tokens) > 0


def test_a_full_disk_on_the_first_run_leaves_no_header(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk_after(monkeypatch, 5000)
    with pytest.raises(DiskFullError):
        prepare_data(tmp_path / "d", corpus=str(corpus))
    monkeypatch.undo()
    assert not [path for path in (tmp_path / "d").rglob("*") if path.is_file()]
    with pytest.raises(UserError, match="holds no prepared data"):
        open_data(tmp_path / "d")


def test_a_file_cut_short_is_noticed_and_made_again(corpus: Path, data: TokenData) -> None:
    content = data.train.path.read_bytes()
    data.train.path.write_bytes(content[:-6])
    with pytest.raises(UserError, match="missing or cut short"):
        open_data(data.folder)
    again = prepare_data(data.folder, corpus=str(corpus), validation_fraction=0.2)
    assert not again.reused
    assert again.train.path.read_bytes() == content


def test_a_damaged_header_is_made_again(corpus: Path, data: TokenData) -> None:
    header = data.folder / "data.json"
    good = json.loads(header.read_text(encoding="utf-8"))
    header.write_text(header.read_text(encoding="utf-8")[:40], encoding="utf-8")
    assert not prepare_data(data.folder, corpus=str(corpus), validation_fraction=0.2).reused
    assert json.loads(header.read_text(encoding="utf-8")) == good


def test_an_output_under_a_file_is_an_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="choose another --output"):
        prepare_data(tmp_path / "file" / "data", corpus=str(corpus))
