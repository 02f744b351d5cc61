from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.html import Html, el


class Reader(HTMLParser):
    """What a browser's parser makes of markup."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(deadline=None)
@given(st.text())
def test_text_and_attributes_come_back_as_they_were(text: str) -> None:
    read = Reader(el("p", text, title=text))
    plain = text.replace("\0", "\ufffd")
    assert read.tags == ["p"]
    assert read.attributes == {"title": plain}
    assert read.text == plain


def test_children() -> None:
    inner = el("b", "<i>")
    assert el("p", inner, [1, 2.5, None, False, "&"], class_="x", open=True, id=None) == (
        '<p class="x" open><b>&lt;i&gt;</b>12.5&amp;</p>'
    )
    assert el("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert el("rect", x=0, stroke_width=1.0) == '<rect x="0" stroke-width="1"></rect>'
    assert el("p", Html("<br>") + "<script>") == "<p>&lt;br&gt;&lt;script&gt;</p>"  # joined text is text
