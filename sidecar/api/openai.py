"""OpenAI-compatible chat completions and models. The body is forwarded unchanged, except for a missing model."""

from __future__ import annotations

from typing import Any

from backends.http1.interface import Answer
from sidecar.api.body import ParsedBody, image_size, json_type, model_of, parse_body, parse_messages
from sidecar.api.call import Call
from sidecar.api.errors import InvalidRequest
from sidecar.api.media import count_part

#: The base paths of the OpenAI-compatible API.
BASES = ("/v1", "/compatible-mode/v1")


async def chat_completions(call: Call) -> Answer:
    """Answer `POST /v1/chat/completions`, streaming or not."""
    body = await call.read()
    parsed = await call.parse(body, parse_chat)
    body, model = await call.with_model(body, parsed)
    return await call.forward(
        "openai", "/chat/completions", body, model=model, tokens=parsed.tokens(model), stream=parsed.stream
    )


async def models(call: Call) -> Answer:
    """Answer `GET /v1/models` with the backend's own list."""
    return await call.respond(200, await call.models(), {"Content-Type": "application/json"})


def parse_chat(body: bytes) -> ParsedBody:
    """Parse the body of a chat completion. Raises `InvalidRequest` that names the field."""
    return parse_body(body, _read)


def _read(data: dict[str, Any]) -> ParsedBody:
    model, stream = model_of(data), data.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest(f"stream must be true or false, not {json_type(stream)}", field="stream")
    parsed = ParsedBody(
        model,
        bool(stream),
        model_is_null=model is None and "model" in data,
        high_resolution=data.get("vl_high_resolution_images") is True,
    )
    parse_messages(data.get("messages"), "messages", parsed, _parse_part)
    return parsed


def _parse_part(part: dict[str, Any], where: str, parsed: ParsedBody) -> None:
    if part.get("type") == "text":
        text = part.get("text")
        parsed.text_chars += len(text) if isinstance(text, str) else 0
    elif part.get("type") == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        parsed.add_image(image_size(url, f"{where}.image_url.url"), part)
    else:
        count_part(part, parsed)
