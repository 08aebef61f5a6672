"""A caller who leaves, whenever it does: the provider sees it at once, and permits, tasks and sockets come back."""

from __future__ import annotations

import asyncio
import os
import random

import aiohttp
import pytest
from running import chat, running
from scripted_upstream import CHAT_ANSWER, Upstream

AT_ONCE = 1.0
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"A gate."}}]}\n\n'
SCALE = float(os.environ.get("CHAOS_SCALE", "1"))


class Holding:
    """A provider that answers up to a point and then waits: for its caller to go, or for `release`."""

    def __init__(self, upto: bytes = b"") -> None:
        self.upto = upto
        self.held = asyncio.Event()
        self.left = asyncio.Event()
        self.release = asyncio.Event()

    async def __call__(self, link, _):
        if self.upto:
            await link.send(self.upto)
        self.held.set()
        gone = asyncio.ensure_future(link.gone())
        release = asyncio.ensure_future(self.release.wait())
        done, waiting = await asyncio.wait((gone, release), return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        if gone in done:
            self.left.set()
        else:
            link.is_open = True
            await link.answer(CHAT_ANSWER)


HALF_BODY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (
    len(EVENT),
    EVENT,
)


async def ask(sidecar, *, stream, **options):
    async with sidecar.post(chat(stream=stream), **options) as response:
        await response.read()
        return response.status


async def leave(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("phase", "upto"),
    [("headers", b""), ("within headers", b"HTTP/1.1 200 OK\r\nContent-Ty"), ("body", HALF_BODY), ("stream", STREAM)],
)
async def test_the_provider_sees_its_caller_gone_at_once(serving, scripted, phase, upto, stream):
    holding = Holding(upto)
    upstream = await scripted(holding)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    task = asyncio.ensure_future(ask(sidecar, stream=stream))
    await asyncio.wait_for(holding.held.wait(), 10)
    await asyncio.sleep(0)
    await leave(task)
    await asyncio.wait_for(holding.left.wait(), AT_ONCE)
    await sidecar.until(sidecar.at_rest)
    assert len(upstream.seen) == 1
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="cancelled"}'] == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("settings", [{"max_concurrency": 1}, {"requests_per_minute": 60.0}], ids=["queued", "paced"])
async def test_who_leaves_the_queue_is_out_of_it_at_once_and_never_sent(serving, scripted, settings, stream):
    holding = Holding()
    upstream = await scripted(holding)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", **settings)
    first = asyncio.ensure_future(ask(sidecar, stream=False))
    await asyncio.wait_for(holding.held.wait(), 10)
    task = asyncio.ensure_future(ask(sidecar, stream=stream))
    admission = sidecar.sidecar.routes[0].admission
    await sidecar.until(lambda: admission.waiting() == 1)
    await leave(task)
    async with asyncio.timeout(AT_ONCE):
        await sidecar.until(lambda: admission.waiting() == 0 and admission.waiting_bytes() == 0)
    holding.release.set()
    assert await first == 200
    await sidecar.until(sidecar.at_rest)
    assert len(upstream.seen) == 1


async def test_a_permit_is_held_as_long_as_the_provider_works_and_is_never_freed_by_age(serving, scripted):
    """What the sidecar says is in flight is what the provider has in hand, however long it takes."""
    holding = Holding()
    upstream = await scripted(holding)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", max_concurrency=4)
    admission = sidecar.sidecar.routes[0].admission
    tasks = [asyncio.ensure_future(ask(sidecar, stream=False)) for _ in range(10)]
    await sidecar.until(lambda: len(upstream.seen) == 4 and admission.waiting() == 6)
    for _ in range(20):
        await asyncio.sleep(0.1)
        assert (admission.in_flight(), len(upstream.seen)) == (4, 4)
    holding.release.set()
    assert await asyncio.gather(*tasks) == [200] * 10
    await sidecar.until(sidecar.at_rest)


async def test_10000_requests_with_every_kind_of_end_leave_nothing_behind():
    """Cancels, timeouts, 502s and bad bodies at random: then all is at zero and the whole concurrency is of use."""
    chance = random.Random(9)

    async def script(link, _):
        fate = chance.random()
        if fate < 0.04:
            link.reset()
        elif fate < 0.08:
            await link.answer({"error": {"message": "no"}}, status=502)
        elif fate < 0.10:
            await link.gone()  # until the deadline
        elif fate < 0.14:
            await link.answer(b"<html>", content_type="text/html")
        else:
            await link.answer(CHAT_ANSWER)

    def open_files():
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    files, tasks = open_files(), len(asyncio.all_tasks())
    async with (
        Upstream(script) as upstream,
        running(dashscope_url=f"{upstream.origin}/v1", max_concurrency=16, deadline=5.0) as sidecar,
    ):
        statuses: dict[object, int] = {}
        room = asyncio.Semaphore(40)

        async def one(number):
            async with room:
                body = {"messages": []} if number % 20 == 0 else chat(stream=number % 3 == 0)
                patience = chance.choice([None] * 6 + [0.0005, 0.002, 0.01])
                headers = {"X-Request-Timeout": "0.2", "X-Camera-Id": str(number % 10)}
                try:
                    async with asyncio.timeout(patience), sidecar.post(body, headers=headers) as response:
                        await response.read()
                        end: object = response.status
                except TimeoutError:
                    end = "left"
                except aiohttp.ClientError as error:
                    end = type(error).__name__
                statuses[end] = statuses.get(end, 0) + 1

        async with asyncio.timeout(120 * SCALE), asyncio.TaskGroup() as group:
            for number in range(int(10_000 * SCALE)):
                group.create_task(one(number))
        await sidecar.until(sidecar.at_rest)
        assert set(statuses) <= {200, 400, 502, 503, 504, "left"}, statuses
        assert {200, 400, 502, 504, "left"} <= set(statuses), statuses

        # Nothing of the concurrency has leaked: once the last probes have succeeded, all 16 are of use.
        upstream.script = answer = Holding()
        answer.release.set()
        async with asyncio.timeout(20):
            while await ask(sidecar, stream=False) != 200:
                pass
        upstream.script = holding = Holding()
        before = len(upstream.seen)
        last = [asyncio.ensure_future(ask(sidecar, stream=False)) for _ in range(20)]
        await sidecar.until(lambda: len(upstream.seen) - before == 16)
        assert sidecar.sidecar.routes[0].admission.in_flight() == 16
        holding.release.set()
        assert await asyncio.gather(*last) == [200] * 20
        await sidecar.until(sidecar.at_rest)
    async with asyncio.timeout(10):
        while open_files() > files or len(asyncio.all_tasks()) > tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
