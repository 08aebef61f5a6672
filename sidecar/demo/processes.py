"""The demo's other processes: the provider and the sidecar, real ones, gone when the demo is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator

import aiohttp

_START_SECONDS = 20.0
_STOP_SECONDS = 5.0


class DemoError(Exception):
    """What keeps the demo from going on, in one line."""


@contextlib.asynccontextmanager
async def provider(*options: str) -> AsyncIterator[str]:
    """Run `vlm-sidecar simulate`; gives its base URL, which ends in `/v1`. Raises `DemoError`."""
    async with _process("simulate", "--port", "0", *options) as process:
        assert process.stdout is not None  # noqa: S101  a pipe was asked for
        async with asyncio.timeout(_START_SECONDS):
            url = (await process.stdout.readline()).decode().strip()
        if not url:
            raise DemoError(f"the simulated provider did not start: {await _last_words(process)}")
        yield url


@contextlib.asynccontextmanager
async def sidecar(upstream: str, client: aiohttp.ClientSession) -> AsyncIterator[str]:
    """Run `vlm-sidecar serve`, as it is out of the box, before an upstream; gives its base URL. Raises `DemoError`."""
    port, admin_port = _free_port(), _free_port()
    listeners = ("--port", str(port), "--admin-host", "127.0.0.1", "--admin-port", str(admin_port))
    options = ("--backend", "dashscope", "--dashscope-url", upstream, "--log-level", "error")
    async with _process("serve", *listeners, *options) as process, asyncio.timeout(None) as bound:
        bound.reschedule(asyncio.get_running_loop().time() + _START_SECONDS)
        while not await _answers(client, f"http://127.0.0.1:{admin_port}/readyz"):
            if process.returncode is not None:
                raise DemoError(f"the sidecar did not start: {await _last_words(process)}")
            await asyncio.sleep(0.05)
        bound.reschedule(None)
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.asynccontextmanager
async def _process(*arguments: str) -> AsyncIterator[Process]:
    """Run a command of ours; it is over when the block is.

    In a session of its own, so that Ctrl-C reaches the demo alone, which then ends the others in order. Settings in the
    environment are for a real sidecar, not for this one.
    """
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("SIDECAR_", "TRIO_", "DASHSCOPE_"))
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", *arguments, stdout=PIPE, stderr=PIPE, env=environ, start_new_session=True
    )
    try:
        yield process
    finally:
        await asyncio.shield(_stop(process))


async def _stop(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.communicate()
        except TimeoutError:
            process.kill()
    await process.wait()


async def _last_words(process: Process) -> str:
    _, errors = await process.communicate()
    return (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _answers(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(url) as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False
