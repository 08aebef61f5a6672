"""Ten cameras, and the ways in which their frames reach the provider: behind a semaphore, or through the sidecar."""

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

#: What the official `openai` client does: 2 retries after 0.5 s, doubled, at most 8 s, each up to a quarter less; of
#: 408, 409, 429 and 5xx (openai-python, `_base_client.py`, `_constants.py`).
_RETRIES, _RETRY_SECONDS, _MAX_RETRY_SECONDS = 2, 0.5, 8.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One frame that was described, and where its time went. Seconds."""

    total: float
    queue: float
    lock: float
    upstream: float


@dataclass(slots=True)
class Result:
    """What became of the frames of one run."""

    sent: int = 0
    lost: int = 0
    answered: list[Answered] = field(default_factory=list)
    before: int = 0
    """Frames of the round that is not counted, described so far."""


class Semaphore:
    """A client whose concurrency was tuned by hand: `openai`'s retries inside a semaphore, as trio-core has them."""

    def __init__(self, client: aiohttp.ClientSession, url: str, size: int, speed: float) -> None:
        self._client = client
        self._url = url
        self._permits = asyncio.Semaphore(size)
        self._speed = speed

    async def send(self, camera: int, body: bytes, patience: float) -> Answered | None:
        """Send one frame; None if it was lost: refused to the end, or not described within `patience` seconds."""
        clock = asyncio.get_running_loop().time
        began, upstream = clock(), 0.0
        try:
            async with asyncio.timeout(patience), self._permits:
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
        """Make one call; gives its status, 599 for a broken connection."""
        try:
            async with self._client.post(f"{self._url}/chat/completions", data=body, headers=_headers(camera)) as reply:
                await reply.read()
                return reply.status
        except aiohttp.ClientError:
            return 599


class ThroughSidecar:
    """A client that sends at once and leaves the rest to the sidecar."""

    def __init__(self, client: aiohttp.ClientSession, url: str) -> None:
        self._client = client
        self._url = url

    async def send(self, camera: int, body: bytes, patience: float) -> Answered | None:
        """Send one frame; None if it was lost. Where its time went is what `Server-Timing` says."""
        clock = asyncio.get_running_loop().time
        began = clock()
        headers = _headers(camera) | {"X-Request-Timeout": f"{patience:.3f}"}
        try:
            async with asyncio.timeout(patience):
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
    """Give the request of each camera: one frame, and what to say of it."""
    return [body_of(frame(camera)) for camera in range(CAMERAS)]


def body_of(jpeg: bytes) -> bytes:
    """Give the chat completion that asks what a frame shows."""
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe this frame."}]
    return orjson.dumps({"model": "qwen-vl-plus", "messages": [{"role": "user", "content": content}]})


async def in_turn(
    way: Semaphore | ThroughSidecar, frames: list[bytes], rounds: int, patience: float, tell: Callable[[Result], None]
) -> Result:
    """Let every camera send its next frame as soon as the last is described, so many times.

    The first round is not counted: the line is not yet as long as it will be.
    """
    result, uncounted = Result(), Result()

    async def camera(number: int) -> None:
        for counted in range(rounds + 1):
            await _one(way, number, frames[number], patience, result if counted else uncounted)
            result.before = len(uncounted.answered)
            tell(result)

    await _all(*(camera(number) for number in range(len(frames))))
    return result


async def at_once(
    way: Semaphore | ThroughSidecar,
    frames: list[bytes],
    rounds: int,
    patience: float,
    tell: Callable[[Result], None],
    *,
    period: float,
) -> Result:
    """Let all cameras send at the same instant, every `period` seconds, whatever has become of the frames before."""
    result = Result()
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def camera(number: int, turn: int) -> None:
        await asyncio.sleep(began + turn * period - loop.time())
        await _one(way, number, frames[number], patience, result)
        tell(result)

    await _all(*(camera(number, turn) for turn in range(rounds) for number in range(len(frames))))
    return result


async def _one(way: Semaphore | ThroughSidecar, camera: int, body: bytes, patience: float, result: Result) -> None:
    result.sent += 1
    answer = await way.send(camera, body, patience)
    if answer is None:
        result.lost += 1
    else:
        result.answered.append(answer)


async def _all(*cameras: Coroutine[Any, Any, None]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for one in cameras:
            tasks.create_task(one)
