"""Requests for the tests of the local backend, and a `Tap` that pauses its decode loop."""
# ruff: noqa: PLC0415 - torch and PIL are imported only where they are installed

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

#: Seconds after which a wait in a test fails.
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
    """Return a request about one small image, or about the images with the URLs in `images`."""
    urls = [data_url(picture())] if images is None else images
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    body = {"model": "any", "messages": [message], "max_tokens": 12, **fields}
    stream = body.get("stream") is True
    return Request("openai", "/chat/completions", json.dumps(body).encode(), "any", stream=stream, deadline=deadline)


def various(count: int, **fields: Any) -> list[Request]:
    """Return requests with prompts of different lengths, and images of different sizes and contents."""
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
    """Send a request and return its answer, whole or streamed."""
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
    """Return the texts in a stream's events, and its finish reason."""
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
    """Wait until a condition is true."""
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110 - often another thread makes the condition true
            await asyncio.sleep(0.002)


class Tap:
    """Wraps `VisionModel.generate`: it counts decode steps, pauses them, and makes batches fail.

    At first all steps run. `hold()` pauses the loop before the next step and resets the count. `allow(n)` lets n more
    steps run.
    """

    def __init__(self, generate: Callable[..., None]) -> None:
        self.steps = 0
        """Decode steps that have run since `hold`."""
        self.running = False
        """Whether a batch is in the decode loop."""
        self.fault: Callable[[list[int], int], BaseException | None] = lambda seeds, step: None
        """Returns the error that a batch raises, or None. The arguments are the seeds of the batch's rows, and the
        number of its next step, counted from 0."""
        self._generate = generate
        self._held = False
        self._passes = threading.Semaphore(0)

    async def hold(self) -> None:
        await until(lambda: not self.running)  # a row is answered shortly before its batch ends
        self._passes = threading.Semaphore(0)
        self._held = True
        self.steps = 0

    def allow(self, steps: int) -> None:
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
