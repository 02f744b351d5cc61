"""Pages to their content: what never comes through, what stays whole, the rules, and hostile markup."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import curate
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.rewrite._overlap import WORD
from pipeline.rewrite.html_blocks import Block, HtmlBlocks, _open, blocks, by_query, is_content, read

PROSE = "The miller walked along the river in the morning and told everybody whom he met what the water had done. "


def pruned(page: str, **options: object) -> str:
    recipe = HtmlBlocks.model_validate(options)
    texts = pa.array([page], pa.large_string())
    kept = _open(recipe)(pa.record_batch([texts], ["text"]))
    (text,) = recipe.render(texts, kept).to_pylist()
    return str(text)


def whole(page: str) -> str:
    return "\n".join(read(page, block) for block in blocks(page))


PAGE = f"""<!doctype html><html><head><title>The river</title><style>p {{color: red}}</style></head>
<body class="secret-attribute"><!-- secret comment > still --><script>var secret = "<p>script</p>";</script>
<nav><ul><li><a href="/">Home</a><li><a href="/a">About us</a></ul></nav>
<div><h1>A river</h1><p title="secret > title">{PROSE}<b>Bold</b> &amp; caf&eacute;&nbsp;<i>end</i>.{PROSE}</p>
<table><tr><td>Year</td><td>Depth</td></tr><tr><td>1999</td><td>3 m and a half at the old bridge, as was told by many
who were there on that day and saw it</td></tr></table>
<pre>  keep
    this   space, for it is code that has to look as it does, in every single one of its many many lines</pre>
<noscript>secret noscript</noscript><p>{PROSE}<br>{PROSE}</div>
<footer><p>Imprint secret <a href="x">Privacy</a></p></footer></body></html>"""


def test_markup_scripts_comments_and_attributes_never_come_through() -> None:
    for text in (whole(PAGE), pruned(PAGE)):
        for word in ("secret comment", "secret =", "attribute", "title", "noscript", "color", "<", "href"):
            assert word not in text
    text = pruned(PAGE)
    assert "Bold & café end." in text
    assert "Imprint" not in text
    assert "About us" not in text
    assert [text.index(w) for w in ("miller", "Bold", "Year", "keep", "miller walked")][1:4] == sorted(
        text.index(w) for w in ("Bold", "Year", "keep")
    )


def test_tables_and_pre_stay_whole() -> None:
    found = [read(PAGE, b) for b in blocks(PAGE)]
    (table,) = [t for t in found if "1999" in t]
    assert table.splitlines()[0].split() == ["Year", "Depth"]
    (code,) = [t for t in found if "this   space" in t]
    assert code.startswith("  keep\n    this")
    layout = "<table><tr><td><p>One</p></td><td><div>Two</div></td></tr></table>"
    assert [read(layout, b) for b in blocks(layout)] == ["One", "Two"]


def test_cleaning_is_idempotent_and_text_without_markup_stays() -> None:
    assert pruned(pruned(PAGE)) == pruned(PAGE)
    for text in ("No markup, 3 < 4 & so on.\n\n  Second  line. ", "x"):
        assert pruned(text) == text
    assert pruned("<script>only()</script>") == ""


def test_the_decision_tree_of_boilerpipe() -> None:
    def block(words: int, links: float = 0.0) -> Block:
        return Block(0, 0, (), frozenset(), words=words, linked=round(words * links))

    cases = [
        (block(10), block(100, 0.5), block(100), False),  # links
        (block(10), block(17), block(0), True),  # long
        (block(10), block(16), block(16), True),  # the next is long
        (block(5), block(16), block(15), True),  # the one before is not tiny
        (block(4), block(16), block(15), False),
        (block(10, 0.9), block(40), block(17), False),  # behind links it takes more
        (block(10, 0.9), block(41), block(0), True),
        (block(10, 0.9), block(40), block(18), True),
        (None, block(3), None, False),
    ]
    assert [is_content(a, b, c) for a, b, c, _ in cases] == [expected for *_, expected in cases]


def test_planted_navigation_goes_and_the_article_stays() -> None:
    """The headline in spirit: over 95 % of the boilerplate's characters are removed, under 2 % of the article's."""
    rng = np.random.default_rng(0)
    menu_words, prose_words = ["Shop", "Login", "Sitemap", "Careers", "Press"], PROSE.split()
    removed, kept = Counter[str](), Counter[str]()
    for _ in range(30):
        menu = "".join(f'<li><a href="#">NAV{rng.choice(menu_words)}</a></li>' for _ in range(12))
        side = "".join(f"<div>NAV{rng.choice(menu_words)} <a>NAVmore</a></div>" for _ in range(8))
        article = "".join(f"<p>{' '.join(rng.choice(prose_words, rng.integers(18, 80)))}.</p>" for _ in range(8))
        page = f"<body><ul>{menu}</ul><div><div>{article}</div><div>{side}</div></div><p>NAVall rights</p></body>"
        for counter, text in ((removed, whole(page)), (kept, pruned(page))):
            for word in text.split():
                counter["NAV" if word.startswith("NAV") else "article"] += len(word)
    assert kept["NAV"] < 0.05 * removed["NAV"]
    assert kept["article"] > 0.98 * removed["article"]


TAGS = "<p> </p> <div> </div> <a> </a> <table> <td> </table> <pre> </pre> <script> </script> <br> <li>"
MARKS = f"{TAGS} <!-- --> <b &lt; \" '"
WORDS = ("word ", "é漢 ", "\n", "many words in a row that make a long block of text and more ")


@settings(max_examples=150)
@given(st.lists(st.sampled_from([*MARKS.split(), *WORDS]), max_size=25))
@example(["<pre>", "</pre>", "word "])
@example(["<div>", "<pre>", "</div>", "word "])
@example(["<pre>", "<p>", "word ", "</p>", "word "])
def test_spans_are_ordered_disjoint_and_inside(pieces: list[str]) -> None:
    page = "".join(pieces)
    for found in (blocks(page), HtmlBlocks().choose(page, None)):
        ends = [0, *(b.end for b in found)]
        assert all(e <= b.start < b.end <= len(page) for e, b in zip(ends, found, strict=False))
    if blocks(page):
        assert HtmlBlocks().choose(page, None)


@pytest.mark.parametrize(
    "unit", ["<a", "<a ", '<a "', "<a '\"", "<script ", "<script>", "<!--", '"<a" ', "<a<", "</a", "<a x='", "<pre "]
)
def test_no_page_takes_quadratic_time(unit: str) -> None:
    page = unit * (200_000 // len(unit))
    start = time.process_time()
    HtmlBlocks().choose(page, None)
    assert time.process_time() - start < 2  # quadratic: minutes


def test_a_depth_bomb_is_one_block() -> None:
    page = "<div>" * 50_000 + PROSE + "</div>" * 50_000
    assert [b for b in blocks(page) if len(b.path) > 64] == []
    assert pruned(page) == PROSE.strip()


def test_a_query_finds_its_blocks() -> None:
    about = ("Cats sleep all day long. ", "The river water rose. ", "Money is round. ")
    page = "<title>river water</title>" + "".join(f"<div><p>{text * 6}</p></div>" for text in about)
    text = pruned(page, signal="query_like", keep=0.4, max_words=40)
    assert "river" in text
    assert "Cats" not in text
    assert "Money" in pruned(page, signal="query_like", keep=1.0)
    found = blocks(page)
    for keep in (0.3, 0.5, 0.8):
        chosen = by_query(found, page, "money", keep, 10)
        assert sum(b.words for b in chosen) <= keep * sum(b.words for b in found) or len(chosen) == 1
        assert chosen == sorted(chosen, key=lambda b: b.start)


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert len(WORD.findall("川の水 river 2")) == 5


def test_curate_prunes_a_corpus_of_pages(write_corpus: Callable[..., Path], tmp_path: Path) -> None:
    def rows(file: int, count: int) -> dict[str, list[str | None]]:
        ids: list[str | None] = [f"{file}-{i}" for i in range(count)]
        return {"id": ids, "text": [PAGE] * count, "asked": ["miller", None] * (count // 2)}

    corpus = write_corpus(files=2, rows=6, rows_of=rows)
    for rewrite in ({"kind": "html_blocks"}, {"kind": "html_blocks", "signal": "query_like", "query": "asked"}):
        config = {
            "corpus": {"path": str(corpus), "id": "id"},
            "scores": ["random"],
            "select": {"budget": {"fraction": 1.0}},
            "output": {"rewrite": rewrite},
            "handoff": {"calibration_rows": 0, "recovery_tokens": 0},
            "engine": {"address": "inline", "max_bad_fraction": 1.0},  # a row without a query counts as bad
            "run": str(tmp_path / "run"),
        }
        written = pq.read_table(curate(config, quiet=True).path).to_pylist()
        for row in written:
            spans = row["tamis"]["kept"]
            if rewrite.get("query") and row["asked"] is None:  # nothing to judge by: the text stays whole
                assert row["text"] == PAGE
                assert spans is None
            else:
                assert "miller" in row["text"]
                assert "<" not in row["text"]
                assert "miller" in "".join(PAGE[s["start"] : s["end"]] for s in spans)
        if "query" not in rewrite:
            assert {r["text"] for r in written} == {pruned(PAGE)}


def test_options_of_the_other_signal_are_refused() -> None:
    with pytest.raises(ValueError, match="only `signal: query_like`"):
        HtmlBlocks.model_validate({"keep": 0.2})
    with pytest.raises(ConfigError, match="unknown kind 'html_block'; did you mean 'html_blocks'"):
        parse(
            {
                "corpus": {"path": "x"},
                "scores": ["random"],
                "select": {"budget": {"rows": 1}},
                "output": {"rewrite": "html_block"},
                "run": "r",
            }
        )


def test_real_pages(shared_data: Path) -> None:
    """Token F1 against the main text, on every eighth page that has it: 0.915 on all of them."""
    pages = [p for p in pq.read_table(shared_data / "html_extraction/pages.parquet").to_pylist() if p["text"]][::8]
    scores = {"pruned": 0.0, "whole": 0.0}
    for page in pages:
        source, truth = page["html"].decode("utf-8", "replace"), Counter(page["text"].split())
        for name, text in (("pruned", pruned(source)), ("whole", whole(source))):
            found = Counter(text.split())
            scores[name] += 2 * (found & truth).total() / max(1, found.total() + truth.total()) / len(pages)
    assert scores["pruned"] > 0.85
    assert scores["pruned"] > scores["whole"] + 0.1
