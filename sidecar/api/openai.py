"""OpenAI-compatible chat completions and models. The body is looked at, never rebuilt."""

from __future__ import annotations

from typing import Any

from backends.http1.response import Answer
from sidecar.api.body import Asked, image_of, kind_of, look_at, look_at_messages, model_of, with_model
from sidecar.api.call import Call
from sidecar.api.errors import InvalidRequest

#: The paths that OpenAI's API lies under.
BASES = ("/v1", "/compatible-mode/v1")


async def chat_completions(call: Call) -> Answer:
    """`POST /v1/chat/completions`, streaming or not."""
    body = await call.read()
    asked = understand(body)
    body, model = with_model(body, asked, call.limits.default_model)
    return await call.forward(
        "openai", "/chat/completions", body, model=model, tokens=asked.tokens(model), stream=asked.stream
    )


async def models(call: Call) -> Answer:
    """`GET /v1/models`: the backend's own list."""
    return await call.respond(200, await call.models(), {"Content-Type": "application/json"})


def understand(body: bytes) -> Asked:
    """Look at a chat completion's body. Raises `InvalidRequest` that names the field."""
    return look_at(body, _read)


def _read(data: dict[str, Any]) -> Asked:
    model, stream = model_of(data), data.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest(f"stream must be true or false, not {kind_of(stream)}", field="stream")
    for name in ("max_tokens", "max_completion_tokens"):
        limit = data.get(name)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            told = limit if isinstance(limit, int) and not isinstance(limit, bool) else kind_of(limit)
            raise InvalidRequest(f"{name} must be a whole number of at least 1, not {told}", field=name)
    asked = Asked(model, bool(stream), high_resolution=data.get("vl_high_resolution_images") is True)
    look_at_messages(data.get("messages"), "messages", asked, _look_at_part)
    return asked


def _look_at_part(part: dict[str, Any], where: str, asked: Asked) -> None:
    if part.get("type") == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}.text must be a string, not {kind_of(text)}", field=f"{where}.text")
        asked.text_chars += len(text)
    elif part.get("type") == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        asked.images.append(image_of(url, f"{where}.image_url.url"))
