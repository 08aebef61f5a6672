"""The start chooses an implementation of HTTP, and serves whichever it is."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import urllib.request
from importlib.metadata import version

import pytest
from running import CHAT, Process, chat

from backends.http1 import implementation
from backends.http1.response import Answer

BOUND = 20.0
#: `_buffer_paused`, which the internal implementation needs, came with this release.
LACKS_PARTS = tuple(map(int, version("aiohttp").split(".")[:3])) < (3, 14, 4)


@pytest.fixture
def undecided(monkeypatch):
    monkeypatch.setattr(implementation._Chosen, "implementation", None)


@pytest.mark.internal_http
async def test_the_internal_implementation_serves_without_a_word(serving, undecided, caplog):
    sidecar = await serving()
    metrics = await sidecar.metrics()
    assert metrics['sidecar_http_implementation{implementation="internal"}'] == 1
    assert metrics['sidecar_http_implementation{implementation="documented"}'] == 0
    assert [one for one in caplog.records if "aiohttp" in one.getMessage()] == []


@pytest.mark.parametrize("error", [AttributeError("no _parser"), ImportError("no such name"), TimeoutError()])
async def test_if_the_self_check_fails_in_any_way_the_documented_one_serves(
    serving, undecided, caplog, monkeypatch, error
):
    async def fails(_):
        raise error

    monkeypatch.setattr(implementation, "self_check", fails)
    with caplog.at_level(logging.WARNING):
        sidecar = await serving()
        other = await serving()
    metrics = await sidecar.metrics()
    assert metrics['sidecar_http_implementation{implementation="internal"}'] == 0
    assert metrics['sidecar_http_implementation{implementation="documented"}'] == 1
    for one in (sidecar, other):
        async with one.post() as response:
            assert response.status == 200
    assert len([one for one in caplog.records if "aiohttp" in one.getMessage()]) == 1, "one warning for a process"


@pytest.mark.internal_http
@pytest.mark.parametrize(
    "broken",
    [
        "aiohttp.base_protocol.BaseProtocol._pause_reading_for_buffer",
        "aiohttp.base_protocol.BaseProtocol._drain_helper",
        "aiohttp.client_proto.ResponseHandler.set_response_params",
        "aiohttp.streams.DataQueue.read",
    ],
)
async def test_a_missing_part_fails_the_self_check(monkeypatch, broken):
    monkeypatch.delattr(broken)
    with pytest.raises((AttributeError, TypeError)):
        await implementation.self_check(implementation.internal())


@pytest.mark.internal_http
async def test_a_changed_message_of_a_disconnected_server_fails_the_self_check(monkeypatch):
    """A POST would be sent again that the provider may have answered, and that costs money."""

    def made(self, message=None):
        self.message = "Server disconnected"

    monkeypatch.setattr("aiohttp.ServerDisconnectedError.__init__", made)
    with pytest.raises(RuntimeError, match=r"ServerDisconnectedError\.message"):
        await implementation.self_check(implementation.internal())


@pytest.mark.internal_http
async def test_a_wrong_answer_over_loopback_fails_the_self_check(monkeypatch):
    write = Answer.write_whole
    monkeypatch.setattr(Answer, "write_whole", lambda self, body: write(self, bytes(len(body))))
    with pytest.raises(RuntimeError, match="wrong answer"):
        await implementation.self_check(implementation.internal())


@pytest.mark.http
async def test_the_self_check_passes_and_leaves_nothing(http):
    await implementation.self_check(http)
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.http
async def test_cancelled_at_any_turn_of_the_loop_the_self_check_leaves_nothing(http):
    for turns in range(300):
        checking = asyncio.create_task(implementation.self_check(http))
        for _ in range(turns):
            await asyncio.sleep(0)
        if checking.done():
            break
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)
    assert checking.done() and turns > 5
    async with asyncio.timeout(BOUND):
        while asyncio.all_tasks() != {asyncio.current_task()}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_whole_process_says_and_shows_which_implementation_serves():
    """On a release that lacks an internal part (a row of `make aiohttp-rows`), this is the documented one."""
    async with Process("--backend", "simulated") as process:
        answer = await asyncio.to_thread(_ask, process.url + CHAT, json.dumps(chat()).encode())
        metrics = await asyncio.to_thread(_ask, process.admin_url + "/metrics")
        process.signal(15)
        assert await process.ended() == 0
    assert json.loads(answer)["choices"]
    for name, serves in (("documented", LACKS_PARTS), ("internal", not LACKS_PARTS)):
        assert f'sidecar_http_implementation{{implementation="{name}"}} {serves:.1f}' in metrics
    assert process.log.count("does not have the internal parts") == LACKS_PARTS


def _ask(url, body=None):
    """Ask with a client that shares no code with the sidecar."""
    with urllib.request.urlopen(url, body, timeout=BOUND) as response:  # noqa: S310  the test's own URL
        assert response.status == 200
        return response.read().decode()


@pytest.mark.internal_http
def test_where_the_internal_implementation_serves_the_other_one_takes_no_memory():
    code = "from backends.http1 import implementation, server, client; import sys; print('aiohttp.web' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=BOUND, check=True)
    assert done.stdout == "False\n"
