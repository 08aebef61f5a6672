"""DashScope's own API for vision models. The body is forwarded unchanged, except for a missing model."""

from __future__ import annotations

from typing import Any

from backends.http1.interface import Answer
from sidecar.api.body import ParsedBody, image_size, json_type, model_of, parse_body, parse_messages
from sidecar.api.call import Call
from sidecar.api.errors import InvalidRequest
from sidecar.api.media import count_part

#: Path below the base of the API. It is the same at the provider and at the sidecar.
PATH = "/services/aigc/multimodal-generation/generation"


async def generation(call: Call) -> Answer:
    """Answer `POST …/multimodal-generation/generation`; with `X-DashScope-SSE: enable`, as a stream of events."""
    body = await call.read()
    parsed = await call.parse(body, _parse)
    body, model = await call.with_model(body, parsed)
    return await call.forward(
        "native", PATH, body, model=model, tokens=parsed.tokens(model), stream=call.asks_for_native_stream
    )


def _parse(body: bytes) -> ParsedBody:
    return parse_body(body, _read)


def _read(data: dict[str, Any]) -> ParsedBody:
    given, parameters = data.get("input"), data.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidRequest(f"parameters must be an object, not {json_type(parameters)}", field="parameters")
    high_resolution = (parameters or {}).get("vl_high_resolution_images") is True
    model = model_of(data)
    model_is_null = model is None and "model" in data
    parsed = ParsedBody(model, stream=False, model_is_null=model_is_null, high_resolution=high_resolution)
    messages = given.get("messages") if isinstance(given, dict) else None
    parse_messages(messages, "input.messages", parsed, _parse_part)
    return parsed


def _parse_part(part: dict[str, Any], where: str, parsed: ParsedBody) -> None:
    if isinstance(part.get("text"), str):
        parsed.text_chars += len(part["text"])
    if "image" in part:
        parsed.add_image(image_size(part["image"], f"{where}.image"), part)
    count_part({name: value for name, value in part.items() if name != "image"}, parsed)
