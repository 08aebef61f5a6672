"""The commands `vlm-sidecar demo` and `vlm-sidecar simulate`."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import aiohttp
import pytest
from PIL import Image
from real_parts import only_on_linux
from running import BOUND, chat

from backends.media import image_size
from sidecar.cli.demo import processes
from sidecar.cli.demo.cameras import Answered, Result
from sidecar.cli.demo.frames import HEIGHT, WIDTH, frame
from sidecar.cli.demo.report import report
from sidecar.cli.demo.table import Row, percentile, summary, table


def test_a_frame_is_a_jpeg_that_pillow_can_decode():
    for camera in range(3):
        with Image.open(io.BytesIO(frame(camera))) as image:
            image.load()
            assert (image.format, image.size) == ("JPEG", (WIDTH, HEIGHT))
            darkest, brightest = image.getextrema()
            assert darkest < 80
            assert brightest > 180
    assert image_size(frame(0)) == (WIDTH, HEIGHT)
    assert frame(0) == frame(0) != frame(1)


def test_a_frame_has_the_brightness_that_was_drawn():
    """The sky has a brightness of 220 at the top. The mean of its texture over the whole width is zero."""
    with Image.open(io.BytesIO(frame(0))) as image:
        top = image.crop((0, 0, WIDTH, 8)).tobytes()
    assert sum(top) / len(top) == pytest.approx(220, abs=8)


def answered(*totals: float) -> list[Answered]:
    return [Answered(total, total - 1.0, 0.25, 0.75) for total in totals]


def test_the_table_contains_the_measurements():
    row = Row("sidecar", Result(sent=5, lost=1, answered=answered(4.0, 1.0, 3.0, 2.0)), refusals=7)
    figures = table("title", [row]).splitlines()[-1].split()
    assert figures == ["sidecar", "5", "1", "7", "2.50", "2.00", "4.00", "1.50", "0.25", "0.75"]


def test_a_sender_that_lost_every_frame_has_no_times():
    row = Row("semaphore", Result(sent=5, lost=5), refusals=15)
    assert table("title", [row]).splitlines()[-1].split() == ["semaphore", "5", "5", "15", *["-"] * 6]
    assert "no frame described, and 5 of 5 frames lost" in summary([row], [row])


def test_percentiles_are_nearest_ranks():
    values = [float(value) for value in range(1, 201)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [100.0, 198.0, 200.0]
    assert percentile([3.0], 0.5) == 3.0


def test_the_report_shows_every_sender_and_names_no_other_origin():
    rows = [
        Row("semaphore of 1", Result(sent=4, lost=4), refusals=12),
        Row("semaphore of 16", Result(sent=4, lost=1, answered=answered(1.5, 2.5, 3.0)), refusals=3),
        Row("sidecar", Result(sent=4, lost=0, answered=answered(1.0, 2.0, 3.0, 4.0)), refusals=1),
    ]
    page = report([("no <quota>", rows), ("hidden quota", rows)])
    tree = ElementTree.fromstring(re.sub(r"<(meta|!doctype)[^>]*>", "", page))  # noqa: S314  our own text
    assert [title.text for title in tree.iter("h2")] == ["no <quota>", "hidden quota"]
    assert "sidecar: p99 4.00 s, 0 lost" in page
    assert "none described" in page
    bars = [bar for bar in tree.iter("rect") if bar.get("class") == "area orange"]
    assert [float(bar.get("width")) for bar in bars[:3]] == sorted(float(bar.get("width")) for bar in bars[:3])
    assert not re.search(r"https?://|src=|@import", page)


async def test_a_report_that_cannot_be_written_stops_the_demo_before_it_starts(tmp_path):
    async with command("demo", "--html", str(tmp_path / "nowhere" / "report.html")) as process:
        printed, complaint = await process.communicate()
    assert (process.returncode, printed) == (1, b"")
    assert b"No such file or directory" in complaint


@contextlib.asynccontextmanager
async def command(*arguments: str):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_the_demo_runs_end_to_end_and_counts_every_frame():
    async with command("demo", "--speed", "10") as process, asyncio.timeout(60):
        output, errors = (stream.decode() for stream in await process.communicate())
    assert (process.returncode, errors) == (0, "")
    rows = re.findall(r"^(semaphore of 1|semaphore of 16|sidecar) +(\d+) +(\d+) +(\d+) +(\S+)", output, re.MULTILINE)
    assert [row[0] for row in rows] == ["semaphore of 1", "semaphore of 16", "sidecar"] * 2
    free, limited = rows[:3], rows[3:]
    assert [int(row[1]) for row in free] == [10, 20, 20]
    assert {int(row[2]) for row in free} == {0}, "nothing is lost where there is no quota"
    assert {int(row[3]) for row in free} == {0}, "nothing is refused where there is no quota"
    assert {int(row[1]) for row in limited} == {30}
    one, sixteen, sidecar = (float(row[4]) for row in free)
    assert one > 5 * sidecar, "ten cameras behind a semaphore of 1 wait for each other"
    assert min(sixteen, sidecar) >= 0.127, "no answer is faster than the provider"
    assert int(limited[1][3]) > 0, "all cameras at once are more than the quota lets through"
    assert "semaphore of 1: " in output.splitlines()[-4]


async def test_the_error_of_a_process_that_does_not_start_is_shown():
    with pytest.raises(processes.DemoError, match=r"did not start: .*latency_seconds must be at least 0"):
        async with processes.provider("--latency", "-1"):
            pytest.fail("there is no such provider")
    async with aiohttp.ClientSession() as client:
        with pytest.raises(processes.DemoError, match=r"did not start: .*SIDECAR_DASHSCOPE_URL"):
            async with processes.sidecar("nowhere", client):
                pytest.fail("there is no such upstream")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@only_on_linux("the test reads the processes that a process started from /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_stopped_demo_leaves_no_process_behind(number):
    async with command("demo") as process, asyncio.timeout(BOUND):
        assert process.stdout is not None
        while not (await process.stdout.readline()).startswith(b"  no quota, semaphore of 1"):
            assert not process.stdout.at_eof()
        started = children_of(process.pid)
        assert started
        process.send_signal(number)
        await process.wait()
    assert process.returncode == 130
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_simulate_prints_its_url_serves_its_quota_and_exits_with_0_on_a_signal():
    options = ("--port", "0", "--requests-per-second", "0.001", "--burst", "2", "--api-key", "sk-1")
    async with command("simulate", *options) as process, asyncio.timeout(BOUND):
        url = (await process.stdout.readline()).decode().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)
        async with aiohttp.ClientSession() as client:
            statuses = []
            for key in ("sk-1", "sk-1", "sk-1", "sk-\xe9"):
                headers = {"Authorization": f"Bearer {key}"}
                async with client.post(f"{url}/chat/completions", json=chat(), headers=headers) as reply:
                    statuses.append(reply.status)
            async with client.get(f"{url.removesuffix('/v1')}/_simulate/stats") as reply:
                counts = await reply.json()
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert statuses == [200, 200, 429, 401]
    assert (counts["accepted"], counts["refused"]) == (2, {"request_rate": 1})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("simulate", "--latency", "-1"), "latency_seconds must be at least 0"),
        (("simulate", "--outages", "soon"), "outages cannot be"),
        (("demo", "--speed", "0"), "--speed must be above 0"),
    ],
)
async def test_bad_usage_is_one_line_that_names_the_option(arguments, named):
    async with command(*arguments) as process, asyncio.timeout(BOUND):
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert named in errors.decode()
    assert len(errors.decode().splitlines()) == 1
