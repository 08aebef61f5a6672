"""A trio-core question as the chat completion that trio-core would send upstream, and the text of its answer."""

from __future__ import annotations

import json
from typing import Any

from backends.base import ServerFailed

JsonObject = dict[str, Any]

#: trio-core's engine sends these with every question (`EngineConfig`, 1.1.5); the limit when the caller gives none.
_SAMPLING = {"temperature": 0.0, "top_p": 1.0}
_MAX_TOKENS = 512

#: What cannot be had through this API, which answers at once and whole.
_STREAMING = ("stream", "stream_options")


def chat_body(
    image_b64: bytes | memoryview,
    media_type: str,
    prompt: str,
    *,
    model: str,
    max_tokens: int | None,
    response_format: JsonObject | None,
    extra_body: JsonObject | None,
) -> tuple[bytes, str]:
    """Give the body of one image and a question, and the model it names.

    `extra_body` is laid over it as the openai client does: field by field, and stronger than anything else. The image
    is copied once and never parsed. Raises `ValueError` for what JSON cannot hold (infinity, half a surrogate pair).
    """
    fields: JsonObject = {"model": model, "max_tokens": max_tokens or _MAX_TOKENS, **_SAMPLING}
    if response_format is not None:
        fields["response_format"] = response_format
    fields |= {name: value for name, value in (extra_body or {}).items() if name not in _STREAMING}
    rest = _json(fields)
    if "messages" in fields:
        return rest, str(fields["model"])
    return b"".join(
        (
            b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:',
            media_type.encode(),
            b";base64,",
            image_b64,
            b'"}},{"type":"text","text":',
            _json(prompt),
            b"}]}],",
            rest[1:],
        )
    ), str(fields["model"])


def answer_text(body: bytes) -> str:
    """The text of a chat completion, empty when the model said nothing.

    Raises `ServerFailed` for a body that is no chat completion.
    """
    try:
        content: str = json.loads(body)["choices"][0]["message"].get("content") or ""
        return content.strip()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerFailed(f"the provider's answer is no chat completion ({type(error).__name__})") from error


def _json(value: Any) -> bytes:
    # Not orjson: extra_body may hold integers of any length, which are the provider's to refuse.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
