"""Few file descriptors: callers and strangers take only their share, and probes are always answered."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import time

import aiohttp
from real_parts import real_part
from running import BOUND, CHAT, Process, chat, samples

EXHAUSTED = 'sidecar_resource_exhausted_total{resource="%s_connections"}'


def limited(limit, *options):
    """`vlm-sidecar serve` with this limit of descriptors."""
    program = real_part("prlimit", "it is in Debian's package util-linux")
    return Process(*options, prefix=(program, f"--nofile={limit}:{limit}"))


async def probe(process, path="/readyz"):
    """Send a request like kubelet: a new connection, one second. Return the text."""
    timeout = aiohttp.ClientTimeout(1.0)
    async with aiohttp.ClientSession(timeout=timeout) as client, client.get(process.admin_url + path) as response:
        assert response.status == 200
        return await response.text()


async def strangers(port, count, sent=b""):
    """Open connections that send this and then nothing. Return the writers."""
    writers = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            writers.append(writer)
    return writers


async def test_with_64_descriptors_every_listener_keeps_its_share(provider):
    url, _ = await provider(latency_seconds=0.5)
    async with limited(64, "--dashscope-url", url) as process:
        [callers] = re.findall(
            r"may open 64 files \(ulimit -n\): at most (\d+) callers' connections, and 16 on", process.log
        )
        callers = int(callers)
        assert 8 <= callers <= 20
        held = await strangers(process.port, 40)
        held += await strangers(process.admin_port, 40)
        held += await strangers(process.admin_port, 20, b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:

            async def ask():
                async with client.post(process.url + CHAT, json=chat()) as response:
                    return response.status

            answers = [asyncio.ensure_future(ask()) for _ in range(callers)]
            longest = 0.0
            for _ in range(10):
                began = time.monotonic()
                assert (await probe(process)).startswith("ready")
                longest = max(longest, time.monotonic() - began)
                await asyncio.sleep(0.02)
            assert longest < 1.0
            assert await asyncio.gather(*answers) == [200] * callers
            ends = await asyncio.gather(*(ask() for _ in range(callers + 3)), return_exceptions=True)
            assert ends.count(200) >= callers
            assert all(end == 200 or isinstance(end, aiohttp.ClientError) for end in ends), ends
        counted = samples(await probe(process, "/metrics"))
        assert counted[EXHAUSTED % "data"] >= 40 - callers
        assert counted[EXHAUSTED % "admin"] >= 44
        assert 'sidecar_upstream_attempts_total{backend="dashscope",result="connect_error"}' not in counted
        for line in ("all callers' connections are in use", "all connections of the admin port are in use"):
            assert process.log.count(line) == 1, process.log
        for writer in held:
            writer.transport.abort()


async def test_with_too_few_descriptors_the_start_says_how_many_are_needed():
    async with limited(40) as process:
        assert await process.ended() == 2
        [needed] = re.findall(r"may open only 40 files \(ulimit -n\): it needs at least (\d+)", process.log)
    async with limited(int(needed)) as process:
        assert "at most 1 callers' connections" in process.log
        assert await probe(process, "/livez") == "alive\n"


@contextlib.contextmanager
def left(process, count):
    """Leave the running process this number of free descriptors."""
    pid = process.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    limit = len(os.listdir(f"/proc/{pid}/fd")) + count  # noqa: PTH208
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


async def test_when_all_descriptors_are_used_idle_callers_are_closed_so_that_probes_are_answered():
    async with Process() as process:
        with left(process, 12):
            held = await strangers(process.port, 40)
            await asyncio.sleep(0.5)  # two looks for a free descriptor
            assert (await probe(process)).startswith("ready")
            counted = samples(await probe(process, "/metrics"))
            assert counted['sidecar_resource_exhausted_total{resource="descriptors"}'] >= 1
            assert process.log.count("no file descriptor left") == 1
            for writer in held:
                writer.transport.abort()


async def test_a_request_waits_for_a_descriptor_and_the_upstream_is_not_blamed(scripted):
    upstream = await scripted()
    async with Process("--dashscope-url", f"{upstream.origin}/v1") as process, aiohttp.ClientSession() as client:

        async def ask():
            async with client.post(process.url + CHAT, json=chat()) as response:
                return response.status

        with left(process, 1):
            answer = asyncio.ensure_future(ask())
            await asyncio.sleep(1.0)
            assert not answer.done()
            assert upstream.seen == []
        async with asyncio.timeout(BOUND):
            assert await answer == 200
        counted = samples(await probe(process, "/metrics"))
        assert counted['sidecar_upstream_attempts_total{backend="dashscope",result="ok"}'] == 1
        assert 'sidecar_upstream_attempts_total{backend="dashscope",result="connect_error"}' not in counted
