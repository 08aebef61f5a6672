"""The upstream's name gets another address, or does not resolve for a while: no request fails, no restart is needed."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

import pytest
from running import chat
from scripted_upstream import Upstream

NAME = "provider.example"


@pytest.fixture
def names(monkeypatch):
    """The address of each name, for all connections of this process. Other names do not resolve."""
    known = {}

    async def resolve(_, host, port=0, family=socket.AF_INET):
        del family
        if host not in known:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [{"hostname": host, "host": known[host], "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]

    monkeypatch.setattr("aiohttp.resolver.ThreadedResolver.resolve", resolve)
    monkeypatch.setattr("aiohttp.connector.DefaultResolver.resolve", resolve)
    monkeypatch.setattr("backends.http1.connecting.DNS_SECONDS", 0.3)
    return known


class Callers:
    """Eight callers that send requests continuously until the block ends."""

    def __init__(self, sidecar):
        self.sidecar = sidecar
        self.statuses = Counter()
        self._over = asyncio.Event()

    async def _ask(self):
        while not self._over.is_set():
            async with self.sidecar.post() as response:
                await response.read()
                self.statuses[response.status] += 1
            await asyncio.sleep(0.01)

    async def __aenter__(self):
        self._tasks = [asyncio.ensure_future(self._ask()) for _ in range(8)]
        return self

    async def __aexit__(self, *_):
        self._over.set()
        await asyncio.gather(*self._tasks)


async def test_an_upstream_that_moves_to_another_address_is_followed(serving, names):
    names[NAME] = "127.0.0.1"
    async with Upstream() as old, Upstream(host="127.0.0.2", port=old.port) as new:
        sidecar = await serving(dashscope_url=f"http://{NAME}:{old.port}/v1")
        async with Callers(sidecar) as callers:
            await sidecar.until(lambda: callers.statuses[200] > 50)
            names[NAME] = "127.0.0.2"
            old.stop()
            await sidecar.until(lambda: len(new.seen) > 50)
        assert set(callers.statuses) == {200}, callers.statuses
        await sidecar.until(sidecar.at_rest)


async def test_while_a_name_does_not_resolve_requests_wait_and_none_fails(serving, names):
    names[NAME] = "127.0.0.1"
    async with Upstream() as upstream:
        sidecar = await serving(dashscope_url=f"http://{NAME}:{upstream.port}/v1")
        async with Callers(sidecar) as callers:
            await sidecar.until(lambda: callers.statuses[200] > 50)
            del names[NAME]
            await asyncio.sleep(0.4)  # the address is cached for 0.3 s
            upstream.drop()
            [place] = sidecar.sidecar.admission.pool("qwen-vl-plus").upstreams
            await sidecar.until(lambda: place.circuit.state is not None)
            async with sidecar.client.get(f"{sidecar.admin_url}/readyz") as response:
                assert response.status == 200
                assert f"the name {NAME} cannot be resolved" in await response.text()
            names[NAME] = "127.0.0.1"
            before = callers.statuses[200]
            await sidecar.until(lambda: callers.statuses[200] > before + 50)
        assert set(callers.statuses) == {200}, callers.statuses
        await sidecar.until(sidecar.at_rest)


async def test_a_name_that_never_resolved_gives_an_error_at_once(serving, names):
    sidecar = await serving(dashscope_url=f"http://{NAME}/v1")
    async with sidecar.post(chat()) as response:
        assert response.status == 502
        error = (await response.json())["error"]
    assert error["code"] == "upstream_error"
    assert f"the name {NAME} cannot be resolved: Temporary failure" in error["message"]
