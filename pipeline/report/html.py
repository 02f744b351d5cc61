"""HTML that is escaped by construction: `el` escapes every string among its children and attributes but `Html`.

`Html` is made here and in `charts` alone, so there is one place to check. Strings from the corpus also pass `visible`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = {"meta", "br", "col"}


class Html(str):
    """Markup that is safe to put on a page as it is."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def el(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. `class_` and `stroke_width` stand for `class` and `stroke-width`; None and False leave one out."""
    given = [(n.rstrip("_").replace("_", "-"), v) for n, v in attributes.items() if v is not None and v is not False]
    opening = "".join(f" {n}" if v is True else f' {n}="{html.escape(_plain(v))}"' for n, v in given)
    return Html(f"<{tag}{opening}>" if tag in VOID else f"<{tag}{opening}>{join(children)}</{tag}>")


def join(children: Child) -> Html:
    """Markup and text end to end, text escaped; None and False are nothing, so that `condition and el(...)` works."""
    if children is None or children is False:
        return Html()
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return Html(html.escape(_plain(children)))
    return Html("".join(join(c) for c in children))


def _plain(value: str | int | float | bool | None) -> str:
    """Text without NUL, which no HTML document may hold; floats with what a pixel needs."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value).replace("\0", "\ufffd")
