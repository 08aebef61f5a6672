"""What the tests of the local backend say to it, and how they hold its decode loop still."""
# ruff: noqa: PLC0415 - torch and PIL are imported where they are known to be there

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from backends.base import BackendError, Request, Timings, Usage
from backends.local import LocalBackend

#: Seconds after which a test that waits for something says that it will not come.
BOUND = 30


def picture(width: int = 64, height: int = 64, kind: str = "JPEG", shade: int = 120) -> bytes:
    from PIL import Image

    image = Image.linear_gradient("L").resize((width, height)).point(lambda value: (value + shade) % 256)
    file = BytesIO()
    image.convert("RGB").save(file, kind)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def chat(
    text: str = "Describe the street.",
    *,
    images: list[str] | None = None,
    deadline: float | None = None,
    **fields: Any,
) -> Request:
    """A request about one small image, unless `images` names others."""
    urls = [data_url(picture())] if images is None else images
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    body = {"model": "any", "messages": [message], "max_tokens": 12, **fields}
    stream = body.get("stream") is True
    return Request("openai", "/chat/completions", json.dumps(body).encode(), "any", stream=stream, deadline=deadline)


def various(count: int, **fields: Any) -> list[Request]:
    """Requests that differ in their prompts' lengths and their images' sizes and contents."""
    return [
        chat(
            "Describe the street. " * (1 + at * 2 % 5),
            images=[data_url(picture(40 + 37 * at, 200 - 13 * at, shade=29 * at))],
            **fields,
        )
        for at in range(count)
    ]


@dataclass
class Answer:
    text: str
    finish_reason: str | None
    usage: Usage | None
    timings: Timings
    pieces: list[str]
    failure: BackendError | None = None


async def ask(backend: LocalBackend, request: Request) -> Answer:
    """The answer to a request, whole or streamed."""
    timings = Timings()
    async with asyncio.timeout(BOUND):
        reply = await backend.send(request, timings)
        assert reply.status == 200
        if reply.chunks is None:
            choice = json.loads(reply.body)["choices"][0]
            return Answer(choice["message"]["content"], choice["finish_reason"], reply.usage, timings, [])
        raw = b"".join([chunk async for chunk in reply.chunks])
        await reply.aclose()
    pieces, reason = read_events(raw)
    return Answer("".join(pieces), reason, reply.usage, timings, pieces, reply.failure)


def read_events(raw: bytes) -> tuple[list[str], str | None]:
    """The texts in a stream's events, and its finish reason."""
    pieces, reason = [], None
    for event in events(raw):
        for choice in event.get("choices", []):
            pieces.append(choice["delta"].get("content", ""))
            reason = choice["finish_reason"] or reason
    return [piece for piece in pieces if piece], reason


def events(raw: bytes) -> list[dict[str, Any]]:
    lines = raw.decode().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110 - what it waits for is often set by another thread
            await asyncio.sleep(0.002)


class Tap:
    """Sits on `VisionModel.generate`: counts decode steps, holds them, and breaks batches.

    Open at first. `hold()` stops the loop before its next step is looked at, and counts from there; `let(n)` lets n
    steps pass.
    """

    def __init__(self, generate: Callable[..., None]) -> None:
        self.steps = 0
        """Decode steps that were looked at."""
        self.running = False
        """A batch is in the decode loop."""
        self.fault: Callable[[list[int], int], BaseException | None] = lambda seeds, step: None
        """What breaks a batch of rows with these seeds before this of its steps, counted from 0."""
        self._generate = generate
        self._held = False
        self._passes = threading.Semaphore(0)

    async def hold(self) -> None:
        await until(lambda: not self.running)  # a row is answered a moment before its batch has ended
        self._passes = threading.Semaphore(0)
        self._held = True
        self.steps = 0

    def let(self, steps: int) -> None:
        self._passes.release(steps)

    def generate(self, model, batch, draws, max_tokens, step) -> None:
        at = 0
        seeds = [draw.seed for draw in draws]

        def tapped(tokens: list[int]) -> list[bool]:
            nonlocal at
            if self._held:
                self._passes.acquire()
            if (error := self.fault(seeds, at)) is not None:
                raise error
            finished = step(tokens)
            at += 1
            self.steps += 1
            return finished

        self.running = True
        try:
            self._generate(model, batch, draws, max_tokens, tapped)
        finally:
            self.running = False
