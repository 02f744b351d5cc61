"""MovieLens ratings as a corpus of interactions: a row a user, in the order of time.

    .venv/bin/python bench/movielens.py ../shared/data/recsys corpora/movielens

`items` are the films from the first to the last, `prompt` the titles of up to 20 before the last one, and
`response` the title of that one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

MOST = 20
"""Titles of a prompt: the last ones before the response."""


def interactions(source: Path) -> pl.DataFrame:
    """`user`, `items` (list<int64>), `prompt` and `response` of the folder with ratings.parquet and movies.parquet."""
    ratings = pl.read_parquet(source / "ratings.parquet").sort("userId", "timestamp", "movieId")
    titles = pl.read_parquet(source / "movies.parquet").select("movieId", pl.col("title").cast(pl.String))
    rows = (
        ratings.join(titles, on="movieId", how="inner", maintain_order="left")
        .group_by("userId", maintain_order=True)
        .agg(pl.col("movieId").alias("items"), pl.col("title").alias("titles"))
        .filter(pl.col("items").list.len() > 1)
    )
    history = pl.col("titles").list.head(pl.col("titles").list.len() - 1).list.tail(MOST).list.join("; ")
    return rows.select(
        pl.col("userId").alias("user"),
        "items",
        pl.format("Films seen, the latest last: {}. Which one comes next?", history).alias("prompt"),
        pl.col("titles").list.last().alias("response"),
    )


if __name__ == "__main__":
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    table = interactions(Path(sys.argv[1]))
    table.write_parquet(out / "part-00000.parquet")
    print(f"{len(table):,} users, {table['items'].list.len().sum():,} films seen, in {out}")
