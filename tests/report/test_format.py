from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.format import HARMLESS, UNSAFE, duration, explain, harmless, plural, share, short, size, visible

HOSTILE = "a\x1b[31mred\x1b[0m\x07 b\u202ec\u2066d\x9b1m\x00e\x7f \U000e0041\u2028f\ufeff"


def test_what_acts_becomes_a_mark() -> None:
    assert visible(HOSTILE, 100) == "a␛[31mred␛[0m␇ b\ufffdc\ufffdd\ufffd1m␀e␡ \ufffd f\ufffd"


def test_of_a_message_all_is_shown_and_nothing_acts() -> None:
    assert harmless(f"  a list:\n    {HOSTILE[:9]}\r\n\nend\ud800") == "  a list:\n    a␛[31mred␍\n\nend\ufffd"


def test_text_of_real_scripts_stays() -> None:
    for text in ("नमस्ते क्‍ष", "العربية نص", "👩\u200d💻 ok", "Übergröße", "ครับ\u200bผม"):
        assert visible(text, 100) == text


def test_piled_up_marks_are_cut() -> None:
    assert visible("a" + "\u0301" * 50 + "b", 100) == "a" + "\u0301" * 4 + "b"


def test_a_long_text_is_cut_and_says_so() -> None:
    assert visible("word " * 100, 9) == "word word…"
    assert visible("a\n\n b", 9) == "a b"
    assert visible("a" + " " * 1000 + "b", 9) == "a…"
    assert visible("", 9) == ""


@settings(deadline=None)
@given(st.text(), st.integers(1, 40))
def test_nothing_unsafe_comes_through(text: str, length: int) -> None:
    shown = visible(text, length)
    assert len(shown) <= length + 1
    assert not [c for c in shown if unicodedata.category(c) in UNSAFE and c not in HARMLESS]


@pytest.mark.parametrize(
    ("part", "whole", "told"),
    [
        (0, 9, "0.0 %"),
        (1, 100_000, "< 0.1 %"),
        (99_999, 100_000, "> 99.9 %"),
        (9, 9, "100.0 %"),
        (1, 3, "33.3 %"),
        (0, 0, "–"),
    ],
)
def test_a_share_never_rounds_to_all_or_nothing(part: float, whole: float, told: str) -> None:
    assert share(part, whole) == told


def test_numbers() -> None:
    assert [short(n) for n in (0, 9999, 10_000, 123_456, 1_234_567, 98_765_432_100, 2e12)] == [
        "0",
        "9,999",
        "10.0 k",
        "123 k",
        "1.23 M",
        "98.8 B",
        "2.00 T",
    ]
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 5.5e12)] == ["0 B", "999 B", "1 kB", "1.23 MB", "5.5 TB"]
    assert [duration(s) for s in (0.0042, 3.21, 42, 600, 7200, 400_000)] == [
        "4 ms",
        "3.2 s",
        "42 s",
        "10 min",
        "2.0 h",
        "4.6 days",
    ]
    assert [plural(n, "pass", "passes") for n in (1, 2)] == ["1 pass", "2 passes"]


def test_every_reason_is_explained() -> None:
    from pipeline.select.verdict import REASONS

    assert "in the curated set" in {explain(r) for r in REASONS}
    assert all("rule" not in explain(r) for r in REASONS)
    assert explain("floor:quality") == "below the floor of quality"
    assert explain("heuristics:top_2_gram") == "failed this rule of heuristics"
