"""Heuristics: datatrove's verdicts, by rules that a plain loop over strings confirms."""

import re
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.scores import heuristics
from pipeline.scores.heuristics import Heuristics
from pipeline.textrules.chars import COUNTED, LINE_END, table
from pipeline.textrules.docs import Docs
from pipeline.textrules.words import count_sentences, split_words

ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def judged(texts: list[str] | pa.Array, **limits: Any) -> list[str]:
    column = Heuristics(**limits).column(None)  # type: ignore[arg-type]  # the rules ask nothing of the run
    texts = pa.array(texts) if isinstance(texts, list) else texts
    out = column.open()(pa.record_batch([texts], list(column.inputs)))
    assert out.schema == column.fields
    assert out["score"].to_pylist() == [float(rule == "") for rule in out["rule"].to_pylist()]
    return out["rule"].to_pylist()


def words_of(text: str) -> list[str]:
    words = split_words(Docs.of([text]))
    return [text[start:end] for start, end in zip(words.starts, words.ends, strict=True)]


def sentences_of(line: str) -> int:
    docs = Docs.of([line])
    return int(count_sentences(docs, split_words(docs), docs.lines)[0])


# The tokenizer: what spaCy 3.8's blank English pipeline makes of these


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Well, (he said) “no”…", "Well|,|(|he|said|)|“|no|”|…"),
        ("word.Another e.g. Mr. Smith's U.S. NATO. etc.)", "word|.|Another|e.g.|Mr.|Smith|'s|U.S.|NATO|.|etc|.|)"),
        ("(don't). I'm can't've cannot y'all c'mon!", "(|do|n't|)|.|I|'m|ca|n't|'ve|can|not|y'|all|c'm|on|!"),
        ("dont it’s its Well were 'em 've 's dogs' ol'", "do|nt|it|’s|its|Well|were|'em|'|ve|'s|dogs|'|ol'"),
        ("self-don't wasn't.Next O’Neil rock'n'roll", "self|-|don't|wasn't|.|Next|O’Neil|rock'n'roll"),
        ("12-year-old covid-19-related 1-2 3--a", "12|-|year|-|old|covid-19|-|related|1|-|2|3|-|-a"),
        ("a--b c---d e—f --g h-- 1+2 +1 1+", "a|--|b|c|---|d|e|—|f|--g|h--|1|+|2|+1|1|+"),
        ("foo/bar and/or, x=y 12:30 1/2 1,000 a,b", "foo|/|bar|and/or|,|x|=|y|12:30|1/2|1,000|a|,|b"),
        ("http://a.b-c.com/d-e foo@bar-baz.com foo.bar-baz", "http://a.b-c.com/d-e|foo@bar-baz.com|foo.bar|-|baz"),
        ("(http://foo.com/a-b). e-mail.com", "(|http://foo.com/a-b|)|.|e-mail.com"),
        ("10am 2p.m. 5km/h. 3.5m 10%. 100°C 10°C.", "10|am|2|p.m.|5|km/h|.|3.5|m|10|%|.|100|°|C|10|°|C|."),
        ("$5,000. US$5 (C$7) #1 @x AT&T C++.", "$|5,000|.|US$|5|(|C$|7|)|#|1|@x|AT&T|C++|."),
        ("hello:) :-( (8) ... ..foo word... a..b", "hello|:)|:-(|(|8)|...|..|foo|word|...|a|..|b"),
        (":):):) :( ):(a", ":)|:)|:)|:(|):|(|a"),
        ("<b>bold</b> [1][2] **x** _y_ &amp; ->", "<|b|>|bold</b|>|[|1][2|]|*|*|x|*|*|_|y|_|&|amp|;|-|>"),
        ("🙂a b🙂c «x» ¿Qué? 你好世界。 foo\u200bbar", "🙂|a|b|🙂|c|«|x|»|¿|Qué|?|你好世界|。|foo\u200bbar"),
        (" a\u00a0b\n\n\tc\u3000d\x85e ", "a|b|c|d|e"),
    ],
)
def test_words_are_spacys(text: str, words: str) -> None:
    assert words_of(text) == words.split("|")


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("One. Two! Three?", 3),
        ("No end", 1),
        ("Dr. Who met Mr. X at 5 p.m. on Mon. there.", 2),  # "Mon." is no exception
        ("“Really?” he said. (Yes.) Done.", 4),
        ("Wait... what?! Version 3.5. End", 3),
        ("你好。世界", 1),  # the full stop of a chunk's middle is not a word
        ("Odd.  ?  End", 3),  # white space that is not one blank opens a sentence too
        ("...", 1),
        ("", 1),
    ],
)
def test_sentences_are_spacys(line: str, count: int) -> None:
    assert sentences_of(line) == count


# datatrove's verdicts


@pytest.mark.parametrize(
    ("column", "limits"),
    [
        ("gopher_repetition", {"rules": ["gopher_repetition"]}),
        ("gopher_quality", {"rules": ["gopher_quality"]}),
        ("c4", {"rules": ["c4"]}),
        ("c4_any_ending", {"rules": ["c4"], "filter_no_terminal_punct": False}),
        ("fineweb", {"rules": ["fineweb"]}),
        ("all_any_ending", {"filter_no_terminal_punct": False}),
    ],
)
def test_verdicts_and_reasons_are_datatroves_on_every_row_of_the_sample(column: str, limits: dict[str, Any]) -> None:
    recorded = pq.read_table(Path(__file__).parent / "datatrove_verdicts.parquet").to_pydict()
    expected = dict(zip(recorded["text_hash"], recorded[column], strict=True))
    texts = ds.dataset(ROOT / "examples/sample", format="parquet").to_table(columns=["text"])["text"]
    texts = texts.drop_null().combine_chunks()
    hashes = [xxhash.xxh3_64_intdigest(text.encode()) - 2**63 for text in texts.to_pylist()]
    known = [number for number, digest in enumerate(hashes) if digest in expected]
    assert len(known) > 2500
    rules = judged(texts.take(pa.array(known)), segment_unspaced=False, **limits)
    assert rules == [expected[hashes[number]] or "" for number in known]


# The rules against a plain loop


def share(part: float, whole: float) -> float:
    return part / max(whole, 1)


def repeats(pieces: list[str]) -> list[str]:
    return [piece for number, piece in enumerate(pieces) if piece in pieces[:number]]


def gopher_repetition(text: str, r: Heuristics) -> str:
    paragraphs, lines, words = re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text), words_of(text)
    for name, pieces in (("para", paragraphs), ("line", lines)):
        twice = repeats(pieces)
        if share(len(twice), len(pieces)) > getattr(r, f"dup_{name}_frac"):
            return f"dup_{name}_frac"
        if share(sum(map(len, twice)), len(text)) > getattr(r, f"dup_{name}_char_frac"):
            return f"dup_{name}_char_frac"
    for n, limit in r.top_n_grams.items():
        grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        if grams:
            gram, count = grams.most_common(1)[0]
            if share(len(gram) * count, len(text)) > limit:
                return f"top_{n}_gram"
    for n, limit in r.dup_n_grams.items():
        seen, taken, at = set(), 0, 0
        while at + n <= len(words):
            gram = tuple(words[at : at + n])
            if gram in seen:
                taken, at = taken + len("".join(gram)), at + n
            else:
                seen.add(gram)
                at += 1
        if share(taken, len(text)) > limit:
            return f"duplicated_{n}_n_grams"
    return ""


def gopher_quality(text: str, r: Heuristics) -> str:
    words, lines = words_of(text), text.splitlines()
    counted = [word for word in words if any(table()[ord(c)] & COUNTED for c in word)]
    alphabetic = sum(any(c.isalpha() for c in word) for word in words)
    stripped = [line.strip() for line in lines]
    mean = sum(map(len, counted)) / len(counted) if counted else 5
    fired = {
        "gopher_short_doc": len(counted) < r.min_doc_words,
        "gopher_long_doc": len(counted) > r.max_doc_words,
        "gopher_below_avg_threshold": mean < r.min_avg_word_length,
        "gopher_above_avg_threshold": mean > r.max_avg_word_length,
        "gopher_too_many_hashes": share(text.count("#"), len(words)) > r.max_symbol_word_ratio,
        "gopher_too_many_ellipsis": share(text.count("...") + text.count("…"), len(words)) > r.max_symbol_word_ratio,
        "gopher_too_many_bullets": share(sum(s.startswith(("•", "-")) for s in stripped), len(lines))
        > r.max_bullet_lines_ratio,
        "gopher_too_many_end_ellipsis": share(sum(s.endswith(("...", "…")) for s in stripped), len(lines))
        > r.max_ellipsis_lines_ratio,
        "gopher_below_alpha_threshold": share(alphabetic, len(words)) < r.min_alpha_words_ratio,
        "gopher_enough_stop_words": len(set(r.stop_words) & set(words)) < r.min_stop_words,
    }
    return next((name for name, fires in fired.items() if fires), "")


def c4(text: str, r: Heuristics) -> tuple[str, str]:
    """The rule that fires, and the text without the lines that C4 drops."""
    kept = []
    for line in map(str.strip, text.splitlines()):
        chunks = line.split()
        if len(chunks) < r.min_words_per_line or any(len(chunk) > r.max_word_length for chunk in chunks):
            continue
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line)
        ends_well = line.endswith((".", "?", "!", '"', "'")) and not line.endswith("...")
        if r.filter_no_terminal_punct and not ends_well:
            continue
        if "lorem ipsum" in line.lower():
            return "lorem_ipsum", ""
        if "javascript" in line.lower():
            continue
        if "{" in line:
            return "curly_bracket", ""
        if not any(phrase in line.lower() for phrase in heuristics._POLICY):
            kept.append(line)
    few = sum(map(sentences_of, kept)) < r.min_num_sentences
    return "too_few_sentences" if few else "", "\n".join(kept).strip()


def fineweb(text: str, r: Heuristics) -> str:
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "empty"
    fired = {
        "line_punct_ratio": share(sum(bool(table()[ord(line[-1])] & LINE_END) for line in lines), len(lines))
        < r.line_punct_thr,
        "short_line_ratio": share(sum(len(line) <= r.short_line_length for line in lines), len(lines))
        > r.short_line_thr,
        "char_dup_ratio": share(sum(map(len, repeats(lines))), len(text.replace("\n", ""))) > r.char_duplicates_ratio,
        "list_ratio": share(text.count("\n"), len(words_of(text))) > r.new_line_ratio,
    }
    return next((name for name, fires in fired.items() if fires), "")


def plain(text: str, r: Heuristics) -> str:
    for rules in r.rules:
        if rules == "c4":
            rule, text = c4(text, r)
        else:
            rule = {"gopher_repetition": gopher_repetition, "gopher_quality": gopher_quality, "fineweb": fineweb}[
                rules
            ](text, r)
        if rule:
            return rule
    return ""


PIECES = [
    *[
        "the",
        "be",
        "to",
        "of",
        "and",
        "that",
        "have",
        "with",
        "cat",
        "sat",
        "mat",
        "River",
        "Mr.",
        "don't",
        "is.",
        "Is?",
    ],
    *["12", "3.5%", "U.S.", "http://a-b.com/c-d", "x-y", "...", "…", "#", "##", "•", "-", "{", "[1]", "[12]", "[edit]"],
    *["lorem", "Lorem", "ipsum", "JavaScript", "privacy", "policy", "use", "Cookies", "no!", "'so'", '"so"', "“q”"],
    *["你好", "。", "ไทย", "🙂"],
]
SPACES = [" ", " ", " ", " ", "\n", "\n", ". ", ".\n", "\n\n", "\n\n\n", "\r\n", "\r", "\u2028", "\x0b", "\t", "  ", ""]
SENTENCE = "The cat sat on the mat that we have with the river.\n"
pieces = st.lists(st.sampled_from(PIECES) | st.sampled_from(SPACES), min_size=1, max_size=40).map("".join)
repeated = st.tuples(pieces, st.integers(1, 4)).map(lambda drawn: drawn[0] * drawn[1])
documents = st.lists(pieces | repeated | st.just(SENTENCE), min_size=1, max_size=6).map("".join).filter(str.strip)
LOOSE = {
    "dup_para_frac": 0.4,
    "dup_para_char_frac": 0.5,
    "dup_line_frac": 0.5,
    "dup_line_char_frac": 0.6,
    "top_n_grams": {1: 0.6, 2: 0.5, 3: 0.4},
    "dup_n_grams": {2: 0.5, 3: 0.4, 5: 0.3, 8: 0.2},
    "min_doc_words": 5,
    "max_doc_words": 90,
    "max_symbol_word_ratio": 0.2,
    "min_alpha_words_ratio": 0.5,
    "min_stop_words": 1,
    "min_num_sentences": 2,
    "max_word_length": 12,
    "short_line_thr": 0.8,
    "short_line_length": 20,
    "char_duplicates_ratio": 0.2,
}


@settings(deadline=None, max_examples=100)
@given(st.lists(documents, min_size=1, max_size=8), st.permutations(heuristics.Heuristics().rules), st.booleans())
@example(["\na b\na b\n", "a\n \nb\n\n", "x", ".", "[1] [2] [3] a. b. c.\n[4] [5] [6]"], ("c4", "fineweb"), False)
def test_rules_are_those_of_a_plain_loop(texts: list[str], order: list[str], endings: bool) -> None:
    for count in range(1, len(order) + 1):
        recipe = Heuristics(rules=order[:count], filter_no_terminal_punct=endings, segment_unspaced=False, **LOOSE)
        assert recipe.judge(pa.record_batch([pa.array(texts)], ["text"]))["rule"].to_pylist() == [
            plain(text, recipe) for text in texts
        ]


# Each limit of the published rules: a text that reaches it passes, one beyond it fails


def distinct(count: int, length: int = 4) -> list[str]:
    """Words that do not repeat."""
    return ["".join(LETTERS[number // 26**place % 26] for place in range(length)) for number in range(count)]


def prose(count: int, *others: str) -> str:
    return " ".join([*distinct(count - 2), "the", "of", *others])


LINES = [f"{first} {second} {third} word." for first, second, third in zip(*[iter(distinct(300, 6))] * 3, strict=True)]
REPETITION, QUALITY, C4, FINEWEB = ({"rules": [rules]} for rules in Heuristics().rules)
LAX = {**REPETITION, "dup_line_char_frac": None, "dup_para_char_frac": None, "top_n_grams": {}, "dup_n_grams": {}}
ANY_END = {**C4, "filter_no_terminal_punct": False}


@pytest.mark.parametrize(
    ("rule", "limits", "passes", "fails"),
    [
        ("dup_line_frac", LAX, "\n".join([*LINES[:7], *LINES[:3]]), "\n".join([*LINES[:6], *LINES[:3]])),
        ("dup_line_frac", LAX, "\nabcd\nabcd\nefgh", "\nabcd\nabcd\nefgh\n"),  # an empty line at both ends
        ("dup_para_frac", LAX, "\n\n".join([*LINES[:7], *LINES[:3]]), "\n\n".join([*LINES[:6], *LINES[:3]])),
        (  # 4 characters of the line twice: 4 of 20 and 4 of 19
            "dup_line_char_frac",
            {**LAX, "dup_line_frac": None, "dup_line_char_frac": 0.2},
            "abcd\nabcd\nefghijklmn",
            "abcd\nabcd\nefghijklm",
        ),
        (
            "dup_para_char_frac",
            {**LAX, "dup_para_frac": None, "dup_para_char_frac": 0.2, "dup_line_frac": None},
            "abcd\n\nabcd\n\nefghijkl",
            "abcd\n\nabcd\n\nefghijk",
        ),
        (  # "aa bb" twice are 10 characters of 50 and 49
            "top_2_gram",
            {**LAX, "top_n_grams": {2: 0.2}},
            "aa bb cc aa bb dd eeeeeeeeeeeeeeeee ffffffffffffff",
            "aa bb cc aa bb dd eeeeeeeeeeeeeeeee fffffffffffff",
        ),
        (  # five words of four letters come again: 20 characters of 200 and 199
            "duplicated_5_n_grams",
            {**LAX, "dup_n_grams": {5: 0.1}},
            " ".join([*distinct(35), *distinct(5)]) + " ",
            " ".join([*distinct(35), *distinct(5)]),
        ),
        ("gopher_short_doc", QUALITY, prose(50), prose(49)),
        ("gopher_short_doc", QUALITY, prose(50, ".", "—"), prose(49, ".", "—")),  # symbols alone do not count
        ("gopher_long_doc", {**QUALITY, "max_doc_words": 60}, prose(60), prose(61)),
        (
            "gopher_below_avg_threshold",
            QUALITY,
            " ".join(["the", "and", *distinct(48, 3)]),
            " ".join(["the", "of", *distinct(48, 3)]),
        ),
        (
            "gopher_above_avg_threshold",
            QUALITY,
            " ".join(["the", "and", "abcdefghijklmnopqrstuvwx", *distinct(47, 10)]),
            " ".join(["the", "and", "abcdefghijklmnopqrstuvwxy", *distinct(47, 10)]),
        ),
        ("gopher_too_many_hashes", QUALITY, prose(54, *"######"), prose(53, *"######")),
        (
            "gopher_too_many_ellipsis",
            QUALITY,
            prose(54, "......", "....", *"…" * 3, "end"),
            prose(53, "......", "....", *"…" * 3, "end"),
        ),
        (
            "gopher_too_many_bullets",
            QUALITY,
            prose(50) + "\n• one more" * 5 + "\n -\tone more" * 4,
            prose(50) + "\r\n• one more" * 6 + "\n -\tone more" * 4 + "\n",
        ),
        (
            "gopher_too_many_end_ellipsis",
            QUALITY,
            "\n".join([prose(50), "a", "b", "c", "d", "e", "f", "word... ", "word…", "word ..."]),
            "\n".join([prose(50), "a", "b", "c", "d", "e", "word... ", "word…", "word ..."]),
        ),
        (
            "gopher_below_alpha_threshold",
            QUALITY,
            prose(80, *["12345"] * 20),
            prose(80, *["12345"] * 21),
        ),
        ("gopher_enough_stop_words", QUALITY, prose(60), prose(60).replace(" of", " off")),
        ("too_few_sentences", C4, "\n".join(LINES[:5]), "\n".join(LINES[:4])),
        ("too_few_sentences", C4, "A bb cc. D ee. F gg! H ii? J kk.", "A bb cc. D ee. F gg! H ii 2.5 kk."),
        ("too_few_sentences", C4, "\n".join(LINES[:5]), "\n".join([*LINES[:4], "Only two."])),
        ("too_few_sentences", C4, "\n".join(LINES[:5]), "\n".join([*LINES[:4], "It ends in an ellipsis..."])),
        (
            "too_few_sentences",
            ANY_END,
            "\n".join([*LINES[:4], "x" * 1000 + " y z"]),
            "\n".join([*LINES[:4], "x" * 1001 + " y z"]),
        ),
        (
            "too_few_sentences",
            ANY_END,
            "\n".join(LINES[:5]),
            "\n".join([*LINES[:4], "Enable JavaScript to read this."]),
        ),
        (
            "too_few_sentences",
            ANY_END,
            "\n".join(LINES[:5]),
            "\n".join([*LINES[:4], "This site Uses Cookies for you."]),
        ),
        (
            "lorem_ipsum",
            C4,
            "\n".join([*LINES[:5], "Lorem and ipsum."]),
            "\n".join([*LINES[:5], "So Lorem Ipsum it is."]),
        ),
        ("curly_bracket", C4, "\n".join([*LINES[:5], "{ x }"]), "\n".join([*LINES[:5], "{ x } is one."])),
        (  # the first line to blame decides, and one that is dropped before does not
            "curly_bracket",
            C4,
            "\n".join([*LINES[:5], "javascript { code } goes here.", "lorem ipsum"]),
            "\n".join([*LINES[:5], "One { here.", "Then a lorem ipsum."]),
        ),
        (
            "line_punct_ratio",
            FINEWEB,
            "\n".join([*LINES[:3], *[f"{line} {line} and no end" for line in LINES[3:25]]]),
            "\n".join([*LINES[:3], *[f"{line} {line} and no end" for line in LINES[3:26]]]),
        ),
        (  # a citation leaves a blank behind, which is stripped off the text but not off the other lines
            "line_punct_ratio",
            {"rules": ["c4", "fineweb"], "filter_no_terminal_punct": False, "char_duplicates_ratio": None},
            "\n".join([*["This line has no end at all, none"] * 5, "The last line of all of them. [1]"]),
            "\n".join(["The first line of all of them. [1]", *["This line has no end at all, none"] * 5]),
        ),
        (
            "short_line_ratio",
            FINEWEB,
            "\n".join([*[line[:29] + "." for line in LINES[:2]], LINES[2] + " It is one of the longer lines."]),
            "\n".join([*[line[:29] + "." for line in LINES[:3]], LINES[3] + " It is one of the longer lines."]),
        ),
        (  # 25 of 2500 characters and of 2499
            "char_dup_ratio",
            {**FINEWEB, "short_line_thr": None, "new_line_ratio": None},
            "\n".join(["a" * 24 + "."] * 2 + ["b" * 2449 + "."]),
            "\n".join(["a" * 24 + "."] * 2 + ["b" * 2448 + "."]),
        ),
        (
            "list_ratio",
            {**FINEWEB, "short_line_thr": None},
            "a b c d.\ne f g.\nh i.\nx",
            "a b c d.\ne f g.\nh i.\n",
        ),
    ],
)
def test_a_rule_fires_beyond_its_limit_and_not_at_it(
    rule: str, limits: dict[str, Any], passes: str, fails: str
) -> None:
    assert judged([passes, fails], **limits) == ["", rule]


def test_the_first_rule_in_the_order_of_the_sets_is_named() -> None:
    text = "Short { line.\n" * 9
    orders = (["gopher_quality", "c4"], ["c4", "gopher_quality"], ["fineweb", "c4"])
    assert [judged([text], rules=order)[0] for order in orders] == [
        "gopher_short_doc",
        "curly_bracket",
        "short_line_ratio",
    ]


def test_limits_that_are_null_are_off() -> None:
    fields = Heuristics.model_fields
    off = {name: None for name, field in fields.items() if type(None) in getattr(field.annotation, "__args__", ())}
    assert len(off) == 20
    switches = {name: False for name, field in fields.items() if name.startswith(("filter_", "remove_"))}
    texts = ["{ # # # ... lorem ipsum javascript", "x", "a a a a\na a a a\na a a a", "•\n•", "1 2 3"]
    assert judged(texts, top_n_grams={}, dup_n_grams={}, **off, **switches) == [""] * 5
    assert "" not in judged(texts)


def test_fineweb_judges_what_c4_left_and_the_text_stays_as_it_is() -> None:
    text = "\n".join([f"It is a long line, too: {line}" for line in LINES[:6]] + ["No full stop at the end"] * 60)
    assert judged([text], rules=["fineweb"]) == ["line_punct_ratio"]
    assert judged([text], rules=["c4", "fineweb"]) == [""]
    assert judged([text], rules=["c4", "fineweb"], filter_no_terminal_punct=False) == ["line_punct_ratio"]


@pytest.mark.parametrize(
    "wrong",
    [{"rules": []}, {"rules": ["c4", "c4"]}, {"rules": ["gopher"]}, {"dup_n_grams": {0: 0.1}}, {"min_doc_words": -1}],
)
def test_settings_without_a_meaning_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Heuristics(**wrong)


# Scripts without spaces


CHINESE = "地球是太阳系中由内及外的第三颗行星，也是宇宙中人类已知唯一存在生命的天体。" * 2
TEXTS = {
    "chinese": CHINESE
    + "它的质量约为五千九百七十亿亿吨。半径约六千三百七十一公里！密度是五点五克？自转一周。公转一年。",
    "japanese": "東京は日本の首都です。人口は約千四百万人。とても大きな街だ！行きましたか？いつか行きたいです。" * 2,
    "thai": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย.\nมีประชากรมากที่สุด.อากาศร้อนมากทั้งปี.\nคนกิน.ข้าว.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_scripts_without_spaces_are_judged_by_their_letters(language: str) -> None:
    sets = {"rules": ["gopher_repetition", "gopher_quality", "c4"], "filter_no_terminal_punct": False}
    text = TEXTS[language]
    assert judged([text, text[:40], text + " {"], **sets) == ["", "gopher_short_doc", "curly_bracket"]
    assert judged([text], segment_unspaced=False, **sets) != [""]


def test_repeated_letters_and_long_lines_are_no_fault_where_letters_are_words() -> None:
    assert judged([CHINESE + "哈" * 60], rules=["gopher_repetition"]) == [""]
    assert judged([CHINESE * 20], rules=["c4"], filter_no_terminal_punct=False) == [""]


def test_every_letter_is_a_word_where_most_have_no_spaces() -> None:
    docs = Docs.of(["東京 is 大きな街。", "Tokyo is 東京 in Japan", "ที่นี่ 12"], segment=True)
    words = split_words(docs)
    spelled = ["".join(map(chr, docs.chars[a:b])) for a, b in zip(words.starts, words.ends, strict=True)]
    assert docs.unspaced.tolist() == [True, False, True]
    assert spelled[:9] == ["東", "京", "is", "大", "き", "な", "街", "。", "Tokyo"]
    assert spelled[9:] == ["is", "東京", "in", "Japan", "ที่", "นี่", "12"]  # vowel signs and tones stay with their letter


# Any text, any batch


def test_a_rule_does_not_depend_on_the_texts_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ds.dataset(ROOT / "examples/sample", format="parquet").to_table(columns=["text"])["text"]
    texts = texts.drop_null().slice(0, 600).combine_chunks()
    whole = judged(texts)
    assert len(set(whole)) > 8
    for size, kind in ((1, pa.large_string()), (1 << 14, pa.string_view())):
        monkeypatch.setattr(heuristics, "PIECE_BYTES", size)
        parts = [texts.slice(start, 97).cast(kind) for start in range(0, 600, 97)]
        assert [rule for part in parts for rule in judged(part)] == whole
    assert judged(texts.slice(0, 0)) == []
    monkeypatch.setattr(heuristics, "MAX_DOCS", 50)
    assert judged(texts) == whole


def test_odd_characters_are_judged_like_any_other() -> None:
    odd = ["\x00", "\u200b", "\ufeff" * 99, "\u0301" * 60, "\U0010ffff", "\n.\n", "\r\r\n\x1c\u2029x", "," * 999]
    assert judged(odd, rules=["gopher_quality"]) == ["gopher_short_doc"] * len(odd)
    assert judged(["🙂" * 500], rules=["gopher_quality"]) == ["gopher_below_avg_threshold"]  # each a word of one letter
    assert all(judged(odd))


@pytest.mark.parametrize(
    ("text", "rule", "bytes_a_character"),
    [
        (" ".join(np.random.default_rng(0).choice(distinct(20_000, 5), 3_333_333)), "gopher_long_doc", 40),
        ("x" * 20_000_000, "gopher_short_doc", 40),
        ("All of the cats sat on the mat that we have with the river.\n" * 333_334, "dup_line_frac", 64),
    ],
    ids=["prose", "one word", "one line again and again"],
)
def test_memory_for_a_text_of_20_mb_is_a_small_multiple_of_it(text: str, rule: str, bytes_a_character: int) -> None:
    assert len(text) > 19_990_000
    batch = pa.array(["Before it.", text, "Behind it."])
    Heuristics().open()
    tracemalloc.start()
    try:
        assert judged(batch)[1] == rule
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bytes_a_character * len(text)
