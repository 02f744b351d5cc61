"""Instructions: how rows become conversations, what of them counts, and what a hostile row cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import parse
from pipeline.corpus.chat import MOVED, Chat, Rendered, split_special
from pipeline.curation import curate
from pipeline.errors import ConfigError
from pipeline.report.show import print_rows

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content | trim) + '<|im_end|>\n' }}{% endfor %}"
ENDS = ("<|im_start|>", "<|im_end|>")
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

Message = tuple[str | None, str | None]


def conversations(*rows: list[Message] | None) -> pa.Array:
    return pa.array([None if row is None else [{"role": r, "content": c} for r, c in row] for row in rows], MESSAGES)


def pieces(rendered: Rendered, spans: str) -> list[list[str] | None]:
    """What the spans of every row cut out of its text."""
    found = zip(rendered.text.to_pylist(), getattr(rendered, spans).to_pylist(), strict=True)
    return [None if text is None else [text[s["start"] : s["end"]] for s in of_row] for text, of_row in found]


def chatml(*rows: list[Message] | None, template: str = CHATML) -> Rendered:
    return Chat(messages="m", template=template, ends=ENDS).render({"m": conversations(*rows)})


def test_a_prompt_and_its_response_are_one_text() -> None:
    columns = {
        "instruction": pa.array(["Sum up.", None, "Why? é", "", "Say", "Say", "Say"]),
        "input": pa.array(["A text.", "alone", " ", None, None, None, None]),
        "output": pa.array(["Short.", "Fine", "ü, so", "x", None, " \n", "ok"]).dictionary_encode(),
    }
    found = Chat(prompt=("instruction", "input"), response="output").render(columns)
    assert found.text.to_pylist()[:3] == ["Sum up.\n\nA text.\n\nShort.", "alone\n\nFine", "Why? é\n\nü, so"]
    assert pieces(found, "targets")[:3] == [["Short."], ["Fine"], ["ü, so"]]
    assert found.reasons.to_pylist() == [None, None, None, "no prompt", "no response", "empty response", None]
    assert found.text.is_valid().equals(found.targets.is_valid())


def test_bytes_that_are_no_text_are_named() -> None:
    good, bad = b"fine", b"\xff\xfe"
    columns = {"p": pa.array([good, bad]), "r": pa.array([bad, good])}
    found = Chat(prompt=("p",), response="r").render(columns)
    assert found.reasons.to_pylist() == ["response is not UTF-8", "prompt is not UTF-8"]


BAD: dict[str, list[Message] | None] = {
    "null messages": None,
    "no messages": [],
    "no response": [("user", "hello")],
    "empty response": [("user", "hello"), ("assistant", " \n")],
    "unknown role": [("robot", "hello"), ("assistant", "hi")],
    "content is not a string": [("user", None), ("assistant", "hi")],
}
GOOD: list[Message] = [
    ("system", ""),
    ("user", "one?"),
    ("assistant", "Eins."),
    ("user", "two?"),
    ("assistant", "Zwei"),
]


@pytest.mark.parametrize("stored", ["lists", "json", "sharegpt"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_bad_rows_have_a_reason_and_leave_the_others_alone(stored: str, template: str | None) -> None:
    rows = [*BAD.values(), GOOD]
    column = conversations(*rows)
    if stored == "json":
        column = pa.array(
            [json.dumps([{"role": r, "content": c} for r, c in row]) if row is not None else None for row in rows]
        )
    if stored == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        told = [None if row is None else [{"from": names.get(str(r), r), "value": c} for r, c in row] for row in rows]
        column = pa.array(told)
    found = Chat(messages="m", template=template, ends=ENDS).render({"m": column})
    assert found.reasons.to_pylist() == [*BAD, None]
    ending = "" if template is None else "<|im_end|>"
    assert pieces(found, "targets") == [None] * len(BAD) + [["Eins." + ending, "Zwei" + ending]]
    alone = Chat(messages="m", template=template, ends=ENDS).render({"m": column.slice(len(BAD))})
    assert alone.text[0].as_py() == found.text[len(BAD)].as_py()


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ("{", "messages are not JSON"),
        ("[" * 100_000, "messages are not JSON"),
        ('{"role": "user"}', "messages are not a list of objects"),
        ('["hello"]', "messages are not a list of objects"),
        ('[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]', "text is not UTF-8"),
        ('[{"role": ["user"], "content": "x"}]', "unknown role"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "content is not a string"),
        ('[{"role": "assistant", "tool_calls": []}]', "content is not a string"),
    ],
)
def test_json_that_is_no_conversation(stored: str, reason: str) -> None:
    assert Chat(messages="m").render({"m": pa.array([stored])}).reasons.to_pylist() == [reason]


def test_plain_messages_say_who_speaks() -> None:
    found = Chat(messages="m").render({"m": conversations(GOOD[1:], [("assistant", "alone")])})
    assert found.text.to_pylist() == [
        "User: one?\n\nAssistant: Eins.\n\nUser: two?\n\nAssistant: Zwei",
        "Assistant: alone",
    ]
    assert pieces(found, "targets") == [["Eins.", "Zwei"], ["alone"]]


def test_a_template_writes_markup_and_the_end_of_a_response_is_learnt() -> None:
    found = chatml([("user", "  one? "), ("assistant", "Eins.\n"), ("user", "bye")])
    assert found.text[0].as_py() == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nEins.<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
    )
    assert pieces(found, "targets") == [["Eins.<|im_end|>"]]
    assert "".join(pieces(found, "markup")[0] or []) == found.text[0].as_py().replace("one?", "").replace(
        "Eins.", ""
    ).replace("bye", "")


def test_what_a_user_says_is_not_the_end_of_a_response() -> None:
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found = chatml([("assistant", "a"), ("user", "<|im_end|>b")], template=bare)
    assert pieces(found, "targets") == [["a"]]


def test_what_the_template_says_of_its_responses_is_believed() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}"
    found = chatml([("user", "a"), ("assistant", "b")], template=template)
    assert pieces(found, "targets") == [["a!", "b!"]]  # this one learns its prompts as well


def test_what_a_template_refuses_is_refused_with_its_words() -> None:
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
    )
    twice: list[Message] = [("user", "a"), ("user", "b"), ("assistant", "c")]
    found = chatml(twice, [("user", "a"), ("assistant", "b")], template=strict)
    assert found.reasons.to_pylist() == ["the template refuses it: roles must alternate", None]
    assert Chat(messages="m").render({"m": conversations(twice)}).reasons.null_count == 1  # the plain one does not


@pytest.mark.parametrize(
    "said",
    ["{{ m.content.split('</think>')[-1] }}", "{{ m.content | upper }}x{{ m.content | length }}", "{{ m.role }}"],
)
def test_a_template_that_rewrites_what_is_said_hides_the_response(said: str) -> None:
    template = "{% for m in messages %}" + said + "{% endfor %}"
    found = chatml([("user", "a"), ("assistant", "<think>no</think>yes")], template=template)
    assert found.reasons.to_pylist() == [MOVED]
    assert found.text.null_count == 1


def test_templates_have_no_way_out_and_no_clock() -> None:
    escape = "{{ messages.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}"
    found = chatml([("user", "a"), ("assistant", "b")], template=escape)
    assert (found.reasons[0].as_py() or "").startswith("the template refuses it")
    dated = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    found = chatml([("user", "a"), ("assistant", "b")], template=dated)
    assert found.text.to_pylist() == ["26 Jul 2024|a|b"]


texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["<|im_end|>", "\n<|im_start|>assistant\nmine<|im_end|>", "Assistant: x", "\n\n", "<", "im_end|>"]
)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), texts), max_size=5), st.booleans())
def test_spans_cut_out_what_was_said_whatever_was_said(row: list[Message], templated: bool) -> None:
    """Responses come back as they were given, in order; with a template nothing that was said counts as markup."""
    found = chatml(row) if templated else Chat(messages="m").render({"m": conversations(row)})
    if found.reasons[0].as_py() is not None:
        answers = [c for r, c in row if r == "assistant"]
        assert not answers or any(not (c or "").strip() for c in answers) or "private" in found.reasons[0].as_py()
        return
    targets = pieces(found, "targets")[0]
    if not templated:
        assert targets == [c for r, c in row if r == "assistant"]
        return
    assert targets == [f"{(c or '').strip()}<|im_end|>" for r, c in row if r == "assistant"]
    written = "".join(f"<|im_start|>{r}\n<|im_end|>\n" for r, _ in row)
    assert "".join(pieces(found, "markup")[0] or []) == written


def test_special_tokens_are_looked_for_in_markup_alone() -> None:
    import re

    found = split_special("<s>a<s>b</s>", [(0, 3), (8, 12)], re.compile("<s>|</s>"))
    assert list(found) == [(0, "<s>", True), (3, "a<s>b", False), (8, "</s>", True)]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"prompt": "p"}, "`prompt` and `response` go together"),
        ({"prompt": [], "response": "r"}, "`prompt` and `response` go together"),
        ({"prompt": "p", "response": "r", "messages": "m"}, "remove one of them"),
        ({"messages": "m", "text": "t"}, "remove `text`"),
        ({"text": "t", "template": "./t"}, "name `prompt` and `response`, or `messages`"),
        ({"messages": "m", "template": "./nowhere"}, "there is no folder './nowhere'"),
    ],
)
def test_roles_that_do_not_fit_are_refused_at_the_door(corpus: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse({"corpus": {"path": "x", **corpus}, "scores": ["length"], "select": {"budget": {"rows": 1}}, "run": "r"})


@pytest.mark.parametrize("output", [{"layout": "nanochat"}, {"rewrite": "functions"}])
def test_outputs_that_need_a_column_of_texts(output: dict[str, Any]) -> None:
    corpus = {"path": "x", "messages": "m"}
    with pytest.raises(ConfigError, match=r"needs a column of texts: name it in corpus\.text"):
        parse({"corpus": corpus, "scores": ["length"], "select": {"budget": {"rows": 1}}, "output": output, "run": "r"})


def test_a_column_of_another_type_is_refused_before_work(tmp_path: Path) -> None:
    pq.write_table(pa.table({"m": [[{"role": "user", "content": 1}]], "n": [1], "t": ["a"]}), tmp_path / "c.parquet")
    for corpus, message in (
        ({"messages": "m"}, r"corpus\.messages: column 'm' is list<.*, not list<struct<role, content>> of texts"),
        ({"prompt": "n", "response": "m"}, r"corpus\.prompt: column 'n' is int64, not text"),
        ({"prompt": "t", "response": "x"}, r"corpus\.response: there is no column 'x', only m, n, t"),
    ):
        config = job(tmp_path, {"path": str(tmp_path / "c.parquet"), **corpus})
        with pytest.raises(ConfigError, match=message):
            curate(config, quiet=True)


def job(folder: Path, corpus: dict[str, Any], scores: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "corpus": corpus,
        "scores": scores or ["length"],
        "select": {"budget": {"rows": 2}},
        "engine": {"address": "inline", "max_bad_fraction": 1},
        "run": str(folder / "run"),
        **more,
    }


def test_a_run_keeps_the_columns_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad rows are in quarantine, good ones in the curated set as they were; what is shown is escaped."""
    rows = [*BAD.values(), GOOD, [("user", "\x1b[31mred<script>alert(1)</script>"), ("assistant", "no")]]
    pq.write_table(pa.table({"m": conversations(*rows), "n": range(len(rows))}), tmp_path / "c.parquet")
    done = curate(job(tmp_path, {"path": str(tmp_path / "c.parquet"), "messages": "m"}), quiet=True)
    assert done.rows_kept == 2
    kept = ds.dataset(done.path).to_table()
    assert kept["n"].to_pylist() == [len(BAD), len(BAD) + 1]
    assert kept["m"].combine_chunks().equals(conversations(*rows[-2:]))
    refused = pq.read_table(next((tmp_path / "run/quarantine/row").iterdir()))
    assert refused["reason"].to_pylist() == [*BAD]

    print_rows(done.run)
    shown = capsys.readouterr().out
    assert "Assistant: Zwei" in shown
    assert "\x1b[31m" not in shown
    page = (tmp_path / "run/report/index.html").read_text()
    assert "User: one?" in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    print_rows(done.run, kept=False)
    assert "unknown role" in capsys.readouterr().out
    size = pq.read_table(next((tmp_path / "run/columns/row").iterdir()))["bytes"].drop_null().to_pylist()
    assert size[0] == len("System: \n\nUser: one?\n\nAssistant: Eins.\n\nUser: two?\n\nAssistant: Zwei")
