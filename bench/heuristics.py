"""`heuristics` beside datatrove's filters on the same documents and one core each: seconds, their ratio, the verdicts.

usage: python bench/heuristics.py PEER_PYTHON [--corpus DIR] [--rows N] [--rounds R]

PEER_PYTHON is the interpreter of an environment with `datatrove[processing]` and spacy. Both sides judge Gopher
repetition, Gopher quality and C4 (lines with any ending), in this order, a document that failed being done with. Their
times hold the judging alone, without start-up, reading and writing; they run in turns, and the ratios are of the best
rounds. CPU seconds are what counts on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BATCH_ROWS = 1024
SETTINGS = {"rules": ["gopher_repetition", "gopher_quality", "c4"], "filter_no_terminal_punct": False}


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def datatrove(path: str) -> dict[str, Any]:
    """In the peer's interpreter: rules that fired (null: none) and seconds."""
    import pyarrow.parquet as pq
    from datatrove.data import Document
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter

    filters = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False)]

    def judge(text: str) -> str | None:
        document = Document(text=text, id="")
        for rules in filters:
            verdict = rules.filter(document)
            if verdict is not True:
                return str(verdict[1])
        return None

    texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
    judge(texts[0] + " A sentence loads the tokenizer. " * 9)
    wall, cpu = clocks()
    rules = [judge(text) for text in texts]
    done = clocks()
    return {"rules": rules, "wall": done[0] - wall, "cpu": done[1] - cpu}


def tamis(path: str) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.scores.heuristics import Heuristics

    pa.set_cpu_count(1)
    judge = Heuristics(**SETTINGS, segment_unspaced=False).open()
    batches = pq.read_table(path, columns=["text"]).to_batches(max_chunksize=BATCH_ROWS)
    judge(batches[0].slice(0, 1))
    wall, cpu = clocks()
    rules = [rule or None for batch in batches for rule in judge(batch)["rule"].to_pylist()]
    done = clocks()
    return {"rules": rules, "wall": done[0] - wall, "cpu": done[1] - cpu}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer_python")
    parser.add_argument("--corpus", default=str(ROOT / "examples/sample"))
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()

    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    texts = ds.dataset(options.corpus, format="parquet").head(options.rows, columns=["text"])["text"].drop_null()
    sides = {"tamis": sys.executable, "datatrove": options.peer_python}
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/texts.parquet"
        pq.write_table(pa.table({"text": texts}), path)
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, python in sides.items():
                out = subprocess.run([python, __file__, f"--side={side}", path], stdout=subprocess.PIPE, check=True)
                rounds[side].append(json.loads(out.stdout))
    pairs = Counter(zip(rounds["tamis"][0]["rules"], rounds["datatrove"][0]["rules"], strict=True))
    best = {side: {clock: min(r[clock] for r in rounds[side]) for clock in ("wall", "cpu")} for side in sides}
    result = {"rows": len(texts), "mb": round(texts.nbytes / 1e6, 1)}
    result |= {f"{side}_{clock}_s": round(best[side][clock], 2) for side in sides for clock in ("wall", "cpu")}
    result |= {f"ratio_{clock}": round(best["datatrove"][clock] / best["tamis"][clock], 1) for clock in ("wall", "cpu")}
    result["tamis_mb_cpu_s"] = round(texts.nbytes / 1e6 / best["tamis"]["cpu"], 1)
    result["kept"] = [sum(n for pair, n in pairs.items() if pair[side] is None) for side in (0, 1)]
    result["same_verdict"] = sum(n for (ours, theirs), n in pairs.items() if (ours is None) == (theirs is None))
    result["same_rule"] = sum(n for (ours, theirs), n in pairs.items() if ours == theirs)
    print(json.dumps(result))
    for (ours, theirs), n in pairs.most_common():
        if ours != theirs:
            print(f"{n} documents: tamis says {ours or 'keep'}, datatrove {theirs or 'keep'}")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("--side="):
        side = {"tamis": tamis, "datatrove": datatrove}[sys.argv[1].removeprefix("--side=")]
        print(json.dumps(side(sys.argv[2])))
    else:
        main()
