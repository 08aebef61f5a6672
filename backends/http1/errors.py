"""The errors of both HTTP implementations, in words of our own: no other room has to import aiohttp.

The listener raises `MalformedRequest`. The client raises `HttpError`s; `failure_of` says what failed.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import aiohttp

from backends.http1 import connecting

#: The base of every error that `Origin.request` and the reading of an answer raise.
HttpError = aiohttp.ClientError


class MalformedRequest(Exception):
    """The caller sent something that is not valid HTTP. The message holds no byte of it: it may be part of a key."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(
            f"this is not a valid HTTP request ({type(cause).__name__}): this port speaks plain HTTP, without TLS"
        )


class MalformedAnswer(HttpError):
    """The upstream answered with something that is not valid HTTP."""


FailureKind = Literal[
    "name_not_resolved",
    "certificate_not_trusted",
    "proxy_refused",
    "proxy_not_connected",
    "not_connected",
    "connect_timed_out",
    "answer_cut_short",
    "malformed_answer",
    "connection_broken",
]


class Failure(NamedTuple):
    """What failed, and the reason in words that quote no URL and no header."""

    kind: FailureKind
    reason: str


def failure_of(error: HttpError) -> Failure:
    """Classify an error. aiohttp's own messages name URLs and quote headers, so they are not used."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return Failure("name_not_resolved", _reason(error))
        case aiohttp.ClientConnectorCertificateError():
            return Failure("certificate_not_trusted", str(error.certificate_error))
        case aiohttp.ClientHttpProxyError():
            return Failure("proxy_refused", str(error.status))
        case aiohttp.ClientProxyConnectionError():
            return Failure("proxy_not_connected", _reason(error))
        case aiohttp.ClientConnectorError():
            return Failure("not_connected", _reason(error))
        case aiohttp.ConnectionTimeoutError():
            return Failure("connect_timed_out", f"{connecting.CONNECT_SECONDS:g}")
        case aiohttp.ClientPayloadError():
            return Failure("answer_cut_short", "")
        case MalformedAnswer() | aiohttp.ClientResponseError():
            return Failure("malformed_answer", "")
        case _:
            return Failure("connection_broken", _reason(error))


def _reason(error: HttpError) -> str:
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, ConnectionError) and cause.errno:
        return os.strerror(cause.errno)  # asyncio's own text names the address instead of the reason
    if isinstance(cause, aiohttp.ServerDisconnectedError):
        return "the server closed it"
    # Without a number, the text is aiohttp's own and can name the URL.
    return (isinstance(cause, OSError) and cause.errno and cause.strerror) or type(cause).__name__
