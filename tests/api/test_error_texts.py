"""Every error of the sidecar's own, over a real socket, in each API's shape: the text says what happened, gives the
value that did it, and a way out."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from running import CHAT, IMAGE_URL, PNG, Running, chat
from scripted_upstream import Upstream

from sidecar.api.errors import Code

README = Path(__file__).parents[2] / "README.md"
GENERATION = "/api/v1/services/aigc/multimodal-generation/generation"
DESCRIBE = "/api/inference/describe"
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": (CHAT, chat()),
    "native": (
        GENERATION,
        {"input": {"messages": [{"role": "user", "content": [{"image": IMAGE_URL}, {"text": "What is going on?"}]}]}},
    ),
    "trio": (DESCRIBE, {"image_b64": IMAGE_URL.partition(",")[2], "prompt": "What is going on?"}),
}


@dataclass
class Given:
    """What an error is provoked with: an API, and parts to start."""

    api: str
    serving: Callable[..., Awaitable[Running]]
    scripted: Callable[..., Awaitable[Upstream]]

    @property
    def path(self) -> str:
        return BODIES[self.api][0]

    async def before(self, script=None, **settings) -> Running:
        """A sidecar before a provider that does what the script says."""
        upstream = await self.scripted(script)
        return await self.serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1", **settings)

    async def ask(self, sidecar, body=None, path=None, method="POST", **headers):
        """Ask; gives status, headers and the error in the API's shape."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        url, body = sidecar.url + (path or self.path), BODIES[self.api][1] if body is None else body
        async with sidecar.client.request(method, url, json=body, headers=headers) as response:
            return response.status, response.headers, await response.json()


async def never(link, seen):
    await link.gone()


def saying(status, body):
    async def script(link, seen):
        await link.answer(body, status=status)

    return script


@contextlib.asynccontextmanager
async def waiting(given, sidecar, **headers):
    """One request upstream, which never ends, and one more in the queue."""
    tasks = [asyncio.create_task(given.ask(sidecar, **headers)) for _ in range(2)]
    (route,) = sidecar.sidecar.routes
    try:
        await sidecar.until(lambda: (route.admission.in_flight(), route.admission.waiting()) == (1, 1))
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- one provocation for each error ------------------------------------------------------------------------------------


async def invalid_header(given):
    sidecar = await given.serving()
    return await given.ask(sidecar, X_Request_Priority="urgent")


async def an_image_that_is_none(given):
    url = "data:image/png;base64,SGVsbG8gd29ybGQ="
    body = {
        "openai": {"messages": [{"content": [{"type": "image_url", "image_url": {"url": url}}]}]},
        "native": {"input": {"messages": [{"content": [{"image": url}]}]}},
        "trio": {"image_b64": url.partition(",")[2]},
    }
    return await given.ask(await given.serving(), body[given.api])


async def compressed(given):
    return await given.ask(await given.serving(), Content_Encoding="gzip")


async def unknown_expectation(given):
    return await given.ask(await given.serving(), Expect="miracles")


async def unauthorized(given):
    return await given.ask(await given.serving(api_key="letmein"), Authorization="Bearer wrong")


async def not_found(given):
    return await given.ask(await given.serving(), path=given.path + "s")


async def method_not_allowed(given):
    return await given.ask(await given.serving(), method="PUT")


async def superseded(given):
    sidecar = await given.before(never, max_concurrency=1)
    headers = {"X_Camera_Id": "gate", "X_Queue_Policy": "latest"}
    async with waiting(given, sidecar, **headers) as (_, queued):
        newer = asyncio.create_task(given.ask(sidecar, **headers))
        answer = await queued
        newer.cancel()
        await asyncio.gather(newer, return_exceptions=True)
    return answer


async def payload_too_large(given):
    sidecar = await given.serving(max_body_bytes=1000)
    return await given.ask(sidecar, {"image_b64": "A" * 2000, "messages": [], "input": {}})


async def queue_full(given):
    sidecar = await given.before(never, max_concurrency=1, queue_size=1)
    async with waiting(given, sidecar):
        return await given.ask(sidecar)


async def queue_full_of_bytes(given):
    sidecar = await given.before(never, max_concurrency=1, queue_bytes=2 * len(PNG) + 100)
    async with waiting(given, sidecar):
        return await given.ask(sidecar)


async def deadline_unreachable_on_arrival(given):
    sidecar = await given.serving(requests_per_minute=6)
    for _ in range(5):
        status, headers, error = await given.ask(sidecar, X_Request_Timeout="4")
        if status != 200:
            break
    return status, headers, error


async def deadline_unreachable_in_the_queue(given):
    sidecar = await given.before(never, max_concurrency=1)
    first = asyncio.create_task(given.ask(sidecar))
    await sidecar.until(lambda: sidecar.sidecar.routes[0].admission.in_flight() == 1)
    answer = await given.ask(sidecar, X_Request_Timeout="0.3")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    return answer


async def draining(given):
    sidecar = await given.serving()
    sidecar.sidecar.drain()
    return await given.ask(sidecar)


async def cut_off_by_the_drain(given):
    sidecar = await given.before(never)
    task = asyncio.create_task(given.ask(sidecar))
    await sidecar.until(lambda: sidecar.sidecar.routes[0].admission.in_flight() == 1)
    sidecar.sidecar.data.abort_all()
    return await task


async def billing(given):
    body = {"code": "Arrearage", "message": "Access denied, your account is in arrears.", "request_id": "r"}
    return await given.ask(await given.before(saying(400, body)))


async def billing_again(given):
    body = {"code": "Arrearage", "message": "Access denied, your account is in arrears.", "request_id": "r"}
    sidecar = await given.before(saying(400, body))
    await given.ask(sidecar)
    return await given.ask(sidecar)


async def upstream_error(given):
    return await given.ask(await given.before(saying(500, {"error": {"message": "kaput"}})))


async def no_connection(given):
    return await given.ask(await given.serving(dashscope_url="http://127.0.0.1:1/compatible-mode/v1"))


async def not_json(given):
    async def script(link, seen):
        await link.answer(b"<html>welcome</html>", content_type="text/html")

    return await given.ask(await given.before(script))


async def deadline_exceeded(given):
    return await given.ask(await given.before(never), X_Request_Timeout="0.3")


async def defect(given):
    """A defect, which cannot be ordered from outside: what counts tickets breaks."""
    sidecar = await given.before()
    sidecar.sidecar.routes[0].backend.send = None
    return await given.ask(sidecar)


#: Provocation → status, code, the value that the text has to give, and the way out of it.
ERRORS: dict[Callable[[Given], Awaitable[Any]], tuple[int, Code, str, str]] = {
    invalid_header: (400, "invalid_request", "'urgent'", "must be high, normal or low"),
    an_image_that_is_none: (
        400,
        "invalid_request",
        r"image_url\.url|content\[0\]\.image|image_b64",
        "base64|JPEG, PNG",
    ),
    compressed: (415, "invalid_request", "compressed body", "without Content-Encoding"),
    unknown_expectation: (417, "invalid_request", "'miracles'", "only 100-continue"),
    unauthorized: (401, "unauthorized", "another one", "must be Bearer and the key .* SIDECAR_API_KEY"),
    not_found: (404, "not_found", "completionss|generations|describes", CHAT),
    method_not_allowed: (405, "method_not_allowed", "PUT", "takes POST"),
    superseded: (409, "superseded", "'gate'", "send no X-Queue-Policy: latest"),
    payload_too_large: (413, "payload_too_large", r"of \d{4} bytes .* 1000", "raise SIDECAR_MAX_BODY_BYTES"),
    queue_full: (503, "queue_full", "1 requests are waiting", r"SIDECAR_QUEUE_SIZE.* after [\d.]+ s"),
    queue_full_of_bytes: (503, "queue_full", r"\d+ bytes are waiting .* \d+ more", r"SIDECAR_QUEUE_BYTES.* after"),
    deadline_unreachable_on_arrival: (503, "deadline_unreachable", r"[\d.]+ s are left", "X-Request-Timeout"),
    deadline_unreachable_in_the_queue: (503, "deadline_unreachable", r"of 0\.3 s,.* concurrency", "X-Request-Timeout"),
    draining: (503, "draining", "shutting down", "try again in 1 s"),
    cut_off_by_the_drain: (503, "draining", "shutting down", "raise SIDECAR_DRAIN_TIMEOUT"),
    billing: (502, "upstream_billing", "in arrears", "the provider's console"),
    billing_again: (502, "upstream_billing", "in arrears", "the provider's console"),
    upstream_error: (502, "upstream_error", "kaput", "`vlm-sidecar check`"),
    no_connection: (502, "upstream_error", "127.0.0.1.*refused", "`vlm-sidecar check`"),
    not_json: (502, "upstream_error", "text/html", "`vlm-sidecar check`"),
    deadline_exceeded: (504, "deadline_exceeded", r"0\.3 s", "X-Request-Timeout and SIDECAR_DEADLINE"),
    defect: (500, "internal_error", "a defect", "its log has the details"),
}
RETRIED = ("queue_full", "deadline_unreachable", "draining")


@pytest.mark.parametrize("api", BODIES)
@pytest.mark.parametrize("provoke", ERRORS, ids=lambda provoke: provoke.__name__)
async def test_an_error_says_what_happened_the_value_and_the_way_out(serving, scripted, api, provoke):
    expected, code, value, way_out = ERRORS[provoke]
    status, headers, error = await provoke(Given(api, serving, scripted))
    assert status == expected, error
    assert headers["X-Request-Id"]
    match api:
        case "openai":
            text = error["error"]["message"]
            assert error["error"].keys() == {"message", "type", "code", "param"}
            assert (error["error"]["code"], error["request_id"]) == (code, headers["X-Request-Id"])
        case "native":
            text = error["message"]
            assert (error["code"], error["request_id"]) == (code, headers["X-Request-Id"])
        case "trio":
            text = error["detail"]
            assert error.get("error") == (code if status == 413 else None)
    assert re.search(value, text), text
    assert re.search(way_out, text), text
    assert IMAGE_URL[-30:] not in text
    assert ("Retry-After" in headers) is (code in RETRIED or provoke is billing_again)


def test_every_code_is_provoked_and_in_the_readme():
    provoked = {(status, code) for status, code, _, _ in ERRORS.values()}
    assert {code for _, code in provoked} == set(get_args(Code))
    table = README.read_text().partition("[start:errors]")[2].partition("[end:errors]")[0]
    told = {
        (int(status), code)
        for statuses, codes in re.findall(r"^\| ([\d, ]+) \| (`.*?`) \|", table, re.MULTILINE)
        for status in statuses.split(",")
        for code in re.findall(r"`(\w+)`", codes)
    }
    assert provoked <= told
    assert {code for _, code in told} == set(get_args(Code))
