"""The errors that a user meets. Each says what is wrong and what to change; the CLI prints them without a traceback."""

from __future__ import annotations


class TamisError(Exception):
    """Base of every error that is the user's to mend; exit code 1."""


class ConfigError(TamisError):
    """The configuration is wrong: names the key, the line and the fix."""


class CorpusError(TamisError):
    """The corpus cannot be read as configured."""


class MissingExtra(TamisError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str, module: str) -> None:
        super().__init__(f"{feature} needs {module}, which is not installed: pip install 'tamis[{extra}]'")


class RunLocked(TamisError):
    """Another run works in this directory."""


class TooManyBadRows(TamisError):
    """More rows went to quarantine than engine.max_bad_fraction allows."""


class BudgetTooSmall(TamisError):
    """Not even the first row fits the budget."""


class DiskFull(TamisError):
    """No space is left where the run writes."""


class NoShardLeft(TamisError):
    """Every shard failed."""
