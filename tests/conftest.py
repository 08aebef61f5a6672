"""Fixtures for tests that drive a whole sidecar."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest
from hypothesis import settings
from running import running
from scripted_upstream import Upstream

from backends.http1 import implementation
from backends.simulated import PROVIDER, Profile, serve

# No example has a deadline: other jobs on the machine may slow it down.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `http` runs on both implementations of HTTP, or on the internal one if it is marked for it."""
    marked = metafunc.definition.get_closest_marker
    if marked("http") is not None:
        internal = pytest.param("internal", marks=pytest.mark.internal_http)
        both = [internal] if marked("internal_http") else [internal, "documented"]
        metafunc.parametrize("http", both, indirect=True)


@pytest.fixture(autouse=True)
def http(request, monkeypatch):
    """The implementation of HTTP of a test that is marked for it. In any other test the start chooses, as in use."""
    if not hasattr(request, "param"):
        return None
    chosen = getattr(implementation, request.param)()
    monkeypatch.setattr(implementation._Chosen, "implementation", chosen)
    return chosen


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keep what computes all the time in three of the processes that run tests at once; the tests in the others wait.

    Two of the three run the tests in virtual time, one those of the in-process model, so that it imports torch once.
    """
    for number, item in enumerate(items):
        if item.path.parent.name == "admission":
            item.add_marker(pytest.mark.xdist_group(f"virtual time {number % 2}"))
        elif item.path.parent.name == "local":
            item.add_marker(pytest.mark.xdist_group("torch"))


def pytest_unconfigure():
    """Drop the 40 lines about leaks that triton prints at exit: they would follow the names of the failed tests."""
    if "triton" in sys.modules:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.fixture
async def serving():
    """Return a function that starts a sidecar: `await serving(dashscope_url=…)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings):
            return await stack.enter_async_context(running(**settings))

        yield start


@pytest.fixture
async def provider():
    """Return a function that starts a simulated provider on a real socket and returns its base URL and the provider.

    For example: `url, simulated = await provider(latency_seconds=1.27)`.
    """
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
    """Return a function that starts a scripted provider: `upstream = await scripted(script)`; see `upstream.origin`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(script=None):
            return await stack.enter_async_context(Upstream(script))

        yield start
