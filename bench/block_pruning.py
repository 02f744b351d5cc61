"""HTML block pruning (pipeline/rewrite/html_blocks.py) on 675 real web pages: how much of the main text it keeps.

usage: python bench/block_pruning.py [--pages PAGES.parquet] [--rounds 1]     (needs tamis[web])

The same pages and figures as bench/extraction.py, whose extractors stand beside it: token precision, recall and F1
against the main text (means over the pages that have it), the share of must_have segments that is found and of
must_not_have segments that is not, pages a cpu second with charset detection. Rows in brackets are not what the rewrite
does: its steps alone.
"""

from __future__ import annotations

from collections.abc import Callable

from extraction import print_table, whole_page

from pipeline.corpus.readers.extract import EXTRACTORS
from pipeline.rewrite.html_blocks import ASIDE, Block, HtmlBlocks, blocks, is_content, read


def density(page: str) -> str:
    return _joined(page, HtmlBlocks().choose(page, None))


def title_like(page: str) -> str:
    return _joined(page, HtmlBlocks(signal="query_like").choose(page, None))


def rules_alone(page: str) -> str:
    return _joined(page, _content(blocks(page)))


def rules_and_names(page: str) -> str:
    return _joined(page, [b for b in _content(blocks(page)) if not b.names & ASIDE])


def _content(page: list[Block]) -> list[Block]:
    around = [None, *page, None]
    return [b for i, b in enumerate(page) if is_content(around[i], b, around[i + 2])]


def _joined(page: str, kept: list[Block]) -> str:
    return "\n".join(read(page, block) for block in kept)


PRUNERS: dict[str, Callable[[str], str]] = {
    "html_blocks": density,
    "html_blocks, query_like by title": title_like,
    "[the decision tree alone]": rules_alone,
    "[and no nav, footer, aside, ...]": rules_and_names,
    "[all text of the page]": whole_page,
}


def main() -> None:
    print_table(__doc__, {**PRUNERS, **EXTRACTORS})


if __name__ == "__main__":
    main()
