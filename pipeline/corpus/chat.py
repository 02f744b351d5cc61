"""Instructions: rows of prompt and response, or of messages, rendered as the text that a model is tuned on.

Rendering happens as rows are read, batch by batch; nothing is stored. Three references come of it:

| reference | values |
| --- | --- |
| `text` | the rendered conversation |
| `targets` | list<struct<start, end>>: the characters of `text` that are responses, which alone count as loss |
| `markup` | the same of what the template wrote rather than a message; only there with a template |

Without a template a prompt and its response are `PROMPT\\n\\nRESPONSE`, and messages `User: CONTENT` and so on with
`\\n\\n` between; the columns of a prompt are joined by `\\n\\n`, blank ones left out. With one, it is the chat template
of a tokenizer, rendered by transformers in its Jinja sandbox. Today's date, which some templates write, is 26 Jul 2024
for all time: the day that Llama's falls back to.

A response runs from its first character to the special token that ends it (`<|im_end|>`, `</s>`), which a model has to
learn as well; without a template to its last character. A template with `{% generation %}` blocks says so itself.

Where contents lie is found by rendering a second time, with a private-use character on either side of every content
and none of the rest changed; a template under which the two differ by more than these (it cuts `<think>` out of a
response, say) hides where the response is, and the row is refused. Otherwise a conversation would be searched for what
was said in it, which a hostile row can imitate.

What a message says never becomes a special token, whatever it looks like: `split_special` cuts a rendered text into the
special tokens that stand in its markup and plain pieces. (Added tokens that a tokenizer does not call special, such as
`<think>` of some, are read as it reads them in any text.)

Refused rows: no or an empty response, no prompt, roles other than `ROLES`, content that is no string (so no images and
no tool calls), text that is not UTF-8, JSON that is none, and what the template refuses, with its words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.text import clean_text, is_text
from pipeline.errors import ConfigError, MissingExtra
from pipeline.recipe import fingerprint

SPANS = pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))
TYPES = {"text": pa.large_string(), "targets": SPANS, "markup": SPANS}
"""The references that rendering fills."""
ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user", "gpt": "assistant"}
KNOWN = (*ROLES, *ALIASES)
RESPONSE = "assistant"
FIELDS = (("role", "content"), ("from", "value"))
"""What a message's fields are called."""
BETWEEN = "\n\n"
SEPARATOR, NOTHING = pa.scalar(BETWEEN, pa.large_string()), pa.scalar("", pa.large_string())
MARKS = 0x100000
"""First of the private-use characters that mark contents while a template is asked: two a message."""
MOST_MESSAGES = 0x7FFF
MARK = re.compile("[\U00100000-\U0010fffd]")
TODAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
MOVED = "the template rewrites what a message says: where its response stands is not known"
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Rendered:
    """n conversations; null where `reasons` says why there is none."""

    text: pa.Array
    targets: pa.ListArray
    markup: pa.ListArray
    reasons: pa.Array


@dataclass(frozen=True)
class Turns:
    """Messages of n rows end to end: `roles` and `contents` (m,), row i between bounds[i] and bounds[i + 1].

    A row with a reason has messages of no meaning.
    """

    roles: pa.Array
    contents: pa.Array
    bounds: np.ndarray
    reasons: pa.Array


@dataclass(frozen=True)
class Chat:
    """Which columns make a conversation, and how it is written. `template` is Jinja, `variables` are what it reads
    beside the messages, `ends` the special tokens that may end a response."""

    prompt: tuple[str, ...] = ()
    response: str | None = None
    messages: str | None = None
    template: str | None = None
    variables: tuple[tuple[str, str], ...] = ()
    ends: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the source that it reads."""
        return (self.messages,) if self.messages is not None else (*self.prompt, str(self.response))

    @property
    def references(self) -> tuple[str, ...]:
        """What a language model reads of a row."""
        return ("text", "targets", "markup") if self.template is not None else ("text", "targets")

    @cached_property
    def identity(self) -> str:
        return fingerprint("chat", 1, asdict(self))

    @classmethod
    def stored(cls, noted: Mapping[str, Any]) -> Chat:
        """As `dataclasses.asdict` and JSON have left it."""
        lists = {"prompt": tuple(noted["prompt"]), "ends": tuple(noted["ends"])}
        return cls(**{**noted, **lists, "variables": tuple((k, v) for k, v in noted["variables"])})

    def check(self, schema: pa.Schema, of: str = "corpus") -> None:
        """Raises ConfigError where a corpus, or what else is `of` conversations, lacks a column or has another type."""
        for role, names in (("prompt", self.prompt), ("response", (self.response,)), ("messages", (self.messages,))):
            for name in names:
                if name is None:
                    continue
                if name not in schema.names:
                    raise ConfigError(f"{of}.{role}: there is no column {name!r}, only {', '.join(schema.names)}")
                kind = schema.field(name).type
                if not (is_text(kind) or (role == "messages" and _fields_of(kind))):
                    wanted = "text" if role != "messages" else "list<struct<role, content>> of texts, nor text of JSON"
                    raise ConfigError(f"{of}.{role}: column {name!r} is {kind}, not {wanted}")

    def render(self, columns: Mapping[str, pa.Array]) -> Rendered:
        """Conversations of n rows from the columns of the source that it names."""
        if self.messages is None:
            turns = _pairs([columns[name] for name in self.prompt], columns[str(self.response)])
        else:
            turns = _messages(columns[self.messages])
        return _plainly(turns, labelled=self.messages is not None) if self.template is None else self._templated(turns)

    def _templated(self, turns: Turns) -> Rendered:
        roles, contents, why = turns.roles.to_pylist(), turns.contents.to_pylist(), turns.reasons.to_pylist()
        texts: list[str | None] = []
        spans: list[list[Spans]] = [[], []]
        for row, (start, end) in enumerate(zip(turns.bounds[:-1].tolist(), turns.bounds[1:].tolist(), strict=True)):
            found = why[row] or self._conversation(roles[start:end], contents[start:end])
            if isinstance(found, str):
                why[row], found = found, (None, [], [])
            texts.append(found[0])
            for kind, of_row in zip(spans, found[1:], strict=True):
                kind.append(of_row)
        reasons = pa.array(why, pa.string())
        targets, markup = (_spans(kind, reasons.is_valid()) for kind in spans)
        return Rendered(pa.array(texts, pa.large_string()), targets, markup, reasons)

    def _conversation(self, roles: list[str], contents: list[str]) -> tuple[str, Spans, Spans] | str:
        """Text, targets and markup of one row, or the reason why there is none."""
        import jinja2

        if len(roles) > MOST_MESSAGES or any(map(MARK.search, contents)):
            return "private-use characters of plane 16, or over 32,767 messages"
        marked = [_marked(content, number) for number, content in enumerate(contents)]
        try:
            text, generated = self._ask(roles, contents)
            shown, _ = self._ask(roles, marked)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            return f"the template refuses it: {str(error)[:200] or type(error).__name__}"
        if MARK.sub("", shown) != text:
            return MOVED
        held = _contents(shown)
        if held is None:
            return MOVED
        said = [(start, end) for _, start, end in held]
        markup = _between(said, len(text))
        if generated is not None:
            targets = [(start, end) for start, end in generated if start < end]
        else:
            answers = [i for i, role in enumerate(roles) if role == RESPONSE]
            if sorted(i for i, _, _ in held if roles[i] == RESPONSE) != answers:
                return MOVED
            after = [*(start for start, _ in said[1:]), len(text)]
            targets = [
                (start, self._end(text, end, most))
                for (i, start, end), most in zip(held, after, strict=True)
                if roles[i] == RESPONSE
            ]
        return (text, targets, markup) if targets else "no response"

    def _ask(self, roles: Sequence[str], contents: Sequence[str]) -> tuple[str, Spans | None]:
        """The template's text of a conversation, and its `{% generation %}` blocks where it has any."""
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        source = str(self.template)
        (text,), blocks = render_jinja_template(
            conversations=[conversation],
            chat_template=TODAY + source if "strftime_now" in source else source,
            return_assistant_tokens_mask=self._says_targets,
            **dict(self.variables),
        )
        return text, blocks[0] if self._says_targets else None

    def _end(self, text: str, end: int, most: int) -> int:
        """Where a response ends whose content does at `end`: behind the special token there, if it is before `most`."""
        found = self._ending.match(text, end, most) if self._ending else None
        return found.end() if found else end

    @cached_property
    def _says_targets(self) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.template or "") is not None

    @cached_property
    def _ending(self) -> re.Pattern[str] | None:
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, self.ends))})") if self.ends else None


def template_of(name: str, of: str = "corpus") -> dict[str, Any]:
    """`template`, `variables` and `ends` of a tokenizer's folder, or of `hf://org/name[@revision]`; `of` asks for it.

    Raises MissingExtra, and ConfigError where there is no tokenizer or it has no chat template.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("a chat template", "models", "transformers") from error
    path, _, revision = name.removeprefix("hf://").partition("@")
    hub = name.startswith("hf://")
    where: dict[str, Any] = {"revision": revision or None} if hub else {"local_files_only": True}
    folder = path if hub else str(Path(name).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **where)
        template = tokenizer.get_chat_template()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{of}.template: {name!r} gives no chat template: {error}") from error
    variables = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    ends = [token for token in special if token in template or token in variables.values()]
    return {
        "template": template,
        "variables": tuple(sorted(variables.items())),
        "ends": tuple(sorted(ends, key=lambda token: (-len(token), token))),
    }


def split_special(text: str, markup: Spans, special: re.Pattern[str]) -> Iterator[tuple[int, str, bool]]:
    """Pieces of a rendered text: where each begins, what it is, and whether it is one of the special tokens, which it
    is in markup alone. `special` matches any of them, the longest first."""
    at = 0
    for start, end in markup:
        for found in special.finditer(text, start, end):
            if found.start() > at:
                yield at, text[at : found.start()], False
            yield found.start(), found[0], True
            at = found.end()
    if at < len(text):
        yield at, text[at:], False


def _pairs(prompts: Sequence[pa.Array], response: pa.Array) -> Turns:
    """Two messages a row: of the user, from some columns, and the response."""
    n, reasons = len(response), pa.nulls(len(response), pa.string())
    parts = []
    for column in prompts:
        part, why = clean_text(column)
        parts.append(part.cast(pa.large_string()))
        if why is not None:  # a part that is null or blank is left out
            broken = pc.fill_null(pc.equal(why, "text is not UTF-8"), False)
            reasons = pc.coalesce(reasons, pc.if_else(broken, "prompt is not UTF-8", None))
    after = [pc.fill_null(pc.binary_join_element_wise(SEPARATOR, part, NOTHING), "") for part in parts]
    prompt = pc.utf8_slice_codeunits(pc.binary_join_element_wise(*after, NOTHING), len(BETWEEN))
    empty = pc.equal(pc.binary_length(prompt), 0)
    reasons = pc.coalesce(reasons, pc.if_else(empty, "no prompt", None))
    answer, why = clean_text(response)
    if why is not None:
        which = pc.index_in(why, pa.array(["null text", "blank text", "text is not UTF-8"]))
        reasons = pc.coalesce(reasons, pa.array(["no response", "empty response", "response is not UTF-8"]).take(which))
    both = pa.chunked_array([prompt, answer.cast(pa.large_string())]).combine_chunks()
    order = pa.array(np.arange(2 * n).reshape(2, n).T.ravel())
    roles = pa.array(np.tile(["user", RESPONSE], n), pa.string())
    return Turns(roles, both.take(order), 2 * np.arange(n + 1), reasons)


def _messages(column: pa.Array) -> Turns:
    """The messages of a column of lists or of JSON, and why those of a row are of no use."""
    if is_text(column.type):
        return _checked(*_parsed(column))
    role, content = _fields_of(column.type) or FIELDS[0]
    reasons = pc.if_else(column.is_null(), "null messages", pa.scalar(None, pa.string()))
    bounds = np.append(0, np.cumsum(pc.fill_null(column.value_lengths(), 0).to_numpy(zero_copy_only=False)))
    flat = column.flatten()
    roles = pc.struct_field(flat, role)
    contents = pc.struct_field(flat, content)
    roles, _ = clean_text(roles)
    contents, why = clean_text(contents)
    if why is not None:  # an empty message is one
        contents = pc.if_else(pc.fill_null(pc.equal(why, "blank text"), False), "", contents)
    broken = np.zeros(len(flat), bool)
    if why is not None:
        broken = pc.fill_null(pc.equal(why, "text is not UTF-8"), False).to_numpy(zero_copy_only=False)
    return _checked(roles.cast(pa.string()), contents.cast(pa.large_string()), bounds, reasons, broken)


def _fields_of(kind: pa.DataType) -> tuple[str, str] | None:
    """What a list of messages calls role and content; None where it is not one."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return None
    held = {field.name: field.type for field in kind.value_type}
    return next((pair for pair in FIELDS if all(name in held and is_text(held[name]) for name in pair)), None)


def _parsed(column: pa.Array) -> tuple[pa.Array, pa.Array, np.ndarray, pa.Array, np.ndarray]:
    """Messages of rows of JSON: a list of objects with role and content."""
    roles: list[str | None] = []
    contents: list[str | None] = []
    broken: list[bool] = []
    bounds, reasons = [0], []
    text, why = clean_text(column)
    for value, reason in zip(text.to_pylist(), (why or pa.nulls(len(text), pa.string())).to_pylist(), strict=True):
        found: Any = None
        if reason is None:
            try:
                found = json.loads(value)
            except (ValueError, RecursionError):
                reason = "messages are not JSON"
            if reason is None and not (isinstance(found, list) and all(isinstance(m, dict) for m in found)):
                reason = "messages are not a list of objects"
        for message in found if reason is None else ():
            names = next((pair for pair in FIELDS if pair[0] in message), FIELDS[0])
            role, content = map(message.get, names)
            roles.append(role if role in KNOWN else None)
            text_of = content if isinstance(content, str) else None
            whole = text_of is None or _is_utf8(text_of)
            contents.append(text_of if whole else None)
            broken.append(not whole)
        bounds.append(len(roles))
        reasons.append(reason.replace("text", "messages") if reason else None)
    arrays = pa.array(roles, pa.string()), pa.array(contents, pa.large_string())
    return *arrays, np.array(bounds), pa.array(reasons, pa.string()), np.array(broken, bool)


def _is_utf8(text: str) -> bool:
    """JSON may hold half of a surrogate pair, which no UTF-8 can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(roles: pa.Array, contents: pa.Array, bounds: np.ndarray, reasons: pa.Array, broken: np.ndarray) -> Turns:
    """Messages with known roles; a row that has other ones, or no response, has a reason."""
    n = len(bounds) - 1
    row = np.repeat(np.arange(n), np.diff(bounds))
    for alias, name in ALIASES.items():
        roles = pc.if_else(pc.equal(roles, alias), name, roles)
    odd = ~pc.is_in(roles, pa.array(ROLES)).to_numpy(zero_copy_only=False)
    answer = pc.fill_null(pc.equal(roles, RESPONSE), False).to_numpy(zero_copy_only=False)
    blank = pc.fill_null(pc.equal(pc.binary_length(pc.utf8_trim_whitespace(contents)), 0), False)
    said = blank.to_numpy(zero_copy_only=False)
    null = contents.is_null().to_numpy(zero_copy_only=False)
    bad = {
        "no messages": np.diff(bounds) == 0,
        "unknown role": _any(row, odd, n),
        "text is not UTF-8": _any(row, broken, n),
        "content is not a string": _any(row, null, n),
        "no response": ~_any(row, answer, n),
        "empty response": _any(row, answer & said, n),
    }
    for reason, where in bad.items():
        reasons = pc.coalesce(reasons, pc.if_else(pa.array(where), reason, None))
    return Turns(roles, contents, bounds, reasons)


def _any(row: np.ndarray, mask: np.ndarray, n: int) -> np.ndarray:
    return np.asarray(np.bincount(row[mask], minlength=n) > 0)


def _plainly(turns: Turns, labelled: bool) -> Rendered:
    """Contents with a blank line between, and who says them before them."""
    n, good = len(turns.bounds) - 1, turns.reasons.is_null()
    lengths = np.diff(turns.bounds)
    row = np.repeat(np.arange(n), lengths)
    contents = pc.fill_null(turns.contents, "")
    labels = pc.binary_join_element_wise(pc.utf8_capitalize(turns.roles), "", ": ").cast(pa.large_string())
    labels = labels if labelled else pa.array(np.full(len(row), ""), pa.large_string())
    labels = pc.fill_null(labels, "")
    lists = pa.LargeListArray.from_arrays(
        pa.array(turns.bounds), pc.binary_join_element_wise(labels, contents, NOTHING)
    )
    text = pc.if_else(good, pc.binary_join(lists, SEPARATOR), None)
    label, size = (pc.utf8_length(a).to_numpy(zero_copy_only=False).astype(np.int64) for a in (labels, contents))
    ends = np.cumsum(label + size + len(BETWEEN))
    before = np.append(0, ends)[turns.bounds[:-1]]
    start = ends - len(BETWEEN) - size - before[row]
    answer = pc.fill_null(pc.equal(turns.roles, RESPONSE), False).to_numpy(zero_copy_only=False)
    answer &= good.to_numpy(zero_copy_only=False)[row]
    bounds = np.append(0, np.cumsum(np.bincount(row[answer], minlength=n)))
    targets = span_lists(start[answer], (start + size)[answer], bounds, pc.invert(good))
    nothing = span_lists(start[:0], start[:0], np.zeros(n + 1, np.int64), pc.invert(good))
    return Rendered(text, targets, nothing, turns.reasons)


def span_lists(start: np.ndarray, end: np.ndarray, bounds: np.ndarray, null: pa.Array | None = None) -> pa.ListArray:
    """Lists of spans of n rows; those of row i stand between bounds[i] and bounds[i + 1]."""
    fields = [pa.array(start.astype(np.int32)), pa.array(end.astype(np.int32))]
    pairs = pa.StructArray.from_arrays(fields, fields=list(SPANS.value_type))
    return pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), pairs, type=SPANS, mask=null)


def span_arrays(spans: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends and the bounds of every row's, int64; the reverse of `span_lists`."""
    flat = spans.flatten()
    start, end = (
        pc.struct_field(flat, name).to_numpy(zero_copy_only=False).astype(np.int64) for name in ("start", "end")
    )
    return start, end, np.append(0, np.cumsum(spans.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)))


def _spans(rows: Sequence[Spans], null: pa.Array) -> pa.ListArray:
    flat = np.array([span for of_row in rows for span in of_row], np.int64).reshape(-1, 2)
    return span_lists(flat[:, 0], flat[:, 1], np.append(0, np.cumsum([len(r) for r in rows])).astype(np.int64), null)


def _marked(content: str, number: int) -> str:
    """A content with a character of its own on either side, inside white space that a template may trim."""
    core = content.strip()
    if not core:
        return content
    start = content.index(core)
    opening, closing = chr(MARKS + 2 * number), chr(MARKS + 2 * number + 1)
    return f"{content[:start]}{opening}{core}{closing}{content[start + len(core) :]}"


def _contents(shown: str) -> list[tuple[int, int, int]] | None:
    """Message, start and end of every marked content, without the marks, in order; None where they are out of order."""
    held: list[tuple[int, int, int]] = []
    at = last = 0
    opened: tuple[int, int] | None = None
    for found in MARK.finditer(shown):
        at += found.start() - last
        last = found.end()
        number, closes = divmod(ord(found[0]) - MARKS, 2)
        if bool(closes) != (opened is not None) or (opened is not None and opened[0] != number):
            return None
        if opened is None:
            opened = number, at
        else:
            held.append((*opened, at))
            opened = None
    return held if opened is None else None


def _between(said: Spans, length: int) -> Spans:
    """What lies between contents, before and behind them."""
    edges = [0, *(edge for span in said for edge in span), length]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
