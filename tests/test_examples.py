"""examples/: the sample corpus is what its README says, free to pass on, and made by its script."""

import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def rows(*parts: str) -> list[dict[str, str | None]]:
    return ds.dataset(EXAMPLES.joinpath(*parts)).to_table().to_pylist()


@pytest.fixture(scope="module")
def sample() -> list[dict[str, str | None]]:
    return rows("sample")


def test_it_is_small_and_has_several_row_groups_in_several_files() -> None:
    files = sorted(EXAMPLES.rglob("*.parquet"))
    assert sum(f.stat().st_size for f in files) < 4_000_000
    assert [pq.ParquetFile(f).num_row_groups for f in files if f.parent.name == "sample"] == [4, 4, 4]


@pytest.mark.parametrize("parts", [("sample",), ("seeds", "good.parquet"), ("seeds", "bad.parquet")])
def test_every_row_may_be_passed_on_and_says_where_it_is_from(parts: tuple[str, ...]) -> None:
    allowed = {"Public domain (published before 1929)", "Public domain", "CC-BY-SA-3.0", "CC-BY-SA-4.0"}
    for row in rows(*parts):
        assert row["license"] in allowed, row["id"]
        assert not str(row["source"]).startswith(("web_", "cc_web", "pile_")), row["id"]
        assert row["origin"], row["id"]
        assert not row["origin"].startswith("Forster"), row["id"]


def test_planted_rows_name_their_original_and_differ_from_it_as_they_say(sample: list[dict[str, str]]) -> None:
    by_id = {r["id"]: r for r in sample}
    assert len(by_id) == len(sample)
    for row in (r for r in sample if r["planted"]):
        original = by_id[row["original"]]
        assert original["planted"] is None
        assert (row["text"] == original["text"]) == (row["planted"] == "exact_duplicate"), row["id"]
        assert row["license"] == original["license"]
        ours, theirs = Counter(row["text"].split()), Counter(original["text"].split())
        if row["planted"] == "near_duplicate" and len(theirs) > 20 and row["lang"] not in ("zh", "th"):
            assert (ours & theirs).total() > 0.9 * theirs.total(), row["id"]
        if row["planted"] == "damaged:shuffled_words" and row["lang"] not in ("zh", "th"):
            assert ours == theirs, row["id"]
        if row["planted"] == "damaged:repeated_line":
            assert len(set(row["text"].splitlines())) == 1, row["id"]


def test_no_seed_is_in_the_sample(sample: list[dict[str, str]]) -> None:
    good, bad = rows("seeds", "good.parquet"), rows("seeds", "bad.parquet")
    assert {r["text"] for r in good}.isdisjoint(r["text"] for r in sample)
    paragraphs = [{r["id"].split("/", 2)[2] for r in some if r["id"].startswith("xquad/")} for some in (good, sample)]
    assert paragraphs[0].isdisjoint(paragraphs[1])
    assert {r["original"] for r in bad} <= {r["id"] for r in good}


def test_the_readme_counts_what_is_there(sample: list[dict[str, str]]) -> None:
    readme = (EXAMPLES / "README.md").read_text()
    found = Counter((r["source"], r["planted"] is not None) for r in sample)
    for source in {r["source"] for r in sample}:
        counts = re.search(rf"\| `{source}` \| [^|]+ \| (\d+) \| (\d+) \|", readme)
        assert counts is not None, source
        assert (int(counts[1]), int(counts[2])) == (found[source, False], found[source, True])
    planted = {kind: int(n) for kind, n in re.findall(r"^\| `([a-z_:]+)` \| (\d+) \|", readme, re.M)}
    assert planted == Counter(r["planted"] for r in sample if r["planted"])
    assert f"{len(sample):,} rows" in readme


def test_the_script_gives_what_is_committed(tmp_path: Path, shared_data: Path) -> None:
    corpus = shared_data / "text_corpus/parts"
    subprocess.run([sys.executable, EXAMPLES / "build_sample.py", corpus, tmp_path], check=True)
    for path in ("sample", "seeds/good.parquet", "seeds/bad.parquet"):
        assert ds.dataset(tmp_path / path).to_table() == ds.dataset(EXAMPLES / path).to_table()


def test_the_criterion_in_contributing_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n# pipeline/scores/vowels\.py\n(.+?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert code is not None
    (tmp_path / "vowels_of_contributing.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    recipe = importlib.import_module("vowels_of_contributing").Vowels(letters="ae")
    column = recipe.column(None)  # this criterion asks nothing of the run
    out = column.open()(pa.record_batch([pa.array(["banana", "xyz"])], ["text"]))
    assert out["score"].to_pylist() == [0.5, 0.0]
    assert out.schema == column.fields
