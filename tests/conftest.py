"""Fixtures for tests that drive a whole sidecar."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import settings
from running import running
from scripted_upstream import Upstream

from backends.simulated import PROVIDER, Profile, serve

# No example is judged by its time: the machine may be anybody's.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture
async def serving():
    """Start sidecars: `await serving(dashscope_url=…)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings):
            return await stack.enter_async_context(running(**settings))

        yield start


@pytest.fixture
async def provider():
    """Start simulated providers on real sockets: `await provider(latency_seconds=1.27)`; gives (base URL, provider)."""
    runners = []

    async def start(**profile):
        runner = await serve(Profile(**profile))
        runners.append(runner)
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}/compatible-mode/v1", runner.app[PROVIDER]

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def scripted():
    """Start providers that do what a test says: `await scripted(script)`; base URL with `upstream.origin`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(script=None):
            return await stack.enter_async_context(Upstream(script))

        yield start
