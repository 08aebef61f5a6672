"""Build the chat completion that trio-core would send upstream for a question, and read the text of the answer."""

from __future__ import annotations

import json
from typing import Any

from backends.base import ServerFailed
from sidecar.api.call import Sampling

JsonObject = dict[str, Any]

#: Fields of `extra_body` that are ignored, because this API always returns a complete answer and never a stream.
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
    sampling: Sampling,
) -> tuple[bytes, str]:
    """Return the body of a chat completion with one image and one question, and the model that the body names.

    Each field of `extra_body` replaces the field of the same name, as in the openai client. The image is copied once
    and never parsed. Raises `ValueError` for values that JSON cannot represent (infinity, half a surrogate pair).
    """
    fields: JsonObject = {
        "model": model,
        "max_tokens": max_tokens or sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
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
    """Return the text of a chat completion, or an empty string if the model returned no text.

    Raises `ServerFailed` if the body is not a chat completion.
    """
    try:
        content: str = json.loads(body)["choices"][0]["message"].get("content") or ""
        return content.strip()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerFailed(f"the provider's answer is no chat completion ({type(error).__name__})") from error


def _json(value: Any) -> bytes:
    # Not orjson: extra_body may hold integers of any length. The provider decides whether to accept them.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
