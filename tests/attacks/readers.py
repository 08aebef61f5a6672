"""Attacks of callers that do not read, and of the provider behind the sidecar (see `attacks.upstream`)."""

from __future__ import annotations

import itertools

from attacks import bodies
from attacks.attack import Attack, Target
from attacks.sockets import CHAT, ask, connected, get, post, repeated, send, until_cut

#: Bytes. A small receive buffer, so that what nobody reads stays in the process that is attacked.
_RECEIVE_BUFFER = 4096


async def _unread(target: Target, seconds: float, count: int, request: bytes) -> None:
    """Send this request on `count` connections, and read nothing. Send it again when the connection is cut."""

    async def once(_: int) -> None:
        async with connected(target.port, _RECEIVE_BUFFER) as raw:
            await send(raw, request)
            await until_cut(raw)

    await repeated(seconds, count, once)


async def unread_streams(target: Target, seconds: float) -> None:
    """As many endless streams of one camera as there are permits."""
    await _unread(target, seconds, 16, post(CHAT, bodies.chat("endless-words", stream=True), "X-Camera-Id: unread\r\n"))


async def unread_answers(target: Target, seconds: float) -> None:
    requests = itertools.cycle(post(CHAT, bodies.chat(model)) for model in ("big-10", "big-60", "big-10"))

    async def once(_: int) -> None:
        async with connected(target.port, _RECEIVE_BUFFER) as raw:
            await send(raw, next(requests))
            await until_cut(raw)

    await repeated(seconds, 30, once)


async def unread_model_lists(target: Target, seconds: float) -> None:
    await _unread(target, seconds, 100, get("/v1/models"))


async def read_answers(target: Target, seconds: float) -> None:
    """Answers of 60 MB, which their callers read."""
    await repeated(seconds, 8, lambda _: ask(target.port, post(CHAT, bodies.chat("big-60"))))


def _by_upstream(model: str, count: int, stream: bool = False) -> Attack:
    async def run(target: Target, seconds: float) -> None:
        request = post(CHAT, bodies.chat(model, stream=stream))
        await repeated(seconds, count, lambda _: ask(target.port, request))

    return Attack("E2", run)


READERS = {
    "streams that are never read": Attack("E8", unread_streams, ("--max-concurrency", "16")),
    "whole answers that are never read": Attack("E8", unread_answers),
    "model lists that are never read": Attack("E8", unread_model_lists),
    "answers of 60 MB": Attack("E2", read_answers),
}
UPSTREAMS = {
    "an answer of tiny objects": _by_upstream("tiny-objects", 2),
    "streams of blank lines": _by_upstream("blank-lines", 30, stream=True),
    "answers of blank lines": _by_upstream("blank-lines", 30),
    "endless 1xx": _by_upstream("endless-1xx", 30),
}
