"""What the tests of public reports share: a provider whose first answer is unusual, and what the sidecar made of it."""

from __future__ import annotations

import json
import time

from running import chat
from scripted_upstream import CHAT_ANSWER

STREAMED = b'data: {"choices":[{"index":0,"delta":{"content":"A gate."},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
#: An error that says that the provider has too much to do.
BUSY = {"code": "server_is_overloaded", "message": "Our servers are overloaded at the moment. Try it again later."}


async def send_stream(link, raw: bytes, size: int = 65536) -> None:
    await link.start_stream()
    for start in range(0, len(raw), size):
        await link.chunk(raw[start : start + size])
    await link.chunk(b"")


def first_then(first, *, stream=False, good=None):
    """Answer the first request with `first` (status, body, headers), and all later ones well. Count the requests."""
    times: list[float] = []

    async def script(link, _):
        times.append(time.monotonic())
        status, body, headers = first if len(times) == 1 else (200, good, "")
        if body is None:
            body = STREAMED if stream else CHAT_ANSWER
        if isinstance(body, bytes) and body.startswith((b"data", b"event")):
            await send_stream(link, body)
        else:
            await link.answer(body, status=status, headers=headers)

    return script, times


async def kinds_of(sidecar) -> list[str]:
    await sidecar.until(sidecar.at_rest)
    return [
        name.split('kind="')[1].rstrip('"}')
        for name in await sidecar.metrics()
        if name.startswith("sidecar_throttles_total")
    ]


async def tokens_of(sidecar) -> list[float]:
    """Return each counter of LLM tokens, the smallest first."""
    await sidecar.until(sidecar.at_rest)
    return sorted(value for name, value in (await sidecar.metrics()).items() if "sidecar_tokens_total" in name)


async def outcomes_of(sidecar) -> list[str]:
    await sidecar.until(sidecar.at_rest)
    return [
        name.split('outcome="')[1].rstrip('"}')
        for name, value in (await sidecar.metrics()).items()
        if name.startswith("sidecar_requests_total") and value
    ]


def error(message: str, **more) -> dict:
    return {"error": {"message": message, **more}}


def event(data: dict, name: bytes = b"error") -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, json.dumps(data).encode())


async def check_refusal(serving, upstream, times, expected, **more):
    """Ask once. `expected`: the kind of the refusal, the caller's status and code, the requests at the provider."""
    kind, answered, code, calls = expected
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", deadline=10)
    async with sidecar.post(chat(**more)) as response:
        raw = await response.read()
    assert (response.status, len(times)) == (answered, calls), raw
    if code is not None:
        assert json.loads(raw)["error"]["code"] == code
    assert await kinds_of(sidecar) == ([kind] if kind else [])
