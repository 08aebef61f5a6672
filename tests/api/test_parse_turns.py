"""Before admission, large bodies take turns by camera and connection, and only short work is done in the event loop."""

from __future__ import annotations

import asyncio
import base64
import json
import threading

import pytest
from running import CHAT, PNG, chat

from sidecar.api.body import is_quick
from sidecar.api.parse_turns import ParseTurns
from sidecar.api.trio import schema

MB = 1_000_000


class Held:
    """Turns whose thread is held until everything has arrived, and the order in which the bodies are parsed."""

    def __init__(self) -> None:
        self.turns = ParseTurns()
        self.order: list[str] = []
        self.go = threading.Event()
        self.tasks: list[asyncio.Task] = []

    async def add(self, source, size, name=None) -> asyncio.Task:
        """Let a body arrive. The first one holds the thread."""
        parse = self.go.wait if not self.tasks else lambda: self.order.append(name or source)
        self.tasks.append(asyncio.ensure_future(self.turns.run(source, size, parse)))
        await asyncio.sleep(0)
        return self.tasks[-1]

    async def finish(self) -> list:
        self.go.set()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        return self.order


async def test_a_small_body_waits_for_one_body_of_a_flood_at_most():
    held = Held()
    for number in range(200):
        await held.add(f"attacker-{number % 4}", 13 * MB)
    await held.add("camera", MB // 3)
    assert (await held.finish())[0] == "camera"


async def test_sources_share_the_thread_by_bytes():
    held = Held()
    for _ in range(90):
        await held.add("many", 2 * MB)
    for _ in range(10):
        await held.add("few", 2 * MB)
    order = await held.finish()
    assert order.index("few") <= 2
    last = max(at for at, source in enumerate(order) if source == "few")
    assert last <= 21, order
    assert len(order) == 99


async def test_a_large_body_is_not_kept_waiting_by_small_ones_of_ever_new_sources():
    held = Held()
    await held.add("first", MB)
    large = await held.add("large", MB)

    async def flood(number):
        for repetition in range(100):
            name = f"{number}-{repetition}"
            await held.turns.run(name, MB // 10, lambda: held.order.append("small"))

    floods = [asyncio.ensure_future(flood(number)) for number in range(10)]
    await asyncio.sleep(0)
    held.go.set()
    await asyncio.gather(large, *floods)
    # Its share: ten other sources have as many bytes parsed as it has itself, and each body is a tenth of its own.
    assert held.order.index("large") <= 120


async def test_callers_that_leave_take_no_turn_and_block_none():
    held = Held()
    running = await held.add("gone", MB)
    waiting = await held.add("gone too", MB)
    await held.add("camera", MB)
    waiting.cancel()
    running.cancel()
    assert await held.finish() == ["camera"]
    held.tasks.clear()
    assert not held.turns._waiting and not held.turns._places and not held.turns._is_busy
    assert await held.turns.run("camera", MB, lambda: 5) == 5


async def test_an_error_in_a_body_gives_the_turn_on():
    turns = ParseTurns()

    def fails():
        raise ValueError("no JSON")

    first, second = await asyncio.gather(
        turns.run("a", MB, fails), turns.run("b", MB, lambda: "parsed"), return_exceptions=True
    )
    assert isinstance(first, ValueError)
    assert second == "parsed"


async def test_a_camera_is_parsed_before_the_flood_of_invalid_bodies_of_another_one(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    turns, go, order = sidecar.sidecar.data._parse_turns, threading.Event(), []
    run = turns.run

    async def noting(source, size, parse):
        return await run(source, size, lambda: (order.append(source), parse())[1])

    turns.run = noting

    async def ask(camera, body):
        headers = {"X-Camera-Id": camera, "Content-Type": "application/json"}
        async with sidecar.client.post(sidecar.url + CHAT, data=body, headers=headers) as response:
            return response.status

    flood = b'{"messages": ["' + b"x" * MB + b'"'
    try:
        held = asyncio.ensure_future(run("first", 1, go.wait))
        async with asyncio.TaskGroup() as tasks:
            for number in range(12):
                tasks.create_task(ask("attacker", flood))
                await sidecar.until(lambda many=number + 1: len(turns._waiting) == many)
            camera = tasks.create_task(ask("gate", json.dumps(chat("x" * 100_000)).encode()))
            await sidecar.until(lambda: len(turns._waiting) == 13)
            go.set()
            await held
    finally:
        go.set()
    assert camera.result() == 200
    assert order == ["gate", *["attacker"] * 12]


@pytest.mark.parametrize("fields", ["values", "keys", "text", "invalid"])
def test_only_short_bodies_are_parsed_in_the_event_loop(fields):
    size = 100 * 1024
    many = {
        "values": "[" + ",".join(["{}"] * (size // 3)) + "]",
        "keys": json.dumps({f"{number:x}": 1 for number in range(size // 9)}),
        "text": json.dumps("x" * size),
        "invalid": '["' + "x" * size,
    }[fields]
    image = base64.b64encode(PNG).decode()
    assert not is_quick(f'{{"messages": {many}}}'.encode())
    assert not schema.is_quick(f'{{"image_b64": "{image}", "extra_body": {many}}}'.encode())
    assert not schema.is_quick(f'{{"extra_body": {many}, "image_b64": "{image}"}}'.encode())


def test_usual_frames_are_parsed_in_the_event_loop():
    image = base64.b64encode(PNG + bytes(150_000)).decode()
    body = chat()
    body["messages"][0]["content"][0]["image_url"]["url"] = f"data:image/png;base64,{image}"
    assert is_quick(json.dumps(body).encode())
    assert schema.is_quick(json.dumps({"prompt": "x", "image_b64": image, "max_tokens": 8}).encode())
