"""DashScope's own API for vision models. The body is looked at, never rebuilt, and goes on as it is where it can."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from .call import Call
from .errors import InvalidRequest
from .openai import Asked, image_of, json_object, kind_of, model_of, with_model

#: Below the API's base, at the provider and here.
PATH = "/services/aigc/multimodal-generation/generation"


async def generation(call: Call) -> web.StreamResponse:
    """`POST …/multimodal-generation/generation`; with `X-DashScope-SSE: enable` as a stream of events."""
    body = await call.read()
    asked = understand(body)
    model = asked.model
    if model is None:
        model = call.limits.default_model
        body = with_model(body, model)
    stream = call.http.headers.get("X-DashScope-SSE", "").lower() == "enable"
    return await call.forward("native", PATH, body, model=model, tokens=asked.tokens(model), stream=stream)


def understand(body: bytes) -> Asked:
    """Look at a body. Raises `InvalidRequest` that names the field. What is not looked at is the provider's."""
    data = json_object(body)
    given, parameters = data.get("input"), data.get("parameters")
    messages = given.get("messages") if isinstance(given, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("input.messages must be a list of at least one message", field="input.messages")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidRequest(f"parameters must be an object, not {kind_of(parameters)}", field="parameters")
    high_resolution = (parameters or {}).get("vl_high_resolution_images") is True
    asked = Asked(model_of(data), stream=False, high_resolution=high_resolution)
    for index, message in enumerate(messages):
        where = f"input.messages[{index}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{where} must be an object, not {kind_of(message)}", field=where)
        _look_at(message.get("content"), f"{where}.content", asked)
    return asked


def _look_at(content: Any, where: str, asked: Asked) -> None:
    if isinstance(content, str):
        asked.text_chars += len(content)
        return
    if content is None:
        return
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of parts, not {kind_of(content)}", field=where)
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise InvalidRequest(f"{where}[{index}] must be an object, not {kind_of(part)}", field=f"{where}[{index}]")
        if isinstance(part.get("text"), str):
            asked.text_chars += len(part["text"])
        if "image" in part:
            asked.images.append(image_of(part["image"], f"{where}[{index}].image"))
