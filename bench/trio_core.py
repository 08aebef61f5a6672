"""Run the same cortex-like load on trio-core 1.1.5 with a semaphore of 1, then of 16, and then on the sidecar.

    make .venv-trio/.ready && .venv/bin/python bench/trio_core.py [--seconds 48]

Ten cameras send a frame every few seconds, all at the same instant, alternately to `describe` and `crop-describe`. The
simulated provider needs about 1.27 s per answer, allows 3 requests/s and answers one call in twenty with a 500. Unlike
`make demo`, this runs trio-core itself, with its own client and thread pool. A frame counts as lost if it gets no 200
within a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, quantiles

import aiohttp

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "parity")]

from running import Process  # noqa: E402
from trio_core_process import trio_core  # noqa: E402

from backends.simulated import PROVIDER, Profile, serve  # noqa: E402
from sidecar.cli.demo.frames import frame  # noqa: E402

CAMERAS = 10
EVERY_SECONDS = 4.0
PATIENCE_SECONDS = 60.0
PROFILE = Profile(
    latency_seconds=1.27, latency_sigma=0.2, requests_per_second=3, burst_requests=3, error_share=0.05, seed=1
)
CROPS = [
    {"class": "car", "bbox": [100, 300, 500, 600], "confidence": 0.9},
    {"class": "person", "bbox": [700, 200, 800, 600], "confidence": 0.7},
]
System = Callable[[str], AbstractAsyncContextManager[tuple[str, int]]]


@dataclass
class Result:
    seconds: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    refusals: int = 0
    memory_mb: float = 0.0

    @property
    def lost(self) -> int:
        return sum(status != 200 for status in self.statuses)


def of_trio_core(size: int) -> System:
    return lambda url: trio_core(
        str(ROOT / ".venv-trio" / "bin" / "python"), remote_vlm_url=url, vlm_api_concurrency=str(size)
    )


@asynccontextmanager
async def of_sidecar(url: str) -> AsyncIterator[tuple[str, int]]:
    async with Process("--dashscope-url", url) as process:
        yield process.url, process.process.pid


async def run(system: System, seconds: float) -> Result:
    """Run the load on one system, in front of its own simulated provider."""
    runner = await serve(PROFILE)
    result = Result()
    try:
        host, port = runner.addresses[0][:2]
        async with (
            system(f"http://{host}:{port}/compatible-mode/v1") as (url, pid),
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
            asyncio.TaskGroup() as cameras,
        ):
            for number in range(CAMERAS):
                cameras.create_task(camera(client, url, number, seconds, result))
            frames = CAMERAS * int(seconds / EVERY_SECONDS)
            cameras.create_task(watch(pid, result, lambda: len(result.statuses) < frames))
        result.refusals = sum(runner.app[PROVIDER].counts.refused.values())
    finally:
        await runner.cleanup()
    return result


async def camera(client: aiohttp.ClientSession, url: str, number: int, seconds: float, result: Result) -> None:
    """Send a frame every `EVERY_SECONDS`, independent of earlier frames."""
    image = base64.b64encode(frame(number)).decode()
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as frames:
        for beat in range(int(seconds / EVERY_SECONDS)):
            await asyncio.sleep(began + beat * EVERY_SECONDS - loop.time())
            path, more = ("crop-describe", {"crops": CROPS}) if (beat + number) % 2 else ("describe", {})
            body = {"image_b64": image, **more}
            frames.create_task(send(client, f"{url}/api/inference/{path}", body, f"camera-{number}", result))


async def send(client: aiohttp.ClientSession, url: str, body: object, key: str, result: Result) -> None:
    loop = asyncio.get_running_loop()
    sent, status = loop.time(), 0
    try:
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            client.post(url, json=body, headers={"X-Camera-Id": key}) as response,
        ):
            await response.read()
            status = response.status
    except (TimeoutError, aiohttp.ClientError):
        pass  # the frame is lost, and counted as such below
    if status == 200:
        result.seconds.append(loop.time() - sent)
    result.statuses.append(status)


async def watch(pid: int, result: Result, is_running: Callable[[], bool]) -> None:
    """Record the peak memory of the process, from Linux's VmHWM, while the system runs."""
    status = Path(f"/proc/{pid}/status")
    while is_running():
        text = await asyncio.to_thread(status.read_text)
        result.memory_mb = int(text.partition("VmHWM:")[2].split()[0]) / 1024
        await asyncio.sleep(0.5)


async def main(seconds: float) -> None:
    systems: dict[str, System] = {
        "trio-core, semaphore 1": of_trio_core(1),
        "trio-core, semaphore 16": of_trio_core(16),
        "vlm-sidecar": of_sidecar,
    }
    print("| | mean s | p50 s | p99 s | frames | lost | refusals at the provider | memory MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, system in systems.items():
        result = await run(system, seconds)
        cuts = quantiles(result.seconds, n=100)
        print(
            f"| {name} | {mean(result.seconds):.1f} | {cuts[49]:.1f} | {cuts[98]:.1f} | {len(result.statuses)} "
            f"| {result.lost} | {result.refusals} | {result.memory_mb:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=48.0, help="how long cameras send (default: 48)")
    asyncio.run(main(parser.parse_args().seconds))
