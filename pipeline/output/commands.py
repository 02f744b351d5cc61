"""`tamis order`, `pack`, `export` and `feed`: from a curated run to what a trainer reads.

Each takes a run directory and says the rest in options, or takes a YAML file with the keys of `Feeding`. A recipe's
fields are set with `--set`: `--set k=20`, in a file `order: {kind: in_context, k: 20}`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import yaml
from pydantic import Field, SerializeAsAny

from pipeline.config import EngineConfig, Model, load, load_as, parse_as, recipe_in
from pipeline.engine.connect import connect
from pipeline.errors import ConfigError
from pipeline.output.export._json import lines
from pipeline.output.export.base import Export, write_export
from pipeline.output.feeding import CuratedSet, FedRun, feeding
from pipeline.output.order._arrange import FedPart, arrange, fed_parts
from pipeline.output.order.base import Order, StoredOrder, write_order
from pipeline.output.pack.base import Pack, write_packed

BATCH_ROWS = 256

OrderOf = SerializeAsAny[Annotated[Order, recipe_in("pipeline.output.order", Order)]]
PackOf = SerializeAsAny[Annotated[Pack, recipe_in("pipeline.output.pack", Pack)]]
ExportOf = SerializeAsAny[Annotated[Export, recipe_in("pipeline.output.export", Export)]]


class Feeding(Model):
    """What is fed from a curated run: an order, packed sequences, an export."""

    run: str = Field(description="directory of the curated run")
    order: OrderOf | None = Field(None, description="without one, rows come as they lie")
    pack: PackOf | None = None
    export: ExportOf | None = None
    to: str | None = Field(None, description="directory of the export")
    rows: bool = Field(False, description="write the rows themselves in the order, too, for the loader")
    engine: dict[str, Any] = Field({}, description="keys of `engine` that differ from the run's")


def asked(
    target: str, key: str, kind: str | None, settings: Sequence[str] = (), default: str | None = None, **given: Any
) -> Feeding:
    """What a command line asks for. `target`: a run directory, a YAML file of `Feeding`, or one of a curation.

    `kind` (for a run directory, `default` in its place) and `settings` (`a.b=c`) are those of the recipe `key`. Raises
    ConfigError.
    """
    file = target.endswith((".yaml", ".yml"))
    kind = kind or (None if file else default)
    changes = [f"{key}.{s}" for s in settings] + ([f"{key}.kind={kind}"] if kind else [])
    extra = {name: value for name, value in given.items() if value is not None}
    if not file:
        data: dict[str, Any] = {"run": target} | extra
        for change in changes:
            _set(data, change)
        return parse_as(Feeding, data, name="command line")
    if "corpus" in _keys(target):
        return asked(given.pop("run", None) or load(target).run, key, kind, settings, default, **given)
    found = load_as(Feeding, target, changes)
    return found.model_copy(update=extra | ({"engine": found.engine | extra["engine"]} if "engine" in extra else {}))


def _keys(path: str) -> set[str]:
    try:
        return set(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or ())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError):
        return set()  # reading it as what it should be says what is wrong


def _set(data: dict[str, Any], change: str) -> None:
    name, separator, value = change.partition("=")
    *parents, last = name.split(".")
    if not separator:
        raise ConfigError(f"--set {change.partition('.')[2]}: write key=value, such as --set k=20")
    for parent in parents:
        data = data.setdefault(parent, {})
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change.partition('.')[2]}: {error}") from error


def _opened(wanted: Feeding, quiet: bool) -> FedRun:
    engine = EngineConfig.model_validate(wanted.engine)  # says what is wrong with the keys
    return feeding(wanted.run, connect, engine.model_dump(include=set(wanted.engine)), quiet)


def make_order(wanted: Feeding, quiet: bool = False) -> dict[str, Any]:
    """`tamis order`: returns `order.json`."""
    if wanted.order is None:
        raise ConfigError("order: say which, such as --kind shuffled")
    with _opened(wanted, quiet) as run:
        order = write_order(run, wanted.order)
        if wanted.rows:
            arrange(run, order)
        return order.described


def make_packed(wanted: Feeding, order: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """`tamis pack`: returns `packed.json`. `order`: the name of a stored one, in place of that of the configuration."""
    if wanted.pack is None:
        raise ConfigError("pack: say how, such as --kind best_fit --length 2048 --tokenizer FOLDER")
    with _opened(wanted, quiet) as run:
        return write_packed(run, wanted.pack, _ordered(run, wanted, order))


def make_export(wanted: Feeding, order: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """`tamis export`: returns `export.json`, with every file that was written."""
    if wanted.export is None or wanted.to is None:
        raise ConfigError("export: say what and where to, such as --to webdataset DIRECTORY")
    with _opened(wanted, quiet) as run:
        return write_export(run, wanted.export, wanted.to, _ordered(run, wanted, order))


def _ordered(run: FedRun, wanted: Feeding, name: str | None) -> StoredOrder | None:
    if name is not None:
        return StoredOrder.at(run.store.uri, name, run.curated)
    return write_order(run, wanted.order) if wanted.order is not None else None


def feed(uri: str, order: str | None, columns: Sequence[str] | None, sink: BinaryIO, limit: int | None = None) -> int:
    """Write curated rows as lines of JSON, in a stored order or as they lie; returns how many.

    Holds one batch of rows, and waits where the reader does. Where the rows of the order do not lie in it yet, they are
    put there first. Raises ConfigError, CorpusError, and BrokenPipeError where the reader has gone.
    """
    source = CuratedSet.at(uri)
    wanted = list(columns or source.schema.names)
    if missing := next((c for c in wanted if c not in source.schema.names), None):
        raise ConfigError(f"feed: the curated set has no column {missing!r}; it has {', '.join(source.schema.names)}")
    written = 0
    for part in _parts(uri, order, source):
        for batch, _ in part.batches(wanted, BATCH_ROWS):
            if limit is not None:
                batch = batch.slice(0, limit - written)
            sink.write(lines(batch.select(wanted)))
            written += len(batch)
            if written == limit:
                return written
    return written


def _parts(uri: str, order: str | None, source: CuratedSet) -> list[FedPart]:
    if order is None:
        return [FedPart(i, f.rows, f.fingerprint, source) for i, f in enumerate(source.files)]
    with feeding(uri, connect) as run:  # the run is let go before the first row is fed
        return fed_parts(run, StoredOrder.at(uri, order, source))


def feed_command(uri: str, order: str | None, columns: Sequence[str] | None, limit: int | None) -> None:
    """`tamis feed`: rows to standard output; a reader that stops reading, such as `head`, ends it without a word."""
    try:
        feed(uri, order, columns, sys.stdout.buffer, limit)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        sys.exit(128 + signal.SIGPIPE)


def say_order(described: dict[str, Any], run: str) -> None:
    """What `tamis order` prints."""
    about = ", ".join(f"{name} {value}" for name, value in described["about"].items())
    print(f"{described['rows']:,} places in {len(described['parts'])} parts{f'; {about}' if about else ''}")
    print(f"Order    {run.rstrip('/')}/order/{described['name']}")


def say_packed(described: dict[str, Any], run: str) -> None:
    """What `tamis pack` prints."""
    about = described["about"]
    print(f"{described['sequences']:,} sequences of {described['length']:,}: {about['tokens']:,} tokens in them")
    print(
        f"utilisation {about['utilisation']:.2%}, cropped {about['cropped']:.2%} of the tokens, in several pieces "
        f"{about['split']:.1%} of {about['documents']:,} documents, {about['truncated']:.1%} of those that would fit"
    )
    for reason, count in about["skipped"].items():
        print(f"{count:,} rows left out: {reason}")
    print(f"Packed   {run.rstrip('/')}/packed/{described['name']}")


def say_export(described: dict[str, Any]) -> None:
    """What `tamis export` prints."""
    print(f"{described['rows']:,} rows in {len(described['files'])} files")
    print(f"Exported {described['target']}")
