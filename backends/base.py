"""The contract between the sidecar and a backend: `send` takes one request and returns one reply or raises an error.

To implement a backend, you need only this file. Each call of `send` makes exactly one attempt. A backend never retries
a refusal, never waits for a quota, and never hides an error. There is one exception: if a *reused* connection breaks
before the first byte of the answer, the backend may send the request once more on a new connection. It counts this in
`Timings.resends`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

#: The API whose format a body uses: OpenAI's chat completions, or DashScope's native generation.
Dialect = Literal["openai", "native"]

#: The limit that caused a refusal. `growth`: the request rate rose too quickly. `capacity`: the model is overloaded for
#: all accounts. `unknown`: the provider did not name the limit.
ThrottleKind = Literal["request_rate", "token_rate", "growth", "concurrency", "capacity", "unknown"]

#: Bytes of the longest whole answer that is read, if the request sets no lower bound. One answer may exceed the bound
#: on all answers, so it must fit into the 96 MiB that the process may use besides its bounds. A description has some
#: kilobytes, four generated pictures of one megapixel in base64 about 12 MB.
MAX_ANSWER_BYTES = 16 * 1024 * 1024


@dataclass(slots=True)
class Request:
    """One request to a backend. Do not modify it.

    It is not a frozen dataclass because creating a frozen one takes four times as long.
    """

    dialect: Dialect
    path: str
    """The path below the API's base, such as `/chat/completions`."""
    body: bytes
    """The caller's bytes. The backend forwards them unchanged."""
    model: str
    stream: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    """End-to-end headers to forward. They never include hop-by-hop headers, `Host`, `Cookie` or the caller's
    `Authorization`."""
    deadline: float | None = None
    """The time after which the answer is useless, on the loop's clock (`loop.time()`). The caller of `send` enforces it
    by cancelling. A backend may also send it to the provider."""
    method: str = "POST"
    """The HTTP method. It differs from POST only for requests that pass through to an upstream over HTTP."""
    query: str = ""
    """The query of the caller's URL, without credentials. Only an upstream over HTTP gets it."""
    max_answer_bytes: int = MAX_ANSWER_BYTES
    """Bytes of the longest whole answer that is read. Only an upstream over HTTP has answers of any length."""
    keeps_stream: bool = False
    """Whether the caller of `send` keeps what it reads of a stream until `aclose`, so that all of it counts as held."""


@dataclass(slots=True)
class Timings:
    """The times of one attempt, on the event loop's clock (`loop.time()`). The backend sets them during the attempt."""

    work_started: float | None = None
    """When the wait for a connection, or for the GPU's lock or batch, ended."""
    first_byte: float | None = None
    """When the first byte of the answer arrived."""
    resends: int = 0
    """How many times the request was sent again, because a reused connection had died while it was idle."""


#: A callback that consumes one piece of a stream. It returns False to pause the stream.
OnPiece = Callable[[bytes], bool]


class Usage(NamedTuple):
    """The numbers of LLM tokens, as the provider reported them."""

    input_tokens: int
    output_tokens: int


class ReportedLimit(NamedTuple):
    """A limit that the provider reported in the headers of an answer. It can be wrong."""

    name: str
    """The header's name in lower case: it names the limit."""
    dimension: Literal["request_rate", "token_rate"]
    limit: float
    """Requests or LLM tokens per window: from 1 to 1e9."""
    window: float | None
    """Seconds of the window; None if the headers do not show it."""
    remaining: float | None = None
    """What remains of the limit, from 0 to `limit`."""
    reset: float | None = None
    """Seconds until the window ends or, if the limit `refills`, until it is whole again. It may be left out while much
    remains."""
    refills: bool = False
    """Whether the limit refills continuously, so that a request may be possible long before `reset`."""


@dataclass(slots=True)
class Progress:
    """How far a stream has come. The backend updates it while the stream is read."""

    content_at: float | None = None
    """The loop time of the newest content; None before the first content. Comments and empty pieces are no content.

    A backend need not look at each piece: the time may be up to 1 s too late.
    """


@dataclass(slots=True)
class Reply:
    """An accepted answer. Either `body` contains the whole answer, or `chunks` yields it piece by piece.

    For a stream, `usage`, `output_bytes` and `failure` are set when `chunks` is exhausted or the reply is closed.
    `failure` is an error that arrived inside the stream after its first content. The caller receives the frame of this
    error unchanged; the field lets the sidecar count and classify the error. An error before the first content is
    raised by `chunks` or `deliver`.

    The receiver of a streaming reply must call `aclose` exactly once, also after an error. `aclose` frees the
    connection. If the stream was not exhausted, `aclose` closes the connection, so that the provider sees that the
    caller has disconnected.
    """

    status: int
    headers: Mapping[str, str]
    """End-to-end response headers that may be sent to the caller. They include `Content-Type`, but not
    `Content-Length`."""
    body: bytes = b""
    chunks: AsyncIterator[bytes] | None = None
    deliver: Callable[[OnPiece], Awaitable[bool]] | None = None
    """Pass the pieces of `chunks` to a callback, each as soon as it arrives, without waking a task for each piece.

    Returns True when the stream is exhausted. Returns False if the callback paused the stream; call `deliver` again to
    continue.
    """
    progress: Progress | None = None
    """How far a stream has come. None: nothing is known about it, or the reply is no stream."""
    usage: Usage | None = None
    output_bytes: float | None = None
    """The length of the generated text in bytes (UTF-8), for an estimate if `usage` is None. It is an estimate too.

    None: nothing was generated, or nothing is known about it.
    """
    failure: BackendError | None = None
    ended_within_event: bool = False
    """Whether the last bytes of a stream belong to an event that is not complete. Set when the reply is closed."""
    limits: tuple[ReportedLimit, ...] = ()
    """The limits that the provider reported with this answer."""
    counted_at: float | None = None
    """Loop time at which the provider says that it counted the request; None if it does not say so."""
    closer: Callable[[], Awaitable[None]] | None = None
    """Releases the resources of a streaming reply. It works even if the iteration over `chunks` never started."""

    async def aclose(self) -> None:
        """Release the resources of the reply. A reply with a whole body has none."""
        if self.closer is not None:
            await self.closer()


class Backend(Protocol):
    """The complete interface between the sidecar and a backend: the sidecar uses nothing else of it."""

    @property
    def name(self) -> str:
        """The backend's name in the header `X-Sidecar-Backend` and in the metrics."""
        ...

    @property
    def model_id(self) -> str | None:
        """The only model of this backend; None if the backend uses the model that the request names."""
        ...

    @property
    def slots(self) -> int | None:
        """The number of attempts that the backend can process or keep ready at the same time.

        None if the sidecar must learn the limits.
        """
        ...

    @property
    def has_native_api(self) -> bool:
        """Whether the backend sends requests in the native dialect to DashScope's own API, whatever their path."""
        ...

    def account(self) -> str:
        """Return the name of the account whose limits apply, for the state file.

        The name may change when a key is rotated.
        """
        ...

    def unready_reason(self) -> str | None:
        """Return one line that says why the backend cannot serve requests at present; None if it can serve them."""
        ...

    async def start(self) -> None:
        """Prepare to serve: open connection pools, load the model.

        Raises `BackendError` with a message that an operator can understand.
        """

    async def send(self, request: Request, timings: Timings) -> Reply:
        """Make one attempt. If the call is cancelled, the attempt also ends at the provider.

        Returns a reply with a 2xx status. Raises a `BackendError` in every other case. For a stream, `send` returns
        when the first content has arrived, so that it can raise a refusal inside a 200 stream like any other refusal.
        It may return earlier if a stream has begun and its content takes long; then `chunks` keeps the caller's
        connection alive with comments, and raises such a refusal.
        """
        ...

    async def models(self) -> bytes:
        """Return the body of `GET /v1/models` in OpenAI's format. Raises the same errors as `send`."""
        ...

    async def close(self) -> None:
        """Release all resources. The sidecar calls this once, when no attempt is in flight."""


class BackendError(Exception):
    """An attempt failed.

    `message` is the sidecar's own sentence with `public_code`: it may be shown to everybody, in `/status` and in the
    log. `body`, `quote`, `code` and `upstream_request_id` come from the provider and may quote the request, so that
    only the caller of this request may see them.
    """

    quote = ""
    """The provider's own message on one line; empty if it sent none."""
    upstream_request_id = ""
    """The provider's own id of this request; empty if it named none. Its support asks for this id."""
    public_code = ""
    """The provider's code if everybody may see it: it consists of known words. Else it is empty."""
    words_known = True
    """False if no rule knew the provider's code or words, so that the error was read by its status alone."""
    limits: tuple[ReportedLimit, ...] = ()
    """The limits that the provider reported with this error."""
    counted_at: float | None = None
    """See `Reply.counted_at`."""
    may_resend = True
    """False if the provider has completed the request: sending it again would be charged again."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        code: str = "",
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.body = body
        """The provider's own error body; empty if it sent none."""
        self.headers: Mapping[str, str] = headers or {}


class Throttled(BackendError):
    """The provider refused the request because of a limit. The request is valid and can be sent again later."""

    def __init__(
        self,
        message: str,
        *,
        kind: ThrottleKind,
        retry_after: float | None = None,
        status: int = 429,
        code: str = "",
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, status=status, code=code, body=body, headers=headers)
        self.kind: ThrottleKind = kind
        self.retry_after = retry_after
        """The wait that the provider asked for, in seconds; None if it named no valid value. It is not reliable."""


class BillingRefused(BackendError):
    """The account has no money left, or the model was not purchased. A retry cannot succeed."""


class QuotaUsedUp(BackendError):
    """The account's quota of an hour, a day or longer is used up. No request can wait for its end."""

    ends_in: float | None = None
    """Seconds until the end of the period, as the provider reported them; None if it reported no end."""


class Rejected(BackendError):
    """The request itself is invalid (a 4xx). The caller receives this error; the request is never retried."""

    moderated = False
    """Whether the provider's content inspection refused the prompt, the image or the answer."""
    above_limit = False
    """Whether this single request is larger than a limit allows at all. The refusal says nothing about the limit's
    present use."""


class Unauthorized(Rejected):
    """The provider refuses the sidecar's key, with status 401, 403 or 400."""


class ServerFailed(BackendError):
    """The provider failed (5xx), or its answer is not valid. A retry may succeed."""


class Unreachable(BackendError):
    """No connection could be made, or it broke before the end of the answer. A retry may succeed."""
