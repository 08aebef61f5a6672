"""Runs the provider and the sidecar of the demo as processes, which end with the demo."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import aiohttp

T = TypeVar("T")

_START_SECONDS = 20.0
_STOP_SECONDS = 5.0


class DemoError(Exception):
    """The demo cannot continue. The message is one line with the reason."""


@contextlib.asynccontextmanager
async def provider(*options: str) -> AsyncIterator[str]:
    """Run `vlm-sidecar simulate` and yield its base URL, which ends in `/v1`. Raises `DemoError`."""
    async with _process("simulate", "--port", "0", *options) as process:
        assert process.stdout is not None  # noqa: S101  the process was started with a pipe
        url = await _started("the simulated provider", process, process.stdout.readline())
        yield url.decode().strip()


@contextlib.asynccontextmanager
async def sidecar(upstream: str, client: aiohttp.ClientSession) -> AsyncIterator[tuple[str, str]]:
    """Run `vlm-sidecar serve` with default settings in front of an upstream. Yield its base URL and its admin URL.

    Raises `DemoError`.
    """
    port, admin_port = free_port(), free_port()
    admin_url = f"http://127.0.0.1:{admin_port}"
    listeners = ("--port", str(port), "--admin-host", "127.0.0.1", "--admin-port", str(admin_port))
    options = ("--backend", "dashscope", "--dashscope-url", upstream, "--log-level", "error")
    async with _process("serve", *listeners, *options) as process:
        await _started("the sidecar", process, _ready(process, client, f"{admin_url}/readyz"))
        yield f"http://127.0.0.1:{port}/v1", admin_url


async def _started(name: str, process: Process, started: Awaitable[T]) -> T:
    """Return the result of `started`, which is falsy if the process ended instead of starting. Raises `DemoError`."""
    try:
        async with asyncio.timeout(_START_SECONDS):
            result = await started
    except TimeoutError:
        raise DemoError(f"{name} did not start within {_START_SECONDS:g} s") from None
    if not result:
        _, errors = await process.communicate()
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise DemoError(f"{name} did not start: {last or 'it did not say why'}")
    return result


async def _ready(process: Process, client: aiohttp.ClientSession, url: str) -> bool:
    while process.returncode is None:
        with contextlib.suppress(aiohttp.ClientConnectionError):  # not listening yet
            async with client.get(url) as response:
                if response.status == 200:
                    return True
        await asyncio.sleep(0.05)
    return False


@contextlib.asynccontextmanager
async def _process(*arguments: str) -> AsyncIterator[Process]:
    """Run a `vlm-sidecar` command, and stop it at the end of the block.

    The process has its own session, so that Ctrl-C reaches only the demo, which then stops the processes in order.
    Settings in the environment are removed: they are for a real sidecar and not for the demo.
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


def free_port() -> int:
    """Return a port of the loopback interface that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
