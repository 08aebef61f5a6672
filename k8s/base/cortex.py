"""A stand-in for cortex: every camera sends one frame per second. It logs the counts of outcomes every ten seconds.

On SIGTERM it stops sending, waits for the answers to the frames in flight, and logs the number of lost frames.
"""

import asyncio
import base64
import collections
import contextlib
import json
import os
import pathlib
import signal

import aiohttp

URL = "http://127.0.0.1:8100/api/inference/describe"
FRAME = base64.b64encode(pathlib.Path(__file__).with_name("frame.jpg").read_bytes()).decode()


async def camera(name: str, session: aiohttp.ClientSession, ended: asyncio.Event, counts: collections.Counter) -> None:
    while not ended.is_set():
        counts["sent"] += 1
        try:
            async with session.post(URL, json={"image_b64": FRAME}, headers={"X-Camera-Id": name}) as response:
                await response.read()
                outcome = "answered" if response.status == 200 else f"status_{response.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome = type(error).__name__
        counts[outcome] += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), timeout=1)


async def report(counts: collections.Counter) -> None:
    while True:
        await asyncio.sleep(10)
        print(json.dumps(counts), flush=True)


async def main() -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    counts: collections.Counter = collections.Counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as session:
        reporter = asyncio.create_task(report(counts))
        cameras = int(os.environ.get("CAMERAS", "10"))
        await asyncio.gather(*(camera(f"camera-{n}", session, ended, counts) for n in range(cameras)))
        reporter.cancel()
    print(json.dumps({**counts, "lost": counts["sent"] - counts["answered"]}), flush=True)


asyncio.run(main())
