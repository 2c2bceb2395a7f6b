"""OpenAI's chat format: parsing of requests, and the form of answers and errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eua.errors import EUAError
from eua.serving.jobs import Finish, Sampling

ROLES = ("system", "developer", "user", "assistant")
# Fields that would change the answer and that this server does not support → their values that have no effect.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}


class RequestError(EUAError):
    """A request that gets no answer: ``status`` is the HTTP status, ``field`` the part of the body that is wrong."""

    def __init__(self, text: str, status: int = 400, field: str | None = None, code: str | None = None) -> None:
        super().__init__(text)
        self.status, self.field, self.code = status, field, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 429 else "rate_limit_error" if self.status == 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


def unknown_model(served: str) -> RequestError:
    """The error for a request that names another model than the one that is served."""
    text = f"The requested model is not served here: request {served!r}, or leave it out."
    return RequestError(text, 404, "model", "model_not_found")


@dataclass(frozen=True)
class ChatRequest:
    """A request, as far as it can be checked without the model. ``max_tokens`` is None if the request sets none."""

    messages: list[dict[str, str]]
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_request(body: bytes, model_name: str) -> ChatRequest:
    """Parse the body of a request. Unknown fields are ignored; unsupported fields raise an error.

    Raises:
        RequestError: 400, or 404 for a model that is not served.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):  # not the parser's text, which quotes the body
        raise RequestError("The body is not JSON, so it cannot be parsed: send a JSON object in UTF-8.") from None
    if not isinstance(fields, dict):
        raise RequestError(f'The body is a {type(fields).__name__}, not an object: send {{"messages": [...]}}.')
    fields = {key: value for key, value in fields.items() if value is not None}
    model = fields.get("model", model_name)
    if model != model_name:
        raise unknown_model(model_name)
    for key, harmless in UNSUPPORTED_FIELDS.items():
        if key in fields and fields[key] not in harmless:
            raise RequestError(f"{key!r} is set, which this server does not support: leave it out.", field=key)
    stream_options = _typed(fields, "stream_options", dict, "an object", {})
    return ChatRequest(
        messages=_messages(fields.get("messages")),
        max_tokens=_max_tokens(fields),
        sampling=Sampling(
            temperature=_number(fields, "temperature", 0.0, 2.0, 0.0),
            top_p=_number(fields, "top_p", 0.0, 1.0, 1.0),
            seed=_typed(fields, "seed", int, "a whole number", None),
        ),
        stop=_stop(fields.get("stop", [])),
        stream=_typed(fields, "stream", bool, "true or false", False),
        include_usage=_typed(stream_options, "include_usage", bool, "true or false", False),
    )


def _typed(fields: Mapping[str, Any], key: str, kind: type, wanted: str, default: Any) -> Any:
    value = fields.get(key, default)
    if value is not default and type(value) is not kind:  # not isinstance: true is an int to Python
        raise RequestError(
            f"{key!r} is a {type(value).__name__}, but must be {wanted}: correct it, or leave it out.", field=key
        )
    return value


def _number(fields: Mapping[str, Any], key: str, low: float, high: float, default: float) -> float:
    value = fields.get(key, default)
    if type(value) not in (int, float) or not low <= value <= high:
        raise RequestError(f"{key!r} must be a number from {low:g} to {high:g}: correct it, or leave it out.", field=key)
    return float(value)


def _max_tokens(fields: Mapping[str, Any]) -> int | None:
    key = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"  # the former is the newer name
    value: int | None = _typed(fields, key, int, "a whole number", None)
    if value is not None and value < 1:
        raise RequestError(f"{key!r} is below 1, so there would be no answer: pass 1 or more.", field=key)
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 4 or not all(isinstance(text, str) and text for text in texts):
        raise RequestError("'stop' must be a text or a list of up to four, none of them empty: correct it.", field="stop")
    return tuple(texts)


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RequestError("'messages' must be a list of at least one message: add a user message.", field="messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(value)]
    if messages[-1]["role"] != "user":
        raise RequestError(
            "The last message is not the user's, so there is nothing to answer: end with a user message.", field="messages"
        )
    return messages


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise RequestError(f'{where} must be an object whose "role" is one of {", ".join(ROLES)}.', field=where)
    content = value.get("content")
    if isinstance(content, list) and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestError(f'{where} has a "content" that is not text, but this model only reads text: send text.', field=where)
    role = value["role"]
    return {"role": "system" if role == "developer" else role, "content": content}  # templates know the older name


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def usage(prompt_tokens: int, finish: Finish) -> dict[str, int]:
    total = prompt_tokens + finish.completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": finish.completion_tokens, "total_tokens": total}


def completion(head: Mapping[str, Any], text: str, finish: Finish, prompt_tokens: int) -> dict[str, Any]:
    """The complete answer; ``head`` holds id, created and model."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": finish.reason}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage(prompt_tokens, finish)}


def chunk(head: Mapping[str, Any], delta: Mapping[str, str], reason: str | None = None) -> dict[str, Any]:
    """A part of a streamed answer."""
    choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": reason}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}


def event(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()
