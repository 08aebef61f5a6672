"""The demo's two acts: without a quota, and with one that nobody told the clients of."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp

from sidecar.cli import top
from sidecar.cli.demo import cameras, processes
from sidecar.cli.demo.cameras import CAMERAS, Result, Semaphore, ThroughSidecar
from sidecar.cli.demo.report import report
from sidecar.cli.demo.table import Row, sentence, table

#: How long the provider takes: what cortex measured of its own (contract.md, "The story it serves").
ANSWER_SECONDS = 1.27
#: Act two. The cameras together come to 90 % of the quota, all at the same instant.
QUOTA_PER_SECOND, BURST, LOAD, ROUNDS = 3.0, 3, 0.9, 3
#: How long a description is of use to whoever watches a camera.
PATIENCE_SECONDS = 8.0
#: Act one: no frame is lost to waiting, so that the waits are seen whole.
LONG_PATIENCE_SECONDS = 60.0

_SEMAPHORES = (1, 16)
_DRAW_SECONDS = 0.2
Way = Semaphore | ThroughSidecar
Tell = Callable[[Result], None]
Picture = Callable[[], Awaitable[list[str]]]
Load = Callable[[Way, int, Tell], Awaitable[Result]]


def show(speed: float, html: Path | None = None) -> int:
    """Play the demo; gives the exit status. With a `speed` of 2 all times are halved and the quota is doubled.

    `html` is where to write the report with plots.
    """
    if not speed > 0:
        print(f"vlm-sidecar demo: --speed must be above 0, not {speed}", file=sys.stderr)
        return 2
    try:
        if html is not None:
            html.touch()  # a minute is too long to learn that it cannot be written
        acts = asyncio.run(_show(speed))
        if html is not None:
            html.write_text(report(acts))
            print(f"\n{html} has it with plots.")
    except OSError as error:
        print(f"vlm-sidecar demo: --html {html}: {error.strerror or error}", file=sys.stderr)
        return 1
    except processes.DemoError as error:
        print(f"vlm-sidecar demo: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("\nstopped; nothing is left running", file=sys.stderr)
        return 130
    return 0


async def _show(speed: float) -> list[tuple[str, list[Row]]]:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  a coroutine runs in one
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # the others end with us, as on Ctrl-C
    answer, quota = ANSWER_SECONDS / speed, QUOTA_PER_SECOND * speed
    frames = cameras.bodies()
    size = sum(map(len, frames)) / len(frames) / 1000
    print(f"{CAMERAS} cameras, a JPEG frame in each request ({size:.0f} KB), to a provider that takes {answer:g} s.")
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:

        def in_turn(way: Way, size: int, tell: Tell) -> Awaitable[Result]:
            # One semaphore of 1 needs 10 answers' time for a round: one is enough to see it.
            return cameras.in_turn(way, frames, 1 if size == 1 else 2, LONG_PATIENCE_SECONDS / speed, tell)

        def at_once(way: Way, _: int, tell: Tell) -> Awaitable[Result]:
            period = CAMERAS / (LOAD * quota)
            return cameras.at_once(way, frames, ROUNDS, PATIENCE_SECONDS / speed, tell, period=period)

        free = await _act(client, speed, "no quota", ["--latency", str(answer)], in_turn)
        hidden = ["--requests-per-second", str(quota), "--burst", str(BURST)]
        limited = await _act(client, speed, "hidden quota", ["--latency", str(answer), *hidden], at_once)
    print()
    easy = "No quota. Each camera sends its next frame when the last is described; the first is not counted."
    print(table(easy, free))
    print()
    title = (
        f"A hidden quota of {quota:g} requests/s. All cameras send at the same instant, {LOAD:.0%} of the quota in all;"
        f"\na frame that is not described within {PATIENCE_SECONDS / speed:g} s is lost."
    )
    print(table(title, limited))
    print()
    print(
        "Queue: waiting for a permit, for the limit, or to try again; lock: for a connection"
        "\n(a semaphore's client cannot tell); upstream: the provider."
    )
    print()
    print(sentence(free, limited))
    return [(easy, free), (title, limited)]


async def _act(client: aiohttp.ClientSession, speed: float, act: str, options: list[str], load: Load) -> list[Row]:
    """Send the load each way, one after the other, every time to a provider that is new."""
    rows = []
    for size in (*_SEMAPHORES, 0):
        async with (
            processes.provider(*options) as upstream,
            _way(client, upstream, size, speed) as (name, way, picture),
        ):
            async with _progress(f"{act}, {name}", picture) as tell:
                result = await load(way, size, tell)
            async with client.get(f"{upstream.removesuffix('/v1')}/_simulate/stats") as response:
                refused = (await response.json())["refused"]
            rows.append(Row(name, result, sum(refused.values())))
    return rows


@contextlib.asynccontextmanager
async def _way(
    client: aiohttp.ClientSession, upstream: str, size: int, speed: float
) -> AsyncIterator[tuple[str, Way, Picture]]:
    """Give a way to the provider: a semaphore of a size, or for 0 a sidecar that has just been started."""
    if size:
        yield f"semaphore of {size}", Semaphore(client, upstream, size, speed), _no_picture
        return
    async with processes.sidecar(upstream, client) as (url, admin_url):

        async def picture() -> list[str]:
            async with client.get(f"{admin_url}/history") as response:
                view = top.View(await response.json())
            return ["", *top.picture(view, width=shutil.get_terminal_size().columns - 1, paint=top.painter())]

        yield "sidecar", ThroughSidecar(client, url), picture


async def _no_picture() -> list[str]:
    return []  # a semaphore cannot say what its waiters wait for


@contextlib.asynccontextmanager
async def _progress(name: str, picture: Picture) -> AsyncIterator[Tell]:
    """Show how far a run is: on a terminal a line that changes, above what `vlm-sidecar top` shows of a sidecar.

    Elsewhere one line when it begins and one at its end.
    """
    clock = asyncio.get_running_loop().time
    began, live = clock(), sys.stdout.isatty()
    told = Result()

    def line() -> str:
        counts = f"{len(told.answered)} described, {told.lost} lost"
        if told.before and not told.answered:
            counts = f"{told.before} described of the first round, which is not counted"
        return f"  {name + ':':34}{clock() - began:5.1f} s   {counts}"

    async def keep_showing() -> None:
        while True:
            below = (await picture())[: shutil.get_terminal_size().lines - 2]
            drawn = "".join(f"\n{text}\x1b[K" for text in below) + "\x1b[J"
            back = f"\x1b[{len(below)}A" if below else ""
            print(f"\r{line()}\x1b[K{drawn}{back}\r", end="", flush=True)
            await asyncio.sleep(_DRAW_SECONDS)

    def tell(result: Result) -> None:
        nonlocal told
        told = result

    if live:
        showing = asyncio.create_task(keep_showing())
        try:
            yield tell
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            print("\r\x1b[J", end="", flush=True)
    else:
        print(f"  {name} …", flush=True)
        yield tell
    print(line(), flush=True)
