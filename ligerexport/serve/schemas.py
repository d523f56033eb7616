"""What clients may ask for: the bodies of requests, with the names and ranges of OpenAI's API.

A field that is `null` counts as absent. Fields that neither OpenAI nor this server has are refused by name. Fields
without an effect here, such as `user`, are accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

Row = TypeVar("Row")
Rows = Annotated[list[Row], Field(fail_fast=True)]
"""A list of which only the first wrong element is reported: a hostile one may have millions."""
Bias = Annotated[float, Field(ge=-100, le=100)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
MOST_ANSWERS = 128
"""Largest number of answers to one request."""
MOST_FIELDS = 1024
"""Largest number of fields in an object."""
STRICT = ConfigDict(strict=True, allow_inf_nan=False, str_max_length=1 << 30)
"""Values are not converted. With a limit, pydantic also looks at every text, and refuses unpaired surrogates."""


class Body(BaseModel):
    """An object whose fields are all known."""

    model_config = STRICT | ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _are_few(cls, values: Any) -> Any:
        """Refuse many fields at once, before each gets an error of its own."""
        for found in (values, values.get("logit_bias")) if isinstance(values, dict) else ():
            if isinstance(found, dict) and len(found) > MOST_FIELDS:
                raise ValueError(f"an object has more than {MOST_FIELDS} fields")
        return values


class Part(BaseModel):
    """A part of a message's content; only text is supported."""

    model_config = STRICT

    type: Literal["text", "input_text", "output_text"]
    text: str


class Called(BaseModel):
    """A function with its arguments, a JSON object."""

    model_config = STRICT

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in an earlier answer."""

    model_config = STRICT

    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class Message(BaseModel):
    """A turn. Clients echo what they got, so unknown fields are ignored here."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Rows[Part] | None = None
    tool_calls: Rows[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(Body):
    """Fields of every endpoint that writes text. Those that OpenAI does not have are `top_k` to `pin`."""

    model: str
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-6, le=1e6)
    pin: bool | None = None
    metadata: dict[str, JsonValue] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


class Chosen(Sampled):
    """Fields of both kinds of completions."""

    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Bias] | None = None
    stream_options: StreamOptions | None = None


class Function(Body):
    """A function that an answer may call; `parameters` is the JSON schema of its arguments."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function


class ChatRequest(Chosen):
    """Body of `/v1/chat/completions`."""

    messages: Rows[Message] = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: Annotated[Rows[Tool], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class CompletionRequest(Chosen):
    """Body of `/v1/completions`."""

    prompt: str | Rows[Token] | Annotated[Rows[str], Field(min_length=1)] | Rows[Rows[Token]]
    best_of: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    echo: bool | None = None
    max_tokens: int | None = Field(None, ge=0, le=1 << 31)
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: str | None = None


class Item(Message):
    """A message of `/v1/responses`."""

    type: Literal["message"] = "message"


class ResponseRequest(Sampled):
    """Body of `/v1/responses`, as far as it is about text."""

    input: str | Annotated[Rows[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: dict[str, Any] | None = None
    tools: Rows[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    include: Rows[str] | None = None
    reasoning: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None


class TokenizeRequest(Body):
    """Body of `/tokenize`: a text, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Rows[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True


class StateChange(Body):
    """Body of `/v1/states/{id}`."""

    model: str | None = None
    name: str | None = Field(None, max_length=200)
    pinned: bool | None = None
