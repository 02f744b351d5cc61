from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import Field

from pipeline.config import kinds
from pipeline.errors import ConfigError
from pipeline.report.criteria import criteria, fields, print_criteria, recipe, type_name
from pipeline.scores.base import Score


class Toy(Score):
    """A criterion outside the package."""

    claim, cost, source = "is [red]", "nothing", "ours"
    kind: Literal["toy"] = "toy"
    model: str = Field(description="where it lies")
    share: float | None = Field(None, description="how much")
    rules: list[str] = Field(default_factory=lambda: ["a"])


@pytest.mark.parametrize("kind", kinds("pipeline.scores"))
def test_every_criterion_says_what_it_claims_costs_and_comes_from(kind: str) -> None:
    found = recipe(kind)
    for said in (found.claim, found.cost, found.source):
        assert said.strip()
        assert "\n" not in said  # one line each
    assert (found.__doc__ or "").strip()


def test_the_table_has_a_line_a_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    print_criteria()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    starts = [line.split()[0] for line in out.splitlines() if line[:1].strip()]
    assert starts[1:] == kinds("pipeline.scores")


def test_json_of_all_and_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_criteria(as_json=True)
    assert json.loads(capsys.readouterr().out) == criteria()
    print_criteria("prototypes", as_json=True)
    one = json.loads(capsys.readouterr().out)
    assert (one["needs"], one["quotas"], one["compares_rows"]) == ("concepts", {"balance": 0.5}, False)
    keep = next(f for f in one["fields"] if f["name"] == "keep")
    assert keep["default"] == "auto"
    assert keep["type"] == '"hard" | "easy" | "auto"'


def test_one_criterion_with_its_fields_and_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    print_criteria("prototypes")
    out = capsys.readouterr().out
    assert "select.quotas: {balance: 0.5}" in out
    assert "max_distance_quantile" in out
    assert "Sorscher et al. 2022" in out


def test_required_fields_have_no_default() -> None:
    found = {f["name"]: f for f in fields(Toy)}
    assert list(found) == ["name", "model", "share", "rules"]
    assert found["model"] == {"name": "model", "type": "text", "description": "where it lies"}
    assert found["share"] == {"name": "share", "type": "number | null", "description": "how much", "default": None}
    assert found["rules"]["default"] == ["a"]


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (str | list[str] | None, "text | list of text | null"),
        (dict[str, float], "mapping of text to number"),
        (tuple[int, ...], "list of integer"),
        (Literal[1, "a"], '1 | "a"'),
        (bool, "true | false"),
    ],
)
def test_types_in_words(annotation: Any, name: str) -> None:
    assert type_name(annotation) == name


def test_an_unknown_kind_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'density'"):
        print_criteria("densty")
