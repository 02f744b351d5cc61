"""What kind of character a code point is: one bit table that every rule looks up, built once a process (0.3 s).

The classes follow the tools that the published filters were tuned with: the letter classes and affixes of spaCy 3.8's
English tokenizer, the symbols and sentence ends of datatrove 0.10. Where those follow Unicode 11, this table follows
the running Python's Unicode (a few hundred newer emoji become words of their own).
"""

from __future__ import annotations

import string
import unicodedata
from functools import cache

import numpy as np

SPACE, LINE_BREAK, LETTER, DIGIT, DECIMAL = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
"""`str.isspace`; where `str.splitlines` breaks; `str.isalpha`; 0-9; a decimal digit of any script (regex `\\d`)."""
LOWER, UPPER, ALPHA = 1 << 5, 1 << 6, 1 << 7
"""Letter classes of the tokenizer. Letters of scripts without case are lower and upper at once."""
PREFIX, SUFFIX, INFIX = 1 << 8, 1 << 9, 1 << 10
"""Peeled off the front or the back of a word; may split a word in its middle, if its neighbours agree."""
QUOTE, BEFORE_STOP, AFTER_DIGIT = 1 << 11, 1 << 12, 1 << 13
"""Quotes; a full stop behind this is peeled off; peeled off the back where a digit is before it."""
COUNTED, NOT_PUNCTUATION, LINE_END, SENTENCE_END = 1 << 14, 1 << 15, 1 << 16, 1 << 17
"""Makes a word count as one (neither symbol nor space); neither space nor Unicode category P; ends a line of prose;
ends a sentence."""
UNSPACED, ICON = 1 << 18, 1 << 19
"""A letter of a script that writes no spaces between words; Unicode category So (emoji, dingbats)."""

_PUNCT = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉\u2329\u232a⟦⟧,"
_CURRENCY = "$£€¥฿₽﷼" + "".join(map(chr, range(0x20A0, 0x20C0)))
_SYMBOLS = string.punctuation + "«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～"
_CASED = (
    "0-24f 250-2af 386 388-38a 38c 38e-3a1 3a3-3a9 3ac-3af 3b1-3c9 3cc-3ce 400-401 403-40a 40c-40d 410-451 453-45a "
    "45c-45d 490-491 496-497 4a2-4a3 4ae-4af 4ba-4bb 4d8-4d9 4e8-4e9 1d00-1d25 1d6b-1d77 1d79-1d9a 1e00-1eff "
    "2c60-2c7b 2c7e-2c7f a722-a76f a771-a787 a78b-a78e a790-a7b9 a7fa ab30-ab5a ab60-ab64 ff21-ff3a ff41-ff5a"
)
_UNCASED = (
    "591-5f4 620-64a 66e-6d5 6e5-6ff 750-77f 8a0-8bd 900-9ff b80-cff d80-dff 1100-137f 2e80-2fdf 2ff0-30ff 31c0-31ef "
    "3200-4dbf 4e00-9fff ac00-d7af f900-faff fb1d-fbb1 fbd3-fd3d fd50-fdc7 fdf0-fdfb fe30-fe4f fe70-fefc 1ee00-1eebb "
    "1f200-1f2ff 20000-2a6df 2a700-2ebef 2f800-2fa1f"
)
# Unicode's Sentence_Terminal: the first line ends a sentence for the sentence splitter, both end a line of prose.
_SENTENCE_ENDS = (
    "21 2e 3f 589 61f 6d4 700-702 7f9 964-965 104a-104b 1362 1367-1368 166e 1735-1736 1803 1809 1944-1945 1aa8-1aab "
    "1b5a-1b5b 1b5e-1b5f 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 2e2e 2e3c 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 "
    "a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 11047-11048 "
    "110be-110c1 11141-11143 111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 "
    "115c9-115d7 11641-11642 1173c-1173e 11a42-11a43 11a9b-11a9c 11c41-11c42 16a6e-16a6f 16af5 16b37-16b38 16b44 "
    "1bc9f 1da88"
)
_LINE_ENDS = (
    "61d-61e 837 839 83d-83e 17d4-17d6 17d9-17da 1b7d-1b7e 2e53-2e54 10f55-10f59 10f86-10f89 11944 11946 11ef7-11ef8 "
    "11f43-11f44 16e98"
)
# Han, Hiragana and Katakana; Thai, Lao, Tibetan, Myanmar, Khmer, Tai Le to Tai Tham, Balinese, Javanese.
_UNSPACED = (
    "e00-eff f00-fff 1000-109f 1780-17ff 1950-19df 1a20-1aaf 1b00-1b7f 2e80-2fdf 3005-3007 3021-3029 3031-303c "
    "3041-30ff 31f0-31ff 3400-4dbf 4e00-9fff a980-a9df aa60-aadf f900-faff ff66-ff9f 1b000-1b16f 20000-323af"
)


def _points(ranges: str) -> np.ndarray:
    """Code points of space-separated hexadecimal ranges."""
    bounds = [[int(bound, 16) for bound in part.split("-")] for part in ranges.split()]
    return np.concatenate([np.arange(low[0], low[-1] + 1) for low in bounds])


def _ord(characters: str) -> np.ndarray:
    return np.array(list(map(ord, characters)))


@cache
def table() -> np.ndarray:
    """The bits of every code point; shape (0x110000,), uint32."""
    bits = np.zeros(0x110000, np.uint32)

    def mark(bit: int, where: np.ndarray) -> None:
        bits[where] |= np.uint32(bit)

    every = np.arange(0x110000, dtype=np.uint32).view("U1")
    letter, space = np.strings.isalpha(every), np.strings.isspace(every)
    mark(LETTER, letter)
    mark(SPACE, space)
    mark(DECIMAL, np.strings.isdecimal(every))
    mark(LINE_BREAK, _ord("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))
    mark(DIGIT, _ord(string.digits))

    cased, uncased = _points(_CASED), _points(_UNCASED)
    cased = np.setdiff1d(cased, _ord("ªµº"))
    mark(ALPHA | LOWER, cased[np.strings.islower(every[cased])])
    mark(ALPHA | UPPER, cased[np.strings.isupper(every[cased])])
    mark(ALPHA | LOWER | UPPER, uncased)

    # Categories are asked for below plane 2 only: beyond it are ideographs, tags and private use.
    categories = np.array([unicodedata.category(chr(point)) for point in range(0x20000)])
    icons = np.flatnonzero(categories == "So")
    mark(ICON | PREFIX | SUFFIX | INFIX, icons)
    punctuation = np.flatnonzero(np.strings.startswith(categories, "P") | space[: len(categories)])
    mark(NOT_PUNCTUATION, np.setdiff1d(np.arange(len(bits)), punctuation))

    mark(PREFIX | SUFFIX | BEFORE_STOP, _ord(_PUNCT + _QUOTES))
    mark(PREFIX | SUFFIX, _ord("—–"))
    mark(PREFIX, _ord("§%=" + _CURRENCY))
    mark(INFIX, _ord("….,-–—~:<>=/+*^"))
    mark(QUOTE, _ord(_QUOTES))
    mark(BEFORE_STOP, np.flatnonzero(bits & (LOWER | DIGIT)))
    mark(BEFORE_STOP, _ord("%²-+|"))
    mark(AFTER_DIGIT, _ord("+%" + _CURRENCY))

    controls = np.array([*range(0, 9), 11, 12, *range(13, 32), *range(127, 160)])
    mark(LINE_END | SENTENCE_END, _points(_SENTENCE_ENDS))
    mark(LINE_END, _points(_LINE_ENDS))
    symbols = np.concatenate([_ord(_SYMBOLS), controls, np.flatnonzero(bits & (LINE_END | SPACE))])
    mark(COUNTED, np.setdiff1d(np.arange(len(bits)), symbols))
    unspaced = _points(_UNSPACED)
    mark(UNSPACED, unspaced[letter[unspaced]])
    return bits
