"""The configuration: every mistake names the place and the fix, and the contract's keys do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config, json_schema, kinds, load, load_as, parse
from pipeline.errors import ConfigError

GOOD = """\
corpus: {path: data, text: text}
scores:
  - {kind: random}
select:
  budget: {rows: 10}
"""


def write(directory: Path, text: str) -> str:
    file = directory / "my.yaml"
    file.write_text(text)
    return str(file)


def test_run_directory_is_named_after_the_file(tmp_path: Path) -> None:
    assert load(write(tmp_path, GOOD)).run == "runs/my"
    assert load(write(tmp_path, GOOD), run="s3://bucket/run").run == "s3://bucket/run"


def test_overrides_reach_into_mappings_and_lists(tmp_path: Path) -> None:
    config = load(write(tmp_path, GOOD), ["engine.workers=2", "scores.0.name=noise", "select.budget={tokens: 5}"])
    assert config.engine.workers == 2
    assert config.scores[0].column_name == "noise"
    assert config.select.budget.tokens == 5


def test_a_bare_kind_is_a_recipe_with_its_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, GOOD.replace("{kind: random}", "random"))).scores == load(write(tmp_path, GOOD)).scores


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        (("text: text", "txet: text"), "my.yaml:1: corpus.txet", "unknown key; did you mean 'text'?"),
        (("kind: random", "kind: randon"), "my.yaml:3: scores.0", "did you mean 'random'?"),
        (("kind: random", "kind: random, sed: 3"), "my.yaml:3: scores.0.sed", "unknown key"),
        (("{kind: random}", "{name: x}"), "my.yaml:3: scores.0", "needs a `kind`"),
        (("  - {kind: random}", "  []"), "my.yaml:2: scores", "at least 1"),
        (("  - {kind: random}", "  - random\n  - random"), "my.yaml", "two scores are named 'random'"),
        (("{kind: random}", "{kind: random, name: row}"), "my.yaml", "cannot be named 'row'"),
        (("{rows: 10}", "{rows: 10, tokens: 3}"), "my.yaml:5: select.budget", "exactly one"),
        (("budget: {rows: 10}", "budgte: {rows: 10}"), "my.yaml:5: select.budgte", "did you mean 'budget'?"),
        (("budget: {rows: 10}", "budget: {rows: 10}\n  floors: {qualty: 1}"), "my.yaml", "no score is named 'qualty'"),
        (("corpus: {path: data, text: text}\n", ""), "my.yaml:1: corpus", "is missing"),
        (("{kind: random}", "{kind: 'no.such:Thing'}"), "my.yaml:3: scores.0", "cannot be imported"),
        (("{kind: random}", "{kind: 'json:JSONDecoder'}"), "my.yaml:3: scores.0", "not a subclass of pipeline.scores"),
    ],
)
def test_a_mistake_names_its_place_and_its_fix(tmp_path: Path, change: tuple[str, str], place: str, words: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, GOOD.replace(*change)))
    assert place in str(caught.value)
    assert words in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, GOOD.replace("text: text", "txet: text").replace("rows: 10", "rows: -1")))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("corpus: {path: a}\ncorpus: {path: b}\n", "my.yaml:2: corpus is there twice"),
        ("corpus: [", "is not YAML"),
        ("- a\n", "must be a mapping"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
    ],
)
def test_what_is_no_configuration_is_said_to_be_none(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(write(tmp_path, text))


@pytest.mark.parametrize("override", ["engine.workers", "=3", "scores.7.name=x", "corpus.path.deep=1"])
def test_an_override_that_fits_nowhere_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load(write(tmp_path, GOOD), [override])


def test_a_missing_file_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load("nowhere.yaml")


def test_the_schema_for_editors_knows_every_built_in_kind() -> None:
    schema = json_schema()
    text = str(schema)
    assert all(
        f"'const': '{kind}'" in text for package in ("pipeline.scores", "pipeline.embed") for kind in kinds(package)
    )
    assert schema["additionalProperties"] is False


MADE_BEFORE = {"dbp_clipart": "runs/dfn/artifacts/dfn", "dfn": "runs/clipart"}
"""Configurations that go on with what another leaves, which their first lines name."""


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    from pipeline.compare.config import Matched
    from pipeline.compress.config import Compress
    from pipeline.output.commands import Feeding

    others = {"compress": Compress, "quickstart_model": Matched, "in_context": Feeding}
    command = others.get(file.stem, Config)
    made = MADE_BEFORE.get(file.stem)
    if made and not (Path(__file__).parent.parent / made).exists():  # as in a fresh clone
        with pytest.raises(ConfigError, match=made):
            load_as(command, str(file))
    else:
        load_as(command, str(file))


def test_plain_data_is_checked_alike() -> None:
    with pytest.raises(ConfigError, match=r"corpus\.path"):
        parse({"corpus": {}, "scores": ["random"], "select": {"budget": {"rows": 1}}, "run": "r"})


def test_a_users_own_recipe_comes_in_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores.py").write_text(
        "from typing import Literal\n"
        "from pipeline.scores.base import Score\n"
        "class Vowels(Score):\n"
        "    kind: Literal['vowels'] = 'vowels'\n"
        "    letters: str = 'aeiou'\n"
        "class Plain(Score):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kinds = "[{kind: 'my_scores:Vowels', letters: ae}, {kind: 'my_scores:Plain'}]"
    config = load(write(tmp_path, GOOD.replace("\n  - {kind: random}", f" {kinds}")))
    assert [s.column_name for s in config.scores] == ["vowels", "plain"]
    assert config.scores[0].model_dump()["letters"] == "ae"
