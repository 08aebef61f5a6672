"""A caller can disconnect at any time: the provider sees it at once, and permits, tasks and sockets are released."""

from __future__ import annotations

import asyncio
import os
import random

import aiohttp
import pytest
from running import CHAT, chat, running
from scripted_upstream import CHAT_ANSWER, Upstream

from sidecar.admission import Admission, Priority, Ticket, UpstreamSettings
from sidecar.admission.admission import MAX_POOLS
from sidecar.admission.queue import FairQueue

pytestmark = pytest.mark.http

#: Seconds. The bound for everything that must happen at once.
AT_ONCE = 1.0
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"A gate."}}]}\n\n'
SCALE = float(os.environ.get("CHAOS_SCALE", "1"))


class Holding:
    """A provider that sends the bytes `upto` and then waits until its caller disconnects or `release` is set."""

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
async def test_the_provider_sees_at_once_that_its_caller_disconnected(serving, scripted, phase, upto, stream):
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
async def test_a_caller_that_disconnects_while_queued_frees_its_place_and_is_never_sent(
    serving, scripted, settings, stream
):
    holding = Holding()
    upstream = await scripted(holding)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", **settings)
    first = asyncio.ensure_future(ask(sidecar, stream=False))
    await asyncio.wait_for(holding.held.wait(), 10)
    task = asyncio.ensure_future(ask(sidecar, stream=stream))
    admission = sidecar.sidecar.admission
    await sidecar.until(lambda: admission.waiting() == 1)
    await leave(task)
    async with asyncio.timeout(AT_ONCE):
        await sidecar.until(lambda: admission.waiting() == 0 and admission.waiting_bytes() == 0)
    holding.release.set()
    assert await first == 200
    await sidecar.until(sidecar.at_rest)
    assert len(upstream.seen) == 1


async def test_a_caller_that_disconnects_while_sending_its_body_leaves_nothing_behind(serving, scripted):
    upstream = await scripted()
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    listener = sidecar.sidecar._data_listener
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" % CHAT.encode()
    for sent in (head[:40], head, head + b"{" * 50_000):
        _, writer = await asyncio.open_connection("127.0.0.1", sidecar.sidecar.data_port)
        writer.write(sent)
        if sent != head[:40]:
            await sidecar.until(lambda: sidecar.sidecar.data.in_progress == 1)
        if sent.endswith(b"{"):
            await sidecar.until(lambda: listener.held_bytes()["receiving"] >= 50_000)
        writer.transport.abort()
        async with asyncio.timeout(AT_ONCE):
            await sidecar.until(sidecar.at_rest)
        assert listener.budget.held_bytes == 0
    assert upstream.seen == []


async def test_a_caller_that_disconnects_during_an_outage_frees_its_place_at_once(serving, provider):
    """In an outage one request is the next probe and the others wait. Probing continues without callers that left."""
    url, simulated = await provider(outages=((0.0, 4.0),), outage_status=503)
    sidecar = await serving(dashscope_url=url)
    admission = sidecar.sidecar.admission
    tasks = [asyncio.ensure_future(ask(sidecar, stream=number % 2 == 0)) for number in range(6)]
    await sidecar.until(lambda: admission.waiting() == 6)
    for task in tasks[:5]:
        await leave(task)
    async with asyncio.timeout(AT_ONCE):
        await sidecar.until(lambda: admission.waiting() + admission.in_flight() == 1)
    assert await tasks[5] == 200
    assert simulated.counts.ended["answered"] == 1
    await sidecar.until(sidecar.at_rest)


async def test_a_request_at_a_provider_that_hangs_keeps_its_permit_until_the_deadline(serving, provider, monkeypatch):
    """The timers of connections, addresses and listeners expire first. None of them may free a permit."""
    for timer in (
        "backends.http1.connecting.IDLE_SECONDS",
        "backends.http1.connecting.DNS_SECONDS",
        "backends.http1.accepting.KEEPALIVE_SECONDS",
        "backends.http1.accepting.FIRST_REQUEST_SECONDS",
    ):
        monkeypatch.setattr(timer, 0.2)
    monkeypatch.setattr("backends.http1.connecting.CONNECT_SECONDS", 0.5)
    url, simulated = await provider(latency_seconds=600.0)
    sidecar = await serving(dashscope_url=url, max_concurrency=4, deadline=2.5)
    admission = sidecar.sidecar.admission
    tasks = [asyncio.ensure_future(ask(sidecar, stream=number % 2 == 0)) for number in range(4)]
    await sidecar.until(lambda: simulated.counts.in_flight == 4)
    while not any(task.done() for task in tasks):
        assert (admission.in_flight(), simulated.counts.in_flight) == (4, 4)
        await asyncio.sleep(0.05)
    assert await asyncio.gather(*tasks) == [504] * 4
    async with asyncio.timeout(AT_ONCE):
        await sidecar.until(lambda: simulated.counts.in_flight == 0)
    await sidecar.until(sidecar.at_rest)


async def test_a_queue_of_a_key_and_a_lane_of_a_model_are_removed_only_when_empty_and_idle():
    """Every waiting ticket is served while many other keys and models come and go."""
    queue, waiting, chance = FairQueue(), [], random.Random(3)
    for number in range(5000):
        one = Ticket(now=0.0, deadline=60.0, key=str(chance.randrange(40)), priority=chance.choice(list(Priority)))
        queue.add(one)
        waiting.append(one)
        if chance.random() < 0.4:
            queue.remove(waiting.pop(chance.randrange(len(waiting))))
        if waiting and chance.random() < 0.5 and number % 700 > 100:
            served = queue.head()
            queue.take(served)
            waiting.remove(served)
    while (head := queue.head()) is not None:
        queue.take(head)
        waiting.remove(head)
    assert waiting == []
    assert not len(queue)
    assert not queue._keys
    assert not queue._turns

    admission = Admission([UpstreamSettings(concurrency=1)])
    now = admission.loop.time()

    def enter(model):
        return admission.enter(Ticket(now=now, deadline=now + 60.0, model=model))

    flying = [enter(f"flying-{number}") for number in range(MAX_POOLS // 2)]
    behind = [enter(f"flying-{number}") for number in range(MAX_POOLS // 2)]
    for number in range(1000):
        enter(f"passing-{number}").release(now)
    assert len(list(admission.status())) <= MAX_POOLS
    for permit in flying:
        permit.release(now)
    for permit in await asyncio.gather(*behind):
        permit.release(now)
    assert admission.in_flight() == admission.waiting() == 0


async def test_10000_requests_with_every_outcome_leave_nothing_behind():
    """After random cancels, timeouts, 502s and bad bodies, all counters are zero and all permits can be used."""
    chance = random.Random(9)

    async def script(link, _):
        outcome = chance.random()
        if outcome < 0.04:
            link.reset()
        elif outcome < 0.08:
            await link.answer({"error": {"message": "no"}}, status=502)
        elif outcome < 0.10:
            await link.gone()  # until the deadline
        elif outcome < 0.14:
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
        concurrency = asyncio.Semaphore(40)

        async def one(number):
            async with concurrency:
                body = {"messages": []} if number % 20 == 0 else chat(stream=number % 3 == 0)
                timeout_seconds = chance.choice([None] * 6 + [0.0005, 0.002, 0.01])
                headers = {"X-Request-Timeout": "0.2", "X-Camera-Id": str(number % 10)}
                try:
                    async with asyncio.timeout(timeout_seconds), sidecar.post(body, headers=headers) as response:
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

        # No permit has leaked: after the last probes have succeeded, all 16 permits can be used.
        upstream.script = answer = Holding()
        answer.release.set()
        async with asyncio.timeout(20):
            while await ask(sidecar, stream=False) != 200:
                pass
        upstream.script = holding = Holding()
        before = len(upstream.seen)
        last = [asyncio.ensure_future(ask(sidecar, stream=False)) for _ in range(20)]
        await sidecar.until(lambda: len(upstream.seen) - before == 16)
        assert sidecar.sidecar.admission.in_flight() == 16
        holding.release.set()
        assert await asyncio.gather(*last) == [200] * 20
        await sidecar.until(sidecar.at_rest)
    async with asyncio.timeout(10):
        while open_files() > files or len(asyncio.all_tasks()) > tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
