"""The event loops for the tests of this folder, and the upstream that most of them use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import uvloop
from scripted_upstream import Upstream

_FOLDER = Path(__file__).parent
_ON_BOTH_LOOPS = {
    _FOLDER / "http1" / "test_http1_client.py",
    _FOLDER / "remote" / "test_remote_faults.py",
    _FOLDER / "simulated" / "test_simulated_server.py",
}
assert all(file.exists() for file in _ON_BOTH_LOOPS)  # a renamed file would lose half of its runs


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the tests of faults on asyncio and on uvloop.

    Production uses uvloop. Closing, resetting and cancelling behave differently on the two loops.
    """
    if item.path in _ON_BOTH_LOOPS:
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture
async def upstream():
    async with Upstream() as running:
        yield running
