"""Every error of the sidecar itself, over a real socket and in each API's format.

The text of each error says what happened, shows the value that caused it, and says how to fix it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from running import CHAT, IMAGE_URL, Running, chat
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
class Setup:
    """The API in which a test provokes an error, and the functions that start sidecar and provider."""

    api: str
    serving: Callable[..., Awaitable[Running]]
    scripted: Callable[..., Awaitable[Upstream]]

    @property
    def path(self) -> str:
        return BODIES[self.api][0]

    async def sidecar_with_provider(self, script=None, **settings) -> Running:
        """Start a sidecar in front of a scripted provider."""
        upstream = await self.scripted(script)
        return await self.serving(dashscope_url=f"{upstream.origin}/compatible-mode/v1", **settings)

    async def ask(self, sidecar, body=None, path=None, method="POST", **headers):
        """Send a request. Return status, headers and the parsed body."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        url, body = sidecar.url + (path or self.path), BODIES[self.api][1] if body is None else body
        async with sidecar.client.request(method, url, json=body, headers=headers) as response:
            return response.status, response.headers, await response.json()


async def never(link, seen):
    await link.gone()


def answering(status, body):
    async def script(link, seen):
        await link.answer(body, status=status)

    return script


@contextlib.asynccontextmanager
async def one_waiting(setup, sidecar, **headers):
    """Keep one request at the upstream, where it never ends, and one request in the queue."""
    tasks = [asyncio.create_task(setup.ask(sidecar, **headers)) for _ in range(2)]
    admission = sidecar.sidecar.admission
    try:
        await sidecar.until(lambda: (admission.in_flight(), admission.waiting()) == (1, 1))
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- one provocation for each error ------------------------------------------------------------------------------------


async def invalid_header(setup):
    sidecar = await setup.serving()
    return await setup.ask(sidecar, X_Request_Priority="urgent")


async def not_an_image(setup):
    url = "data:image/png;base64,SGVsbG8gd29ybGQ="
    body = {
        "openai": {"messages": [{"content": [{"type": "image_url", "image_url": {"url": url}}]}]},
        "native": {"input": {"messages": [{"content": [{"image": url}]}]}},
        "trio": {"image_b64": url.partition(",")[2]},
    }
    return await setup.ask(await setup.serving(), body[setup.api])


async def compressed(setup):
    return await setup.ask(await setup.serving(), Content_Encoding="gzip")


async def slow_body(setup):
    sidecar = await setup.serving(deadline=0.2)
    sent = asyncio.Event()

    async def half_a_body():
        yield b'{"messages": '
        await sent.wait()

    async with sidecar.client.post(sidecar.url + setup.path, data=half_a_body()) as response:
        sent.set()
        return response.status, response.headers, await response.json()


async def unknown_expectation(setup):
    return await setup.ask(await setup.serving(), Expect="miracles")


async def foreign_page(setup):
    return await setup.ask(await setup.serving(), Origin="http://evil.example")


async def unauthorized(setup):
    return await setup.ask(await setup.serving(api_key="letmein"), Authorization="Bearer wrong")


async def not_found(setup):
    return await setup.ask(await setup.serving(), path=setup.path + "s")


async def method_not_allowed(setup):
    return await setup.ask(await setup.serving(), method="PUT")


async def superseded(setup):
    sidecar = await setup.sidecar_with_provider(never, max_concurrency=1)
    headers = {"X_Camera_Id": "gate", "X_Queue_Policy": "latest"}
    async with one_waiting(setup, sidecar, **headers) as (_, queued):
        newer = asyncio.create_task(setup.ask(sidecar, **headers))
        answer = await queued
        newer.cancel()
        await asyncio.gather(newer, return_exceptions=True)
    return answer


async def payload_too_large(setup):
    sidecar = await setup.serving(max_body_bytes=1000)
    return await setup.ask(sidecar, {"image_b64": "A" * 2000, "messages": [], "input": {}})


async def queue_full(setup):
    sidecar = await setup.sidecar_with_provider(never, max_concurrency=1, queue_size=1)
    async with one_waiting(setup, sidecar):
        return await setup.ask(sidecar)


async def queue_full_of_bytes(setup):
    # Three quarters are for bodies that wait. The heads of these requests count 2 to 3 kB too.
    sidecar = await setup.sidecar_with_provider(never, max_concurrency=1, queue_bytes=6000)
    async with one_waiting(setup, sidecar):
        return await setup.ask(sidecar)


async def deadline_unreachable_on_arrival(setup):
    sidecar = await setup.serving(requests_per_minute=6)
    for _ in range(5):
        status, headers, error = await setup.ask(sidecar, X_Request_Timeout="4")
        if status != 200:
            break
    return status, headers, error


async def deadline_unreachable_in_the_queue(setup):
    sidecar = await setup.sidecar_with_provider(never, max_concurrency=1)
    first = asyncio.create_task(setup.ask(sidecar))
    await sidecar.until(lambda: sidecar.sidecar.admission.in_flight() == 1)
    answer = await setup.ask(sidecar, X_Request_Timeout="0.3")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    return answer


async def draining(setup):
    sidecar = await setup.serving()
    sidecar.sidecar.drain()
    return await setup.ask(sidecar)


async def cut_off_by_the_drain(setup):
    sidecar = await setup.sidecar_with_provider(never)
    task = asyncio.create_task(setup.ask(sidecar))
    await sidecar.until(lambda: sidecar.sidecar.admission.in_flight() == 1)
    sidecar.sidecar.data.abort_all()
    return await task


async def billing(setup):
    body = {"code": "Arrearage", "message": "Access denied, your account is in arrears.", "request_id": "r"}
    return await setup.ask(await setup.sidecar_with_provider(answering(400, body)))


async def billing_again(setup):
    body = {"code": "Arrearage", "message": "Access denied, your account is in arrears.", "request_id": "r"}
    sidecar = await setup.sidecar_with_provider(answering(400, body))
    await setup.ask(sidecar)
    return await setup.ask(sidecar)


async def quota_used_up(setup):
    body = {"error": {"code": "rate_limit_exceeded", "message": "Limit on requests per day. Try again in 5h2m."}}
    return await setup.ask(await setup.sidecar_with_provider(answering(429, body)))


async def quota_used_up_again(setup):
    body = {"error": {"code": "rate_limit_exceeded", "message": "Limit on requests per day. Try again in 5h2m."}}
    sidecar = await setup.sidecar_with_provider(answering(429, body))
    await setup.ask(sidecar)
    return await setup.ask(sidecar)


async def upstream_error(setup):
    return await setup.ask(await setup.sidecar_with_provider(answering(500, {"error": {"message": "kaput"}})))


async def no_connection(setup):
    return await setup.ask(await setup.serving(dashscope_url="http://127.0.0.1:1/compatible-mode/v1"))


async def not_json(setup):
    async def script(link, seen):
        await link.answer(b"<html>welcome</html>", content_type="text/html")

    return await setup.ask(await setup.sidecar_with_provider(script))


async def deadline_exceeded(setup):
    return await setup.ask(await setup.sidecar_with_provider(never), X_Request_Timeout="0.3")


async def defect(setup):
    """Cause a defect. No request can cause it, so the test breaks a method of the backend."""
    sidecar = await setup.sidecar_with_provider()
    sidecar.sidecar.parts.backends[0].send = None
    return await setup.ask(sidecar)


#: Function that provokes an error → status, code, pattern of the value in the text, pattern of the fix in the text.
ERRORS: dict[Callable[[Setup], Awaitable[Any]], tuple[int, Code, str, str]] = {
    invalid_header: (400, "invalid_request", "'urgent'", "must be high, normal or low"),
    not_an_image: (
        400,
        "invalid_request",
        r"image_url\.url|content\[0\]\.image|image_b64",
        "base64|JPEG, PNG",
    ),
    compressed: (415, "unsupported_media_type", "compressed body", "without Content-Encoding"),
    slow_body: (408, "request_timeout", r"within 0\.2 s", "SIDECAR_DEADLINE"),
    unknown_expectation: (417, "invalid_request", "'miracles'", "only 100-continue"),
    foreign_page: (403, "forbidden_origin", "", "another site may not send this: .* SIDECAR_ALLOWED_HOSTS"),
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
    billing_again: (502, "upstream_billing", "Arrearage.: the account has no money", "the provider's console"),
    quota_used_up: (503, "upstream_quota_used_up", "rate_limit_exceeded", "Try again in 5h2m"),
    quota_used_up_again: (503, "upstream_quota_used_up", "rate_limit_exceeded", "quota"),
    upstream_error: (502, "upstream_error", "kaput", "`vlm-sidecar check`"),
    no_connection: (502, "upstream_error", "127.0.0.1.*refused", "`vlm-sidecar check`"),
    not_json: (502, "upstream_error", "text/html", "`vlm-sidecar check`"),
    deadline_exceeded: (504, "deadline_exceeded", r"0\.3 s", "X-Request-Timeout and SIDECAR_DEADLINE"),
    defect: (500, "internal_error", "a defect", "its log has the details"),
}
RETRYABLE = ("queue_full", "deadline_unreachable", "draining", "upstream_quota_used_up")


@pytest.mark.parametrize("api", BODIES)
@pytest.mark.parametrize("provoke", ERRORS, ids=lambda provoke: provoke.__name__)
async def test_an_error_says_what_happened_with_which_value_and_how_to_fix_it(serving, scripted, api, provoke):
    expected, code, value, fix = ERRORS[provoke]
    status, headers, error = await provoke(Setup(api, serving, scripted))
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
    assert re.search(fix, text), text
    assert IMAGE_URL[-30:] not in text
    assert ("Retry-After" in headers) is (code in RETRYABLE or provoke is billing_again)
    final = (400 <= status < 500 and status != 408) or status in (502, 504) or code == "upstream_quota_used_up"
    assert headers.get("X-Should-Retry") == ("false" if final else None)
    assert headers.get("Allow") == ("POST" if status == 405 else None)


def test_every_code_is_tested_and_is_in_the_readme():
    # The HTTP layer makes the 431, in the same format on every path: see `api/test_bad_input.py`.
    provoked = {(status, code) for status, code, _, _ in ERRORS.values()} | {(431, "headers_too_large")}
    assert {code for _, code in provoked} == set(get_args(Code))
    table = README.read_text().partition("[start:errors]")[2].partition("[end:errors]")[0]
    documented = {
        (int(status), code)
        for statuses, codes in re.findall(r"^\| ([\d, ]+) \| (`.*?`) \|", table, re.MULTILINE)
        for status in statuses.split(",")
        for code in re.findall(r"`(\w+)`", codes)
    }
    assert provoked <= documented
    assert {code for _, code in documented} == set(get_args(Code))
