"""Run a sidecar for a test: on real sockets in the test's own event loop, or as a separate process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp

from sidecar.app import Sidecar
from sidecar.settings import load

#: A 1 x 1 PNG.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
IMAGE_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
#: Seconds. The longest time that a test waits for anything.
BOUND = 20.0
CHAT = "/v1/chat/completions"


def chat(text: str = "What is going on?", **fields: Any) -> dict[str, Any]:
    """Return the body of a chat completion about one frame."""
    content = [{"type": "image_url", "image_url": {"url": IMAGE_URL}}, {"type": "text", "text": text}]
    return {"model": "qwen-vl-plus", "messages": [{"role": "user", "content": content}], **fields}


class Running:
    """A started sidecar and an HTTP client for it."""

    def __init__(self, sidecar: Sidecar, client: aiohttp.ClientSession) -> None:
        self.sidecar = sidecar
        self.client = client
        self.url = f"http://127.0.0.1:{sidecar.data_port}"
        self.admin_url = f"http://127.0.0.1:{sidecar.admin_port}"

    def post(self, body: Any = None, path: str = CHAT, **options: Any) -> Any:
        """Send a request with a JSON body. Use it with `async with`."""
        return self.client.post(self.url + path, json=chat() if body is None else body, **options)

    async def metrics(self) -> dict[str, float]:
        """Return every sample of `/metrics`. The key is the name with its labels, as `/metrics` shows them."""
        async with self.client.get(f"{self.admin_url}/metrics") as response:
            return samples(await response.text())

    async def until(self, condition: Any) -> None:
        """Wait until `condition()` is true. Raises `TimeoutError` after `BOUND` seconds."""
        async with asyncio.timeout(BOUND):
            while not condition():  # noqa: ASYNC110  no event exists for this state
                await asyncio.sleep(0.002)

    def at_rest(self) -> bool:
        """Return whether no request is queued, in flight or in progress."""
        admission = self.sidecar.admission
        return not (admission.in_flight() or admission.waiting() or self.sidecar.data.in_progress)


def samples(text: str) -> dict[str, float]:
    """Parse Prometheus text. Return the value of each sample by its name with labels."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def free_port() -> int:
    """Give a port of the loopback that nothing uses.

    It is below the ports that the kernel gives to outgoing connections, and each worker of pytest-xdist has 500 of its
    own, so no test that runs at the same time takes it before it is used.
    """
    first = 20_000 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = first + secrets.randbelow(500)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Running]:
    """Start a sidecar with these settings on free ports, and close it afterwards."""
    given = {"host": "127.0.0.1", "port": 0, "admin_host": "127.0.0.1", "admin_port": 0, **settings}
    sidecar = Sidecar(load(given, environ={})[0])
    try:
        await sidecar.start()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(BOUND)) as client:
            yield Running(sidecar, client)
    finally:
        await sidecar.close()


class Process:
    """`vlm-sidecar serve` as a separate process."""

    def __init__(self, *options: str, environ: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> None:
        """`prefix` is a command that runs the process, such as `prlimit`."""
        self._options = options
        self._prefix = prefix
        self._environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("SIDECAR_", "TRIO_", "DASHSCOPE"))
        } | (environ or {})
        self.log = ""

    async def __aenter__(self) -> Process:
        self.process = await asyncio.create_subprocess_exec(
            *self._prefix, sys.executable, "-m", "sidecar", "serve", "--port", "0", "--admin-port", "0",
            "--log-format", "human", *self._options, stderr=subprocess.PIPE, env=self._environ,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read())
        self._ready = asyncio.Event()
        async with asyncio.timeout(BOUND):
            await self._ready.wait()
        if self.process.returncode is None and (found := re.search(r" on \S+?:(\d+), .* on \S+?:(\d+)", self.log)):
            self.port, self.admin_port = int(found[1]), int(found[2])
            self.url, self.admin_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        return self

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.log += line.decode()
            if "probes and metrics on" in self.log:
                self._ready.set()
        await self.process.wait()
        self._ready.set()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the end of the process and return its exit status."""
        async with asyncio.timeout(BOUND):
            await self._reader
            return await self.process.wait()

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.signal(signal.SIGKILL)
        await self.ended()


class SimulatedProcess(Process):
    """`vlm-sidecar simulate` as a separate process. `url` is its base URL, up to and including `/v1`."""

    async def __aenter__(self) -> SimulatedProcess:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sidecar", "simulate", *self._options,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self._environ,
        )  # fmt: skip
        self._ready = asyncio.Event()
        self._reader = asyncio.create_task(self._read())
        assert self.process.stdout is not None
        async with asyncio.timeout(BOUND):
            self.url = (await self.process.stdout.readline()).decode().strip()
        assert self.url, self.log
        self.port = int(self.url.rsplit(":", 1)[1].split("/")[0])
        return self
