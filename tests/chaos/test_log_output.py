"""Stderr accepts nothing: a pipe that nobody reads, a closed pipe, a full disk. Serving continues at the same speed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time

import aiohttp
import pytest
from real_parts import only_on_linux
from running import BOUND, CHAT, chat, free_port, samples

DROPPED = "sidecar_log_lines_dropped_total"
pytestmark = only_on_linux("/dev/full, and the size of a pipe that can be set")


@contextlib.asynccontextmanager
async def serving_to(stderr, *options):
    """Run `vlm-sidecar serve` with this stderr. Yield the process, a client, and the URLs of the two listeners."""
    port, admin_port = free_port(), free_port()
    command = [sys.executable, "-m", "sidecar", "serve", "--port", str(port), "--admin-port", str(admin_port)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SIDECAR_", "TRIO_", "DASH"))}
    if stderr is None:
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    process = await asyncio.create_subprocess_exec(*command, *options, "--access-log", stderr=stderr, env=environ)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(BOUND)) as client:
            admin_url = f"http://127.0.0.1:{admin_port}"
            async with asyncio.timeout(BOUND):
                while not await is_ready(client, admin_url):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            yield process, client, f"http://127.0.0.1:{port}", admin_url
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(BOUND):
                assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def is_ready(client, admin_url):
    try:
        async with client.get(f"{admin_url}/readyz") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def ask(client, url, count):
    """Send requests one after the other. Return the longest time that an answer took, in seconds."""
    longest = 0.0
    for _ in range(count):
        began = time.monotonic()
        async with client.post(url + CHAT, json=chat(max_tokens=1)) as response:
            assert response.status == 200
            await response.read()
        longest = max(longest, time.monotonic() - began)
    return longest


async def dropped(client, admin_url):
    async with client.get(f"{admin_url}/metrics") as response:
        return samples(await response.text())[DROPPED]


@pytest.fixture
async def upstream(provider):
    url, _ = await provider(latency_seconds=0.001)
    return ("--dashscope-url", url)


async def test_a_pipe_that_nobody_reads_delays_nothing_and_a_reader_that_comes_back_gets_the_lines_in_order(upstream):
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    try:
        async with serving_to(write, *upstream) as (_, client, url, admin_url):
            os.close(write)
            assert await ask(client, url, 100) < 2.0
            assert await dropped(client, admin_url) == 0  # the lines wait
            reading = asyncio.create_task(asyncio.to_thread(lambda: b"".join(iter(lambda: os.read(read, 65536), b""))))
        text = (await reading).decode()
    finally:
        os.close(read)
    times = [line.split('"')[3] for line in text.splitlines()]
    assert len(times) > 100
    assert times == sorted(times)


async def test_with_a_pipe_that_nobody_reads_the_process_ends(upstream):
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    async with serving_to(write, *upstream) as (_, client, url, _):
        os.close(write)
        await ask(client, url, 40)
        began = time.monotonic()
    assert time.monotonic() - began < 6.0
    os.close(read)


@pytest.mark.parametrize("kind", ["a closed pipe", "a full disk", "a closed descriptor"])
async def test_lines_that_cannot_be_written_are_dropped_and_counted(upstream, kind):
    with contextlib.ExitStack() as stack:
        if kind == "a full disk":
            stderr = os.open("/dev/full", os.O_WRONLY)
            stack.callback(os.close, stderr)
        elif kind == "a closed pipe":
            read, stderr = os.pipe()
            stack.callback(os.close, stderr)
            os.close(read)
        else:
            stderr = None
        async with serving_to(stderr, *upstream) as (_, client, url, admin_url):
            assert await ask(client, url, 10) < 2.0
            assert await dropped(client, admin_url) >= 10


def test_an_error_at_the_start_is_printed_after_the_lines_before_it(tmp_path):
    command = [sys.executable, "-m", "sidecar", "serve", "--port", "0", "--admin-port", "0", "--dashscope-url"]
    command += ["http://127.0.0.1:9/v1", "--dashscope-api-key-file", str(tmp_path / "missing")]
    environ = {"SIDECAR_PROT": "1", "PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=BOUND, env=environ, check=False)
    lines = ended.stderr.splitlines()
    assert (ended.returncode, len(lines)) == (2, 2), ended.stderr
    assert "SIDECAR_PROT" in lines[0]
    assert lines[1].startswith("vlm-sidecar: SIDECAR_DASHSCOPE_API_KEY_FILE: ")
