"""Answers DashScope's native generation API with a backend that speaks OpenAI's chat completions only.

The request is translated there, the answer, the stream and the errors back. Shapes: Model Studio's API reference for
`multimodal-generation`, and the official SDK (`dashscope` on the package registry), which must not see a difference.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson

from backends.base import BackendError, Rejected, Reply, Request, ServerFailed, Timings

#: Fields of `parameters` that say how a native answer is written; all others mean the same in both dialects.
_NATIVE_ONLY = frozenset({"incremental_output", "result_format", "stream"})
_EVENT_END = re.compile(rb"\r?\n\r?\n")


async def send_native(
    send: Callable[[Request, Timings], Awaitable[Reply]], request: Request, timings: Timings
) -> Reply:
    """Make one attempt for a native request: see `Backend.send`. `send` is such a method that knows OpenAI's dialect.

    Errors have their bodies in the native shape, and name the fields as the native request does.
    """
    request_id = str(uuid.uuid4())
    try:
        translated, incremental = _to_openai(request)
        reply = await send(translated, timings)
    except BackendError as error:
        error.message = _native_field(error.message)
        error.args = (error.message,)
        error.body = _error(error, request_id)
        raise
    if reply.chunks is None:
        try:
            body = _whole(orjson.loads(reply.body), request_id)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _no_completion(error) from error
        return Reply(reply.status, reply.headers, body, usage=reply.usage, failure=reply.failure)
    streaming = Reply(reply.status, reply.headers, closer=reply.aclose)
    streaming.chunks = _frames(reply, reply.chunks, streaming, request_id, incremental=incremental)
    return streaming


def _invalid(message: str) -> Rejected:
    return Rejected(message, status=400, code="InvalidParameter")


def _no_completion(error: Exception) -> ServerFailed:
    return ServerFailed(f"the upstream's answer is no chat completion ({type(error).__name__})")


def _to_openai(request: Request) -> tuple[Request, bool]:
    """Translate the request; whether its stream is to be incremental. Raises `Rejected` that names a field."""
    fields = _json(request.body)
    asked = fields.get("input")
    parameters = fields.get("parameters") or {}
    if not isinstance(asked, dict) or not isinstance(asked.get("messages"), list):
        raise _invalid("input.messages: must be a list")
    if not isinstance(parameters, dict):
        raise _invalid("parameters: must be an object")
    messages = [_message(message, f"input.messages[{at}]") for at, message in enumerate(asked["messages"])]
    body = {name: value for name, value in parameters.items() if name not in _NATIVE_ONLY}
    body |= {"model": request.model, "messages": messages}
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {name: value for name, value in request.headers.items() if name.lower() != "x-dashscope-sse"}
    translated = replace(request, dialect="openai", path="/chat/completions", body=orjson.dumps(body), headers=headers)
    return translated, parameters.get("incremental_output") is True


def _message(message: object, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _invalid(f"{field}: must be an object")
    content = message.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{field}.content[{at}]") for at, part in enumerate(content)]
    return {**message, "content": content}


def _part(part: object, field: str) -> dict[str, Any]:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if isinstance(part, dict) and isinstance(part.get("image"), str):
        return {"type": "image_url", "image_url": {"url": part["image"]}}
    raise _invalid(f"{field}: must hold text or image")


def _native_field(message: str) -> str:
    """`messages[0].content[1].image_url.url: …`, as OpenAI's dialect names a field, in the native request's words."""
    if not message.startswith("messages"):
        return message
    field, colon, rest = message.partition(": ")
    return "input." + field.replace(".image_url.url", ".image") + colon + rest


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise _invalid("body: not a JSON object")
    return value


def _error(error: BackendError, request_id: str) -> bytes:
    return orjson.dumps({"code": error.code or "InternalError", "message": error.message, "request_id": request_id})


def _whole(answer: dict[str, Any], request_id: str) -> bytes:
    choices = [_choice(choice["message"], choice["finish_reason"]) for choice in answer["choices"]]
    return orjson.dumps(
        {"output": {"choices": choices}, "usage": _usage(answer.get("usage")), "request_id": request_id}
    )


def _choice(message: dict[str, Any], finish_reason: str) -> dict[str, Any]:
    text = message.get("content")
    return {
        "finish_reason": finish_reason,
        "message": {**message, "role": "assistant", "content": [{"text": text}] if text else []},
    }


def _usage(usage: dict[str, Any] | None) -> dict[str, Any]:
    if not usage:
        return {}
    given, made = usage["prompt_tokens"], usage["completion_tokens"]
    counted = {"input_tokens": given, "output_tokens": made, "total_tokens": given + made}
    details = usage.get("prompt_tokens_details") or {}
    return {**counted, "image_tokens": details["image_tokens"]} if "image_tokens" in details else counted


async def _frames(
    reply: Reply, chunks: AsyncIterator[bytes], streaming: Reply, request_id: str, *, incremental: bool
) -> AsyncIterator[bytes]:
    """Native frames, one for each OpenAI event with text; the last has the reason and the usage, told apart there."""
    number = 0
    said = ""
    reason = "stop"
    usage: dict[str, Any] = {}

    def frame(text: str, reason: str) -> bytes:
        nonlocal number
        number += 1
        answer = {"output": {"choices": [_choice({"content": text}, reason)]}, "usage": usage, "request_id": request_id}
        return b"id:%d\nevent:result\n:HTTP_STATUS/200\ndata:%b\n\n" % (number, orjson.dumps(answer))

    async for event in _events(chunks):
        usage = _usage(event.get("usage")) or usage
        for choice in event.get("choices", []):
            piece = (choice.get("delta") or {}).get("content") or ""
            said += piece
            reason = choice.get("finish_reason") or reason
            if piece:
                yield frame(piece if incremental else said, "null")
    streaming.usage, streaming.failure = reply.usage, reply.failure
    if reply.failure is None:
        yield frame("" if incremental else said, reason)
    else:
        number += 1
        body = _error(reply.failure, request_id)
        yield b"id:%d\nevent:error\n:HTTP_STATUS/%d\ndata:%b\n\n" % (number, reply.failure.status, body)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Give the JSON of each event of an OpenAI stream, however its bytes are cut."""
    rest = b""
    async for chunk in chunks:
        *whole, rest = _EVENT_END.split(rest + chunk)
        for event in whole:
            data = event.removeprefix(b"data:").strip()
            if event.startswith(b"data:") and data != b"[DONE]":
                try:
                    value = orjson.loads(data)
                except orjson.JSONDecodeError as error:
                    raise _no_completion(error) from error
                if isinstance(value, dict):
                    yield value
