"""The dataset card, README.md of the run: what was kept, from what, by which recipe, with which totals.

It stands beside the curated directory, not in it: that holds Parquet and nothing else, so that Arrow and others read
it whole. `load_dataset(RUN)` follows the card to the curated files, and so does the hub.
"""

from __future__ import annotations

from typing import Any

import yaml

from pipeline import __version__
from pipeline.corpus.storage import Store
from pipeline.run import Run
from pipeline.select.stage import Selection


def write_card(
    run: Run,
    selection: Selection,
    directory: Store,
    files: list[dict[str, Any]],
    rewritten: dict[str, int] | None = None,
) -> None:
    """Write README.md: a front matter that `datasets` and the hub read, then the totals and the configuration.

    `rewritten`: what the rows came to once their texts were shortened, see `curated.shortened`.
    """
    config = run.config.model_dump(mode="json", exclude={"engine"}, exclude_none=True)
    front = {
        "configs": [{"config_name": "default", "data_files": _glob(run.store, directory, files)}],
        "tags": ["tamis"],
        "size_categories": [_size(selection.rows)],
    }
    reasons = "\n".join(f"| {reason} | {count:,} |" for reason, count in selection.reasons.items())
    failed = "".join(f"- `{f['file']}`: {f['reason']}\n" for f in run.failures) or "Nothing: every file was read.\n"
    caveats = "".join(f"- {caveat}\n" for score in run.config.scores for caveat in score.caveats(run))
    text = f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {run.store.uri.rstrip("/").rsplit("/", 1)[-1]}

{selection.rows:,} of {run.rows:,} rows, {selection.tokens:,} tokens ({run.tokens_named}), {selection.bytes:,} bytes of
{run.content}, in {len(files)} Parquet files. Curated by Tamis {__version__}; rows keep the source's schema and order.
{_rewritten(rewritten)}{_beware(caveats)}
## What became of every row

| reason | rows |
| --- | ---: |
{reasons}

## What is missing

{failed}
## Recipe

```yaml
{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}```

Fingerprint of the selection: `{run.plans["select"].fingerprint}`. The run's `manifest.json` has the lineage of every
file.
"""
    run.store.write(text.encode(), "README.md")


def _rewritten(totals: dict[str, int] | None) -> str:
    if not totals:
        return ""
    return f"""
These totals are of the original rows, by which they were selected. `output.rewrite` then went over {totals["rows"]:,}
of them and shortened {totals["shortened"]:,}; it left {totals["tokens"]:,} tokens, {totals["bytes"]:,} bytes of text.
"""


def _beware(caveats: str) -> str:
    return f"\n## Beware\n\n{caveats}" if caveats else ""


def _glob(run: Store, directory: Store, files: list[dict[str, Any]]) -> str:
    """Pattern of the curated files, relative to the card where they are in the run."""
    place = directory.uri.removeprefix(run.uri.rstrip("/") + "/")
    return f"{place}/{files[0]['file'].split('0')[0]}*.parquet"


def _size(rows: int) -> str:
    """The hub's size category of a number of rows."""
    edges = [
        (10**3, "n<1K"),
        (10**4, "1K<n<10K"),
        (10**5, "10K<n<100K"),
        (10**6, "100K<n<1M"),
        (10**7, "1M<n<10M"),
        (10**8, "10M<n<100M"),
    ]
    edges += [(10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T")]
    return next((name for edge, name in edges if rows < edge), "n>1T")
