"""What the commands print. Rich where a person looks, plain columns where a file or a pipe does.

Nothing here parses markup: what comes from a corpus or a path is printed as it is, after `format.visible`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pipeline.report.format import count, explain, plural, share, size, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from pipeline.compare.ledger import Plan
    from pipeline.compare.results import Results
    from pipeline.compress.compression import Compressed
    from pipeline.curation import Curated

PLAIN_WIDTH = 200
REASONS_PRINTED, FAILURES_PRINTED = 20, 10


def console() -> Console:
    """Standard output; nothing is wrapped at 80 columns, coloured or framed where it is no terminal."""
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, markup=False, emoji=False, soft_wrap=False
    )


def print_table(out: Console, heads: Sequence[str], lines: Iterable[Sequence[str]], columns: str) -> None:
    """`columns` has a letter each: `n` number, `l` label, `t` text that gives way where the terminal is narrow."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD if out.is_terminal else None, pad_edge=False, header_style="dim")
    for head, kind in zip(heads, columns, strict=True):
        table.add_column(head, justify="right" if kind == "n" else "left", no_wrap=kind != "t", overflow="fold")
    for line in lines:
        table.add_row(*(text(cell) for cell in line))
    out.print(table)


def text(content: str, style: str = "") -> Text:
    """Text for rich, in which square brackets are square brackets."""
    from rich.text import Text

    return Text(content, style)


def print_result(result: Curated) -> None:
    """The end of `tamis curate`: how much was kept, why the rest was not, where everything is, what is missing."""
    out = console()
    of_all = f"{count(result.rows_kept)} of {count(result.rows)} rows ({share(result.rows_kept, result.rows)})"
    out.print(text(f"Kept {of_all}: {count(result.tokens_kept)} tokens, {size(result.bytes_kept)} of text.", "bold"))
    out.print()
    lines = [
        (visible(reason, 60), count(rows), share(rows, result.rows), visible(explain(reason), 90))
        for reason, rows in list(result.reasons.items())[:REASONS_PRINTED]
    ]
    print_table(out, ["reason", "rows", "share", ""], lines, "lnnt")
    out.print()
    out.print(text(f"Curated  {result.path} ({plural(len(result.files), 'file')})"))
    out.print(text(f"Report   {result.run.rstrip('/')}/report/index.html"))
    out.print(text(f"Look     tamis show {result.run} --dropped"))
    print_failures(out, result.failures)


def print_failures(out: Console, failures: Sequence[dict[str, str]]) -> None:
    """What of the corpus is not in the result, with the reason; nothing where all is."""
    if not failures:
        return
    out.print()
    out.print(
        text(f"Left out: {plural(len(failures), 'file or part of a file', 'files or parts of files')}", "bold red")
    )
    for failure in failures[:FAILURES_PRINTED]:
        groups = f" row groups {failure['row_groups']}" if "row_groups" in failure else ""
        out.print(text(f"  {visible(failure['file'], 200)}{groups}: {visible(failure['reason'], 400)}"))
    if len(failures) > FAILURES_PRINTED:
        out.print(text(f"  and {count(len(failures) - FAILURES_PRINTED)} more: see `failed` in manifest.json"))


def print_compressed(result: Compressed) -> None:
    """The end of `tamis compress`: how small the model is, what it says of unseen text, where it is."""
    out = console()
    before, after = result.parameters
    out.print(text(f"{count(before)} parameters to {count(after)} ({share(before - after, before)} removed).", "bold"))
    out.print()
    lines = [("dense", f"{result.dense:.4g}"), ("cut", f"{result.cut:.4g}")]
    lines += [("healed", f"{result.healed:.4g}")] if result.healed is not None else []
    print_table(out, ["", "bits per byte"], lines, "ln")
    out.print()
    if result.unusable:
        often = visible(result.unusable.most_common(1)[0][0], 90)
        out.print(text(f"Left out {plural(result.unusable.total(), 'unusable row')}, most often: {often}"))
    out.print(text(f"Model   {result.folder}"))
    out.print(text(f"Report  {result.report}"))


def print_arms(plan: Plan) -> None:
    """What every arm of a comparison can afford, before it starts."""
    out = console()
    out.print(text(f"Budget of every arm: {plan.budget:.4g} FLOPs.", "bold"))
    out.print()
    heads = ["arm", "before training", "a token", "tokens", "epochs", "scoring", "break-even keep", ""]
    print_table(out, heads, plan.cells(), "lnnnnnnt")
    out.print()


def print_matched(results: Results) -> None:
    """The end of `tamis compare`: language by arm, what made the difference, where the rest is."""
    if not results.arms:
        return
    out = console()
    print_table(out, *results.language(), "llnnn")
    out.print()
    print_table(out, *results.told(), "lllllt")
    out.print()
    for why in results.invalid:
        out.print(text(f"Invalid: {why}", "bold red"))
    out.print(text(f"Report  {results.page}"))
    out.print(text(f"Tables  {results.directory}/matched.md, matched.json"))
