"""Serves DashScope's native generation API with a backend that supports only OpenAI's chat completions.

It translates the request to OpenAI's format, and the answer, the stream and the errors back to the native format.
Sources of the formats: Model Studio's API reference for `multimodal-generation`, and the official SDK (`dashscope` on
the package registry). The SDK must not notice a difference.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import orjson

from backends.base import MAX_ANSWER_BYTES, BackendError, Rejected, Reply, Request, ServerFailed, Timings
from backends.remote.answers import choices_of, usage_of
from backends.remote.error_bodies import lenient_json
from backends.remote.events import EventReader, events_in
from backends.remote.stream import COMMENT

#: Path of the generation API for vision models, below the base of the native API.
GENERATION_PATH = "/services/aigc/multimodal-generation/generation"
#: Fields of `parameters` that control the format of a native answer. All other fields have the same meaning in both
#: dialects.
_NATIVE_ONLY = frozenset({"incremental_output", "result_format", "stream"})
#: Bytes of a request that is translated in the event loop: a longer one, of many parts, would block it.
_LOOP_BYTES = 256 * 1024
#: Bytes of the longest event that is translated.
_EVENT_LIMIT = 16 * 1024 * 1024
#: Events that are translated before the event loop may do other work.
_EVENTS_AT_ONCE = 1000
#: Bytes of the events of the longest stream that is translated: all its text is kept, because a native frame that is
#: not incremental repeats it.
_STREAM_LIMIT = MAX_ANSWER_BYTES


async def send_native(
    send: Callable[[Request, Timings], Awaitable[Reply]], request: Request, timings: Timings
) -> Reply:
    """Make one attempt for a native request, see `Backend.send`.

    The argument `send` is the `send` method of a backend for OpenAI's dialect. Errors that this function raises have
    native bodies and use the field names of the native request.
    """
    request_id = str(uuid.uuid4())
    try:
        if request.path != GENERATION_PATH:
            raise Rejected(f"this upstream does not answer {request.path[:200]}", status=404)
        if len(request.body) <= _LOOP_BYTES:
            translated, incremental = _to_openai(request)
        else:
            translated, incremental = await asyncio.to_thread(_to_openai, request)
        reply = await send(translated, timings)
    except BackendError as error:
        _make_native(error, request_id)
        raise
    if encoding := reply.headers.get("Content-Encoding"):
        await reply.aclose()
        named = f" {encoding}" if encoding.isalpha() and len(encoding) < 10 else ""
        raise _final(f"the upstream's answer has the content encoding{named}, so that it cannot be translated")
    if reply.chunks is None:
        try:
            body = _whole(lenient_json(reply.body), request_id)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _no_completion(error) from error
        return replace(reply, body=body)
    streaming = replace(reply, chunks=None, deliver=None)

    async def close() -> None:
        await reply.aclose()
        streaming.usage, streaming.output_bytes = reply.usage, reply.output_bytes

    streaming.closer = close
    streaming.chunks = _frames(reply, reply.chunks, streaming, request_id, incremental=incremental)
    return streaming


def _make_native(error: BackendError, request_id: str) -> None:
    """Give an error a native body and the field names of the native request."""
    error.message, error.quote = _native_field(error.message), _native_field(error.quote)
    error.args = (error.message,)
    error.body = _error(error, request_id)


def _invalid(message: str) -> Rejected:
    return Rejected(message, status=400, code="InvalidParameter")


def _final(message: str) -> ServerFailed:
    """Return an error about a complete answer. The request is not sent again, because the provider has charged it."""
    error = ServerFailed(message)
    error.may_resend = False
    return error


def _no_completion(error: Exception) -> ServerFailed:
    return _final(f"the upstream's answer is no chat completion ({type(error).__name__})")


def _to_openai(request: Request) -> tuple[Request, bool]:
    """Return the translated request, and whether its stream is incremental.

    Raises `Rejected` with the name of the invalid field.
    """
    fields = _json(request.body)
    native_input = fields.get("input")
    parameters = fields.get("parameters") or {}
    if not isinstance(native_input, dict) or not isinstance(native_input.get("messages"), list):
        raise _invalid("input.messages: must be a list")
    if not isinstance(parameters, dict):
        raise _invalid("parameters: must be an object")
    messages = [_message(message, f"input.messages[{at}]") for at, message in enumerate(native_input["messages"])]
    body = {name: value for name, value in parameters.items() if name not in _NATIVE_ONLY}
    body |= {"model": request.model, "messages": messages}
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {name: value for name, value in request.headers.items() if name.lower() != "x-dashscope-sse"}
    translated = replace(request, dialect="openai", path="/chat/completions", body=orjson.dumps(body), headers=headers,
                         keeps_stream=True)  # fmt: skip
    return translated, parameters.get("incremental_output") is True


def _message(message: object, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _invalid(f"{field}: must be an object")
    content = message.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{field}.content[{at}]") for at, part in enumerate(content)]
    return {**message, "content": content}


def _part(part: object, field: str) -> dict[str, Any]:
    """Translate one part of a message. Its other fields (`min_pixels`, `fps`, `cache_control`) stay beside it.

    The format of a video is that of Model Studio's OpenAI-compatible API: a list of frames, or one URL.
    """
    given = part if isinstance(part, dict) else {}
    text, image, video = (given.get(name) for name in ("text", "image", "video"))
    more = {name: value for name, value in given.items() if name not in ("text", "image", "video")}
    if isinstance(text, str):
        return {**more, "type": "text", "text": text}
    if isinstance(image, str):
        return {**more, "type": "image_url", "image_url": {"url": image}}
    if isinstance(video, str):
        return {**more, "type": "video_url", "video_url": {"url": video}}
    if isinstance(video, list):
        return {**more, "type": "video", "video": video}
    raise _invalid(f"{field}: must hold text, image or video")


def _native_field(message: str) -> str:
    """Translate the field name at the start of an error message.

    OpenAI's `messages[0].content[1].image_url.url: …` becomes the native `input.messages[0].content[1].image: …`.
    """
    if not message.startswith("messages"):
        return message
    field, colon, rest = message.partition(": ")
    return "input." + field.replace(".image_url.url", ".image").replace(".video_url.url", ".video") + colon + rest


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise _invalid("body: not a JSON object")
    return value


def _error(error: BackendError, request_id: str) -> bytes:
    message = f"{error.message}. The provider says: {error.quote}" if error.quote else error.message
    return _dumps({"code": error.code or "InternalError", "message": message, "request_id": request_id})


def _whole(answer: Any, request_id: str) -> bytes:
    choices = [_choice(choice["message"], choice["finish_reason"]) for choice in answer["choices"]]
    if len(choices) > 1:
        choices = [{"index": at, **choice} for at, choice in enumerate(choices)]
    native = {"output": {"choices": choices}, "usage": _usage(answer), "request_id": request_id}
    return _dumps(native)


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # half a surrogate pair, which only Python's encoder can write
        return json.dumps(value).encode()


def _choice(message: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    text = message.get("content")
    return {
        "finish_reason": finish_reason,
        "message": {**message, "role": "assistant", "content": [{"text": text}] if text else []},
    }


def _usage(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the native usage of an OpenAI answer or event; empty if it names none that is plausible."""
    usage = usage_of(answer)
    if usage is None:
        return {}
    counted = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    details = answer["usage"].get("prompt_tokens_details")
    has_images = isinstance(details, dict) and isinstance(details.get("image_tokens"), int)
    return {**counted, "image_tokens": details["image_tokens"]} if has_images else counted


class _Message:
    """One choice of a stream: what has arrived of it, and what is new since the last frame."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._whole: dict[str, Any] = {}
        self._new: dict[str, Any] = {}

    def add(self, delta: dict[str, Any]) -> None:
        """Add a piece: text, reasoning or parts of tool calls."""
        for name, value in delta.items():
            if name == "role" or not value:
                continue
            if name == "tool_calls" and isinstance(value, list):
                self._add_tool_calls(value)
                continue
            for message in (self._whole, self._new):
                before = message.get(name)
                if isinstance(value, str) and isinstance(before, str):
                    message[name] = before + value
                else:
                    message[name] = value

    def take(self, *, incremental: bool) -> dict[str, Any]:
        """Return the message for the next frame: only what is new, or all of it so far."""
        new, self._new = self._new, {}
        return {"content": "", **(new if incremental else self._whole)}

    @property
    def has_news(self) -> bool:
        """Whether something has arrived since the last frame."""
        return bool(self._new)

    def _add_tool_calls(self, pieces: list[Any]) -> None:
        for message in (self._whole, self._new):
            if not isinstance(message.get("tool_calls"), list):
                message["tool_calls"] = []
        for piece in pieces:
            if isinstance(piece, dict):
                index = _index_of_call(self._whole["tool_calls"], piece)
                for message in (self._whole, self._new):
                    _add_to_call(message["tool_calls"], index, piece)


def _index_of_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> int:
    """Return the index of the tool call that a piece belongs to.

    Some servers leave the index out, send null, or give the second call the index of the first. Then the id decides; a
    piece without index, id and name continues the last call. Sources: AstrBot PR#6692, GPT_API_free #254, agno PR#8880.
    """
    index, identity = piece.get("index"), piece.get("id")
    known = [call["index"] for call in calls if identity and call.get("id") == identity]
    if known:
        return int(known[0])
    if isinstance(index, int):
        has_other_id = any(call["index"] == index and "id" in call for call in calls) and identity
        if not has_other_id:
            return index
    function = piece.get("function")
    begins = identity or (isinstance(function, dict) and function.get("name"))
    if calls and not begins:
        return int(calls[-1]["index"])
    return max((call["index"] for call in calls), default=-1) + 1


def _add_to_call(calls: list[dict[str, Any]], index: int, piece: dict[str, Any]) -> None:
    """Add a piece to the call of this index, as OpenAI's clients do: the arguments arrive in parts."""
    call = next((call for call in calls if call["index"] == index), None)
    if call is None:
        call = {"index": index, "type": "function", "function": {"name": "", "arguments": ""}}
        calls.append(call)
    call |= {name: value for name, value in piece.items() if name not in ("index", "function") and value}
    function = piece.get("function")
    for name, value in function.items() if isinstance(function, dict) else ():
        if isinstance(value, str):
            call["function"][name] = call["function"].get(name, "") + value


async def _frames(
    reply: Reply, chunks: AsyncIterator[bytes], streaming: Reply, request_id: str, *, incremental: bool
) -> AsyncIterator[bytes]:
    """Yield one native frame for each OpenAI event with content, and a last frame with finish reasons and usage.

    Before the first frame, an event without content and a comment become a comment, which keeps the connection alive.
    Raises `ServerFailed` if the stream did not say that it has ended: no end is invented.
    """
    number = 0
    messages: dict[int, _Message] = {}
    usage: dict[str, Any] = {}
    ended = False

    def frame(*, last: bool) -> bytes:
        nonlocal number
        number += 1
        choices = []
        for index, message in sorted(messages.items()):
            if last or message.has_news:
                reason = (message.reason or "stop") if last else "null"
                choice = _choice(message.take(incremental=incremental), reason)
                choices.append({"index": index, **choice} if len(messages) > 1 else choice)
        answer = {"output": {"choices": choices}, "usage": usage, "request_id": request_id}
        return b"id:%d\nevent:result\n:HTTP_STATUS/200\ndata:%b\n\n" % (number, _dumps(answer))

    async for events in _events(chunks, request_id):
        for at, event in enumerate(events, 1):
            if at % _EVENTS_AT_ONCE == 0:
                await asyncio.sleep(0)  # one piece can hold tens of thousands of events
            if event is None:
                ended = True
                continue
            usage = _usage(event) or usage
            for choice in choices_of(event):
                index = choice.get("index")
                message = messages.setdefault(index if isinstance(index, int) else 0, _Message())
                delta = choice.get("delta")
                if isinstance(delta, dict):
                    message.add(delta)
                message.reason = choice.get("finish_reason") or message.reason
            if any(message.has_news for message in messages.values()):
                yield frame(last=False)
        if reply.progress is not None and reply.progress.content_at is None:
            yield COMMENT
    streaming.usage, streaming.output_bytes, streaming.failure = reply.usage, reply.output_bytes, reply.failure
    if reply.failure is not None:
        body, status = _error(reply.failure, request_id), reply.failure.status
        # The official SDK reads the status from the field `status`; it takes an error without this field for a 400.
        yield b"id:%d\nevent:error\nstatus:%d\n:HTTP_STATUS/%d\ndata:%b\n\n" % (number + 1, status, status, body)
    elif ended or (messages and all(message.reason for message in messages.values())):
        yield frame(last=True)
    else:
        raise ServerFailed("the upstream's stream ended in the middle: no finish_reason and no [DONE] came")


async def _events(chunks: AsyncIterator[bytes], request_id: str) -> AsyncIterator[Iterator[dict[str, Any] | None]]:
    """Yield the events of each chunk of an OpenAI stream: their JSON, and None for `[DONE]`.

    The chunks may split an event anywhere. An error of the stream gets a native body.
    """
    reader, left = EventReader(_EVENT_LIMIT), _STREAM_LIMIT
    try:
        async for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                raise _final(f"the upstream's stream is longer than {_STREAM_LIMIT} bytes")
            yield _values(reader.feed(chunk))
    except BackendError as error:
        _make_native(error, request_id)
        raise
    if block := reader.end():
        yield _values(block)


def _values(block: bytes) -> Iterator[dict[str, Any] | None]:
    for event in events_in(block) if block else ():
        if event.is_done:
            yield None
        elif event.data and not event.is_keepalive:
            value = lenient_json(event.data)
            if value is None:
                raise _no_completion(ValueError())
            if isinstance(value, dict):
                yield value
