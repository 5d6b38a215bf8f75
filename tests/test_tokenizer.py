"""The tokenizer against a CLIP tokenizer written out plainly, on thousands of strings."""

from __future__ import annotations

import gzip
import html
import pickle
import time
import unicodedata
from pathlib import Path

import ftfy
import numpy as np
import pytest
import regex

import sam3_jax
from sam3_jax.tokenizer import Tokenizer, clean, default_tokenizer

MERGES = Path(sam3_jax.__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
START, END = 49406, 49407


class PlainTokenizer:
    """CLIP's algorithm step by step: no cache, no shortcut, no tokenizers library."""

    def __init__(self) -> None:
        shown = {b: chr(b) for b in range(256) if chr(b).isprintable() and not chr(b).isspace()}
        hidden = [b for b in range(256) if b not in shown]
        self.symbol = shown | {b: chr(256 + n) for n, b in enumerate(hidden)}
        with gzip.open(MERGES, "rt", encoding="utf-8") as lines:
            pairs = [tuple(line.split()) for line in lines][1:48895]
        self.rank = {pair: n for n, pair in enumerate(pairs)}
        # Ids 0..255 are bytes (printable ones first), 256..511 bytes that end a word.
        symbols = [*shown.values(), *(self.symbol[b] for b in hidden)]
        tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in pairs)]
        self.id = {token: n for n, token in enumerate(tokens)}
        special = {"<start_of_text>": START, "<end_of_text>": END}
        self.id |= special
        self.special = special
        self.words = regex.compile(
            "<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d"
            r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )

    def clean(self, text: str) -> str:
        text = ftfy.fix_text(text)
        text = html.unescape(html.unescape(text)).strip()
        return regex.sub(r"\s+", " ", text).strip().lower()

    def merge(self, word: str) -> list[str]:
        if word in self.special:
            return [word]
        parts = [self.symbol[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while True:
            known = [p for p in zip(parts, parts[1:], strict=False) if p in self.rank]
            if not known:
                return parts
            best = min(known, key=self.rank.__getitem__)
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append("".join(parts[i : i + 2]) if both else parts[i])
                i += 2 if both else 1
            parts = merged

    def __call__(self, text: str, length: int) -> list[int]:
        words = self.words.findall(self.clean(text))
        ids = [START, *(self.id[part] for word in words for part in self.merge(word)), END]
        if len(ids) > length:
            ids = [*ids[: length - 1], END]
        return ids + [0] * (length - len(ids))


@pytest.fixture(scope="module")
def plain() -> PlainTokenizer:
    return PlainTokenizer()


def assert_same(plain: PlainTokenizer, texts: list[str], length: int = 64) -> None:
    rows = default_tokenizer()(texts, length)
    for text, row in zip(texts, rows, strict=True):
        assert row.tolist() == plain(text, length), repr(text)


HAND_PICKED = [
    "",
    " ",
    "\t\n \r\u00a0\u3000\u200b",
    "a",
    "cat",
    "a photo of a cat",
    "The Yellow School Bus!",
    "striped cat's tail; dogs' bowls, they're I'm we've he'd she'll can't 'S 'LL",
    "'\u017f \u017f \u212a",  # long s and the Kelvin sign fold to ASCII letters
    "player in white, number 23 (left) #7 & 100%",
    "x" * 300,
    "ab" * 200,
    "!!!???...---___***###",
    "a_b-c/d\\e|f~g`h^i",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m \u0130stanbul stra\u00dfe \u1e9e \u0149",
    "\ufb01re \uff26\uff55\uff4c\uff4c \u2460 \u00bd \u2167 \u00b2",
    "z\u0351\u036b\u0343\u036aa\u0302\u0308\u0323l\u0334g\u0335o",
    "\u732b\u306e\u5199\u771f \uace0\uc591\uc774 \u0642\u0637\u0629 \u05d7\u05ea\u05d5\u05dc",
    "\u0915\u0941\u0924\u094d\u0924\u093e \u0e41\u0e21\u0e27 \u043a\u043e\u0448\u043a\u0430",
    "\u0661\u0662\u0663 \u0967\u0968 \u4e00\u4e8c \U0001d7d8",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1ef\U0001f1f5 \U0001f44d\U0001f3fd",
    "&lt;b&gt; &amp;amp; &amp;lt; &eacute; &#x1F600; &#65; &nbsp; &bogus; & AT&T &amp",
    "<b>&eacute;</b> <br/>",
    "caf\u00c3\u00a9 \u00e2\u20ac\u2122 \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",
    "\u00f0\u0178\u02dc\u20ac",
    "\u2018single\u2019 \u201cdouble\u201d \u2026 \u2014 \u2013",
    "bell\x07 null\x00 esc\x1b[31mred\x1b[0m del\x7f nel\x85 sep\x1c\x1d\x1e\x1f end",
    "line\r\nbreak\u2028and\u2029paragraph\x0b\x0c",
    "\ud800 lone \udfff",
    "\ufeffbom \u202eright to left\u202c \u00adsoft",
    "<start_of_text>",
    "a <start_of_text> b<end_of_text>c <START_OF_TEXT> <End_Of_Text>",
    "<start_of_text",
    "&lt;end_of_text&gt;",
    "<|startoftext|> <|endoftext|> </w> cat</w>",
    " ".join(f"word{n}" for n in range(500)),
    " ".join(["cat"] * 500),
]


@pytest.mark.parametrize("length", [2, 3, 8, 32, 77, 2000])
def test_hand_picked(plain, length):
    assert_same(plain, HAND_PICKED, length)


def alphabets() -> list[list[str]]:
    def span(first: int, last: int) -> list[str]:
        points = map(chr, range(first, last + 1))
        return [c for c in points if unicodedata.category(c) not in ("Cn", "Cs")]

    words = "the a of cat Dog 's n't 'RE I'm it'll 3d x-ray bird's-eye &amp; &lt; &#39; &quot;"
    return [
        span(0x20, 0x7E),
        span(0x61, 0x7A),
        [*span(0x41, 0x7A), " ", "'"],
        span(0x00, 0xFF),  # controls and the pieces of mojibake
        [*span(0xC0, 0x24F), " "],
        [*span(0x61, 0x7A), *span(0x300, 0x36F)],
        [*span(0x370, 0x52F), " ", "-"],
        [*span(0x590, 0x6FF), " "],
        [*span(0x900, 0xDFF), " "],
        [*span(0xE00, 0x109F), " "],
        [*span(0x2000, 0x2BFF)],
        [*span(0x3040, 0x30FF), *span(0x4E00, 0x4EFF), *span(0xAC00, 0xACFF), " "],
        [*span(0xFB00, 0xFB06), *span(0xFF00, 0xFFEF)],
        [*span(0x1F300, 0x1F64F), *span(0x1F1E6, 0x1F1FF), "\u200d", "\ufe0f", "a"],
        [*span(0x10000, 0x10FFF), *span(0x1D400, 0x1D7FF)],
        [f"{w} " for w in words.split()] + ["<start_of_text>", "<end_of_text>", "'", "9"],
    ]


@pytest.mark.parametrize("alphabet", alphabets(), ids=lambda a: f"U+{ord(a[1][0]):04X}")
def test_random_strings(plain, rng, alphabet):
    texts = ["".join(rng.choice(alphabet, rng.integers(1, 30))) for _ in range(300)]
    assert_same(plain, texts)


def test_random_mixtures(plain, rng):
    everything = [c for alphabet in alphabets() for c in rng.choice(alphabet, 60)]
    texts = ["".join(rng.choice(everything, rng.integers(1, 40))) for _ in range(1500)]
    assert_same(plain, texts)


def test_mojibake(plain, rng):
    texts = []
    for alphabet in alphabets()[4:]:
        for _ in range(25):
            text = "".join(rng.choice(alphabet, rng.integers(1, 15)))
            texts.append(text.encode("utf-8").decode("latin-1"))
            texts.append(text.encode("utf-8").decode("cp1252", errors="replace"))
    assert_same(plain, texts)


def test_every_kind_of_character(plain, rng):
    points = [*range(0, 0x3000, 3), *rng.integers(0x3000, 0x20000, 1500)]
    assert_same(plain, [f"a{chr(p)}b 1{chr(p)}" for p in map(int, points)])


def test_merging_order_on_letter_salad(plain, rng):
    # Long words of few letters: many overlapping and repeated pairs.
    texts = ["".join(rng.choice(list("aeinst"), rng.integers(10, 60))) for _ in range(1000)]
    assert_same(plain, texts)


def test_clean_shortcut_changes_nothing(plain, rng):
    # Printable ASCII without "&" skips ftfy; "&" and controls are near misses.
    pool = [*map(chr, range(0x1E, 0x80)), *["  ", "\u00e9"]]
    for _ in range(3000):
        text = "".join(rng.choice(pool, rng.integers(0, 12)))
        assert clean(text) == plain.clean(text), repr(text)


def test_known_ids():
    # CLIP's published tokenization of this phrase.
    row = default_tokenizer()(["a photo of a cat"])
    assert row.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 25]


def test_shape_dtype_and_padding():
    tokenizer = Tokenizer()
    rows = tokenizer(["cat", "", "a very small dog"], context_length=6)
    assert rows.shape == (3, 6)
    assert rows.dtype == np.int32
    assert rows[1].tolist() == [START, END, 0, 0, 0, 0]
    assert tokenizer([]).shape == (0, 32)
    assert tokenizer.vocab_size == 49408
    assert (tokenizer.start_id, tokenizer.end_id) == (START, END)


def test_truncation_keeps_the_end_token():
    tokenizer = default_tokenizer()
    full = tokenizer(["one two three four five six"], 8)[0]
    assert full.tolist() == [START, *tokenizer.encode("one two three four five six"), END]
    assert tokenizer(["one two three four five six"], 7)[0].tolist() == [*full[:6], END]
    assert tokenizer([" ".join(["cat"] * 500)])[0].tolist() == [START] + [2368] * 30 + [END]


def test_one_string_is_a_list_of_one():
    tokenizer = default_tokenizer()
    np.testing.assert_array_equal(tokenizer("cat"), tokenizer(["cat"]))


def test_rows_do_not_depend_on_company():
    tokenizer = default_tokenizer()
    together = tokenizer(HAND_PICKED)
    alone = [tokenizer([text])[0] for text in reversed(HAND_PICKED)]
    np.testing.assert_array_equal(together, alone[::-1])


def test_decode():
    tokenizer = default_tokenizer()
    text = "a caf\u00e9 , 2 3 \u732b 's \U0001f600"
    assert tokenizer.decode(tokenizer([text])[0]) == text
    assert tokenizer.decode(tokenizer.encode("Two  Dogs!")) == "two dogs !"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer([""])[0]) == ""
    # An id for each byte: cut inside a character.
    assert tokenizer.decode(tokenizer.encode("\U00010348")[:-1]) == "\ufffd"


@pytest.mark.parametrize("bad", [-1, 49408])
def test_decode_refuses_other_ids(bad):
    with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary"):
        default_tokenizer().decode([START, bad])


@pytest.mark.parametrize("length", [1, 0, -3])
def test_context_length_too_small(length):
    with pytest.raises(ValueError, match=f"at least 2.*got {length}"):
        default_tokenizer()(["cat"], length)


def test_texts_must_be_strings():
    # The annotation is checked first in tests; without the hook the tokenizer itself speaks up.
    with pytest.raises(TypeError):
        default_tokenizer()([b"cat"])


def test_default_is_shared_and_instances_pickle():
    assert default_tokenizer() is default_tokenizer()
    copy = pickle.loads(pickle.dumps(default_tokenizer()))
    np.testing.assert_array_equal(copy(HAND_PICKED), default_tokenizer()(HAND_PICKED))


def test_ten_thousand_phrases_in_a_second():
    tokenizer = Tokenizer()
    texts = [f"a small red car number {n}" for n in range(10_000)]
    start = time.process_time()
    tokenizer(texts)
    assert time.process_time() - start < 1  # .13 s on an idle core
