"""The command line. Every command parses, calls one function of the library, prints, and sets the exit code:
0 done, 1 error (with what to change), 2 finished but some shards failed (they are listed).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="tamis",
    help="Sieve a training corpus down to the budget that a model deserves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, see configs/")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set a key of the configuration; may be given again.")
]
RunOption = Annotated[
    str | None,
    typer.Option("--run", metavar="DIR", help="Run directory, local or s3:// (default: runs/<name of the file>)."),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")]


@app.command()
def curate(
    config: ConfigPath,
    overrides: Overrides = None,
    run: RunOption = None,
    refresh: Annotated[bool, typer.Option(help="List an object store again.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Sieve a corpus: embed, cluster, score, select, write, report."""
    from pipeline.config import load
    from pipeline.curation import curate as curate_corpus
    from pipeline.report.terminal import print_result

    changes = [*(overrides or []), *(["corpus.refresh=true"] if refresh else [])]
    result = curate_corpus(load(config, changes, run), quiet=quiet)
    print_result(result)
    raise typer.Exit(result.exit_code)


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None, run: RunOption = None) -> None:
    """Say what a run would read, write and cost, from a measured sample, before anything runs."""
    from pipeline.config import load
    from pipeline.report.plan import make_plan, print_plan

    print_plan(make_plan(load(config, overrides, run)))


@app.command()
def status(run: RunArgument) -> None:
    """Say how far a run is and what failed."""
    from pipeline.report.status import print_status

    raise typer.Exit(print_status(run))


@app.command()
def show(
    run: RunArgument,
    kept: Annotated[bool, typer.Option("--kept/--dropped", help="Rows that were kept, or dropped.")] = True,
    by: Annotated[
        str | None, typer.Option("--by", metavar="SCORE", help="Best first by this score (default: a random sample).")
    ] = None,
    lowest: Annotated[bool, typer.Option("--lowest", help="With --by: worst first.")] = False,
    rows: Annotated[int, typer.Option("-n", min=1, help="Rows to print.")] = 10,
) -> None:
    """Print real rows with their scores and the reason for which they were kept or dropped."""
    from pipeline.report.show import print_rows

    print_rows(run, kept=kept, by=by, lowest=lowest, count=rows)


@app.command()
def ingest(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="JSONL (.gz, .zst), CSV, text, WARC/WET, a `datasets` directory; files, directories, globs.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Where the Parquet shards go.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=B", help="Set an option of the reader.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray address, or `inline`.")] = None,
    workers: Annotated[int | None, typer.Option(help="Actors.")] = None,
) -> None:
    """Turn other formats into Parquet shards with ids, one input file a task."""
    from pipeline.corpus.ingest import ingest_command

    raise typer.Exit(ingest_command(source, output, overrides or [], address, workers))


@app.command()
def submit(
    config: ConfigPath,
    address: Annotated[str, typer.Option(help="Address of the cluster's dashboard, such as http://head:8265.")],
    overrides: Overrides = None,
    run: RunOption = None,
) -> None:
    """Run `curate` as a Ray job: submit, follow the log, return the job's exit code."""
    from pipeline.submit import submit_job

    raise typer.Exit(submit_job(config, address, overrides or [], run))


@app.command()
def fit(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="Kind or name of a score of the configuration.")],
    config: ConfigPath,
    overrides: Overrides = None,
    run: RunOption = None,
) -> None:
    """Fit what a criterion needs, such as its models, and print where it is; nothing is scored."""
    from pipeline.config import load
    from pipeline.fit import fit as fit_score

    for name, path in fit_score(load(config, overrides, run), kind).items():
        print(f"{name}\t{path}")


@app.command()
def compress(
    config: ConfigPath,
    overrides: Overrides = None,
    run: RunOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the result.")] = False,
) -> None:
    """Make a model smaller and heal it on a curated run: calibrate, cut, recover, write."""
    from pipeline.compress.compression import compress as compress_model
    from pipeline.compress.config import Compress
    from pipeline.config import load_as
    from pipeline.report.terminal import print_compressed

    print_compressed(compress_model(load_as(Compress, config, overrides, run), quiet=quiet))


@app.command()
def compare(
    config: ConfigPath,
    proxy: Annotated[
        bool, typer.Option("--proxy", help="Compare the scores of a curation, each alone, on a small model.")
    ] = False,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Cut the students, print what every arm can afford, train nothing.")
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="FILE", help="--proxy: texts that the model is to be good at."),
    ] = None,
    at: Annotated[
        list[float] | None, typer.Option("--at", help="--proxy: budget, as a share of all tokens: 0.1.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="--proxy: trainings of every arm.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="A.B=C", help="--proxy: set an option of the training: steps=500."),
    ] = None,
    overrides: Overrides = None,
    run: RunOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """What do curation and pruning buy at equal FLOPs? With --proxy: which criterion earns its cost?"""
    from pipeline.config import load, load_as
    from pipeline.errors import ConfigError

    if proxy:
        from pipeline.compare.proxy import compare_proxy, settings
        from pipeline.compare.verdict import print_comparison

        sieve = load(config, overrides, run)
        learner = settings(sieve, options or [], target=target, at=at, seeds=seeds)
        print_comparison(compare_proxy(sieve, learner, quiet=quiet))
        return
    if target or at or seeds or options:
        raise ConfigError("--target, --at, --seeds and --with belong to --proxy; set keys of CONFIG with --set")
    from pipeline.compare.config import Matched
    from pipeline.compare.matched import compare_matched
    from pipeline.report.terminal import print_arms, print_matched

    matched = load_as(Matched, config, overrides, run)
    print_matched(compare_matched(matched, quiet, only_plan, show=None if quiet else print_arms))


FedFrom = Annotated[
    str, typer.Argument(metavar="RUN|CONFIG", help="Curated run, or a YAML file such as configs/in_context.yaml.")
]
OrderName = Annotated[
    str | None, typer.Option("--order", metavar="NAME", help="A stored order (default: as the rows lie).")
]
RecipeOptions = Annotated[
    list[str] | None, typer.Option("--set", metavar="A=B", help="Set an option of the kind; may be given again.")
]


@app.command()
def order(
    source: FedFrom,
    kind: Annotated[
        str | None, typer.Option("--kind", help="source, shuffled, curriculum, repeated, in_context.")
    ] = None,
    rows: Annotated[
        bool, typer.Option("--rows", help="Write the rows themselves in this order, too, for the loader.")
    ] = False,
    options: RecipeOptions = None,
    run: RunOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Say in which sequence a trainer reads the curated rows, and how often each."""
    from pipeline.output.commands import asked, make_order, say_order

    wanted = asked(source, "order", kind, options or [], run=run, rows=rows or None)
    say_order(make_order(wanted, quiet), wanted.run)


@app.command()
def pack(
    source: FedFrom,
    kind: Annotated[str | None, typer.Option("--kind", help="best_fit, concat, pairs.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=2, help="Tokens a sequence.")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="tokenizer.json, folder or hub name.")] = None,
    by: OrderName = None,
    options: RecipeOptions = None,
    run: RunOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Pack the curated rows into token sequences of one length."""
    from pipeline.output.commands import asked, make_packed, say_packed

    named = {"length": length, "tokenizer": tokenizer}
    options = [*(options or []), *(f"{name}={value}" for name, value in named.items() if value is not None)]
    wanted = asked(source, "pack", kind, options, default="best_fit", run=run)
    say_packed(make_packed(wanted, by, quiet), wanted.run)


@app.command()
def export(
    source: FedFrom,
    to: Annotated[
        tuple[str, str] | None,
        typer.Option("--to", metavar="FORMAT DIR", help="huggingface, jsonl, mds, megatron, webdataset; and where."),
    ] = None,
    by: OrderName = None,
    options: RecipeOptions = None,
    run: RunOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Write the curated rows in a trainer's own format, through that format's own library."""
    from pipeline.output.commands import asked, make_export, say_export

    kind, directory = to or (None, None)
    say_export(make_export(asked(source, "export", kind, options or [], run=run, to=directory), by, quiet))


@app.command()
def feed(
    run: RunArgument,
    by: OrderName = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", metavar="NAME", help="A column (default: all); may be given again.")
    ] = None,
    rows: Annotated[int | None, typer.Option("-n", min=1, help="Rows (default: all).")] = None,
) -> None:
    """Stream the curated rows to standard output, a JSON object a line."""
    from pipeline.output.commands import feed_command

    feed_command(run, by, columns, rows)


@app.command()
def criteria(
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="One criterion: its fields and defaults.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the criteria: what a high score of each claims, needs and costs, and where it comes from."""
    from pipeline.report.criteria import print_criteria

    print_criteria(kind, as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    import json

    from pipeline.config import json_schema

    print(json.dumps(json_schema(), indent=2))


def main() -> None:
    """Entry point of the console script: errors of the user's become one message and exit code 1."""
    from pipeline.errors import TamisError

    sys.path.append(os.getcwd())  # `kind: my_package.module:MyScore` may lie where the command is typed
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that locks and workers are let go
    try:
        app()
    except TamisError as error:
        from pipeline.report.format import harmless

        print(f"tamis: {harmless(str(error))}", file=sys.stderr)  # it may quote a row, or the name of a column
        sys.exit(1)
    except KeyboardInterrupt:
        print("tamis: stopped; the same command continues where it was", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
