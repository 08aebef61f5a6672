"""Ten cameras, and two kinds of senders for their frames: a client with a semaphore, and a client of the sidecar."""

from __future__ import annotations

import asyncio
import base64
import random
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from sidecar.cli.demo.frames import frame

CAMERAS = 10

#: The retries of the official `openai` client: 2 retries after 408, 409, 429 and 5xx. The first wait is 0.5 s, each
#: next wait is twice as long, at most 8 s; a random part of up to a quarter is subtracted. Source: openai-python,
#: `_base_client.py` and `_constants.py`.
_RETRIES, _RETRY_SECONDS, _MAX_RETRY_SECONDS = 2, 0.5, 8.0


@dataclass(frozen=True, slots=True)
class Answered:
    """The times of one described frame, in seconds."""

    total: float
    queue: float
    lock: float
    upstream: float


@dataclass(slots=True)
class Result:
    """Counts of the frames of one run."""

    sent: int = 0
    lost: int = 0
    answered: list[Answered] = field(default_factory=list)
    uncounted: int = 0
    """Described frames of the first round, which is not counted."""


class Semaphore:
    """A client with a hand-tuned concurrency: the retries of `openai` inside a semaphore, as in trio-core."""

    def __init__(self, client: aiohttp.ClientSession, url: str, size: int, speed: float) -> None:
        self._client = client
        self._url = url
        self._permits = asyncio.Semaphore(size)
        self._speed = speed

    async def send(self, camera: int, body: bytes, timeout: float) -> Answered | None:
        """Send one frame.

        Return None if it is lost: refused in every attempt, or not described within `timeout` seconds.
        """
        clock = asyncio.get_running_loop().time
        began, upstream = clock(), 0.0
        try:
            async with asyncio.timeout(timeout), self._permits:
                for attempt in range(_RETRIES + 1):
                    sent = clock()
                    status = await self._attempt(camera, body)
                    upstream += clock() - sent
                    if status == 200:
                        total = clock() - began
                        return Answered(total, total - upstream, 0.0, upstream)
                    if attempt == _RETRIES or not (status in {408, 409, 429} or status >= 500):
                        return None
                    pause = min(_RETRY_SECONDS * 2**attempt, _MAX_RETRY_SECONDS) * random.uniform(0.75, 1.0)  # noqa: S311
                    await asyncio.sleep(pause / self._speed)
        except TimeoutError:
            return None
        return None

    async def _attempt(self, camera: int, body: bytes) -> int:
        """Make one call and return its status; 599 for a broken connection."""
        try:
            async with self._client.post(f"{self._url}/chat/completions", data=body, headers=_headers(camera)) as reply:
                await reply.read()
                return reply.status
        except aiohttp.ClientError:
            return 599


class ThroughSidecar:
    """A client that sends immediately and leaves waiting and retries to the sidecar."""

    def __init__(self, client: aiohttp.ClientSession, url: str) -> None:
        self._client = client
        self._url = url

    async def send(self, camera: int, body: bytes, timeout: float) -> Answered | None:
        """Send one frame. Return None if it is lost. `Server-Timing` gives the times in queue, lock and upstream."""
        clock = asyncio.get_running_loop().time
        began = clock()
        headers = _headers(camera) | {"X-Request-Timeout": f"{timeout:.3f}"}
        try:
            async with asyncio.timeout(timeout):
                async with self._client.post(f"{self._url}/chat/completions", data=body, headers=headers) as reply:
                    await reply.read()
        except (TimeoutError, aiohttp.ClientError):
            return None
        if reply.status != 200:
            return None
        spent = {name: float(ms) / 1000 for name, ms in _PART.findall(reply.headers["Server-Timing"])}
        return Answered(clock() - began, spent["queue"], spent["lock"], spent["upstream"])


_PART = re.compile(r"(\w+);dur=([\d.]+)")


def _headers(camera: int) -> dict[str, str]:
    return {"Content-Type": "application/json", "X-Camera-Id": f"camera-{camera}"}


def bodies() -> list[bytes]:
    """Return the request body of each camera: one frame and a question about it."""
    return [body_of(frame(camera)) for camera in range(CAMERAS)]


def body_of(jpeg: bytes) -> bytes:
    """Return the body of a chat completion that asks for a description of a frame."""
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe this frame."}]
    return orjson.dumps({"model": "qwen-vl-plus", "messages": [{"role": "user", "content": content}]})


async def in_turn(
    sender: Semaphore | ThroughSidecar,
    frames: list[bytes],
    rounds: int,
    timeout: float,
    on_progress: Callable[[Result], None],
) -> Result:
    """Let every camera send `rounds` + 1 frames, each as soon as the frame before is described.

    The first round is not counted, because the queue has not reached its usual length yet.
    """
    result, uncounted = Result(), Result()

    async def camera(number: int) -> None:
        for counted in range(rounds + 1):
            await _send_frame(sender, number, frames[number], timeout, result if counted else uncounted)
            result.uncounted = len(uncounted.answered)
            on_progress(result)

    await _run_cameras(*(camera(number) for number in range(len(frames))))
    return result


async def at_once(
    sender: Semaphore | ThroughSidecar,
    frames: list[bytes],
    rounds: int,
    timeout: float,
    on_progress: Callable[[Result], None],
    *,
    period: float,
) -> Result:
    """Let all cameras send at the same instant, every `period` seconds, without waiting for the frames before."""
    result = Result()
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def camera(number: int, turn: int) -> None:
        await asyncio.sleep(began + turn * period - loop.time())
        await _send_frame(sender, number, frames[number], timeout, result)
        on_progress(result)

    await _run_cameras(*(camera(number, turn) for turn in range(rounds) for number in range(len(frames))))
    return result


async def _send_frame(
    sender: Semaphore | ThroughSidecar, camera: int, body: bytes, timeout: float, result: Result
) -> None:
    result.sent += 1
    answer = await sender.send(camera, body, timeout)
    if answer is None:
        result.lost += 1
    else:
        result.answered.append(answer)


async def _run_cameras(*cameras: Coroutine[Any, Any, None]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for camera in cameras:
            tasks.create_task(camera)
