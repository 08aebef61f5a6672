"""Send every case to a server, and return the results in a form that can be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import aiohttp
from cases import Case, Says
from scripted_upstream import Upstream

#: Characters. Longer texts are compared only by length and beginning, because FastAPI repeats whole frames.
_LONG = 200
#: The text before the provider's own message. In trio-core this text depends on the version of its openai client.
_PREFACE = re.compile(r"^(Error code: \d+ - )the provider answered \d+: (?:\w+: )?")


class Provider(Upstream):
    """Gives the answers of the current case in order, and repeats the last answer."""

    def __init__(self) -> None:
        super().__init__(self._say)
        self.says: list[Says] = []

    async def _say(self, link: Any, seen: Any) -> None:
        says = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        await link.answer(says.body, says.status, says.content_type)


async def outcomes(url: str, provider: Provider, cases: Sequence[Case]) -> dict[str, Any]:
    """Send the cases to `url`, one after the other. Return status, answer and upstream body for each case name."""
    found = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
        for case in cases:
            provider.says = list(case.says)
            provider.seen.clear()
            headers = {"Content-Type": case.content_type} if case.content_type else {}
            async with client.request(
                case.method, url + case.path, data=case.body, headers=headers, skip_auto_headers=["Content-Type"]
            ) as response:
                answer = await response.read()
            sent = _sent(json.loads(provider.seen[-1].body), case) if provider.seen else None
            found[case.name] = {"status": response.status, "answer": _answer(answer), "sent": sent}
    return found


def _answer(body: bytes) -> Any:
    try:
        answer = json.loads(body)
    except ValueError:
        return {"text": body.decode(errors="replace")}
    if isinstance(answer, dict) and "elapsed_ms" in answer:
        answer["elapsed_ms"] = type(answer["elapsed_ms"]).__name__
    detail = answer.get("detail") if isinstance(answer, dict) else None
    if isinstance(detail, dict) and "message" in detail:
        detail["message"] = _PREFACE.sub(r"\1", detail["message"])
    return _cut(answer)


def _sent(body: dict[str, Any], case: Case) -> dict[str, Any]:
    """Return the body that reached the provider, without prompt texts and pixels, which differ between the servers."""
    *images, text = body.pop("messages")[0]["content"]
    prompt = text["text"].endswith(case.own_prompt)
    return {**_cut(body), "images": len(images), "own prompt": prompt}


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONG:
        return f"{value[:64]}… ({len(value)} characters)"
    if isinstance(value, list):
        return [_cut(item) for item in value]
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    return value
