"""The contract between the sidecar and whatever answers: one request in, one reply out, or one of the errors below.

An implementer needs this file only. A backend makes exactly one attempt for each `send`: it never retries a refusal,
never waits for a quota, and never hides an error. (The one exception: a *reused* connection that turns out to be dead
before the first byte of an answer may be replaced once, unseen.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

#: Which API a body is written in: OpenAI's chat completions, or DashScope's native generation.
Dialect = Literal["openai", "native"]

#: What a refusal was about. `growth`: traffic rose too quickly; `capacity`: the model has no room for anybody;
#: `unknown`: a throttling refusal that does not say.
ThrottleKind = Literal["request_rate", "token_rate", "growth", "concurrency", "capacity", "unknown"]


@dataclass(slots=True)
class Request:
    """One call for a backend, not to be changed (a frozen one takes four times as long to make).

    `body` is the caller's bytes, forwarded as they are.
    """

    dialect: Dialect
    path: str
    """The path below the API's base, such as `/chat/completions`."""
    body: bytes
    model: str
    stream: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    """End-to-end headers to pass on. Never hop-by-hop ones, `Host`, `Cookie` or the caller's `Authorization`."""
    deadline: float | None = None
    """On the loop's clock: when the answer is of no more use. The caller of `send` enforces it by cancelling; a
    backend may use it to tell its provider."""
    method: str = "POST"
    """Another one only with what passes through to an upstream over HTTP."""


@dataclass(slots=True)
class Timings:
    """What a backend notes about one attempt while it runs, on the event loop's clock (`loop.time()`)."""

    work_started: float | None = None
    """The wait for a connection, or for the GPU's lock or batch, was over."""
    first_byte: float | None = None
    """The first byte of the answer was there."""


#: Takes a piece of a stream; False: no more for now.
Take = Callable[[bytes], bool]


class Usage(NamedTuple):
    """LLM tokens as the provider counted them."""

    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Reply:
    """An accepted answer: either `body` is whole, or `chunks` yields it piece by piece.

    For a stream, `usage` and `failure` are known once `chunks` is exhausted. `failure` is an error that arrived inside
    the stream after its first content: its frame was passed on, this is for the accounts.
    Whoever receives a streaming reply calls `aclose` exactly once, also after an error: it frees the connection, and
    if the stream was not exhausted it makes the provider see its caller gone.
    """

    status: int
    headers: Mapping[str, str]
    """End-to-end response headers that may reach the caller, `Content-Type` included, no `Content-Length`."""
    body: bytes = b""
    chunks: AsyncIterator[bytes] | None = None
    pour: Callable[[Take], Awaitable[bool]] | None = None
    """The same pieces as from `chunks`, each given away in the instant in which it comes, and no task woken for it.

    Returns whether that was the last: False where no more was taken for now, and it is to be called again.
    """
    usage: Usage | None = None
    failure: BackendError | None = None
    closer: Callable[[], Awaitable[None]] | None = None
    """Frees what a streaming reply holds, whether or not `chunks` was ever begun."""

    async def aclose(self) -> None:
        """Let go of what the reply holds. A reply with a whole body holds nothing."""
        if self.closer is not None:
            await self.closer()


class Backend(Protocol):
    """Anything that answers. This is everything that the sidecar uses of a backend."""

    @property
    def name(self) -> str:
        """What `X-Sidecar-Backend` and the metrics call it."""
        ...

    @property
    def model_id(self) -> str | None:
        """The one model that answers here; None if the request's own model is used."""
        ...

    @property
    def slots(self) -> int | None:
        """Attempts that the backend can work on or keep ready at once; None if its limits must be learned."""
        ...

    def account(self) -> str:
        """Name the account whose limits apply, for the state file. It may change when a key is rotated."""
        ...

    def ready_reason(self) -> str | None:
        """Why the backend can serve no request at present, in one line; None while it can."""
        ...

    async def start(self) -> None:
        """Be ready to serve: open pools, load the model. Raises `BackendError` with a message for a person."""

    async def send(self, request: Request, timings: Timings) -> Reply:
        """Make one attempt. Cancelling it ends the attempt at the provider too.

        Returns a reply with a 2xx status. Raises one of the `BackendError`s for everything else. For a stream it
        returns once the first content is there, so that a refusal inside a 200 stream is raised like any other.
        """
        ...

    async def models(self) -> bytes:
        """The body of `GET /v1/models`, in OpenAI's shape. Raises like `send`."""
        ...

    async def close(self) -> None:
        """Let go of everything. Called once, when nothing is in flight."""


class BackendError(Exception):
    """An attempt that brought no answer. `body` is the provider's own error body, empty if it sent none."""

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
        self.headers: Mapping[str, str] = headers or {}


class Throttled(BackendError):
    """The provider refused because of a limit. The request itself is fine: try again when the limit allows."""

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
        """Seconds the provider asks to wait, if it said so in any spelling that makes sense. To be trusted little."""


class BillingRefused(BackendError):
    """The account is out of money, or the model was not bought: no retry helps."""


class Rejected(BackendError):
    """The request's own fault (a 4xx): it goes to the caller once, and is never retried."""

    moderated = False
    """The provider's content inspection refused the prompt, the image or the answer."""


class ServerFailed(BackendError):
    """The provider failed (5xx), or answered what is no answer. A retry may help."""


class Unreachable(BackendError):
    """No connection, or one that broke before the answer was whole. A retry may help."""
