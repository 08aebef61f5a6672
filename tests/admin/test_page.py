"""The live page in a real Chromium, under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path

import aiohttp
import pytest
from running import BOUND, CHAT, Process, chat, samples

from sidecar.cli.demo.cameras import Answered, Result
from sidecar.cli.demo.report import report
from sidecar.cli.demo.table import Row

PAGE = Path(__file__).parents[2] / "sidecar" / "admin" / "page"


@contextlib.asynccontextmanager
async def opened(browser, url, **options):
    """Open the page at `url`. Yield it and a list of its console errors, exceptions and requests to other origins."""
    problems = []
    context = await browser.new_context(**options)
    page = await context.new_page()
    page.set_default_timeout(BOUND * 1000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: None if request.url.startswith(url) else problems.append(request.url))
    await page.goto(url)
    yield page, problems
    await context.close()


async def until(page, expression):
    """Wait until a JavaScript expression is true. Playwright's own wait uses eval, which the page's policy forbids."""
    async with asyncio.timeout(BOUND):
        while not await page.evaluate(expression):  # noqa: ASYNC110  the page sends no event when it has drawn
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def load(url, cameras=10):
    """Run cameras until the block ends. Each camera sends three frames at a time."""

    async def camera(client, number):
        priority = "high" if number == 0 else "low" if number == 9 else "normal"
        headers = {"X-Camera-Id": f"camera-{number}", "X-Request-Priority": priority}
        with contextlib.suppress(aiohttp.ClientError):
            while True:
                await asyncio.gather(*(ask(client, headers) for _ in range(3)))

    async def ask(client, headers):
        async with client.post(url + CHAT, json=chat(), headers=headers) as response:
            await response.read()
        if response.status != 200:
            await asyncio.sleep(0.5)  # a camera waits for its next frame

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        tasks = [asyncio.create_task(camera(client, number)) for number in range(cameras)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_under_load_the_page_shows_the_metrics_and_survives_a_restart(browser, provider, tmp_path):
    url, _ = await provider(requests_per_second=8, burst_requests=4, latency_seconds=0.4)
    where = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    async with Process("--dashscope-url", url) as process:
        port = process.admin_port
        async with opened(browser, f"{process.admin_url}/", viewport={"width": 1280, "height": 900}) as (
            page,
            problems,
        ):
            async with load(process.url):
                await until(page, "document.querySelector('.words')?.textContent.includes('wait for')")
                await until(page, "document.querySelectorAll('.throttles tr').length > 0")
                await until(page, "document.querySelectorAll('.queues tr').length > 0")
                await asyncio.sleep(float(os.environ.get("SCREENSHOT_SECONDS", "0")))  # a fuller picture for the docs
                await page.screenshot(path=where / "page-light.png")
                await page.emulate_media(color_scheme="dark")
                await page.screenshot(path=where / "page-dark.png")
                await page.set_viewport_size({"width": 390, "height": 844})
                await page.screenshot(path=where / "page-phone.png", full_page=True)
                widest = await page.evaluate("document.documentElement.scrollWidth")
                assert widest <= 390, "the page scrolls sideways on a phone"
            assert process.process.returncode is None and "defect" not in process.log, process.log
            await equal_to_metrics(page, process)
            await page.click("text=since the start")
            await until(page, "document.querySelector('path.line').getAttribute('d').length > 20")
            assert problems == []
            process.signal(15)
            await process.ended()
            await page.wait_for_selector("#lost:not([hidden])")
            async with Process("--dashscope-url", url, "--admin-port", str(port)):
                await page.wait_for_selector("#lost", state="hidden")
                await until(page, "document.querySelector('.words').textContent.includes('nothing was asked')")
            # the browser's own messages about a server that does not answer are no defect of the page
            assert [text for text in problems if "ERR_" not in text] == []


async def equal_to_metrics(page, process):
    """Wait until every total on the page equals the metrics. No request may be running."""
    names = {
        "requests": ("sidecar_requests_total", "outcome"),
        "attempts": ("sidecar_upstream_attempts_total", "result"),
        "throttles": ("sidecar_throttles_total", "kind"),
        "waited": ("sidecar_queue_wait_cause_seconds_total", "cause"),
    }
    cells = "[...document.querySelectorAll('[data-total]')]"
    script = f"Object.fromEntries({cells}.map(cell => [cell.dataset.total, +cell.dataset.value]))"
    async with aiohttp.ClientSession() as client, asyncio.timeout(BOUND):
        while True:
            async with client.get(f"{process.admin_url}/metrics") as response:
                metrics = samples(await response.text())
            shown = await page.evaluate(script)
            expected = {}
            for key in shown:
                group, _, value = key.partition(".")
                if group in names:
                    name, label = names[group]
                    found = [v for n, v in metrics.items() if n.startswith(name + "{") and f'{label}="{value}"' in n]
                    expected[key] = pytest.approx(sum(found), abs=0.002)
            groups = {key.partition(".")[0] for key in expected}
            if groups == names.keys() and {key: shown[key] for key in expected} == expected:
                return
            await asyncio.sleep(0.2)


async def test_a_screen_reader_finds_names_and_sentences(browser, provider):
    url, _ = await provider()
    async with Process("--dashscope-url", url) as process, aiohttp.ClientSession() as client:
        name = "<img src=x onerror=alert(1)>"
        async with client.post(process.url + CHAT, json=chat(model=name)) as response:
            await response.read()
        async with opened(browser, f"{process.admin_url}/") as (page, problems):
            await page.wait_for_selector(".words b")
            assert await page.text_content(".words b") == name
            assert await page.locator("img").count() == 0
            for label in await page.locator("svg").evaluate_all(
                "all => all.map(one => one.getAttribute('aria-label'))"
            ):
                assert ", now: " in label
            assert await page.locator("table caption").count() == 4
            assert re.fullmatch(
                r"waits in the queue [\d.]+ s, .* s, at the backend [\d.]+ s",
                await page.get_attribute(".stack", "aria-label"),
            )
            assert name in await page.text_content("[role=status]")
            assert problems == []


async def test_the_report_of_the_demo_needs_no_other_file(browser, tmp_path):
    answered = [Answered(total, total - 1.0, 0.25, 0.75) for total in (1.0, 2.0, 4.0)]
    rows = [Row(way, Result(3, 0, answered), 0) for way in ("semaphore of 1", "semaphore of 16", "sidecar")]
    file = tmp_path / "report.html"
    file.write_text(report([("no quota", rows), ("hidden quota", rows)]))
    async with opened(browser, file.as_uri(), viewport={"width": 360, "height": 800}) as (page, problems):
        assert await page.locator("svg").count() == 4
        drawn = (
            "[...document.querySelectorAll('rect, path')].filter(one => one.getBoundingClientRect().width > 5).length"
        )
        assert await page.evaluate(drawn) == 2 * (3 * 3 + 3), "each bar has three parts, and each way a line"
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        assert problems == []


def test_the_page_is_small_and_names_no_other_origin():
    files = [PAGE / name for name in ("index.html", "page.css", "page.js")]
    assert sum(file.stat().st_size for file in files) < 60_000
    for file in files:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text


async def test_the_policy_lets_the_page_load_only_its_own_files(serving):
    sidecar = await serving()
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        async with sidecar.client.get(sidecar.admin_url + path) as response:
            assert (response.status, response.content_type) == (200, kind)
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_every_text_colour_has_enough_contrast():
    """WCAG 2.1 requires a contrast of 4.5 : 1 for text. Checked for light and dark mode."""
    css = (PAGE / "page.css").read_text()
    for theme in re.findall(r":root \{(.*?)\}", css, re.DOTALL):
        colours = dict(re.findall(r"--(\w+): #(\w+);", theme))
        for back in ("back", "card"):
            for text in ("text", "dim", "blue", "green", "red", "orange"):
                assert contrast(colours[text], colours[back]) >= 4.5, (text, back)


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours from their relative luminances (WCAG 2.1, 1.4.3)."""

    def luminance(colour):
        short = len(colour) == 3
        shares = [int(colour[at] * 2 if short else colour[2 * at : 2 * at + 2], 16) / 255 for at in range(3)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
