"""What the rows of a corpus say, as a configuration names it: a text, or a conversation."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.corpus.chat import Chat, template_of
from pipeline.models.files import check_installed, existing, is_hub


class Content(BaseModel):
    """Columns that are read of a row: `text`, or instead of it `prompt` and `response`, or `messages`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = Field("text", description="column that holds the text")
    prompt: str | list[str] | None = Field(
        None, description="instead of `text`: column, or columns, that a response answers"
    )
    response: str | None = Field(None, description="column of the response, which alone counts as loss")
    messages: str | None = Field(
        None, description="instead of `text`: column of conversations, list<struct<role, content>> or JSON"
    )
    template: str | None = Field(
        None, description="tokenizer whose chat template writes them: folder or hf://org/name (default: plain)"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_text(cls, data: Any) -> Any:
        """Where a text is made of other columns, `text` names none unless the user says so."""
        if isinstance(data, dict) and any(data.get(role) is not None for role in ("prompt", "response", "messages")):
            return {"text": None} | data
        return data

    @model_validator(mode="after")
    def _chat_fits(self) -> Self:
        if (self.prompt is None) != (self.response is None) or self.prompt == []:
            raise ValueError("`prompt` and `response` go together: name the columns of both")
        if self.prompt is not None and self.messages is not None:
            raise ValueError("a row is either `prompt` and `response` or `messages`: remove one of them")
        if self.chat_columns and self.text is not None:
            raise ValueError("the text is made of prompt and response, or of messages: remove `text`")
        if self.template is not None:
            if not self.chat_columns:
                raise ValueError("`template` writes conversations: name `prompt` and `response`, or `messages`")
            check_installed("template", "models", "transformers", "jinja2")
            if not is_hub(self.template):
                existing(self.template, "tokenizer*.json")
        return self

    @property
    def has_text(self) -> bool:
        """Whether rows have a text, a column of its own or one that is made of a conversation."""
        return self.text is not None or bool(self.chat_columns)

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt or ())

    @property
    def chat_columns(self) -> tuple[str, ...]:
        """Columns that a conversation is made of; none where rows are texts."""
        return tuple(name for name in (*self.prompts, self.response, self.messages) if name is not None)

    def chat(self, of: str) -> Chat | None:
        """How conversations are written, where rows are some; errors say whose they are. Raises ConfigError for a
        tokenizer without a template, MissingExtra."""
        if not self.chat_columns:
            return None
        found = template_of(self.template, of) if self.template else {}
        return Chat(self.prompts, self.response, self.messages, **found)
