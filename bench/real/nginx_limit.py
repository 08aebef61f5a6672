"""A real nginx that limits with its default 503 page, in front of a server that answers in 0.2 to 1 s.

    python bench/real/nginx_limit.py                 # every limit with both loads, 90 s, all at the same time
    python bench/real/nginx_limit.py --only burst --loads 1.5 --seconds 60

`vlm-sidecar serve` runs as a process in front of nginx, and ten cameras send through it: 1.5 times the quota, and nine
tenths of it. For each run the program prints: the calls offered and answered in time, the share of the quota that was
used (accepted calls, from nginx's access log), nginx's refusals in 1,000 calls, the callers' 5xx (without the sidecar's
own refusals), and the limits that the sidecar has learned. nginx must be installed (`.ci/parts` brings it on Debian).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bench.live import Live
from bench.sim.load import Run

ROOT = Path(__file__).resolve().parent.parent.parent
#: nginx's limit in requests/s, and the mean seconds of an answer. They make 6 connections allow the same rate.
RATE, MEAN_SECONDS = 10.0, 0.6
#: The lines of nginx's configuration that make each limit: nginx's own spelling, with its default status 503.
LIMITS = {
    "no burst": "limit_req zone=requests;",
    "burst": "limit_req zone=requests burst=5 nodelay;",
    "connections": f"limit_conn connections {RATE * MEAN_SECONDS:.0f};",
}
START_SECONDS = 60.0
DEADLINE_SECONDS = 20.0
ANSWER = (
    b'{"id":"1","object":"chat.completion","model":"m","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"A gate."}}],"usage":{"prompt_tokens":300,"completion_tokens":9}}'
)


class Answering:
    """A server that answers every request, by default after 0.2 to 1 s."""

    def __init__(self, seed: int, mean_seconds: float = MEAN_SECONDS) -> None:
        self._random = Random(seed)
        self._mean_seconds = mean_seconds

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled: the program ends while nginx waits for an answer.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                await asyncio.sleep(self._mean_seconds * self._random.uniform(1 / 3, 5 / 3))
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)
                writer.write(head + ANSWER)
        writer.close()


@contextlib.contextmanager
def writable_folder() -> Iterator[Path]:
    """Make a folder in which nginx's worker may write, whatever user it runs as."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


@contextlib.asynccontextmanager
async def nginx(limit: str, upstream: int, folder: Path, status: int = 503, rate: float = RATE) -> AsyncIterator[int]:
    """Run nginx with this limit in front of the port `upstream`. Yields its port; `folder/access` is its log."""
    program = shutil.which("nginx", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", f"{ROOT}/.parts/usr/sbin"]))
    if program is None:
        raise RuntimeError("nginx is not installed")
    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port: int = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    temporary = "".join(f"{kind}_temp_path {folder}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(f"""
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/errors crit;
events {{ worker_connections 1024; }}
http {{
  {temporary}
  log_format short "$msec $status"; access_log {folder}/access short;
  limit_req_zone $server_name zone=requests:1m rate={60 * rate:.0f}r/m;
  limit_conn_zone $server_name zone=connections:1m;
  limit_req_status {status}; limit_conn_status {status};
  upstream model {{ server 127.0.0.1:{upstream}; }}
  server {{
    listen 127.0.0.1:{port}; server_name model; client_max_body_size 14m; client_body_buffer_size 1m;
    location / {{ {limit} proxy_pass http://model; proxy_http_version 1.1; }}
  }}
}}
""")
    process = await asyncio.create_subprocess_exec(program, "-c", f"{folder}/nginx.conf", "-e", f"{folder}/errors")
    try:
        async with asyncio.timeout(START_SECONDS):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)
        yield port
    finally:
        process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def sidecar(upstream: str) -> AsyncIterator[tuple[str, str]]:
    """Run `vlm-sidecar serve`. Yields the URLs of its chat completions and of its admin listener."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "serve", "--port", "0", "--admin-port", "0", "--admin-host", "127.0.0.1",
        "--log-format", "human", "--dashscope-url", upstream, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stderr is not None
    line = b""
    try:
        async with asyncio.timeout(START_SECONDS):
            while b"probes and metrics on" not in line:
                line = await process.stderr.readline()
        found = re.search(rb" on \S+?:(\d+), .* on \S+?:(\d+)", line)
        assert found is not None, line
        rest = asyncio.create_task(process.stderr.read())
        yield f"http://127.0.0.1:{int(found[1])}/v1/chat/completions", f"http://127.0.0.1:{int(found[2])}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    await rest


def calls(folder: Path) -> tuple[list[float], list[float]]:
    """Return the times at which nginx ended accepted calls, and at which it refused calls."""
    lines = [line.split() for line in (folder / "access").read_text().splitlines()]
    return [float(at) for at, status in lines if status in ("200", "499")], [
        float(at) for at, status in lines if status in ("503", "429")
    ]


async def learned(client: aiohttp.ClientSession, admin: str) -> str:
    """Return the learned limits, as the metrics show them."""
    async with client.get(f"{admin}/metrics") as response:
        text = await response.text()
    found = []
    for name, unit in (("requests_per_second", "/s"), ("concurrency", " at a time")):
        found += [f"{float(value):.2f}{unit}" for value in re.findall(rf"sidecar_limit_{name}{{.*?}} (\S+)", text)]
    return ", ".join(found) or "no limit"


async def measure(name: str, load: float, seconds: float, status: int) -> str:
    """Play one limit with one load and return its line of the table."""
    with writable_folder() as folder:
        answering = await asyncio.start_server(Answering(1).serve, "127.0.0.1", 0)
        try:
            upstream = answering.sockets[0].getsockname()[1]
            async with (
                nginx(LIMITS[name], upstream, folder, status) as port,
                sidecar(f"http://127.0.0.1:{port}/v1") as (url, admin),
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
            ):
                run = Run(Live(client, url), seconds, DEADLINE_SECONDS, random=Random(f"1 {load}"))
                await run.arrive(load * RATE)
                limits = await learned(client, admin)
        finally:
            answering.close()
        accepted, refused = calls(folder)
        took = max([*accepted, *refused]) - min([*accepted, *refused])
        late = sum(at > min([*accepted, *refused]) + 20.0 for at in refused)
    outcomes = run.outcomes()
    total = len(accepted) + len(refused)
    return (
        f"{name:<12} {load:>4.1f} {len(run.records):>8} {outcomes['ok']:>9} {len(accepted) / (RATE * took):>11.3f}"
        f" {1000 * len(refused) / max(total, 1):>13.1f} {1000 * late / max(total, 1):>11.1f} {outcomes['failed']:>8}"
        f"   {limits};  {dict(outcomes)}"
    )


async def measure_all(names: list[str], loads: list[float], seconds: float, status: int) -> None:
    runs = [asyncio.create_task(measure(name, load, seconds, status)) for name in names for load in loads]
    print("limit        load  offered  answered  quota used  refusals/1000  after 20 s  5xx seen   learned;  outcomes")
    for run in runs:
        print(await run, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--loads", nargs="*", type=float, default=[1.5, 0.9], help="offered, as multiples of the quota")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--status", type=int, default=503, help="of a refusal; 429 for comparison (default: 503)")
    options = parser.parse_args()
    asyncio.run(measure_all(options.only, options.loads, options.seconds, options.status))


if __name__ == "__main__":
    main()
