"""Nothing that a caller or a provider wrote reaches an admin page, the log, a metric, a span, or another caller."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import logging
import re
from collections.abc import Iterator
from itertools import cycle
from urllib.parse import unquote

import pytest
from running import CHAT, PNG

from sidecar.assembly import StartError, make_backend
from sidecar.observe import logging as logs
from sidecar.settings import SettingsError, load

#: What nobody else may see: who wrote it, and the text. No two have 6 characters in common.
CANARIES = {
    "prompt": "kumquatZephyrBramble7Quixotic",
    "picture": base64.b64encode(b"\xffW1n\xe9 of the c\xe9llar\x00\x9f" * 3).decode(),
    "bearer": "brr-Gx81vLqT5mYz0RkD2sHn",
    "query": "qry-Jd64wPcU7fXo3VbE9tMi",
    "key": "sk-Ta52hNyB8gKr6ZsW1cLe4",
}
ADMIN = ("/status", "/readyz", "/startupz", "/metrics", "/history", "/events", "/")
NATIVE = "/api/v1/services/aigc/multimodal-generation/generation"
DESCRIBE = "/api/inference/describe"
#: Characters of the shortest part of a canary that is looked for.
PART = 8
#: Requests that are sent at once. The sidecar allows more in flight only after it has learned that it may.
BATCH = 8


def spellings(text: str) -> list[str]:
    """Return a text as a hostile provider may write it: whole, cut, escaped, encoded and reversed."""
    parts = [text, text[:8], text[-8:], text[:20], text[-20:]]
    return [
        *parts,
        "".join(f"\\u{ord(letter):04x}" for letter in text),
        "".join(f"%{ord(letter):02x}" for letter in text),
        "".join(f"&#{ord(letter)};" for letter in text),
        *(base64.b64encode(b"ab"[:before] + part.encode()).decode() for before in range(3) for part in parts),
        text.encode().hex(),
        text[::-1],
        text.swapcase(),
        "\u200b".join(text),
    ]


def found_in(seen: str) -> set[str]:
    """Return the canaries that a text contains, in any of these spellings, or cut to `PART` characters."""
    plain = [seen]
    for _ in range(2):
        seen = re.sub(r"\\+u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), html.unescape(unquote(seen)))
        plain.append(seen)
    texts = [re.sub("[^a-z0-9]", "", text.lower()) for text in plain]
    found = set()
    for name, canary in CANARIES.items():
        letters = re.sub("[^a-z0-9]", "", canary.lower())
        encoded = [
            re.sub("[^a-z0-9]", "", base64.b64encode(b"abc"[:before] + canary.encode()).decode().lower())[4:-4]
            for before in range(3)
        ]
        for spelling in (letters, letters[::-1], *encoded, canary.encode().hex()):
            step = range(len(spelling) - PART + 1)
            if any(spelling[start : start + PART] in text for start in step for text in texts):
                found.add(name)
    return found


def test_the_search_finds_each_spelling_of_each_canary():
    for name, canary in CANARIES.items():
        for spelling in spellings(canary):
            assert found_in(f"the {spelling} of") <= {name}
            if len(spelling) > 2 * PART:
                assert found_in(f"the {spelling} of") == {name}, spelling
    assert not found_in("the provider answered 429 (limit_requests): its limit of requests per time is reached")


def token(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.:/-]", "", text)[:64] or "x"


def everywhere(texts: Iterator[str], status: int, kind: str) -> bytes:
    """Return an answer that contains the next text in each place where a provider can write."""

    def text() -> str:
        return next(texts)

    def word() -> str:
        return token(next(texts))

    def line() -> str:
        return re.sub(r"[\r\n\x00]|[^\x00-\x7f]", "", next(texts)) or "x"

    def low() -> str:
        return re.sub("[^a-z0-9_]", "", next(texts).lower()) or "x"

    def letters() -> str:
        return re.sub("[^a-z_]", "", next(texts).lower()) or "x"

    def error() -> dict:
        return {"message": f"Slow down: {text()}", "type": word(), "code": word(), "param": text(), "status": word()}

    content_type, limit = "application/json", low()
    body = json.dumps(
        {
            "error": error(), "code": word(), "message": text(), "request_id": word(), "type": text(),
            "errors": [error()], "model": text(), "usage": {"prompt_tokens": text(), "model": text()},
            "finish_reason": text(), "base_resp": {"status_code": 1002, "status_msg": text()}, "data": [{"id": text()}],
            "details": [
                {"quotaMetric": word(), "quotaId": word(), "retryDelay": text(), "headers": {word(): text()}, word(): 1}
            ],
        }
    ).encode()  # fmt: skip
    if kind == "page":
        body, content_type = f"<html><title>{text()}</title>{text()}</html>".encode(), f"text/{word().lower()}"
    elif kind == "text":
        body, content_type = text().encode(), "text/plain"
    elif kind == "stream":
        content_type = "text/event-stream"
        body = f": {text()}\n\nevent: {line()}\nid: {line()}\n: {text()}\ndata: ".encode() + body + b"\n\n"
    elif kind == "choice":
        choice = {"finish_reason": text(), "error": error()}
        body = json.dumps({"choices": [choice], "model": text(), "id": text()}).encode()
    elif kind == "bad":
        return f"HTTP/1.1 {line()} {line()}\r\n{line()}: {line()}\r\n\r\n".encode()
    head = (
        f"HTTP/1.1 {status} {line()}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"X-Request-Id: {word()}\r\nX-DashScope-Request-Id: {line()}\r\nCF-Ray: {word()}\r\nRetry-After: {line()}\r\n"
        f"x-ratelimit-limit-requests: {line()}\r\nx-ratelimit-reset-requests: {line()}\r\n"
        f"x-ai-ratelimit-limit-60-{limit}: 5\r\nx-ai-ratelimit-remaining-60-{limit}: 4\r\n"
        f"x-ratelimit-{letters()}-limit-requests: 600\r\n"
        f'RateLimit-Policy: "{line()}";q=5;w=60\r\nRateLimit: "{line()}";r=2;t=1\r\nDate: {line()}\r\n'
        f"X-DashScope-{low().replace('_', '-')}: {line()}\r\nOpenAI-Model: {line()}\r\nServer: {line()}\r\n"
        f"Location: /{line()}\r\n{word().replace('/', '').replace(':', '')}: {line()}\r\n"
    )
    return f"{head}\r\n".encode() + body


ANSWERS = [
    *((status, "json") for status in (429, 400, 401, 402, 403, 404, 422, 500, 503, 301, 529)),
    (200, "json"),
    *((status, kind) for status in (429, 500, 200, 401) for kind in ("page", "text")),
    (200, "stream"),
    (200, "choice"),
    (200, "bad"),
]


@pytest.fixture
def log_lines(caplog):
    """Return every log record so far, formatted in both ways, at level debug."""
    caplog.set_level(logging.DEBUG)

    def lines() -> str:
        formatters = logs.JsonFormatter(), logs.HumanFormatter()
        return "\n".join(one.format(record) for record in caplog.records for one in formatters)

    return lines


def request_of(path: str, text: str, model: str, *, stream: bool) -> dict:
    """Return the body of a request about a frame that contains the canary of the picture."""
    picture = base64.b64encode(PNG + base64.b64decode(CANARIES["picture"])).decode()
    url = f"data:image/png;base64,{picture}"
    if path == DESCRIBE:
        return {"image_b64": picture, "prompt": text, "model": model}
    if path == NATIVE:
        messages = [{"role": "user", "content": [{"image": url}, {"text": text}]}]
        return {"model": model, "input": {"messages": messages}, "parameters": {"result_format": "message"}}
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "stream": stream}


async def ask(sidecar, path: str, text: str, model: str, stream: bool = False) -> str:
    """Send a request. Return everything that the caller sees."""
    headers = {"Authorization": f"Bearer {CANARIES['bearer']}", "X-Request-Timeout": "0.05", "X-Camera-Id": "gate"}
    query = f"?api_key={CANARIES['query']}&x={CANARIES['query']}"
    async with sidecar.post(request_of(path, text, model, stream=stream), path + query, headers=headers) as response:
        seen = " ".join(f"{name}: {value}" for name, value in response.headers.items())
        return f"{response.status} {seen} {await response.text()}"


async def pages(sidecar) -> str:
    """Return every admin page; of the live view its first event."""
    seen = []
    sidecar.sidecar.parts.sampler.sample()
    for path in ADMIN:
        headers = {"Accept": "application/openmetrics-text"} if path == "/metrics" else {}
        async with sidecar.client.get(sidecar.admin_url + path, headers=headers) as response:
            assert response.status == 200
            if path != "/events":
                seen.append(await response.text())
                continue
            reading = asyncio.ensure_future(response.content.readuntil(b"\n\n"))
            while not reading.done():
                sidecar.sidecar.parts.sampler.sample()
                await asyncio.sleep(0)
            seen.append((await reading).decode())
    return "\n".join(seen)


@pytest.mark.parametrize("path", [CHAT, NATIVE, DESCRIBE])
async def test_no_word_of_a_caller_or_of_a_key_reaches_anybody_else(serving, scripted, log_lines, path):
    answers: dict[str, bytes] = {}  # each answer has a model of its own: a circuit that has opened lets nothing through
    for number, (status, kind) in enumerate(ANSWERS):
        for writer, canary in CANARIES.items():
            texts = spellings(canary)
            after = number % len(texts)
            answers[f"{writer}-{number}"] = everywhere(cycle(texts[after:] + texts[:after]), status, kind)

    reached = set()

    async def quoting(link, seen):
        model = json.loads(seen.body)["model"]
        reached.add(model)
        await link.send(answers[model])
        link.close()

    upstream = await scripted(quoting)
    sidecar = await serving(
        dashscope_url=f"{upstream.origin}/v1", dashscope_native_url=f"{upstream.origin}/api/v1", log_level="debug",
        dashscope_api_key=CANARIES["key"], api_key=CANARIES["bearer"], access_log=True,
    )  # fmt: skip
    callers = ""
    while todo := [model for model in answers if model not in reached][:BATCH]:
        streams = [ANSWERS[int(model.rpartition("-")[2])][1] == "stream" for model in todo]
        asking = (ask(sidecar, path, CANARIES["prompt"], *one) for one in zip(todo, streams, strict=True))
        callers += "\n".join(await asyncio.gather(*asking))
    answers |= dict.fromkeys(answers, everywhere(cycle(["x"]), 429, "json"))
    others = await pages(sidecar)
    others += "\n".join(await asyncio.gather(*(ask(sidecar, path, "What is that?", model) for model in answers)))
    others += await pages(sidecar)
    for seen in (others, log_lines()):
        assert found_in(seen) == set()
    assert "key" not in found_in(callers)
    assert found_in(callers) >= {"prompt", "bearer"}  # the provider's own error is for its caller


async def test_no_secret_of_the_settings_is_shown_anywhere(serving, log_lines, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://porter:{CANARIES['query']}@127.0.0.1:9")
    sidecar = await serving(
        dashscope_url=f"http://porter:{CANARIES['prompt']}@upstream.invalid:9/v1", dashscope_api_key=CANARIES["key"],
        dashscope_native_url=f"http://porter:{CANARIES['picture']}@127.0.0.1:9/api/v1", api_key=CANARIES["bearer"],
        access_log=True, log_level="debug", key_header="Authorization",
    )  # fmt: skip
    seen = ""
    for path in (CHAT, NATIVE, "/v1/models", f"/v1/{CANARIES['bearer']}/x"):
        answer = await ask(sidecar, path, "What is that?", "m")
        seen += "" if CANARIES["bearer"] in path else answer  # the caller's own path
    seen += await pages(sidecar) + log_lines()
    parts = sidecar.sidecar.parts
    objects = [sidecar.sidecar, *parts.backends, parts.data, parts.admission, parts.models, parts.admin]
    seen += "".join(map(repr, [*objects, sidecar.sidecar.settings, parts.backends[0].account()]))
    seen += "".join(repr(origin) for origin in parts.backends[0]._origins.values())
    assert found_in(seen) == set()


@pytest.mark.parametrize(
    "settings",
    [
        {"dashscope_url": "ftp://porter:{}@upstream.invalid/v1"},
        {"dashscope_url": "http://porter:{}@upstream.invalid/v1?x=1"},
        {"dashscope_url": "http://porter:{}@upstream.invalid:x/v1"},
        {"dashscope_url": "porter:{}@upstream.invalid/v1"},
        {"dashscope_native_url": "gopher://porter:{}@upstream.invalid/v1"},
        {"dashscope_api_key": "{} \n{}"},
        {"api_key": "{} {}"},
    ],
)
def test_an_error_in_the_settings_shows_no_secret(settings):
    secret = CANARIES["key"]
    with pytest.raises((SettingsError, StartError)) as caught:
        given = load({name: text.format(secret, secret) for name, text in settings.items()}, environ={})[0]
        make_backend(given, "dashscope")
    assert found_in(str(caught.value)) == set()
