"""Requests of OpenAI's interface as this server takes them.

Unknown fields are refused, as an ignored setting is a wrong answer. Fields that change no answer here (`user`, `store`)
are taken; those that would change it and are not supported (`tools`, `logit_bias`) are refused where they are set.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_INT64 = 2**63 - 1
Seed = Annotated[int, Field(ge=-(2**63), le=_INT64)]
TokenId = Annotated[int, Field(ge=0, le=_INT64)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Strict(BaseModel):
    """Base of all: no unknown fields, no NaN, no numbers in texts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class ImageUrl(Strict):
    """Address of a picture."""

    url: str
    """`data:image/png;base64,...`, or `https://...` where the server fetches pictures."""
    detail: Literal["auto", "low", "high"] | None = None
    """Without effect: models take pictures in one way."""


class TextPart(Strict):
    """A stretch of text."""

    type: Literal["text"]
    text: str


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Strict):
    """An instruction that holds for the whole conversation."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Strict):
    """A message of the user, with pictures."""

    role: Literal["user"]
    content: str | list[ContentPart]
    name: str | None = None


class AssistantMessage(Strict):
    """An earlier answer of the model."""

    role: Literal["assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    """Options of streams."""

    include_usage: bool = False
    """Send token counts with a last chunk."""
    include_obfuscation: Literal[False] | None = None


class Sampling(Strict):
    """Settings that both kinds of requests have."""

    model: str = ""
    """Name of the model; any where it is left out."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 is greedy; 1 when not given."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT64)] | None = None
    """0 and -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Seed | None = None
    """Of the first answer; those of further ones follow."""
    n: Annotated[int, Field(ge=1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool = False
    """Do not end at the model's own end of an answer."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Requests with different ones share no cached rows."""
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    """Not supported: empty."""

    @model_validator(mode="after")
    def _check_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextFormat(Strict):
    """Form of an answer: text alone."""

    type: Literal["text"]


class ChatRequest(Sampling):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    """Longest answer; as long as the model allows when not given."""
    max_tokens: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    """The same under its older name."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    parrot_routing: bool = False
    """Tell which experts turned each picture, and which words the router attended to."""
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    """Not supported: empty."""
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


class CompletionRequest(Sampling):
    """`/v1/completions`."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    """A text, its token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = 16
    """0 with `echo`: only the prompt's log-probabilities."""
    echo: bool = False
    """Send the prompt back before the answer."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_special_tokens: bool = True
    """Begin a text with the tokenizer's own first token, where it has one."""
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class TokenizeRequest(Strict):
    """`/tokenize`: a text or a conversation."""

    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """`/detokenize`: token ids."""

    model: str = ""
    tokens: list[TokenId]
