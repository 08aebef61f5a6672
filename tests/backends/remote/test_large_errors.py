"""How much of a hostile error body is read: counted in steps, because a time depends on the machine."""

from __future__ import annotations

import json
import sys
from itertools import count

import pytest
from scripted_upstream import CHAT_ANSWER

from backends.base import BackendError, Request, Timings
from backends.remote import backend as remote_backend
from backends.remote import error_bodies
from backends.remote.backend import DashScopeBackend
from backends.remote.error_bodies import lenient_json, read_error
from backends.remote.refusals import classify

MEGABYTE = 1024 * 1024
CODES = ("code", "type", "status", "error_code", "errorCode", "error_type", "reason", "ErrorCode")
TEXTS = ("message", "msg", "error_msg", "errorMessage", "status_msg", "title", "text", "description", "raw")
ENVELOPES = ("error", "errors", "detail", "details", "base_resp", "Response", "innererror", "metadata", "cause")


def tree(leaf, depth: int = 2) -> dict:
    if not depth:
        return leaf()
    return {name: [tree(leaf, depth - 1) for _ in range(4)] for name in ENVELOPES[: 9 if depth > 1 else 2]}


number = count()
LEAVES = {
    "codes": lambda: {name: f"aB{next(number)}cD eF" for name in CODES},
    "numbers": lambda: {name: 1000 + next(number) for name in CODES},
    "texts": lambda: {name: f"{next(number)} {{'msg': '" + ",'msg':'" * 10 for name in TEXTS},
    "JSON in texts": lambda: {name: json.dumps({"message": f"{{{next(number)}", "code": "aB"}) for name in TEXTS},
    "texts of broken JSON": lambda: dict.fromkeys(TEXTS, "{" + "[" * 90),
    "quota names": lambda: {"violations": [{"quotaId": "aB" * 90}] * 16},
    "headers": lambda: {"headers": {f"x-ratelimit-reset-{next(number)}": "1h" * 90 for _ in range(20)}},
    "choices": lambda: {"choices": [{"error": {"message": f"m{next(number)}"}}] * 16},
}


def hostile(name: str) -> bytes:
    """A body of 5 MB or more."""
    one = json.dumps(tree(LEAVES[name]))
    repeated = ",".join([one] * (5 * MEGABYTE // len(one) // 4 + 1))
    lists = ", ".join(f'"{key}": [{repeated}]' for key in ("errors", "detail", "cause", "x"))
    return f'{{"error": {one}, {lists}}}'.encode()


def calls_of(function, *arguments) -> int:
    """Return how many functions, also those of C, one call of a function calls."""
    calls = 0

    def note(_frame, event, _argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("name", LEAVES)
def test_only_a_bounded_part_of_an_error_is_collected(name):
    body = hostile(name)
    assert len(body) > 4 * MEGABYTE
    facts = read_error(body)
    assert facts.visited <= 200
    assert facts.parsed <= 8
    assert len(facts.texts) <= 32 + 4
    assert len(facts.codes) <= 32
    assert len(facts.numbers) <= 64
    assert len(facts.quota_names) <= 32
    assert len(facts.headers) <= 32
    assert max(map(len, [*facts.codes, *facts.quota_names]), default=0) <= 120
    assert max(map(len, facts.texts), default=0) <= 4000
    assert len(facts.text) <= 2000


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("status", [0, 400, 429])
def test_the_steps_of_reading_do_not_grow_with_the_body(name, status):
    assert calls_of(classify, status, {}, hostile(name)) < 100_000


@pytest.mark.parametrize(
    "body", [{"error": {"quotaId": "aB" * MEGABYTE}}, "a " * MEGABYTE, {"message": "{" * MEGABYTE}]
)
def test_one_long_value_is_cut(body):
    facts = read_error(json.dumps(body).encode())
    assert sum(map(len, [*facts.texts, *facts.quota_names])) <= 4000


def test_a_wrapped_error_is_still_found():
    for wrapped in ("x - {'error': {'message': 'it is full', 'code': 1}}", 'x: {"code": 1, "message": "it is full"}'):
        facts = read_error(json.dumps({"error": {"message": wrapped}}).encode())
        assert facts.texts == [wrapped, "it is full"]


@pytest.mark.parametrize("code", [{"code": "limit_requests", "message": "slower"}, {}], ids=["refusal", "nothing"])
async def test_a_large_200_that_contains_an_error_is_parsed_once(upstream, monkeypatch, code):
    parsed: list[int] = []

    def counting(data: bytes) -> object:
        parsed.append(len(data))
        return lenient_json(data)

    monkeypatch.setattr(remote_backend, "lenient_json", counting)
    monkeypatch.setattr(error_bodies, "lenient_json", counting)

    async def script(link, _):
        await link.answer({**CHAT_ANSWER, "choices": [], "padding": ["x" * 40] * 50_000, "error": code})

    upstream.script = script
    backend = DashScopeBackend(base_url=f"{upstream.origin}/v1")
    await backend.start()
    with pytest.raises(BackendError):
        await backend.send(Request("openai", "/chat/completions", b"{}", "m"), Timings())
    await backend.close()
    assert len([size for size in parsed if size > 1_000_000]) == 1
