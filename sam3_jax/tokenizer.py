"""CLIP byte-pair tokenizer with the cleaning that SAM 3 expects.

Upstream: ``sam3/model/tokenizer_ve.py``. Token for token the same. Text is split into words by
the ``regex`` module, as upstream does, because the regular expressions of ``tokenizers`` know
another edition of Unicode and fold case differently (upstream's ``'s`` also takes the long s);
``tokenizers`` does the merging, whose order is the same because every CLIP token has one merge
that makes it. The merges are in ``assets/``.
"""

from __future__ import annotations

import functools
import gzip
import html
import operator
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import SupportsIndex

import ftfy
import numpy as np
import regex
from jaxtyping import Int32
from tokenizers.models import BPE

START, END = "<start_of_text>", "<end_of_text>"
NUM_MERGES = 49152 - 256 - 2  # the file holds more; CLIP stops here
WORD_CACHE = 1 << 16

# The literal special tokens are part of upstream's pattern: written in a text they become their
# ids. (Case does not matter there, but the text is lower case by then.)
_WORDS = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)
_SPACES = regex.compile(r"\s+")


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte value in the merges file."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):  # the others take code points from 256 on, in order
        symbols.setdefault(byte, chr(256 + len(symbols) - len(printable)))
    return [symbols[byte] for byte in range(256)]


def _read_merges() -> list[tuple[str, str]]:
    path = resources.files("sam3_jax") / "assets" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    # Line 0 is a version comment.
    return [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]


def clean(text: str) -> str:
    """Repair mojibake (ftfy), undo HTML escapes twice, collapse white space, lower the case."""
    if text.isascii() and text.isprintable() and "&" not in text:
        # Nothing to repair or unescape, and the only white space is " ": 20 times faster.
        return " ".join(text.split()).lower()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACES.sub(" ", text.strip()).strip().lower()


class Tokenizer:
    """Phrases to ids of the text encoder, and back.

    Building one takes a fifth of a second; :func:`default_tokenizer` keeps one. Instances can be
    shared by threads and pickled (the copy reads the merges again).

    Attributes:
      vocab_size: 49408.
      start_id: 49406, the first token of every row.
      end_id: 49407, the last token of every row before the zeros.
    """

    def __init__(self) -> None:
        symbols = _byte_symbols()
        merges = _read_merges()
        # Ids go by the order of the symbols sorted as upstream lists them: printable bytes first.
        alphabet = sorted(symbols)
        tokens = alphabet + [s + "</w>" for s in alphabet] + ["".join(m) for m in merges]
        tokens += [START, END]
        ids = {token: i for i, token in enumerate(tokens)}
        self.vocab_size = len(tokens)
        self.start_id, self.end_id = ids[START], ids[END]
        self._tokens = tokens
        self._bytes = {symbol: byte for byte, symbol in enumerate(symbols)}
        self._to_symbols = dict(enumerate(symbols))
        self._bpe = BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>")
        self._word_ids = functools.lru_cache(WORD_CACHE)(self._encode_word)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[()]]:
        return Tokenizer, ()

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word == START:
            return (self.start_id,)
        if word == END:
            return (self.end_id,)
        # Latin-1 maps the UTF-8 bytes to code points 0..255, which translate then renames.
        symbols = word.encode("utf-8").decode("latin-1").translate(self._to_symbols)
        return tuple(token.id for token in self._bpe.tokenize(symbols))

    def encode(self, text: str) -> list[int]:
        """Ids of one cleaned text, without start, end, padding or truncation."""
        return [i for word in _WORDS.findall(clean(text)) for i in self._word_ids(word)]

    def __call__(
        self, texts: str | Sequence[str], context_length: int = 32
    ) -> Int32[np.ndarray, "t n"]:
        """Tokenize phrases into rows of ``context_length`` ids.

        A row is start, the text's ids, end, zeros. A longer text is cut so that the end token
        stays last. A single string counts as a list of one.

        Raises:
          TypeError: if a text is not a string.
          ValueError: if ``context_length`` is below 2.
        """
        if context_length < 2:
            raise ValueError(
                f"context_length must be at least 2 (start and end token), got {context_length}"
            )
        texts = [texts] if isinstance(texts, str) else texts
        rows = np.zeros((len(texts), context_length), np.int32)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] must be a string, got {type(text).__name__}: {text!r}")
            row = [self.start_id, *self.encode(text)[: context_length - 2], self.end_id]
            rows[i, : len(row)] = row
        return rows

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of one row of ids: what stands between its start and its first end token.

        The text comes back cleaned and with its words, numbers and punctuation set apart by
        spaces. Ids that end inside a character (a truncated row) give U+FFFD there.

        Raises:
          ValueError: for an id outside the vocabulary.
        """
        symbols = []
        for i in map(operator.index, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary (0..{self.vocab_size - 1})")
            if i == self.end_id:
                break
            if i != self.start_id:
                symbols.append(self._tokens[i])
        text = bytes(self._bytes[symbol] for symbol in "".join(symbols))
        return text.decode("utf-8", errors="replace").replace("</w>", " ").strip()


@functools.cache
def default_tokenizer() -> Tokenizer:
    """The shared instance."""
    return Tokenizer()
