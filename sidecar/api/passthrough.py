"""Forward the other endpoints of an OpenAI-compatible upstream (embeddings, files), or of DashScope's own API.

These requests pass through the same admission as chat completions. They are forwarded only if `SIDECAR_PASSTHROUGH` is
set and only to an upstream over HTTP, because every such request acts in the provider's account.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from backends.http1.interface import Answer
from sidecar.api.body import ParsedBody, is_model_name, parse_body
from sidecar.api.call import Call
from sidecar.api.errors import InvalidRequest
from sidecar.api.media import count_anything
from sidecar.api.openai import BASES
from sidecar.api.uploads import require_native_api

#: The base path of DashScope's own API.
NATIVE_BASE = "/api/v1"

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


async def passthrough(call: Call) -> Answer:
    """Forward any method on any other path below `/v1`, `/compatible-mode/v1` and `/api/v1`."""
    http = call.http
    if http.method not in _METHODS:
        raise InvalidRequest(
            f"{http.method[:20]} does not pass through",
            status=405,
            code="method_not_allowed",
            allow=", ".join(_METHODS),
        )
    is_native = call.api == "native"
    if is_native:
        require_native_api(call)
    base = next(base for base in (*BASES, NATIVE_BASE) if http.raw_path.startswith(f"{base}/"))
    path = http.raw_path[len(base) :].partition("?")[0]
    segments = unquote(path).replace("\\", "/").split("/")
    if any(segment.partition(";")[0] == ".." for segment in segments):  # `..;a` is the same for servers in Java
        raise InvalidRequest("a path that leads out of the upstream's base does not pass through", status=404)
    body = await call.read()
    content_type = http.headers.get("Content-Type", "")
    is_json = content_type.lower().startswith("application/json")
    parsed = await call.parse(body, _parsed) if is_json else ParsedBody(None, stream=False)
    model = parsed.model or ""
    return await call.forward(
        "native" if is_native else "openai",
        path,
        body,
        model=model,
        tokens=parsed.tokens(model),
        stream=call.asks_for_native_stream if is_native else parsed.stream,
        method=http.method,
        headers={"Content-Type": content_type} if content_type else {},
    )


def _parsed(body: bytes) -> ParsedBody:
    """Return what the body costs. A body that is no JSON object costs nothing: the upstream then refuses it."""
    try:
        return parse_body(body, _read)
    except InvalidRequest:
        return ParsedBody(None, stream=False)


def _read(data: dict[str, Any]) -> ParsedBody:
    """Count everything, because each of these APIs has other names for its texts and media."""
    model = data.get("model")
    parsed = ParsedBody(model if is_model_name(model) else None, stream=data.get("stream") is True)
    count_anything({name: value for name, value in data.items() if name != "model"}, parsed)
    return parsed
