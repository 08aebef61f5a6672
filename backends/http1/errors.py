"""The errors of both HTTP implementations, as types of this project, so that no other package must import aiohttp.

The listener raises `MalformedRequest`. The client raises `HttpError`; `failure_of` says what failed.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import aiohttp

from backends.http1 import connecting, descriptors

#: The base of every error that `Origin.request` and the reading of an answer raise.
HttpError = aiohttp.ClientError


class MalformedRequest(Exception):
    """The caller sent data that is not valid HTTP, or a head that is too large.

    The message contains no byte of the data, because the data may contain a part of a key.
    """

    status: Literal[400, 431]
    code: Literal["invalid_request", "headers_too_large"]

    def __init__(self, cause: BaseException | None, *, head_too_large: bool = False) -> None:
        if head_too_large:
            self.status, self.code = 431, "headers_too_large"
            text = (
                "the first line or a header of the request is longer than 8 kB, all of them are longer than 64 kB, or "
                "there are more than 128 headers: send less"
            )
        else:
            self.status, self.code = 400, "invalid_request"
            text = (
                f"this is not a valid HTTP request ({type(cause).__name__}): this port speaks plain HTTP, without TLS"
            )
        super().__init__(text)


class RefusedBody(Exception):
    """The listener does not receive the rest of a body. The message names the reason and the way out."""

    def __init__(
        self,
        message: str,
        status: Literal[400, 408, 503],
        code: Literal["invalid_request", "request_timeout", "queue_full"],
    ) -> None:
        self.status: Literal[400, 408, 503] = status
        self.code: Literal["invalid_request", "request_timeout", "queue_full"] = code
        super().__init__(message)


def stalled_body() -> RefusedBody:
    """Return the error for a body that is not sent steadily while other requests need its place."""
    return RefusedBody(
        "the body paused or came too slowly, and others need its place, because the bytes for bodies that arrive are "
        "in use: send it without a pause, or raise SIDECAR_QUEUE_BYTES",
        408,
        "request_timeout",
    )


def too_many_bodies() -> RefusedBody:
    """Return the error for a large body that begins while too many others have begun."""
    return RefusedBody(
        "so many large bodies arrive that their first bytes alone do not fit into SIDECAR_QUEUE_BYTES: try again after "
        "1 s, send fewer at the same time, or raise it",
        503,
        "queue_full",
    )


def tiny_chunks() -> RefusedBody:
    """Return the error for a body in chunks that are mostly not the body."""
    return RefusedBody("the chunks of the body are too small: send larger ones", 400, "invalid_request")


class MalformedAnswer(HttpError):
    """The upstream's answer is not valid HTTP."""


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
    """The kind of a failure, and its reason as a text without URLs and headers."""

    kind: FailureKind
    reason: str


def failure_of(error: HttpError) -> Failure:
    """Classify an error. aiohttp's own messages are not used, because they can contain URLs and headers."""
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


def lacks_descriptor(error: HttpError) -> bool:
    """Return whether a connection failed because the process, or the machine, has no file descriptor left."""
    cause = getattr(error, "os_error", None)
    return isinstance(cause, OSError) and descriptors.is_exhausted(cause)


def _reason(error: HttpError) -> str:
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, ConnectionError) and cause.errno:
        return os.strerror(cause.errno)  # asyncio's own text contains the address and not the reason
    if isinstance(cause, aiohttp.ServerDisconnectedError):
        return "the server closed it"
    # If the error has no errno, its text is from aiohttp and can contain the URL.
    return (isinstance(cause, OSError) and cause.errno and cause.strerror) or type(cause).__name__
