"""How numbers, reasons and the corpus's own text are shown to people, on a page or in a terminal.

Text of a corpus is hostile: `visible` makes it safe to look at. What could move a cursor, ring, recolour, hide or
reorder (control characters, escape sequences, bidirectional overrides, tags, unassigned code points) comes out
as a mark that is seen. HTML is escaped elsewhere, by `pipeline.report.html`.
"""

from __future__ import annotations

import unicodedata
from typing import Any

HARMLESS = "\u00ad\u200b\u200c\u200d"
"""Format characters that real scripts are written with (soft hyphens, Thai and Khmer breaks, Indic and emoji joins)."""
UNSAFE = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
STACKED = 4
"""Combining marks in a row that real scripts stay below; more pile up over the lines around them."""

REASONS = {
    "kept": "in the curated set",
    "below_threshold": "ranked after the rows that filled the budget",
    "tie_lost": "the same score as the last rows kept; lost by hash",
    "quota": "lost inside its concept with a score that was enough in another",
    "too_large": "ranked high enough, but larger than what was left of the budget",
    "quarantined": "unusable: no text, no vector or no score",
}


def visible(text: str, length: int) -> str:
    """At most `length` characters of a text on one line, with nothing in it that acts; `…` says that more follows."""
    start = " ".join(text[: 4 * length].split())
    cut = start[:length]
    marks, shown = 0, []
    for character in cut:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= STACKED:
            shown.append(_safe(character))
    more = len(start) > length or len(text) > 4 * length
    return "".join(shown).rstrip() + "…" * more


def harmless(text: str) -> str:
    """All of a text, its lines as they are, with nothing else in it that acts."""
    return "\n".join("".join(map(_safe, line)) for line in text.split("\n"))


def _safe(character: str) -> str:
    if unicodedata.category(character) not in UNSAFE or character in HARMLESS:
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


def explain(reason: str) -> str:
    """What a reason of the column `select` means."""
    if reason in REASONS:
        return REASONS[reason]
    score, _, rule = reason.partition(":")
    return f"below the floor of {rule}" if score == "floor" else f"failed this rule of {score}"


def count(number: float) -> str:
    return f"{number:,.0f}"


def plural(number: int, one: str, many: str = "") -> str:
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def short(number: float) -> str:
    """Three significant digits with a unit: 1.23 M."""
    for factor, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(number) >= factor:
            scaled = number / (1e3 if unit == " k" else factor)
            return f"{scaled:.{max(0, 2 - len(str(int(abs(scaled)))) + 1)}f}{unit}"
    return f"{number:,.0f}"


def share(part: float, whole: float) -> str:
    """A percentage that never rounds to 0 % or 100 % what is neither."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return "> 99.9 %" if 99.9 < percent < 100 else f"{percent:.1f} %"


def size(number: float) -> str:
    """Bytes in decimal units."""
    for factor, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 1000 * factor else f"{number / factor:,.0f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


def number(value: float) -> str:
    """A score or a bin edge: at most four significant digits."""
    return f"{value:.4g}"


def trouble(done: dict[str, Any]) -> str:
    """What went wrong in a pass of the manifest; empty where nothing did."""
    told = [f"{count(done['failed'])} failed"] if done["failed"] else []
    return ", ".join([*told, *([f"{plural(done['workers_lost'], 'worker')} lost"] if done["workers_lost"] else [])])
