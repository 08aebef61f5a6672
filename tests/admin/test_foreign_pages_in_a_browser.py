"""What a web page of another site can do in a real Chromium, and what the sidecar's own page still can."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from aiohttp import web
from running import BOUND, CHAT

#: Sends a frame and reads the status from a page of another site, without waiting for a permission (`no-cors`).
ATTACK = """async ([data, admin]) => {
    const options = {method: "POST", mode: "no-cors", body: "{}", headers: {"Content-Type": "text/plain"}};
    const results = [];
    for (const [url, how] of [[data, options], [admin + "/status", {mode: "no-cors"}], [admin + "/status", {}]]) {
        results.push(await fetch(url, how).then(answer => answer.type, () => "failed"));
    }
    return results;
}"""


@pytest.fixture
async def evil():
    """A web server of another site. Its one page links to the address in its query."""

    async def page(request):
        link = f"<a id=link href='{request.query.get('to', '')}'>the page</a>"
        return web.Response(text=f"<title>evil</title>{link}", content_type="text/html")

    app = web.Application()
    app.router.add_get("/", page)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://evil.example:{runner.addresses[0][1]}/"
    await runner.cleanup()


@contextlib.asynccontextmanager
async def forwarded(port):
    """Forward connections from another port, as `kubectl port-forward` does. Yield that port."""

    async def pump(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader, writer):
        there = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_a_page_of_another_site_sends_no_frame_and_reads_no_status(browser, serving, provider, evil):
    url, simulated = await provider()
    sidecar = await serving(dashscope_url=url)
    page = await browser.new_page()
    await page.goto(evil)
    types = await page.evaluate(ATTACK, [sidecar.url + CHAT, sidecar.admin_url])
    assert types == ["opaque", "opaque", "failed"]  # it was answered, and the page cannot read the answer
    assert not simulated.counts.calls
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="dashscope",outcome="invalid"}'] == 1


async def test_a_rebound_name_reads_nothing(browser, serving):
    sidecar = await serving()
    page = await browser.new_page()
    rebound = f"http://rebound.example:{sidecar.sidecar.admin_port}"
    answer = await page.goto(f"{rebound}/")
    assert answer.status == 403
    for path in ("/status", "/history", "/events"):
        assert await page.evaluate(f"fetch('{path}').then(answer => answer.status)") == 403
    data = f"http://rebound.example:{sidecar.sidecar.data_port}"
    await page.goto(f"{data}/health")
    status = await page.evaluate(f"fetch('{CHAT}', {{method: 'POST', body: '{{}}'}}).then(answer => answer.status)")
    assert status == 403


async def test_the_live_page_works_through_a_port_forward_and_by_a_link_of_another_site(browser, serving, evil):
    sidecar = await serving()
    async with forwarded(sidecar.sidecar.admin_port) as port:
        for host in ("127.0.0.1", "localhost"):
            page = await browser.new_page()
            await page.goto(f"{evil}?to=http://{host}:{port}/")
            async with page.expect_navigation():
                await page.click("#link")
            async with asyncio.timeout(BOUND):
                while "simulated" not in await page.inner_text("body"):  # noqa: ASYNC110  the first event draws it
                    await asyncio.sleep(0.05)
            await page.close()
