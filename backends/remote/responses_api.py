"""What an answer of OpenAI's Responses API says of itself: as one object, or as the events of a stream.

Source: OpenAI's API reference, "Responses" and "Streaming events". Such an answer begins with 200 and events without
content, and can fail after that (new-api #3142).
"""

from __future__ import annotations

from collections.abc import Mapping

from backends.base import ServerFailed

_BEFORE_CONTENT = ("response.created", "response.queued", "response.in_progress")
_ENDS = ("response.completed", "response.incomplete", "response.failed")


def is_before_content(payload: Mapping[str, object]) -> bool:
    """Return whether an event comes before the model has answered anything."""
    return payload.get("type") in _BEFORE_CONTENT


def is_end_of_response(payload: object) -> bool:
    """Return whether an event is the last one of a stream."""
    return isinstance(payload, dict) and payload.get("type") in _ENDS


def has_failed(payload: Mapping[str, object]) -> bool:
    """Return whether an event or a whole answer says that this request has failed."""
    return payload.get("type") == "response.failed" or (
        payload.get("object") == "response" and payload.get("status") == "failed"
    )


def unfinished() -> ServerFailed:
    """Return the error of a stream that has begun as one of this API and not said that it has ended."""
    return ServerFailed("the provider's stream ended in the middle: no response.completed came")
