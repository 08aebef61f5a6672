"""A provider that answers each model in its own way: a client chooses by the model's name what happens to it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from scripted_upstream import Link, Seen

ANSWER = "Ein Tor, 门 und 🚪."
#: The arguments of the tool call, in the pieces in which they are streamed.
ARGUMENTS = ['{"city": ', '"Paris"', "}"]
STRUCTURED = '{"name": "Science Fair", "day": "Friday"}'
USAGE = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}


def _completion(message: dict, finish_reason: str = "stop") -> dict:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason, "logprobs": None}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1700000000, "model": "m", "choices": [choice],
        "usage": USAGE,
    }  # fmt: skip


def _chunk(delta: dict, finish_reason: str | None = None) -> dict:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m", "choices": [choice]}


def _message(body: dict) -> tuple[dict, str, list[dict]]:
    """Return the message, the finish reason and the deltas of the same answer."""
    asked_with_result = any(message.get("role") == "tool" for message in body["messages"])
    if body.get("tools") and not asked_with_result:
        name = body["tools"][0]["function"]["name"]
        call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": "".join(ARGUMENTS)}}
        first: dict = {"index": 0, "id": "call_1", "type": "function", "function": {"name": name, "arguments": ""}}
        later: list[dict] = [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in ARGUMENTS]
        deltas = [{"role": "assistant", "content": None, "tool_calls": [first]}, *later]
        return {"content": None, "tool_calls": [call]}, "tool_calls", deltas
    text = STRUCTURED if body.get("response_format") else ANSWER
    return {"content": text}, "stop", [{"role": "assistant", "content": ""}, *({"content": letter} for letter in text)]


def _event(data: dict | str) -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _stream(body: dict) -> bytes:
    _, reason, deltas = _message(body)
    events = [_event(_chunk(delta)) for delta in deltas] + [_event(_chunk({}, reason))]
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(_event({**_chunk({}), "choices": [], "usage": USAGE}))
    return b"".join((*events, _event("[DONE]")))


def _odd(stream: bytes) -> bytes:
    """Return the same events as other servers write them.

    They have a BOM, CRLF, names, numbers and comments, and no space after a colon; the last has no blank line.
    """
    odd = stream.replace(b"data: ", b"event: message\nid: 7\n: a comment\ndata:").replace(b"\n", b"\r\n")
    # After an event with an id no empty line may follow a comment: openai 3.57 for Python (like LiteLLM and LangChain,
    # which use it) takes the two for an event without data, and fails.
    first, end, others = odd.partition(b"\r\n\r\n")
    return b"\xef\xbb\xbf: keep-alive\r\n\r\n" + first + end + b": ping\r\n" + others.rstrip()


def _responses(body: dict) -> dict[str, Any]:
    content = {"type": "output_text", "text": ANSWER, "annotations": []}
    message = {"id": "m-1", "type": "message", "role": "assistant", "status": "completed", "content": [content]}
    usage = {
        "input_tokens": 9, "output_tokens": 7, "total_tokens": 16,
        "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip
    return {
        "id": "resp-1", "object": "response", "created_at": 1700000000, "model": body["model"], "status": "completed",
        "output": [message], "usage": usage, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "error": None, "incomplete_details": None, "instructions": None, "metadata": {}, "temperature": 1.0,
        "top_p": 1.0,
    }  # fmt: skip


def _responses_stream(body: dict) -> bytes:
    whole = _responses(body)
    message: dict = whole["output"][0]
    place = {"item_id": "m-1", "output_index": 0, "content_index": 0}
    item: dict = {**message, "content": [], "status": "in_progress"}
    part = {"type": "output_text", "text": "", "annotations": []}
    events: list[dict] = [
        {"type": "response.created", "response": {**whole, "status": "in_progress", "output": []}},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.content_part.added", **place, "part": part},
        *({"type": "response.output_text.delta", **place, "delta": letter, "logprobs": []} for letter in ANSWER),
        {"type": "response.output_text.done", **place, "text": ANSWER, "logprobs": []},
        {"type": "response.content_part.done", **place, "part": {**part, "text": ANSWER}},
        {"type": "response.output_item.done", "output_index": 0, "item": message},
        {"type": "response.completed", "response": whole},
    ]
    return b"".join(
        f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': number})}\n\n".encode()
        for number, event in enumerate(events)
    )


#: A model whose name begins so gets this error: status and body, as OpenAI writes them.
ERRORS = {
    "bad-request": (400, "invalid_request_error", "invalid_value"),
    "no-such-model": (404, "invalid_request_error", "model_not_found"),
    "not-allowed": (422, "invalid_request_error", None),
    "failing": (500, "server_error", None),
    "throttled": (429, "requests", "rate_limit_exceeded"),
    "no-money": (429, "insufficient_quota", "insufficient_quota"),
    "wrong-key": (401, "invalid_request_error", "invalid_api_key"),
}


class Provider:
    """The script of `Upstream`."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()

    async def __call__(self, link: Link, request: Seen) -> None:
        path = request.path.partition("?")[0]
        if path.startswith("/calls/"):
            await link.answer(str(self._calls[path.removeprefix("/calls/")]).encode(), content_type="text/plain")
        elif path == "/v1/models":
            models = [{"id": "m", "object": "model", "created": 1, "owned_by": "p"}]
            await link.answer({"object": "list", "data": models})
        elif path == "/v1/files":
            file = {"id": "file-1", "object": "file", "bytes": len(request.body), "created_at": 1, "filename": "f"}
            await link.answer({**file, "purpose": "fine-tune", "status": "processed"})
        elif request.method == "GET":
            await link.answer({"error": {"message": "There is no such thing.", "code": "not_found"}}, status=404)
        else:
            body = json.loads(request.body)
            model = body["model"]
            self._calls[model] += 1
            await self._model(link, path, model, body)

    async def _model(self, link: Link, path: str, model: str, body: dict) -> None:
        kind = model.removesuffix("-once")
        if kind in ERRORS and not (model.endswith("-once") and self._calls[model] > 1):
            status, type_, code = ERRORS[kind]
            text = "You exceeded your current quota, please check your plan and billing details."
            if kind != "no-money":
                text = f"The model {model} answers so."
            error = {"message": text, "type": type_, "param": None, "code": code}
            await link.answer({"error": error}, status=status, headers="x-request-id: req_of_the_provider\r\n")
        elif path.endswith("/embeddings"):
            texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
            # 0.5 and -1.0 as little-endian floats of 32 bits
            vector = "AAAAPwAAgL8=" if body.get("encoding_format") == "base64" else [0.5, -1.0]
            vectors = [{"object": "embedding", "index": at, "embedding": vector} for at, _ in enumerate(texts)]
            usage = {"prompt_tokens": 2, "total_tokens": 2}
            await link.answer({"object": "list", "data": vectors, "model": model, "usage": usage})
        elif path.endswith("/responses"):
            await (self._send(link, _responses_stream(body)) if body.get("stream") else link.answer(_responses(body)))
        elif model == "slow":
            await asyncio.sleep(3)
            await link.answer(_completion({"content": ANSWER}))
        elif not body.get("stream"):
            message, reason, _ = _message(body)
            await link.answer(_completion(message, reason), headers="x-request-id: req_of_the_provider\r\n")
        elif model == "breaking":
            await self._send(link, b"".join(_event(_chunk({"content": "A"})) for _ in range(3)))
        elif model == "odd":
            await self._send(link, _odd(_stream(body)), size=1)
        else:
            await self._send(link, _stream(body))

    async def _send(self, link: Link, stream: bytes, size: int = 1000) -> None:
        await link.start_stream()
        for start in range(0, len(stream), size):
            await link.chunk(stream[start : start + size])
        await link.chunk(b"")
