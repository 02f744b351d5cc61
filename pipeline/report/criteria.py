"""`tamis criteria`: what every criterion claims, needs and costs, read from the recipes themselves.

Nothing is listed by hand: a recipe's class says `claim`, `needs`, `cost` and `source`, its fields are its parameters,
and the docstring of its module is the long text of `tamis criteria KIND`. A criterion that is not in the package is
named as in a configuration, `my_package.module:MyScore`.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.config import kinds, recipe_class
from pipeline.errors import ConfigError
from pipeline.report.terminal import console, print_table, text
from pipeline.scores.base import Score

PACKAGE = "pipeline.scores"
REQUIRED = "(required)"


def print_criteria(kind: str | None = None, as_json: bool = False) -> None:
    """Print the table of all criteria, or one with its fields; as JSON a list of all, or one object with `fields`.

    Raises ConfigError for a kind that is not there.
    """
    if kind is not None:
        found = recipe(kind)
        print(json.dumps(describe(found) | {"fields": fields(found)}, indent=2)) if as_json else _print_one(found)
    elif as_json:
        print(json.dumps(criteria(), indent=2))
    else:
        heads = ("kind", "a high score claims", "needs", "compares rows", "cost of a row", "source")
        lines = [
            (c["kind"], c["claim"], c["needs"], "yes" if c["compares_rows"] else "no", c["cost"], c["source"])
            for c in criteria()
        ]
        print_table(console(), heads, lines, "ltlltt")


def criteria() -> list[dict[str, Any]]:
    """Every criterion of the package, as `describe` has it, in the order of their names."""
    return [describe(recipe(kind)) for kind in kinds(PACKAGE)]


def recipe(kind: str) -> type[Score]:
    """The class behind a kind. Raises ConfigError with the kinds that there are."""
    try:
        return recipe_class(PACKAGE, Score, kind)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def describe(score: type[Score]) -> dict[str, Any]:
    """`kind`, `claim`, `needs`, `compares_rows`, `cost`, `source` and the `quotas` that the method brings along."""
    return {
        "kind": score.model_fields["kind"].default,
        "claim": score.claim,
        "needs": score.needs,
        "compares_rows": score.fill is not Score.fill,
        "cost": score.cost,
        "source": score.source,
        "quotas": dict(score.quotas),
    }


def fields(score: type[Score]) -> list[dict[str, Any]]:
    """The parameters: `name`, `type`, `default` (absent where it is required) and `description`."""
    return [
        {"name": name, "type": type_name(field.annotation), "description": field.description or ""}
        | ({} if field.is_required() else {"default": _default(field)})
        for name, field in score.model_fields.items()
        if name != "kind"
    ]


def type_name(annotation: Any) -> str:
    """A type as people read it: `"hard" | "easy"`, `number | null`, `list of text`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(json.dumps(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return type_name(arguments[0])
    if origin is dict:
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    if origin is not None:
        return f"list of {type_name(arguments[0])}"
    named = {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "null"}
    return named.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _print_one(score: type[Score]) -> None:
    out, about = console(), describe(score)
    out.print(text(about["kind"], "bold"))
    quotas = ", ".join(f"{name}: {value}" for name, value in about["quotas"].items())
    print_table(
        out,
        ("", ""),
        [
            ("claims", about["claim"]),
            ("needs", about["needs"]),
            ("compares rows", "yes" if about["compares_rows"] else "no"),
            ("costs", about["cost"]),
            ("source", about["source"]),
            *([("brings", f"select.quotas: {{{quotas}}}")] if quotas else []),
        ],
        "lt",
    )
    lines = [
        (f["name"], json.dumps(f["default"]) if "default" in f else REQUIRED, f["type"], f["description"])
        for f in fields(score)
    ]
    print_table(out, ("field", "default", "type", ""), lines, "lttt")
    out.print()
    out.print(text(inspect.getdoc(sys.modules[score.__module__]) or ""))
