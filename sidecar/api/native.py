"""DashScope's own API for vision models. The body is looked at, never rebuilt, and goes on as it is where it can."""

from __future__ import annotations

from typing import Any

from backends.http1.response import Answer
from sidecar.api.body import Asked, image_of, kind_of, look_at, look_at_messages, model_of, with_model
from sidecar.api.call import Call
from sidecar.api.errors import InvalidRequest

#: Below the API's base, at the provider and here.
PATH = "/services/aigc/multimodal-generation/generation"


async def generation(call: Call) -> Answer:
    """`POST …/multimodal-generation/generation`; with `X-DashScope-SSE: enable` as a stream of events."""
    body = await call.read()
    asked = look_at(body, _read)
    body, model = with_model(body, asked, call.limits.default_model)
    stream = call.http.headers.get("X-DashScope-SSE", "").lower() == "enable"
    return await call.forward("native", PATH, body, model=model, tokens=asked.tokens(model), stream=stream)


def _read(data: dict[str, Any]) -> Asked:
    given, parameters = data.get("input"), data.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidRequest(f"parameters must be an object, not {kind_of(parameters)}", field="parameters")
    high_resolution = (parameters or {}).get("vl_high_resolution_images") is True
    asked = Asked(model_of(data), stream=False, high_resolution=high_resolution)
    messages = given.get("messages") if isinstance(given, dict) else None
    look_at_messages(messages, "input.messages", asked, _look_at_part)
    return asked


def _look_at_part(part: dict[str, Any], where: str, asked: Asked) -> None:
    if isinstance(part.get("text"), str):
        asked.text_chars += len(part["text"])
    if "image" in part:
        asked.images.append(image_of(part["image"], f"{where}.image"))
