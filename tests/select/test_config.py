from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.select.config import Budget, Quotas, Select

TEN = {"budget": {"rows": 10}}


def score(name: str, **quotas: Any) -> Any:
    return SimpleNamespace(column_name=name, quotas=quotas)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({}, "budget"),
        ({"budget": {}}, "exactly one of rows, tokens, bytes, fraction and compute; it has none"),
        ({"budget": {"rows": 1, "tokens": 2}}, "it has rows and tokens"),
        ({"budget": {"rows": 0}}, "greater than or equal to 1"),
        ({"budget": {"bytes": -5}}, "greater than or equal to 1"),
        ({"budget": {"rows": True}}, "needs a number"),
        ({"budget": {"tokens": 2.5}}, "fractional part"),
        ({"budget": {"fraction": 0}}, "greater than 0"),
        ({"budget": {"fraction": 1.1}}, "less than or equal to 1"),
        ({"budget": {"fraction": float("nan")}}, "less than or equal to 1"),
        ({"budget": {"rows": 5, "of": "tokens"}}, "`of` belongs to `fraction`"),
        ({"budget": {"fraction": 0.1, "of": "words"}}, "'rows', 'tokens' or 'bytes'"),
        (TEN | {"weight": {"a": 1}}, "Extra inputs"),
        (TEN | {"weights": {"a": 0}}, "a: 0 is not above 0"),
        (TEN | {"weights": {"a": float("nan")}}, "a: nan is not above 0"),
        (TEN | {"floors": {"a": float("inf")}}, "a: inf is not a finite number"),
        (TEN | {"combine": "gates", "weights": {"a": 2}}, "gates knows no weights"),
        (TEN | {"combine": "minimum", "weights": {"a": 2, "b": 1}}, "minimum knows no weights"),
        (TEN | {"combine": "gates", "temperature": 1}, "remove temperature"),
        (TEN | {"combine": "mean"}, "'rank', 'geometric'"),
        (TEN | {"skip": True}, "every row fits a budget of rows"),
        (TEN | {"quotas": "even"}, "'none', 'density', 'proportional' or 'equal'"),
        (TEN | {"quotas": {"rule": "equal", "tau": 1}}, "only `rule: density` has tau"),
        (TEN | {"quotas": {"rule": "density", "tau": 0}}, "greater than 0"),
        (TEN | {"quotas": {"balance": 1.5}}, "less than or equal to 1"),
        (TEN | {"temperature": -1}, "greater than or equal to 0"),
    ],
)
def test_mistakes_are_named(select: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Select.model_validate(select)


def test_names_of_scores_are_checked() -> None:
    select = Select.model_validate(TEN | {"weights": {"quality": 1}, "floors": {"denisty": 0}})
    with pytest.raises(ValueError, match=r"select.floors: no score is named 'denisty'; did you mean 'density'\?"):
        select.check_scores(["quality", "density"])
    select.check_scores(["quality", "denisty"])


def test_a_short_form_of_quotas() -> None:
    assert Select.model_validate(TEN | {"quotas": "equal"}).quotas == Quotas(rule="equal")
    options = Select.model_json_schema()["$defs"]["Quotas"]["anyOf"]
    assert options[0]["enum"] == ["none", "density", "proportional", "equal"]
    assert "balance" in options[1]["properties"]


@pytest.mark.parametrize(
    ("budget", "available", "amount"),
    [
        (Budget(rows=7), 7, 7),
        (Budget(fraction=0.29), 100, 29),  # int(0.29 * 100) is 28
        (Budget(fraction=0.1), 19, 1),
        (Budget(fraction=1), 19, 19),
        (Budget(fraction=0.2, of="tokens"), 10**18 + 5, 2 * 10**17 + 1),
    ],
)
def test_amounts(budget: Budget, available: int, amount: int) -> None:
    assert budget.amount(available) == amount


def test_more_than_there_is_says_how_much_there_is() -> None:
    with pytest.raises(ConfigError, match=r"select.budget.tokens: 2,000 is more than the corpus has, 1,999 tokens"):
        Budget(tokens=2000).amount(1999)
    with pytest.raises(ConfigError, match=r"0.01 of 99 rows is less than one"):
        Budget(fraction=0.01).amount(99)


def test_which_scores_rank() -> None:
    names = ["clean", "quality", "novelty"]
    assert Select.model_validate(TEN).ranking(names) == {"clean": 1, "quality": 1, "novelty": 1}
    assert Select.model_validate(TEN | {"weights": {"quality": 2}}).ranking(names) == {"quality": 2}
    gates = TEN | {"combine": "gates", "floors": {"clean": 1}}
    assert list(Select.model_validate(gates).ranking(names)) == ["quality", "novelty"]
    gates["floors"] |= {"quality": 0, "novelty": 0}
    assert list(Select.model_validate(gates).ranking(names)) == ["novelty"]


def test_a_score_brings_its_quotas_unless_it_does_not_rank() -> None:
    scores = [score("quality"), score("dense", rule="density")]
    assert Select.model_validate(TEN).quotas_for(scores) == Quotas(rule="density")
    assert Select.model_validate(TEN).needs_concepts(scores)
    for other in ({"weights": {"quality": 1}}, {"quotas": "none"}):
        assert not Select.model_validate(TEN | other).needs_concepts(scores)
    assert Select.model_validate(TEN | {"quotas": {"balance": 0.5}}).needs_concepts(scores[:1])
    assert Quotas(rule="density").least_share == 0.5
    assert Quotas(rule="equal").least_share == 0
