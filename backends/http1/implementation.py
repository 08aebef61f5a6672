"""Chooses the HTTP implementation once per process: the internal one, if it works on the installed aiohttp.

Releases of aiohttp may change internal parts at any time, and a security release must never have to wait for this
project. So a self-check decides at start. If it fails, `documented.py` is used, and the log warns.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from backends.http1.answer_bytes import AnswerBytes
from backends.http1.interface import Answer, Connector, HttpRequest, MakeListener, Name, Origin

log = logging.getLogger("sidecar")

#: Maximum duration of the self-check in seconds. Usually it takes a few milliseconds.
_CHECK_SECONDS = 5.0
#: The body of the self-check, 300,000 bytes: more than the read buffers of both ends and more than the client's slice,
#: so that the check also covers flow control.
_BODY = b"self-check" * 30_000


@dataclass(frozen=True, slots=True)
class Implementation:
    """Both ends of HTTP: see `interface.py`."""

    name: Name
    listener: MakeListener
    connector: Callable[[AnswerBytes | None], Connector]
    """The argument counts what arrives."""


def internal() -> Implementation:
    """Import and return the implementation that uses aiohttp's internal parts.

    May raise any exception if this aiohttp lacks an internal part.
    """
    from backends.http1 import client, server  # noqa: PLC0415  the import can fail

    return Implementation("internal", server.Listener, client.Connector)


def documented() -> Implementation:
    """Import and return the implementation that uses only aiohttp's documented interface."""
    from backends.http1 import documented as module  # noqa: PLC0415  its imports take memory that few processes need

    return Implementation("documented", module.Listener, module.Connector)


class _Chosen:
    """The choice of this process. It depends only on the installed aiohttp."""

    implementation: Implementation | None = None


async def choose() -> Implementation:
    """Return the implementation that this process uses."""
    if _Chosen.implementation is None:
        _Chosen.implementation = await _choose()
    return _Chosen.implementation


async def _choose() -> Implementation:
    try:
        implementation = internal()
        await self_check(implementation)
    except Exception as error:  # noqa: BLE001  internal parts can fail in any way
        log.warning(
            "aiohttp %s does not have the internal parts that this version uses (%s: %s): the documented "
            "implementation of HTTP serves. It needs about three times the processor time per frame",
            version("aiohttp"), type(error).__name__, error,
        )  # fmt: skip
        return documented()
    return implementation


async def self_check(implementation: Implementation) -> None:
    """Look for the internal parts by name, then send two requests over one loopback connection.

    May raise any exception if this aiohttp lacks an internal part. The bodies are larger than the read buffers of both
    ends, so that each end must wait for the other.
    """
    if implementation.name == "internal":
        from backends.http1 import aiohttp_parts  # noqa: PLC0415  the import can fail

        aiohttp_parts.check(asyncio.get_running_loop())
    listener, connector = implementation.listener(_echo, max_connections=2), implementation.connector(None)
    try:
        try:
            port = await listener.open("127.0.0.1", 0)
        except OSError:
            return  # without loopback, nothing can be concluded about aiohttp
        async with asyncio.timeout(_CHECK_SECONDS):
            origin = connector.origin(f"http://127.0.0.1:{port}")
            try:
                for path in ("/whole", "/pieces"):
                    await _exchange(origin, path)
            finally:
                origin.close()
    finally:
        await connector.close()
        await listener.close()


async def _echo(http: HttpRequest) -> Answer:
    """Answer with the body of the request: whole, or in two pieces."""
    body = b"".join([piece async for piece in http.content.iter_any()])
    whole = http.raw_path == "/whole"
    answer = http.answer(200, {"Content-Type": "text/plain"}, length=len(body) if whole else None)
    if whole:
        answer.write_whole(body)
    else:
        for piece in (body[:10], body[10:]):
            answer.write(piece)
            await answer.drain()
        answer.write_eof()
    await answer.drain()
    return answer


async def _exchange(origin: Origin, path: str) -> None:
    response = await origin.request("POST", path, {}, _BODY, _Times())
    pieces: list[bytes] = []
    try:
        complete = await response.deliver(lambda piece: not pieces.append(piece))  # type: ignore[func-returns-value]
    finally:
        response.close_unless_read()
    if (response.status, complete, b"".join(pieces)) != (200, True, _BODY):
        raise RuntimeError("an exchange over loopback brought a wrong answer")


@dataclass(slots=True)
class _Times:
    work_started: float | None = None
    first_byte: float | None = None
    resends: int = 0
