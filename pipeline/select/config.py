"""The key `select:` of a configuration: what to keep, in which order, under which constraints."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pipeline.errors import ConfigError
from pipeline.select.compute import Choice, Law, choose, load_law
from pipeline.select.proxies import Proxies

if TYPE_CHECKING:
    from pipeline.scores.base import Score

Unit = Literal["rows", "tokens", "bytes"]
UNITS: tuple[Unit, ...] = ("rows", "tokens", "bytes")
Rule = Literal["rank", "geometric", "minimum", "maximum", "rrf", "zscore", "gates"]
QuotaRule = Literal["none", "density", "proportional", "equal"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Model):
    """How much to keep, at the most; exactly one of rows, tokens, bytes, fraction and compute."""

    rows: int | None = Field(None, ge=1, description="rows to keep")
    tokens: int | None = Field(None, ge=1, description="tokens to keep, as corpus.tokenizer counts them")
    bytes: int | None = Field(None, ge=1, description="UTF-8 bytes of text to keep")
    fraction: float | None = Field(None, gt=0, le=1, description="share of what is there, quarantined rows left out")
    of: Unit = Field("rows", description="what `fraction` is a share of")
    compute: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="FLOPs of the training: `law` then says how many tokens to keep"
    )
    params: float | None = Field(None, gt=0, allow_inf_nan=False, description="compute: parameters of the model")
    law: Law | None = Field(
        None, description="compute: utility and half-life of the best tokens, or a JSON file that holds them"
    )
    proxies: Proxies | None = Field(None, description="compute: small trainings to fit the law to, where none is given")

    @field_validator("law", mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        return load_law(value) if isinstance(value, str) else value

    @field_validator("rows", "tokens", "bytes", "fraction", "compute", "params", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("needs a number")
        return value

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [k for k in (*UNITS, "fraction", "compute") if getattr(self, k) is not None]
        training = [k for k in ("params", "law", "proxies") if getattr(self, k) is not None]
        if self.compute is None and training:
            raise ValueError(
                f"{' and '.join(training)} belong to `compute`, the FLOPs of the training: give those, too"
            )
        if len(given) != 1:
            found = f"it has {' and '.join(given)}" if given else "it has none"
            raise ValueError(f"needs exactly one of rows, tokens, bytes, fraction and compute; {found}")
        if self.compute is not None and (self.params is None or (self.law is None) == (self.proxies is None)):
            raise ValueError("compute needs `params` and either `law` ({utility: [...], ...} or a file) or `proxies`")
        if self.of != "rows" and self.fraction is None:
            raise ValueError(f"`of` belongs to `fraction`: remove it, or write {{fraction: 0.1, of: {self.of}}}")
        return self

    @property
    def unit(self) -> Unit:
        if self.compute is not None:
            return "tokens"
        return self.of if self.fraction is not None else next(u for u in UNITS if getattr(self, u) is not None)

    def choice(self, available: int) -> Choice | None:
        """What a budget of compute comes to, out of the tokens that the corpus has; None for any other budget, and for
        one whose law is not fitted yet."""
        if self.compute is None or self.params is None or self.law is None:
            return None
        return choose(self.law, self.compute, self.params, available)

    def amount(self, available: int) -> int:
        """The budget in its unit, out of what the corpus has. Raises ConfigError where that is less, or rounds to 0."""
        if choice := self.choice(available):
            return choice.best.tokens
        if self.fraction is not None:
            amount = int(Fraction(repr(self.fraction)) * available)  # the decimal that was written: 0.29 of 100 is 29
            if amount == 0:
                raise ConfigError(
                    f"select.budget.fraction: {self.fraction:g} of {available:,} {self.unit} is less than one: raise it"
                )
            return amount
        amount = int(getattr(self, self.unit))
        if amount > available:
            raise ConfigError(
                f"select.budget.{self.unit}: {amount:,} is more than the corpus has, {available:,} {self.unit} without "
                f"quarantined rows: lower it, or keep all with `fraction: 1.0`"
            )
        return amount


class Quotas(_Model):
    """How the budget is shared among concepts. `quotas: equal` is short for `quotas: {rule: equal}`.

    `none` ranks all rows together; with a `balance` every concept first gets its floor of its own best rows (Sorscher
    et al. 2022, arXiv 2206.14486). `density` shares by softmax(d_intra * d_inter / tau) (Abbas et al. 2024, arXiv
    2401.04578), `proportional` by what a concept has, `equal` alike; none gets more than it has.
    """

    rule: QuotaRule = "none"
    tau: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="density: temperature; small favours spread concepts"
    )
    relative: bool = Field(False, description="density: `tau` counts in standard deviations of the complexity")
    balance: float | None = Field(
        None, ge=0, le=1, description="share of an equal share that each concept gets at least (density: 0.5, else 0)"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"rule": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _only_density(self) -> Self:
        if self.rule != "density" and (given := self.model_fields_set & {"tau", "relative"}):
            raise ValueError(f"only `rule: density` has {' and '.join(sorted(given))}: remove it from {self.rule!r}")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"enum": ["none", "density", "proportional", "equal"]}, handler(schema)]}

    @property
    def least_share(self) -> float:
        return self.balance if self.balance is not None else 0.5 if self.rule == "density" else 0.0

    @property
    def grouped(self) -> bool:
        """Whether concepts matter at all."""
        return self.rule != "none" or self.least_share > 0


class Select(_Model):
    """From scores to an exact budget."""

    budget: Budget
    combine: Rule = Field(
        "rank",
        description="several scores in one order: weighted mean of percentiles (`rank`), their weighted `geometric` "
        "mean, `minimum` (good in all), `maximum` (good in any), reciprocal rank fusion (`rrf`), weighted mean of "
        "standardised scores (`zscore`), or `gates`: scores with a floor only let pass, the others rank in their "
        "order, each breaking the ties of those before it",
    )
    weights: dict[str, float] = Field({}, description="scores that rank, and how much (default: every score, 1 each)")
    floors: dict[str, float] = Field({}, description="a row whose score is below its floor is dropped first")
    quotas: Quotas | None = Field(
        None, description="shares of concepts (default: those that a ranking score brings, else none)"
    )
    temperature: float = Field(
        0, ge=0, allow_inf_nan=False, description="above 0 the order is drawn with weights exp(score / temperature)"
    )
    skip: bool = Field(False, description="go on with smaller rows after the first that does not fit the budget")
    strict: bool = Field(False, description="fail where fewer rows pass the floors than the budget could hold")
    seed: int | None = Field(None, description="seed of ties and draws (default: the run's)")

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"{name}: {weight:g} is not above 0; leave out a score that is not to rank")
        return weights

    @field_validator("floors")
    @classmethod
    def _finite(cls, floors: dict[str, float]) -> dict[str, float]:
        for name, floor in floors.items():
            if not math.isfinite(floor):
                raise ValueError(f"{name}: {floor:g} is not a finite number")
        return floors

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.combine in ("gates", "minimum", "maximum") and len(set(self.weights.values()) | {1.0}) > 1:
            raise ValueError(f"combine: {self.combine} knows no weights but 1: remove them, or use `combine: rank`")
        if self.combine == "gates" and self.temperature:
            raise ValueError("combine: gates has an order, not a number to draw by: remove temperature")
        if self.skip and self.budget.unit == "rows":
            raise ValueError("skip: every row fits a budget of rows: remove skip, or give tokens or bytes")
        return self

    def check_scores(self, names: Sequence[str]) -> None:
        """Raises ValueError for a name in `weights` or `floors` that no score has."""
        for key in ("weights", "floors"):
            for name in getattr(self, key):
                if name not in names:
                    close = difflib.get_close_matches(name, names, n=1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise ValueError(f"select.{key}: no score is named {name!r}{hint}; there are {', '.join(names)}")

    def ranking(self, names: Sequence[str]) -> dict[str, float]:
        """Names and weights of the scores that rank, in their order of decision."""
        ranked = {n: self.weights.get(n, 1.0) for n in names if n in self.weights or not self.weights}
        if self.combine == "gates":
            return {n: 1.0 for n in ranked if n not in self.floors} or dict.fromkeys(list(ranked)[-1:], 1.0)
        return ranked

    def quotas_for(self, scores: Sequence[Score]) -> Quotas:
        """The quotas, by default those that the first of the ranking scores that brings some does."""
        if self.quotas is not None:
            return self.quotas
        ranked = self.ranking([s.column_name for s in scores])
        brought = [s.quotas for s in scores if s.column_name in ranked and s.quotas]
        return Quotas.model_validate(dict(brought[0])) if brought else Quotas()

    def needs_concepts(self, scores: Sequence[Score]) -> bool:
        return self.quotas_for(scores).grouped
