"""Run trio-core 1.1.5 itself as a process in its own environment (`make .venv-trio/.ready`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator

import aiohttp

from sidecar.cli.demo.processes import free_port


@contextlib.asynccontextmanager
async def trio_core(python: str, **settings: str) -> AsyncIterator[tuple[str, int]]:
    """Run its inference server with these `TRIO_` settings. Yield its URL and its process id."""
    port = free_port()
    code = f"from trio_core.api.inference_server import main; main('127.0.0.1', {port}, 'critical')"
    process = subprocess.Popen([python, "-c", code], env=environ_of(settings), stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(60), aiohttp.ClientSession() as client:
            while not await _is_up(client, url):
                await asyncio.sleep(0.1)
        yield url, process.pid
    finally:
        process.kill()
        process.wait(10)


def environ_of(settings: dict[str, str]) -> dict[str, str]:
    """Return an environment with only these `TRIO_` settings, in which trio-core does not look for a local model."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRIO_")}
    settings = {"model": "none", "auto_optimize": "0", **settings}
    return clean | {f"TRIO_{name.upper()}": value for name, value in settings.items()}


async def _is_up(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(f"{url}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
