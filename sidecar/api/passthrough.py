"""Forward the other endpoints of an OpenAI-compatible upstream (embeddings, files, completions).

These requests pass through the same admission as chat completions. They are forwarded only if `SIDECAR_PASSTHROUGH` is
set and only to an upstream over HTTP, because every such request acts in the provider's account.
"""

from __future__ import annotations

from urllib.parse import unquote

import orjson

from backends.http1.interface import Answer
from sidecar.api.body import CHARS_PER_TOKEN
from sidecar.api.call import Call
from sidecar.api.errors import InvalidRequest
from sidecar.api.openai import BASES

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


async def passthrough(call: Call) -> Answer:
    """Forward any method on any other path below `/v1` and `/compatible-mode/v1`."""
    http = call.http
    if http.method not in _METHODS:
        raise InvalidRequest(
            f"{http.method[:20]} does not pass through",
            status=405,
            code="method_not_allowed",
            allow=", ".join(_METHODS),
        )
    base = next(base for base in BASES if http.raw_path.startswith(f"{base}/"))
    path = http.raw_path[len(base) :].partition("?")[0]
    if ".." in unquote(path).replace("\\", "/").split("/"):
        raise InvalidRequest("a path that leads out of the upstream's base does not pass through", status=404)
    body = await call.read()
    content_type = http.headers.get("Content-Type", "")
    data = _json(body) if content_type.startswith("application/json") else {}
    model = data.get("model")
    return await call.forward(
        "openai",
        path,
        body,
        model=model if isinstance(model, str) else "",
        tokens=len(body) / CHARS_PER_TOKEN if data else 0.0,
        stream=data.get("stream") is True,
        method=http.method,
        headers={"Content-Type": content_type} if content_type else {},
    )


def _json(body: bytes) -> dict[str, object]:
    """Return the JSON object of the body. Return {} if the body is not an object: the upstream then refuses it."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return data if isinstance(data, dict) else {}
