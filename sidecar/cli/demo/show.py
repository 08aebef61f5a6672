"""Plays the two scenarios of the demo: without a quota, and with a quota that the clients do not know."""

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
from sidecar.cli.demo.table import Row, summary, table

#: Seconds that the simulated provider takes for an answer. cortex measured this value (contract.md, "The story it
#: serves").
ANSWER_SECONDS = 1.27
#: Second scenario: quota in requests/s, burst in requests, load as a share of the quota, rounds. All cameras send at
#: the same instant.
QUOTA_PER_SECOND, BURST, LOAD, ROUNDS = 3.0, 3, 0.9, 3
#: Second scenario: seconds after which a description is too late to be useful, so the frame is lost.
FRAME_TIMEOUT_SECONDS = 8.0
#: First scenario: seconds until a frame is lost. Long enough that no frame is lost, so that all waits are measured.
LONG_FRAME_TIMEOUT_SECONDS = 60.0

_SEMAPHORES = (1, 16)
_DRAW_SECONDS = 0.2
Sender = Semaphore | ThroughSidecar
OnProgress = Callable[[Result], None]
RenderView = Callable[[], Awaitable[list[str]]]
Load = Callable[[Sender, int, OnProgress], Awaitable[Result]]


def show(speed: float, html: Path | None = None) -> int:
    """Play the demo and return the exit status. With a `speed` of 2, all times are halved and the quota is doubled.

    `html` is the file for the report with plots.
    """
    if not speed > 0:
        print(f"vlm-sidecar demo: --speed must be above 0, not {speed}", file=sys.stderr)
        return 2
    try:
        if html is not None:
            html.touch()  # report a file that cannot be written now, not after the whole demo
        scenarios = asyncio.run(_show(speed))
        if html is not None:
            html.write_text(report(scenarios))
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
    assert task is not None  # noqa: S101  a coroutine always runs in a task
    # SIGTERM stops the other processes too, like Ctrl-C.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    answer, quota = ANSWER_SECONDS / speed, QUOTA_PER_SECOND * speed
    frames = cameras.bodies()
    size = sum(map(len, frames)) / len(frames) / 1000
    print(f"{CAMERAS} cameras, a JPEG frame in each request ({size:.0f} KB), to a provider that takes {answer:g} s.")
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:

        def in_turn(sender: Sender, size: int, on_progress: OnProgress) -> Awaitable[Result]:
            # With a semaphore of 1, a round takes the time of 10 answers, so one counted round is enough.
            return cameras.in_turn(
                sender, frames, 1 if size == 1 else 2, LONG_FRAME_TIMEOUT_SECONDS / speed, on_progress
            )

        def at_once(sender: Sender, _: int, on_progress: OnProgress) -> Awaitable[Result]:
            period = CAMERAS / (LOAD * quota)
            return cameras.at_once(sender, frames, ROUNDS, FRAME_TIMEOUT_SECONDS / speed, on_progress, period=period)

        no_quota = await _play(client, speed, "no quota", ["--latency", str(answer)], in_turn)
        hidden = ["--requests-per-second", str(quota), "--burst", str(BURST)]
        with_quota = await _play(client, speed, "hidden quota", ["--latency", str(answer), *hidden], at_once)
    print()
    no_quota_title = "No quota. Each camera sends its next frame when the last is described; the first is not counted."
    print(table(no_quota_title, no_quota))
    print()
    with_quota_title = (
        f"A hidden quota of {quota:g} requests/s. All cameras send at the same instant, {LOAD:.0%} of the quota in all;"
        f"\na frame that is not described within {FRAME_TIMEOUT_SECONDS / speed:g} s is lost."
    )
    print(table(with_quota_title, with_quota))
    print()
    print(
        "Queue: waiting for a permit, for the limit, or to try again; lock: for a connection"
        "\n(a semaphore's client cannot tell); upstream: the provider."
    )
    print()
    print(summary(no_quota, with_quota))
    return [(no_quota_title, no_quota), (with_quota_title, with_quota)]


async def _play(
    client: aiohttp.ClientSession, speed: float, scenario: str, options: list[str], load: Load
) -> list[Row]:
    """Send the load with each sender, one after the other, each time to a new provider."""
    rows = []
    for size in (*_SEMAPHORES, 0):
        async with (
            processes.provider(*options) as upstream,
            _sender(client, upstream, size, speed) as (name, sender, render_view),
        ):
            async with _progress(f"{scenario}, {name}", render_view) as on_progress:
                result = await load(sender, size, on_progress)
            async with client.get(f"{upstream.removesuffix('/v1')}/_simulate/stats") as response:
                refused = (await response.json())["refused"]
            rows.append(Row(name, result, sum(refused.values())))
    return rows


@contextlib.asynccontextmanager
async def _sender(
    client: aiohttp.ClientSession, upstream: str, size: int, speed: float
) -> AsyncIterator[tuple[str, Sender, RenderView]]:
    """Yield the name of a sender, the sender, and a function that renders its live view.

    The sender is a client with a semaphore of `size`; for size 0, a client of a newly started sidecar.
    """
    if size:
        yield f"semaphore of {size}", Semaphore(client, upstream, size, speed), _no_view
        return
    async with processes.sidecar(upstream, client) as (url, admin_url):

        async def render_view() -> list[str]:
            async with client.get(f"{admin_url}/history") as response:
                view = top.View(await response.json())
            return ["", *top.render(view, width=shutil.get_terminal_size().columns - 1, paint=top.painter())]

        yield "sidecar", ThroughSidecar(client, url), render_view


async def _no_view() -> list[str]:
    return []  # a semaphore has no live view


@contextlib.asynccontextmanager
async def _progress(name: str, render_view: RenderView) -> AsyncIterator[OnProgress]:
    """Show the progress of a run. Yield the function to call with each new result.

    On a terminal: a line that changes, and below it the live view of `vlm-sidecar top`. Elsewhere: one line at the
    start and one line at the end.
    """
    clock = asyncio.get_running_loop().time
    began, live = clock(), sys.stdout.isatty()
    latest = Result()

    def line() -> str:
        counts = f"{len(latest.answered)} described, {latest.lost} lost"
        if latest.uncounted and not latest.answered:
            counts = f"{latest.uncounted} described of the first round, which is not counted"
        return f"  {name + ':':34}{clock() - began:5.1f} s   {counts}"

    async def keep_showing() -> None:
        while True:
            below = (await render_view())[: shutil.get_terminal_size().lines - 2]
            drawn = "".join(f"\n{text}\x1b[K" for text in below) + "\x1b[J"
            back = f"\x1b[{len(below)}A" if below else ""
            print(f"\r{line()}\x1b[K{drawn}{back}\r", end="", flush=True)
            await asyncio.sleep(_DRAW_SECONDS)

    def on_progress(result: Result) -> None:
        nonlocal latest
        latest = result

    if live:
        showing = asyncio.create_task(keep_showing())
        try:
            yield on_progress
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            print("\r\x1b[J", end="", flush=True)
    else:
        print(f"  {name} …", flush=True)
        yield on_progress
    print(line(), flush=True)
