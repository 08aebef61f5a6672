"""The in-process model in a complete sidecar: its waits, its probes, its batches, and failover to it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading

import pytest
from local_calls import BOUND, data_url, picture, read_events, until
from running import chat
from scripted_upstream import CHAT_ANSWER

from backends.local import backend as backend_module
from sidecar.app import Sidecar
from sidecar.settings import load


def frame(text: str = "Describe the street.", **fields):
    body = chat(text, max_tokens=12, **fields)
    body["messages"][0]["content"][0]["image_url"]["url"] = data_url(picture())
    return body


@pytest.fixture
def local(serving, model_of):
    """Start sidecars that use a tiny model."""

    async def start(**settings):
        return await serving(**{"backend": "local", "local_model": str(model_of("idefics3")), **settings})

    return start


async def ask(sidecar, body=None, **options):
    """Return the body of the answer, the parts of its time from Server-Timing, and the total time, in seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with sidecar.post(body or frame(), **options) as response:
        answer = await response.json()
        assert response.status == 200, answer
    wall = loop.time() - began
    timing = {
        part: float(ms) / 1e3 for part, ms in re.findall(r"(\w+);dur=([\d.]+)", response.headers["Server-Timing"])
    }
    return answer, timing, wall


async def probe(sidecar, path):
    async with sidecar.client.get(sidecar.admin_url + path) as response:
        return response.status, (await response.text()).strip()


@pytest.mark.alone
async def test_server_timing_shows_the_increasing_lock_waits_of_ten_simultaneous_requests(local, tap):
    """Each request waits for the model while all requests before it are answered. trio-core hid this wait."""
    sidecar = await local(local_max_batch=1, max_concurrency=10)
    await tap.hold()
    asking = [asyncio.create_task(ask(sidecar)) for _ in range(10)]
    await until(lambda: len(sidecar.sidecar.parts.backends[0]._rows) == 10)
    tap.allow(10**6)
    timings = sorted((timing for _, timing, _ in await asyncio.gather(*asking)), key=lambda timing: timing["lock"])
    ahead = 0.0  # seconds of the answers before this one; the first answer was held until all ten requests had arrived
    for timing in timings[1:]:
        assert timing["lock"] >= ahead - 0.005
        ahead += timing["upstream"]
        assert timing["queue"] + timing["lock"] + timing["upstream"] == pytest.approx(timing["total"], abs=0.002)
    metrics = await sidecar.metrics()
    assert metrics['sidecar_backend_lock_wait_seconds_count{backend="local"}'] == 10
    waited = sum(timing["lock"] for timing in timings)
    assert metrics['sidecar_backend_lock_wait_seconds_sum{backend="local"}'] == pytest.approx(waited, abs=0.005)
    assert metrics['sidecar_batch_size_sum{backend="local"}'] == metrics['sidecar_batch_size_count{backend="local"}']


async def test_a_request_without_a_free_permit_waits_in_the_fair_queue_for_every_model_name(local, tap):
    sidecar = await local(local_max_batch=2)
    await tap.hold()
    admission = sidecar.sidecar.admission
    asking = [asyncio.create_task(ask(sidecar, {**frame(), "model": f"model {at}"})) for at in range(9)]
    await until(lambda: admission.waiting() == 5)
    assert admission.in_flight() == 4
    tap.allow(10**6)
    answers = await asyncio.gather(*asking)
    assert {answer["model"] for answer, _, _ in answers} == {"idefics3"}
    assert sum(timing["queue"] > 0.001 for _, timing, _ in answers) >= 5
    assert sidecar.at_rest()


async def test_concurrent_requests_share_batches(local, tap):
    sidecar = await local()
    await tap.hold()
    first = asyncio.create_task(ask(sidecar))
    await until(lambda: tap.running)
    rest = [asyncio.create_task(ask(sidecar)) for _ in range(8)]
    await until(lambda: sidecar.sidecar.admission.in_flight() == 9)
    await until(lambda: len(sidecar.sidecar.parts.backends[0]._rows) == 9)
    tap.allow(10**6)
    await asyncio.gather(first, *rest)
    metrics = await sidecar.metrics()
    assert metrics['sidecar_batch_size_bucket{backend="local",le="8.0"}'] - metrics[
        'sidecar_batch_size_bucket{backend="local",le="6.0"}'
    ] == pytest.approx(1)


async def test_a_stream_starts_at_the_caller_before_its_batch_ends(local, tap):
    sidecar = await local()
    await tap.hold()
    asking = asyncio.create_task(sidecar.post({**frame(stream=True), "max_tokens": 200}).__aenter__())
    await until(lambda: tap.running)
    tap.allow(8)
    response = await asyncio.wait_for(asking, BOUND)
    piece = await asyncio.wait_for(response.content.readuntil(b"\n\n"), BOUND)
    assert piece.startswith(b"data: ")
    assert tap.running
    tap.allow(10**6)
    pieces, reason = read_events(piece + await response.read())
    assert reason == "length"
    assert len(pieces) > 3
    response.release()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnected_caller_frees_its_row(local, tap, stream):
    sidecar = await local()
    await tap.hold()
    asking = asyncio.create_task(ask(sidecar, {**frame(stream=stream), "max_tokens": 10**6}))
    await until(lambda: tap.running)
    tap.allow(3)
    await until(lambda: tap.steps == 3)
    asking.cancel()
    await asyncio.wait([asking])
    await until(sidecar.at_rest)
    tap.allow(2)
    await until(lambda: not tap.running)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_hangs_up_while_it_waits_for_the_engine_is_never_computed(local, tap, stream):
    """The permit is returned at once, although the engine works on the batch of another request."""
    sidecar = await local(local_max_batch=1, max_concurrency=2)
    await tap.hold()
    first = asyncio.create_task(ask(sidecar))
    await until(lambda: tap.running)
    second = asyncio.create_task(ask(sidecar, frame(stream=stream)))
    admission = sidecar.sidecar.admission
    await until(lambda: admission.in_flight() == 2)
    second.cancel()
    await asyncio.wait([second])
    async with asyncio.timeout(1.0):
        await sidecar.until(lambda: admission.in_flight() == 1)
    tap.allow(10**6)
    await first
    await until(lambda: not tap.running)
    steps = tap.steps
    await ask(sidecar)
    await until(lambda: not tap.running)
    assert tap.steps == 2 * steps, "the engine has computed the abandoned request"


async def test_the_startup_probe_says_that_the_model_is_being_loaded(model_of, tap):
    import aiohttp  # noqa: PLC0415

    given = {"backend": "local", "local_model": str(model_of("idefics3")), "admin_host": "127.0.0.1"}
    sidecar = Sidecar(load({**given, "port": 0, "admin_port": 0}, environ={})[0])
    await tap.hold()
    starting = asyncio.create_task(sidecar.start())
    await until(lambda: tap.running)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{sidecar.admin_port}") as client:
        for path in ("/startupz", "/readyz"):
            async with client.get(path) as response:
                assert (response.status, await response.text()) == (503, "the model is being loaded\n")
        tap.allow(10)
        await starting
        async with client.get("/startupz") as response:
            assert response.status == 200
    await sidecar.close()


async def test_a_drain_during_the_start_does_not_wait_for_the_model_to_load(model_of, tap):
    given = {"backend": "local", "local_model": str(model_of("idefics3")), "admin_host": "127.0.0.1"}
    sidecar = Sidecar(load({**given, "port": 0, "admin_port": 0}, environ={})[0])
    await tap.hold()
    running = asyncio.create_task(sidecar.run())
    await until(lambda: tap.running)
    sidecar.drain()
    await asyncio.wait_for(running, BOUND)
    assert tap.running
    tap.allow(10)
    await until(lambda: not any(thread.name == "local-engine" for thread in threading.enumerate()))


async def test_readiness_reports_the_restart_of_the_engine(local, tap, monkeypatch):
    monkeypatch.setattr(backend_module, "RESTART_INTERVAL_SECONDS", 0.01)
    sidecar = await local()
    assert (await probe(sidecar, "/readyz"))[0] == 200
    tap.fault = lambda *_: SystemExit()
    async with sidecar.post(frame()) as response:
        assert response.status == 502
        assert "SystemExit" in (await response.json())["error"]["message"]
    status, reason = await probe(sidecar, "/readyz")
    assert status == 503
    assert "SystemExit" in reason
    assert (await probe(sidecar, "/startupz"))[0] == 200
    assert (await probe(sidecar, "/livez"))[0] == 200
    tap.fault = lambda *_: None
    async with asyncio.timeout(BOUND):
        while (await probe(sidecar, "/readyz"))[0] != 200:  # noqa: ASYNC110  the test polls the probe on purpose
            await asyncio.sleep(0.01)
    await ask(sidecar)


async def test_requests_go_to_the_local_model_while_the_provider_is_unreachable_and_return_to_it_later(local, scripted):
    async def reset(link, seen):
        link.reset()

    upstream = await scripted(reset)
    sidecar = await local(backend="dashscope,local", dashscope_url=upstream.origin + "/v1")
    async with sidecar.post(frame()) as response:
        assert (response.status, response.headers["X-Sidecar-Backend"]) == (200, "local")

    async def answer(link, seen):
        await link.answer(CHAT_ANSWER)

    upstream.script = answer
    async with asyncio.timeout(BOUND):
        while True:
            async with sidecar.post(frame()) as response:
                assert response.status == 200
                if response.headers["X-Sidecar-Backend"] == "dashscope":
                    break
    metrics = await sidecar.metrics()
    assert metrics['sidecar_requests_total{api="openai",backend="local",outcome="ok"}'] >= 1


async def test_the_pod_stays_ready_when_the_engine_dies_if_there_is_also_a_provider(local, scripted, tap):
    upstream = await scripted()
    sidecar = await local(backend="dashscope,local", dashscope_url=upstream.origin + "/v1")
    sidecar.sidecar.parts.backends[1]._unready = "the engine died"
    assert (await probe(sidecar, "/readyz"))[0] == 200


@pytest.mark.parametrize("allowed", [False, True])
async def test_images_from_other_sources_are_accepted_only_if_the_operator_allows_them(local, tmp_path, allowed):
    (tmp_path / "frame.jpg").write_bytes(picture())
    sidecar = await local(**({"local_image_urls": f"https://cameras.invalid/ {tmp_path.as_uri()}/"} if allowed else {}))
    body = frame()
    body["messages"][0]["content"][0]["image_url"]["url"] = (tmp_path / "frame.jpg").as_uri()
    async with sidecar.post(body) as response:
        answer = await response.json()
        assert response.status == (200 if allowed else 400), answer
    if not allowed:
        assert answer["error"]["param"] == "messages[0].content[0].image_url.url"


def test_if_the_model_cannot_be_loaded_the_command_prints_one_line_and_exits(model_of, tmp_path):
    model_of("idefics3")
    command = [sys.executable, "-m", "sidecar", "serve", "--backend", "local", "--local-model", f"{tmp_path}/none"]
    ports = ["--port", "0", "--admin-port", "0", "--log-level", "error"]
    done = subprocess.run([*command, *ports], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(f"SIDECAR_BACKEND=local cannot start: there is no model folder {tmp_path}/none")
    assert len(done.stderr.strip().splitlines()) == 1
