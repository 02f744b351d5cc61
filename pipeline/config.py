"""The whole configuration as pydantic models, and errors that name the key, the line and the fix.

A `kind:` picks a recipe: `kind: density` is the one class of `pipeline/scores/density.py`, and
`kind: my_package.module:MyScore` is a user's own. There is no registry to enter: the module's name is the kind.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)

from pipeline.concepts.kmeans import Cluster
from pipeline.corpus.content import Content
from pipeline.corpus.images import ImageColumn
from pipeline.embed.base import Embed
from pipeline.errors import ConfigError
from pipeline.recipe import Recipe
from pipeline.rewrite.base import Rewrite
from pipeline.scores.base import Score
from pipeline.select.config import Select

R = TypeVar("R", bound=Recipe)
M = TypeVar("M", bound=BaseModel)


def recipe_class(package: str, base: type[R], kind: str) -> type[R]:
    """The class behind a `kind`. Raises ValueError that lists the kinds, or says what a user's module lacks."""
    if ":" in kind:
        module_name, name = kind.split(":", 1)
        try:
            found = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"kind {kind!r} cannot be imported: {error}") from error
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise ValueError(f"kind {kind!r} is not a subclass of {base.__module__}.{base.__name__}")
        return found
    if kind not in kinds(package):
        raise ValueError(f"unknown kind {kind!r}{_hint(kind, kinds(package))}; there are {', '.join(kinds(package))}")
    module = importlib.import_module(f"{package}.{kind}")
    own = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, base) and c.__module__ == module.__name__
    ]
    return next(c for c in own if c.model_fields["kind"].default == kind)


def kinds(package: str) -> list[str]:
    """Names of the recipes that a package of recipes holds."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if m.name != "base" and not m.name.startswith("_"))


def recipe_in(package: str, base: type[R]) -> BeforeValidator:
    """Turns `{kind: ..., ...}`, or the kind alone, into the recipe of that kind in a package of recipes."""

    def resolve(value: Any) -> Any:
        if isinstance(value, str):
            value = {"kind": value}  # `scores: [density]` says all there is to say
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("kind"), str):
            raise ValueError(f"needs a `kind`; there are {', '.join(kinds(package))}")
        recipe = recipe_class(package, base, value["kind"])
        own = recipe.model_fields["kind"].get_default()
        return recipe.model_validate(value | {"kind": own if isinstance(own, str) else recipe.__name__.lower()})

    return BeforeValidator(resolve)


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CorpusConfig(Content):
    """Where the corpus lies and which columns mean what."""

    path: str | list[str] = Field(
        description="Parquet file, directory, glob or a list of them; local, s3://, gs://, hf://"
    )
    text: str | None = Field(
        "text", description="column that holds the text; `json.FIELD` reads the documents of a tar; null: images alone"
    )
    image: str | None = Field(
        None, description="column that holds images: bytes, struct<bytes, path>, or paths relative to the file"
    )
    max_image_mb: float = Field(64, gt=0, le=1024, description="MiB of an image, or of a tar's member, at the most")
    image_roots: list[str] = Field(
        [], description="directories that paths to images may lead into, beside that of the file which names them"
    )
    id: str | None = Field(
        None, description="column that names a row; without it a row's id is the xxh3-128 of its text and its image"
    )
    columns: list[str] | None = Field(None, description="source columns to carry into the curated set (default: all)")
    source: str | None = Field(
        None, description="column that says where a row comes from; the report breaks down by it"
    )
    tokenizer: str | None = Field(
        None, description="tokenizer.json or hub name to count tokens with; without it bytes / 4"
    )
    shard_mb: float | None = Field(
        None, gt=0, description="compressed MiB a shard (default: a 32nd of the corpus, 1 to 64)"
    )
    refresh: bool = Field(False, description="list an object store again instead of trusting the run's listing")

    @model_validator(mode="after")
    def _some_content(self) -> CorpusConfig:
        if self.text is None and self.image is None and not self.chat_columns:
            raise ValueError("a row needs a content: name the column of `text`, of `image` or of `messages`")
        return self

    @property
    def max_image_bytes(self) -> int:
        return int(self.max_image_mb * (1 << 20))

    @property
    def image_column(self) -> ImageColumn | None:
        """How images are read; None where the corpus has none."""
        return ImageColumn(self.image, self.max_image_bytes, tuple(self.image_roots)) if self.image else None

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)


class EngineConfig(Model):
    """How the work is carried out; nothing here changes a result."""

    address: str | None = Field(
        None, description="Ray address; `inline` works in this process; default: a Ray of our own"
    )
    workers: int | None = Field(None, ge=1, description="actors (default: what the cluster's cpus allow)")
    cpus: float = Field(1, gt=0, description="cores an actor, also its thread count")
    gpus: float = Field(0, ge=0, description="GPUs an actor that runs a neural model")
    memory_gb: float = Field(0, ge=0, description="memory that an actor reserves")
    timeout_s: float = Field(3600, gt=0, description="a unit of work that takes longer is killed and tried elsewhere")
    retries: int = Field(3, ge=0, description="tries after the first before a shard is given up")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="share of rows in quarantine that stops the run")


class OutputConfig(Model):
    """What the curated set looks like."""

    path: str | None = Field(None, description="where the curated files go (default: <run>/curated)")
    layout: Literal["parquet", "nanochat"] = Field("parquet", description="`nanochat` writes that trainer's shards")
    scores: bool = Field(True, description="add a struct column `tamis` with id, concept and scores")
    file_mb: float = Field(256, gt=0, description="compressed MiB a file aims at")
    row_group_rows: int = Field(10_000, ge=1, description="rows a row group at the most")
    spread: bool = Field(
        False, description="measure how diverse the kept rows are: effective rank and entropy of their vectors"
    )
    rewrite: SerializeAsAny[Annotated[Rewrite, recipe_in("pipeline.rewrite", Rewrite)]] | None = Field(
        None, description="shorten the kept texts; what is removed is recorded, and the budget counts original tokens"
    )


class HandoffConfig(Model):
    """Subsets of the curated set for a compression stage; disjoint."""

    calibration_rows: int = Field(256, ge=0, description="rows to calibrate on, from every concept; 0 writes none")
    recovery_tokens: int = Field(10_000_000, ge=0, description="tokens to recover on, at the most; 0 writes none")


class Config(Model):
    corpus: CorpusConfig
    embed: SerializeAsAny[Annotated[Embed, recipe_in("pipeline.embed", Embed)]] | None = None
    cluster: Cluster | None = None
    scores: list[SerializeAsAny[Annotated[Score, recipe_in("pipeline.scores", Score)]]] = Field(min_length=1)
    select: Select
    output: OutputConfig = OutputConfig()
    handoff: HandoffConfig = HandoffConfig()
    engine: EngineConfig = EngineConfig()
    run: str
    seed: int = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        names = [s.column_name for s in self.scores]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            raise ValueError(f"two scores are named {twice!r}: give one of them another `name`")
        reserved = {"row", "embed", "concept", "combined", "select", "address", "corpus", "text", "id"}
        reserved |= {"spread", "rewrite", "kept", "removed", "kept_fraction"}
        reserved |= {"curated", "image", "targets", "validation", "handoff_calibration", "handoff_recovery"}
        if taken := next((n for n in names if n in reserved), None):
            raise ValueError(f"a score cannot be named {taken!r}, which Tamis uses itself: give it another `name`")
        self.select.check_scores(names)
        if self.corpus.text is None and (self.output.layout == "nanochat" or self.output.rewrite):
            what = "layout: nanochat" if self.output.layout == "nanochat" else "rewrite"
            raise ValueError(f"output.{what} needs a column of texts: name it in corpus.text")
        if not self.corpus.has_text and self.embed is None and self.needs_vectors:
            raise ValueError("the corpus has images alone: name an `embed` that reads them")
        if self.output.spread and not self.needs_concepts:
            raise ValueError("output.spread compares concepts: add `cluster: {k: auto}`")
        return self

    @property
    def needs_vectors(self) -> bool:
        return self.needs_concepts or any(s.needs == "vectors" for s in self.scores)

    @property
    def needs_concepts(self) -> bool:
        return (
            self.cluster is not None
            or self.select.needs_concepts(self.scores)
            or any(s.needs == "concepts" for s in self.scores)
        )


def load(path: str, overrides: list[str] | None = None, run: str | None = None) -> Config:
    """The configuration of a sieve; see `load_as`."""
    return load_as(Config, path, overrides, run)


def load_as(schema: type[M], path: str, overrides: list[str] | None = None, run: str | None = None) -> M:
    """Read a YAML file, apply `a.b=c` overrides, check it whole.

    Raises ConfigError that lists every mistake as `file:line: key: what is wrong and what to write instead`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict) or node is None:
        raise ConfigError(f"{path} must be a mapping with the keys {', '.join(schema.model_fields)}")
    lines: dict[tuple[str, ...], int] = {}
    _collect_lines(node, (), lines, path)
    origin = {where: f"{path}:{line}" for where, line in lines.items()}
    for override in overrides or []:
        origin[_apply_override(data, override)] = f"--set {override}"
    if run is not None:
        data["run"] = run
    data.setdefault("run", f"runs/{Path(path).stem}")
    return parse_as(schema, data, origin, path)


def parse(data: dict[str, Any]) -> Config:
    """Check the configuration of a sieve given as plain data. Raises ConfigError, see `load_as`."""
    return parse_as(Config, data)


def parse_as(
    schema: type[M],
    data: dict[str, Any],
    origin: dict[tuple[str, ...], str] | None = None,
    name: str = "configuration",
) -> M:
    """Check a configuration given as plain data. Raises ConfigError, see `load_as`."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, schema, origin or {}, name) for e in error.errors())) from error


def _collect_lines(node: yaml.Node, where: tuple[str, ...], lines: dict[tuple[str, ...], int], path: str) -> None:
    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*where, str(key.value))
            if inner in lines:
                raise ConfigError(
                    f"{path}:{key.start_mark.line + 1}: {'.'.join(inner)} is there twice: remove one of them"
                )
            lines[inner] = key.start_mark.line + 1
            _collect_lines(value, inner, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _collect_lines(value, (*where, str(i)), lines, path)


def _apply_override(data: dict[str, Any], override: str) -> tuple[str, ...]:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: write key=value, such as --set engine.workers=2")
    where = tuple(key.split("."))
    target: Any = data
    for part in where[:-1]:
        try:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        except (IndexError, ValueError, AttributeError) as error:
            raise ConfigError(f"--set {override}: there is no {part!r} to set something in") from error
    try:
        parsed = yaml.safe_load(value)
        if isinstance(target, list):
            target[int(where[-1])] = parsed
        elif isinstance(target, dict):
            target[where[-1]] = parsed
        else:
            raise TypeError(f"{'.'.join(where[:-1])} is {target!r}, not a mapping")
    except (IndexError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"--set {override}: {error}") from error
    return where


def _explain(error: Any, schema: type[BaseModel], origin: dict[tuple[str, ...], str], name: str) -> str:
    where = tuple(str(part) for part in error["loc"])
    known = next((origin[where[:n]] for n in range(len(where), -1, -1) if where[:n] in origin), name)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        siblings = _keys_at(schema, where[:-1])
        message = f"unknown key{_hint(where[-1], siblings)}" + (
            f"; the keys here are {', '.join(siblings)}" if siblings else ""
        )
    elif error["type"] == "missing":
        message = "is missing"
    elif "input" in error and not isinstance(error["input"], dict | list):
        message += f" (got {error['input']!r})"
    return f"{known}: {'.'.join(where) or 'configuration'}: {message}"


def _keys_at(schema: type[BaseModel], where: tuple[str, ...]) -> list[str]:
    """Keys that the model at a location knows; empty where the location is inside a recipe of unknown kind."""
    model: Any = schema
    for part in where:
        if not (inspect.isclass(model) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return []
        model = _model_in(model.model_fields[part].annotation)
    return list(model.model_fields) if inspect.isclass(model) and issubclass(model, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)


def _hint(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def json_schema() -> dict[str, Any]:
    """JSON schema of the whole configuration, every built-in recipe included, for editors."""
    fields: dict[str, Any] = {"run": (str, Field("", description="run directory (default: runs/<name of the file>)"))}
    bases: list[tuple[str, str, Any]] = [
        ("embed", "pipeline.embed", Embed),
        ("scores", "pipeline.scores", Score),
        ("rewrite", "pipeline.rewrite", Rewrite),
    ]
    for key, package, base in bases:
        classes: list[Any] = [recipe_class(package, base, kind) for kind in kinds(package)]
        union: Any = reduce(or_, classes)
        recipe = Annotated[union, Field(discriminator="kind")]
        fields[key] = (list[recipe], Field(min_length=1)) if key == "scores" else (recipe | None, None)
    output = create_model("OutputConfig", __base__=OutputConfig, rewrite=fields.pop("rewrite"))
    fields["output"] = (output, output())
    whole = create_model("Configuration", __base__=Config, **fields)
    return whole.model_json_schema()
