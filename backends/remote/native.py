"""Serves DashScope's native generation API with a backend that supports only OpenAI's chat completions.

It translates the request to OpenAI's format, and the answer, the stream and the errors back to the native format.
Sources of the formats: Model Studio's API reference for `multimodal-generation`, and the official SDK (`dashscope` on
the package registry). The SDK must not notice a difference.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson

from backends.base import BackendError, Rejected, Reply, Request, ServerFailed, Timings

#: Fields of `parameters` that control the format of a native answer. All other fields have the same meaning in both
#: dialects.
_NATIVE_ONLY = frozenset({"incremental_output", "result_format", "stream"})
_EVENT_END = re.compile(rb"\r?\n\r?\n")


async def send_native(
    send: Callable[[Request, Timings], Awaitable[Reply]], request: Request, timings: Timings
) -> Reply:
    """Make one attempt for a native request, see `Backend.send`.

    The argument `send` is the `send` method of a backend for OpenAI's dialect. Errors that this function raises have
    native bodies and use the field names of the native request.
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
    """Translate the field name at the start of an error message.

    OpenAI's `messages[0].content[1].image_url.url: …` becomes the native `input.messages[0].content[1].image: …`.
    """
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
    input_tokens, output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    counted = {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }
    details = usage.get("prompt_tokens_details") or {}
    return {**counted, "image_tokens": details["image_tokens"]} if "image_tokens" in details else counted


async def _frames(
    reply: Reply, chunks: AsyncIterator[bytes], streaming: Reply, request_id: str, *, incremental: bool
) -> AsyncIterator[bytes]:
    """Yield one native frame for each OpenAI event with text, and a last frame with the finish reason and the usage."""
    number = 0
    text_so_far = ""
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
            text_so_far += piece
            reason = choice.get("finish_reason") or reason
            if piece:
                yield frame(piece if incremental else text_so_far, "null")
    streaming.usage, streaming.failure = reply.usage, reply.failure
    if reply.failure is None:
        yield frame("" if incremental else text_so_far, reason)
    else:
        number += 1
        body = _error(reply.failure, request_id)
        yield b"id:%d\nevent:error\n:HTTP_STATUS/%d\ndata:%b\n\n" % (number, reply.failure.status, body)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of each event of an OpenAI stream. The chunks may split the bytes anywhere."""
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
