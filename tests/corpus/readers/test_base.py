"""Blocks of lines: nothing lost, nothing moved, whatever the block size; oversized lines named and left out."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.readers.base import line_blocks
from pipeline.errors import CorpusError

MARK = b"\xef\xbb\xbf"
LINES = st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"").replace(MARK, b"")), max_size=30)


@given(LINES, st.integers(3, 40), st.booleans(), st.booleans())
def test_blocks_join_to_the_stream(lines: list[bytes], block: int, ends: bool, marked: bool) -> None:
    content = b"\n".join(lines) + b"\n" * (ends and bool(lines))
    blocks = list(line_blocks(io.BytesIO(MARK * marked + content), 1 << 20, block))
    assert b"".join(b.data for b in blocks) == content
    line, offset = 1, len(MARK) * marked
    for b in blocks:
        assert (b.first, b.offset, b.size) == (line, offset, 0)
        line, offset = line + b.total, offset + len(b.data)


@given(LINES, st.integers(3, 40), st.integers(1, 20))
def test_lines_above_the_limit_are_counted_whole(lines: list[bytes], block: int, limit: int) -> None:
    content = b"\n".join(lines) + b"\n"
    position, line = 0, 1
    try:
        for b in line_blocks(io.BytesIO(content), limit, block):
            assert (b.offset, b.first) == (position, line)
            piece = content[position : position + (b.size or len(b.data))]
            if b.size:
                assert piece.startswith(b.data)
                assert len(piece) > limit
                assert piece.find(b"\n") in (-1, len(piece) - 1)
            else:
                assert piece == b.data
            position, line = position + len(piece), line + b.total
    except CorpusError:
        assert max(map(len, lines)) > 64 * limit - block
    else:
        assert position == len(content)


def test_a_line_that_never_ends_is_no_line() -> None:
    with pytest.raises(CorpusError, match="line 2 does not end within"):
        list(line_blocks(io.BytesIO(b"a\n" + bytes(1000)), 10, 64))
