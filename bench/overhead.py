"""What the sidecar costs beside a bare aiohttp pass-through: same upstream, same client, same run; ratios at the end.

    make bench            (or .venv/bin/python bench/overhead.py [--seconds 3])

The bare pass-through reads a request, sends it on from a pooled aiohttp session and writes the answer: no queue, no
limits, no metrics, no look at the body. It has aiohttp's low-level server and uvloop, as the sidecar has. Upstream and
client are bare protocols of this file, each a process of its own, so that what is measured is what lies between.
Beside calls/s there is the processor time that the proxy itself took for a call: that holds on a busy machine too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import aiohttp
import uvloop
from aiohttp import web

from sidecar.demo.cameras import body_of
from sidecar.demo.frames import frame

ROUNDS = 3
ANSWER = json.dumps(
    {
        "id": "chat-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "A gate."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1225, "completion_tokens": 30, "total_tokens": 1255},
    }
).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class Upstream(asyncio.Protocol):
    """Answers every request at once. Reads no more of HTTP than where a request ends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = bytearray()
        self.missing = -1

    def data_received(self, data: bytes) -> None:
        if self.missing < 0:
            self.buffer += data
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self.missing = content_length(self.buffer[:end]) - (len(self.buffer) - end - 4)
            self.buffer.clear()
        else:
            self.missing -= len(data)
        if self.missing == 0:
            self.missing = -1
            self.transport.write(HEAD % len(ANSWER) + ANSWER)


class Client(asyncio.Protocol):
    """Sends one request after another on its connection, and counts."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.answered = 0
        self.buffer = bytearray()
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0 or len(self.buffer) < end + 4 + content_length(self.buffer[:end]):
            return
        if not self.buffer.startswith(b"HTTP/1.1 200 "):
            self.lost.set_exception(RuntimeError(f"not answered: {bytes(self.buffer[:300])!r}"))
            self.transport.abort()
            return
        self.buffer.clear()
        self.answered += 1
        self.transport.write(self.request)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_exception(RuntimeError(f"the connection broke: {error}"))


def content_length(head: bytes) -> int:
    at = head.lower().index(b"content-length:") + 15
    return int(head[at:].split(b"\r\n", 1)[0])


async def upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    await server.serve_forever()


async def bare(port: int, to: int) -> None:
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def handle(request: web.BaseRequest) -> web.Response:
        data = await request.read()
        headers = {"Content-Type": request.headers["Content-Type"]}
        async with session.post(f"http://127.0.0.1:{to}{request.raw_path}", data=data, headers=headers) as answer:
            return web.Response(body=await answer.read(), headers={"Content-Type": answer.headers["Content-Type"]})

    runner = web.ServerRunner(web.Server(handle, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


async def load(port: int, connections: int, seconds: float, body: bytes) -> None:
    """Print the calls answered and the seconds that they took."""
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: Client(request), "127.0.0.1", port))[1] for _ in range(connections)
    ]
    began = loop.time()
    done, _ = await asyncio.wait([client.lost for client in clients], timeout=seconds, return_when="FIRST_COMPLETED")
    took = loop.time() - began
    for lost in done:
        await lost
    print(sum(client.answered for client in clients), took)
    os._exit(0)  # with requests under way: nobody waits for those


def small() -> bytes:
    return json.dumps({"model": "qwen-vl-plus", "messages": [{"role": "user", "content": "Hello."}]}).encode()


BODIES = {"small": small, "frame": lambda: body_of(frame(0))}


@contextlib.contextmanager
def process(*arguments: str, port: int) -> Iterator[int]:
    """Run something until the block ends; gives its process id once it listens."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SIDECAR_", "TRIO_", "DASHSCOPE"))}
    child = subprocess.Popen([sys.executable, *arguments], env=environ)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(arguments)} does not listen on {port}")
            time.sleep(0.05)
        yield child.pid
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def measure(port: int, pid: int, connections: int, seconds: float, kind: str) -> tuple[float, float]:
    """Give calls/s, and milliseconds of the proxy's processor time a call."""
    before = cpu_seconds(pid)
    command = [sys.executable, __file__, "load", str(port), str(connections), str(seconds), kind]
    calls, took = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=seconds + 30
    ).stdout.split()
    return int(calls) / float(took), (cpu_seconds(pid) - before) / max(int(calls), 1) * 1000


def compare(seconds: float) -> None:
    to, bare_port, port = free_port(), free_port(), free_port()
    serve = ("-m", "sidecar", "serve", "--port", str(port), "--admin-host", "127.0.0.1", "--admin-port", "0")
    serve += ("--backend", "dashscope", "--dashscope-url", f"http://127.0.0.1:{to}/v1", "--log-level", "error")
    with (
        process(__file__, "upstream", str(to), port=to),
        process(__file__, "bare", str(bare_port), str(to), port=bare_port) as bare_pid,
        process(*serve, port=port) as pid,
    ):
        time.sleep(1)
        idle = resident_mb(bare_pid), resident_mb(pid)
        print(f"{'':24}{'bare':>22}{'sidecar':>22}{'sidecar / bare':>24}")
        print(f"{'':24}" + f"{'calls/s':>12}{'cpu ms':>10}" * 2 + f"{'calls/s':>14}{'cpu':>10}")
        for kind in BODIES:
            for connections in (1, 16):
                runs = [
                    (
                        measure(bare_port, bare_pid, connections, seconds, kind),
                        measure(port, pid, connections, seconds, kind),
                    )
                    for _ in range(ROUNDS)
                ]
                b, b_cpu = (median(values) for values in zip(*(run[0] for run in runs), strict=True))
                s, s_cpu = (median(values) for values in zip(*(run[1] for run in runs), strict=True))
                ratio = median(sidecar[0] / bare[0] for bare, sidecar in runs)
                cpu = median(sidecar[1] / bare[1] for bare, sidecar in runs)
                name = f"{kind}, {connections} connection{'s' * (connections > 1)}"
                print(f"{name:24}{b:12.0f}{b_cpu:10.3f}{s:12.0f}{s_cpu:10.3f}{ratio:14.2f}{cpu:10.2f}", flush=True)
        print(f"{'idle memory, MB':24}{idle[0]:22.1f}{idle[1]:22.1f}{idle[1] / idle[0]:24.2f}")
        print(f"{'memory after, MB':24}{resident_mb(bare_pid):22.1f}{resident_mb(pid):22.1f}")


def main() -> None:
    match sys.argv[1:]:
        case ["upstream", port]:
            uvloop.run(upstream(int(port)))
        case ["bare", port, to]:
            uvloop.run(bare(int(port), int(to)))
        case ["load", port, connections, seconds, kind]:
            uvloop.run(load(int(port), int(connections), float(seconds), BODIES[kind]()))
        case _:
            parser = argparse.ArgumentParser(description="The sidecar beside a bare aiohttp pass-through.")
            parser.add_argument("--seconds", type=float, default=3.0, help="length of each of the runs (default: 3)")
            compare(parser.parse_args().seconds)


if __name__ == "__main__":
    main()
