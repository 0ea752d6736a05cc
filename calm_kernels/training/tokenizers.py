"""Text to token ids and back: bytes, a byte-level BPE trained here, or any given tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from calm_kernels.training.errors import MissingExtraError, UserError
from calm_kernels.training.files import read_json

HEADER = "calm_tokenizer.json"
TOKENIZER_FILE = "tokenizer.json"
EOS = "<|eos|>"
PAD = "<|pad|>"
KNOWN_EOS = (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>")
KNOWN_PAD = (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]")
SMALLEST_BPE = 320

TokenArray = npt.NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    vocab_size: int
    """Number of ids, the padding id included."""
    eos_token_id: int
    pad_token_id: int

    @property
    def identity(self) -> str:
        """Two tokenizers with the same identity give the same ids."""

    def encode(self, text: str) -> TokenArray:
        """The ids of a text, without any special token."""

    def decode(self, ids: Sequence[int] | TokenArray) -> str:
        """The text of ids; special tokens are left out, broken UTF-8 shows as U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write the files that :func:`load_tokenizer` reads."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then end-of-text 256 and padding 257."""

    vocab_size = 258
    eos_token_id = 256
    pad_token_id = 257
    identity = "bytes"

    def encode(self, text: str) -> TokenArray:
        return np.frombuffer(text.encode("utf-8", errors="surrogatepass"), dtype=np.uint8)

    def decode(self, ids: Sequence[int] | TokenArray) -> str:
        values = np.asarray(ids, dtype=np.int64).reshape(-1)
        return (
            values[(values >= 0) & (values < 256)]
            .astype(np.uint8)
            .tobytes()
            .decode("utf-8", errors="replace")
        )

    def save(self, folder: Path) -> None:
        header = {"kind": "bytes", "vocab_size": self.vocab_size}
        (folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


class FileTokenizer:
    """A ``tokenizer.json`` of the tokenizers library.

    Special tokens in the text are taken as plain text. Without a padding token in the file, one
    more id after the last serves as padding; it never occurs in text.
    """

    def __init__(self, serialized: str, eos_token: str | None = None) -> None:
        """Read the content of a tokenizer.json.

        Raises:
            UserError: not a tokenizer.json, or the end-of-text token is not in it.
        """
        try:
            self._tokenizer = _library().Tokenizer.from_str(serialized)
        except MissingExtraError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"this is not a tokenizer.json of the tokenizers library ({reason}): "
                f"pass one saved with Tokenizer.save()"
            ) from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._serialized = serialized
        self.eos_token = eos_token or self._first_known(KNOWN_EOS)
        eos = None if self.eos_token is None else self._tokenizer.token_to_id(self.eos_token)
        if eos is None:
            raise UserError(
                f"the tokenizer has no end-of-text token "
                f"{self.eos_token or 'among ' + ', '.join(KNOWN_EOS)}: name it with --eos-token"
            )
        self.eos_token_id: int = eos
        size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        pad = self._first_known(KNOWN_PAD)
        self.pad_token_id: int = size if pad is None else self._tokenizer.token_to_id(pad)
        self.vocab_size: int = max(size, self.pad_token_id + 1)

    def _first_known(self, names: Iterable[str]) -> str | None:
        return next((n for n in names if self._tokenizer.token_to_id(n) is not None), None)

    @property
    def identity(self) -> str:
        digest = hashlib.sha256(f"{self.eos_token}\n{self._serialized}".encode()).hexdigest()
        return f"sha256:{digest}"

    def encode(self, text: str) -> TokenArray:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int] | TokenArray) -> str:
        values = np.asarray(ids, dtype=np.int64).reshape(-1)
        keep = values[(values != self.eos_token_id) & (values != self.pad_token_id)]
        return str(self._tokenizer.decode(keep.tolist(), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        (folder / TOKENIZER_FILE).write_text(self._serialized, encoding="utf-8")
        header = {"kind": "file", "vocab_size": self.vocab_size, "eos_token": self.eos_token}
        (folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Train a byte-level BPE of ``vocab_size`` ids, end-of-text (0) and padding (1) included."""
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return FileTokenizer(tokenizer.to_str(), EOS)


def checked_specification(specification: str) -> str:
    """Check ``bytes``, ``bpe:<size>`` or a path to a tokenizer.json, and return it.

    Raises:
        UserError: none of these, or a BPE too small to hold the bytes and the special tokens.
    """
    if specification == "bytes":
        return specification
    if specification.startswith("bpe:"):
        size = specification.removeprefix("bpe:")
        if not size.isdecimal() or int(size) < SMALLEST_BPE:
            raise UserError(
                f"tokenizer {specification!r}: expected bpe:<vocabulary size> with a size of at "
                f"least {SMALLEST_BPE}, e.g. bpe:4096"
            )
        return specification
    if not Path(specification).is_file():
        raise UserError(
            f"tokenizer {specification!r}: expected bytes, bpe:<size> or the path of an existing "
            f"tokenizer.json"
        )
    return specification


def make_tokenizer(
    specification: str, texts: Iterable[str], eos_token: str | None = None
) -> Tokenizer:
    """The tokenizer that a specification names; ``texts`` train it where it needs training."""
    specification = checked_specification(specification)
    if specification == "bytes":
        return ByteTokenizer()
    if specification.startswith("bpe:"):
        return train_bpe(texts, int(specification.removeprefix("bpe:")))
    return FileTokenizer(Path(specification).read_text(encoding="utf-8"), eos_token)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in a folder.

    Raises:
        UserError: the folder holds none.
    """
    header = read_json(folder / HEADER) or {}
    if header.get("kind") == "bytes":
        return ByteTokenizer()
    path = folder / TOKENIZER_FILE
    if path.is_file():
        return FileTokenizer(path.read_text(encoding="utf-8"), header.get("eos_token"))
    raise UserError(
        f"{folder} holds no tokenizer ({HEADER} or {TOKENIZER_FILE}): copy the tokenizer.json that "
        f"the model was trained with into it"
    )


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError(
            "this tokenizer needs the tokenizers package: pip install 'calm_kernels[train]'"
        ) from error
    return tokenizers
