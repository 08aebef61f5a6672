"""`/status` and the log tell refusals whose words no rule knows from the others, without anybody's text."""

from __future__ import annotations

import logging

import pytest
from running import chat

from backends.base import Throttled
from backends.remote.answer_file import explain, lines_of
from backends.remote.refusals import classify
from sidecar.observe.refusal_words import RefusalWords


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, b"The kettle is on, come back when it has boiled."),
        (429, b""),
        (429, b'{"error": {"code": "KETTLE_ON", "message": "Try the pantry."}}'),
        (403, b'{"code": "PantryLocked", "message": "Ask the housekeeper."}'),
        (412, b'{"code": "PantryLocked"}'),
        (529, b"{}"),
        (0, b'{"error": {"code": "KETTLE_ON", "message": "Try the pantry."}}'),
    ],
)
def test_a_refusal_that_only_its_status_explains_is_unknown(status, body):
    assert not classify(status, {}, body).words_known


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, b'{"error": {"code": "limit_requests", "message": "Try the pantry."}}'),
        (429, b"You sent too many requests per minute."),
        (403, b'{"code": "Arrearage", "message": "Ask the housekeeper."}'),
        (401, b"Who is there?"),
        (402, b"{}"),
        (400, b'{"error": {"message": "The tea leaf at messages[0] is no image."}}'),
        (404, b"No such pantry."),
        (500, b"<html>The kettle exploded.</html>"),
        (503, b"upstream connect error"),
    ],
)
def test_known_words_invalid_requests_and_failures_are_not_unknown(status, body):
    assert classify(status, {}, body).words_known


def test_check_answer_prints_a_report_for_unknown_words_at_any_status():
    head = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\n\r\n"
    unknown = "\n".join(lines_of(explain(head + b'{"code": "PantryLocked", "message": "Ask the housekeeper."}')))
    assert "please send it" in unknown
    assert "PantryLocked" in unknown
    assert "housekeeper" not in unknown
    assert "please send it" not in "\n".join(lines_of(explain(head + b'{"code": "Arrearage"}')))


async def status_of(sidecar):
    async with sidecar.client.get(f"{sidecar.admin_url}/status") as response:
        text = await response.text()
        return (await response.json())["backends"][0]["refusals"], text


async def test_status_and_log_show_the_code_and_never_the_words(serving, scripted, caplog):
    answers = [
        ({"error": {"code": "limit_requests", "message": "slow down"}}, 429),
        ({"error": {"code": "ZONE_FROZEN_9", "message": "The kettle of sk-1 is on: what is in the yard?"}}, 429),
        ({"error": {"code": "ZONE_FROZEN_9", "message": "The kettle of sk-1 is on: what is in the yard?"}}, 429),
    ]

    async def script(link, seen):
        body, status = answers.pop(0) if answers else ({"choices": [{"message": {"content": "A gate."}}]}, 200)
        await link.answer(body, status=status)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1", dashscope_api_key="sk-1")
    assert (await status_of(sidecar))[0] == {"known": 0, "unknown": 0, "last_unknown": None}
    with caplog.at_level(logging.WARNING):
        async with sidecar.post(chat("what is in the yard?")) as response:
            assert response.status == 200
    found, text = await status_of(sidecar)
    last = found.pop("last_unknown")
    assert found == {"known": 1, "unknown": 2}
    assert (last["status"], last["code"]) == (429, "ZONE_FROZEN_9")
    assert 0 <= last["seconds_ago"] < 20
    [line] = [record.getMessage() for record in caplog.records if "does not know" in record.getMessage()]
    assert "ZONE_FROZEN_9" in line
    assert "vlm-sidecar check --answer FILE" in line
    assert "yard" not in text + caplog.text
    assert "sk-1" not in text + caplog.text


def test_a_provider_with_a_new_code_each_time_does_not_fill_the_log(caplog):
    words = RefusalWords()
    for number in range(500):
        error = Throttled("refused", kind="unknown")
        error.public_code = f"code-{number}"
        error.words_known = False
        words.count(1.0, "dashscope", error)
    assert words.unknown["dashscope"] == 500
    assert words.last_unknown["dashscope"].code == "code-499"
    assert len(caplog.records) == 20


async def test_a_code_that_is_not_made_of_known_words_is_counted_and_not_shown(serving, scripted, caplog):
    answers = [({"error": {"code": "WhatIsInTheYard", "message": "x"}}, 429)]

    async def script(link, seen):
        body, status = answers.pop(0) if answers else ({"choices": [{"message": {"content": "A gate."}}]}, 200)
        await link.answer(body, status=status)

    upstream = await scripted(script)
    sidecar = await serving(dashscope_url=f"{upstream.origin}/v1")
    with caplog.at_level(logging.WARNING):
        async with sidecar.post(chat("what is in the yard?")) as response:
            assert response.status == 200
    found, text = await status_of(sidecar)
    assert (found["unknown"], found["last_unknown"]["code"]) == (1, "")
    assert "code not shown" in caplog.text
    assert "yard" not in (text + caplog.text).lower()
