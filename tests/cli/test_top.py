"""`vlm-sidecar top`, with and without a terminal, and the events that it and the live page use."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import aiohttp
from running import BOUND, CHAT, Process, chat

from sidecar.cli import top
from sidecar.observe.format import duration, number
from sidecar.observe.time_series import FIELDS


async def run_top(port):
    """Run `top` with its output in a pipe."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "top", "--admin-port", str(port),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    async with asyncio.timeout(BOUND):
        printed, complaint = await process.communicate()
    return process.returncode, printed.decode(), complaint.decode()


async def test_without_a_terminal_it_prints_once_why_requests_wait(serving, provider):
    url, simulated = await provider(latency_seconds=8.0)
    sidecar = await serving(dashscope_url=url, max_concurrency=2)
    asking = [
        asyncio.ensure_future(sidecar.post(headers={"X-Camera-Id": f"gate-{n % 2}"}).__aenter__()) for n in range(6)
    ]
    await sidecar.until(lambda: simulated.counts.in_flight == 2 and sidecar.sidecar.admission.waiting() == 4)
    sidecar.sidecar.parts.sampler.sample()
    status, printed, complaint = await run_top(sidecar.sidecar.admin_port)
    assert (status, complaint) == (0, "")
    assert "dashscope qwen-vl-plus" in printed
    assert "4 wait for one of the 2 permits, 2 are in flight" in printed
    queues = re.search(r"queues +(gate-\d 2) \(since \d\.\d s\) · (gate-\d 2) \(since", printed)
    assert queues and set(queues.groups()) == {"gate-0 2", "gate-1 2"}  # both wait equally long
    assert "\x1b" not in printed
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_without_a_sidecar_it_prints_an_error():
    status, printed, complaint = await run_top(1)
    assert (status, printed) == (1, "")
    assert "no sidecar answers on 127.0.0.1:1: Connection refused" in complaint


async def test_on_a_terminal_it_survives_a_restart_and_quits_with_q():
    """The sidecar stops, and another one starts at the same port. After `q` the terminal has its old state."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    before = termios.tcgetattr(slave)
    seen = bytearray()
    loop = asyncio.get_running_loop()

    def read():
        with contextlib.suppress(OSError):
            seen.extend(os.read(master, 65536))

    async def until(text):
        async with asyncio.timeout(BOUND):
            while text not in seen:  # noqa: ASYNC110  only the screen shows it
                await asyncio.sleep(0.02)
        seen.clear()

    loop.add_reader(master, read)
    try:
        async with Process() as first:
            port = first.admin_port
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sidecar", "top", "--admin-port", str(port),
                stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"NO_COLOR": "1"},
            )  # fmt: skip
            await until(b"SIMULATED")
            async with aiohttp.ClientSession() as client, client.post(first.url + CHAT, json=chat()) as response:
                assert response.status == 200
            await until(b"simulated qwen-vl-plus")
        await until(b"looking again")
        async with Process("--admin-port", str(port)):
            await until(b"nothing was asked yet")
            os.write(master, b"q")
            async with asyncio.timeout(BOUND):
                assert await process.wait() == 0
        assert termios.tcgetattr(slave) == before
        read()
        assert seen.endswith(b"\x1b[?25h\x1b[?1049l")
    finally:
        loop.remove_reader(master)
        os.close(master)
        os.close(slave)


def view(status=None, points=()):
    model = {"model": "m\x1b[2J", "in_words": "x" * 300, "bound_by": None, "hold": None, "longest_queues": [],
             "requests": {"learned": None}}  # fmt: skip
    queue = {"requests": 0, "bytes": 0, "by_priority": {"high": 0, "normal": 0, "low": 0}}
    backend = {"name": "dashscope", "queue": queue, "models": [model]}
    fields = {
        "version": "1",
        "uptime_seconds": 7300.0,
        "ready": True,
        "reason": None,
        "simulated": False,
        "throttles": [],
    }
    return top.View(
        {
            "status": fields | {"backends": [backend]},
            "fields": FIELDS,
            "history": {"dashscope": {"recent": list(points)}},
        }
    )


def test_no_line_is_wider_than_the_terminal_and_no_name_moves_the_cursor():
    for width in (40, 80, 200):
        lines = top.render(view(), width=width)
        assert "\x1b" not in "".join(lines)
        assert max(map(len, lines)) <= width
        assert sum(line.count("x") for line in lines) >= min(300, 4 * (width - 2))


def test_numbers_and_bars_are_formatted_correctly():
    assert [number(value) for value in (0, 0.25, 16234, 999_999, 1.3e6)] == ["0", "0.25", "16.2k", "1M", "1.3M"]
    assert [duration(value) for value in (5, 119, 120, 7300, 1e6)] == ["5 s", "119 s", "2 min", "2 h", "12 d"]
    assert top.sparkline([0, 1, 8], 5) == "   ▁█"
    assert top.bar(0.5, 4) == "██··"


async def test_events_start_with_all_data_and_continue_with_each_sample(serving):
    sidecar = await serving()
    sampler = sidecar.sidecar.parts.sampler
    sampler.sample()
    async with sidecar.client.get(f"{sidecar.admin_url}/events") as response:
        assert response.content_type == "text/event-stream"
        assert await response.content.readline() == b"retry: 1000\n"
        assert await response.content.readline() == b"event: start\n"
        start = json.loads((await response.content.readline())[6:])
        assert len(start["history"]["simulated"]["recent"]) == 1
        await response.content.readline()
        sampler.sample()
        assert await response.content.readline() == b"event: tick\n"
        tick = json.loads((await response.content.readline())[6:])
        assert len(tick["points"]["simulated"]) == len(start["fields"])
        sampler.close()
        assert await response.content.read() == b"\n"


async def test_live_views_are_bounded_and_a_closed_one_frees_its_place(serving):
    sidecar = await serving()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(16):
            response = await stack.enter_async_context(sidecar.client.get(f"{sidecar.admin_url}/events"))
            assert response.status == 200
        async with sidecar.client.get(f"{sidecar.admin_url}/events") as response:
            assert response.status == 503
    async with asyncio.timeout(BOUND):
        while True:
            async with sidecar.client.get(f"{sidecar.admin_url}/events") as response:
                if response.status == 200:
                    break
            await asyncio.sleep(0.01)
