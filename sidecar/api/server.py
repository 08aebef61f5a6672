"""The data listener: find the endpoint, check the bearer token, and turn every result or error into an answer."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, get_args
from urllib.parse import unquote

from backends.forwarded_headers import is_public_id
from backends.http1.interface import Answer, HttpRequest
from sidecar.admission import Draining
from sidecar.api import native, openai, uploads
from sidecar.api.call import TRACE, Call, CallSettings
from sidecar.api.errors import Api, InvalidRequest, problem_of
from sidecar.api.parse_turns import ParseTurns
from sidecar.api.passthrough import NATIVE_BASE, passthrough
from sidecar.api.trio import endpoints as trio
from sidecar.dispatch.dispatcher import Dispatcher
from sidecar.dispatch.model_list import ModelList
from sidecar.foreign_pages import ForeignPages
from sidecar.observe.format import shown_name

log = logging.getLogger("sidecar.access")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The handler of one method on one path, and the API that defines the format of its errors."""

    api: Api
    handle: Callable[[Call], Awaitable[Answer]]
    open: bool = False
    """Needs no bearer token, because probes and load balancers call it."""


#: path → method → endpoint.
ENDPOINTS: dict[str, dict[str, Endpoint]] = {}
for _base in openai.BASES:
    ENDPOINTS[f"{_base}/chat/completions"] = {"POST": Endpoint("openai", openai.chat_completions)}
    ENDPOINTS[f"{_base}/models"] = {"GET": Endpoint("openai", openai.models)}
ENDPOINTS[NATIVE_BASE + native.PATH] = {"POST": Endpoint("native", native.generation)}
ENDPOINTS[NATIVE_BASE + uploads.PATH] = {"GET": Endpoint("native", uploads.upload_policy)}
ENDPOINTS["/api/inference/describe"] = {"POST": Endpoint("trio", trio.describe)}
ENDPOINTS["/api/inference/crop-describe"] = {"POST": Endpoint("trio", trio.crop_describe)}
ENDPOINTS["/api/inference/detect"] = {"POST": Endpoint("trio", trio.detect)}
ENDPOINTS["/api/inference/status"] = {"GET": Endpoint("trio", trio.status)}
ENDPOINTS["/health"] = {"GET": Endpoint("trio", trio.health, open=True)}


#: The error text of a request that was still in progress when the drain timed out.
_DRAIN_TIMEOUT_TEXT = (
    "the sidecar is shutting down and could not finish this in the time it was given: try again in 1 s, "
    "or raise SIDECAR_DRAIN_TIMEOUT"
)
#: A part of a path that is neither plain words nor a version.
_NOT_PLAIN = re.compile(r"(?<=/)(?!(?:v\d|[a-z][a-z_-]{0,23})(?:/|$))[^/]+")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
#: Base path -> the endpoint of every other path below it, if `SIDECAR_PASSTHROUGH` is set.
_PASSTHROUGH = {f"{base}/": Endpoint("openai", passthrough) for base in openai.BASES}
_PASSTHROUGH[f"{NATIVE_BASE}/"] = Endpoint("native", passthrough)


class DataServer:
    """Handles every request of the data listener, and counts the requests in progress for the drain."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        settings: CallSettings,
        models: ModelList,
        *,
        foreign_pages: ForeignPages,
        detector: Dispatcher | None = None,
        api_key: str | None = None,
        access_log: bool = False,
    ) -> None:
        self._dispatcher = dispatcher
        self._models = models
        self._detector = detector
        self._foreign_pages = foreign_pages
        self._parse_turns = ParseTurns()
        self.configure(settings, api_key=api_key, access_log=access_log)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._aborted = False
        self._idle: asyncio.Event | None = None  # exists only while a task waits for it

    def configure(self, settings: CallSettings, *, api_key: str | None, access_log: bool) -> None:
        """Use these settings for the requests that arrive from now on."""
        self._settings = settings
        self._api_key = api_key.encode() if api_key else None
        self._access_log = access_log

    @property
    def in_progress(self) -> int:
        """Number of requests that do not have a complete answer yet."""
        return len(self._tasks)

    def abort_all(self) -> None:
        """End every request in progress with an answer, because the drain timed out."""
        self._aborted = True
        for task in self._tasks:
            task.cancel()

    async def wait_until_idle(self) -> None:
        """Wait until no request is in progress."""
        if self._tasks:
            self._idle = self._idle or asyncio.Event()
            await self._idle.wait()

    async def __call__(self, http: HttpRequest) -> Answer:
        """Answer one request."""
        path = http.raw_path.partition("?")[0]
        methods = ENDPOINTS.get(unquote(path)) if "%" in path else ENDPOINTS.get(path)
        if methods:
            endpoint = methods.get("GET" if http.method == "HEAD" else http.method)
        else:
            endpoint = _redirect_of(path) or self._passthrough_endpoint(path)
        api = endpoint.api if endpoint else _api_of(path)
        call = Call(
            http, api, self._dispatcher, self._settings, self._models, detector=self._detector,
            parse_turns=self._parse_turns,
        )  # fmt: skip
        task = http.task
        assert task is not None  # noqa: S101  this code runs in that task
        self._tasks.add(task)
        try:
            call.identify()
            self._check_origin(http)
            if endpoint is None:
                _refuse_path(path, http.method, methods)
            if self._api_key is not None and not endpoint.open:
                self._check_bearer(http)
            response = await endpoint.handle(call)
            call.outcome = "ok" if response.status < 400 else call.outcome
        except asyncio.CancelledError:
            call.outcome = "cancelled"
            if not self._aborted or http.is_gone:
                raise
            task.uncancel()
            response = await self._answer(call, Draining(_DRAIN_TIMEOUT_TEXT, retry_after=1.0))
        except Exception as error:  # noqa: BLE001  the only place where an exception becomes an answer
            try:
                response = await self._answer(call, error)
            except ConnectionError:
                call.outcome = "cancelled"
                raise
            finally:
                error.__traceback__ = None  # its frames refer to the error and to the request body
        finally:
            self._tasks.discard(task)
            if self._idle is not None and not self._tasks:
                self._idle.set()
                self._idle = None
            call.finish()
            if self._access_log:
                _log_access(call, path)
        return response

    def _passthrough_endpoint(self, path: str) -> Endpoint | None:
        """Return the endpoint for a path that is not ours: pass-through if it is enabled, otherwise None."""
        if not self._settings.passthrough:
            return None
        return next((endpoint for base, endpoint in _PASSTHROUGH.items() if path.startswith(base)), None)

    async def _answer(self, call: Call, error: Exception) -> Answer:
        if isinstance(error, ConnectionError) and (call.http.caller_has_left or call.http.is_gone):
            raise error  # nobody waits for an answer
        problem = problem_of(error, call.api)
        call.outcome, call.upstream_request_id = problem.outcome, problem.upstream_request_id
        if problem.status == 500:  # only a defect has this status: a provider's 5xx becomes 502
            logging.getLogger("sidecar").error(
                "a defect in the sidecar: %s", type(error).__name__, exc_info=error, extra=_ids(call)
            )
        return await call.fail(problem)

    def _check_origin(self, http: HttpRequest) -> None:
        refusal = self._foreign_pages.refusal(http.headers)
        if refusal is not None:
            raise InvalidRequest(refusal, status=403, code="forbidden_origin")

    def _check_bearer(self, http: HttpRequest) -> None:
        given = http.headers.get("Authorization", "")
        scheme, _, token = given.partition(" ")
        assert self._api_key is not None  # noqa: S101  the caller of this method has checked it
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            token.strip().encode(errors="surrogateescape"), self._api_key
        ):
            why = "its key is another one" if given else "there is none"
            raise InvalidRequest(
                f"the Authorization header must be Bearer and the key that the sidecar's SIDECAR_API_KEY holds: {why}",
                status=401,
                code="unauthorized",
                field="Authorization",
            )


def _api_of(path: str) -> Api:
    """Return the API that defines the error format for an unknown path."""
    if path.startswith(("/api/inference", "/health")):
        return "trio"
    return "native" if path.startswith("/api/v1/") else "openai"


async def _redirect(call: Call) -> Answer:
    """Answer a path with a slash too many, as trio-core does: 307, so that the client sends the same request again."""
    path, mark, query = call.http.raw_path.partition("?")
    return await call.respond(307, b"", {"Location": f"{unquote(path).rstrip('/')}{mark}{query}"})


_REDIRECTS = {api: Endpoint(api, _redirect, open=True) for api in get_args(Api)}


def _redirect_of(path: str) -> Endpoint | None:
    """Return the endpoint that redirects, if `path` without its last slashes is one of ours."""
    without = unquote(path).rstrip("/")
    return _REDIRECTS[_api_of(without)] if path.endswith(("/", "%2F", "%2f")) and without in ENDPOINTS else None


def _refuse_path(path: str, method: str, methods: dict[str, Endpoint] | None) -> NoReturn:
    if methods:
        allow = ", ".join(("GET, HEAD" if name == "GET" else name) for name in methods)
        message = f"{path} takes {allow}, not {method[:20]}"
        raise InvalidRequest(message, status=405, code="method_not_allowed", allow=allow)
    raise InvalidRequest(
        f"there is nothing at {path[:200]}; there is {', '.join(ENDPOINTS)}, and with SIDECAR_PASSTHROUGH "
        f"all of /v1/ and {NATIVE_BASE}/",
        status=404,
        code="not_found",
    )


def _log_access(call: Call, path: str) -> None:
    """Log one line for each request, with its waits in seconds, and never its body.

    Of a method and of a path that are not ours, only plain words are logged: the rest may be any text of the caller.
    """
    if path not in ENDPOINTS:
        path = _NOT_PLAIN.sub("*", path[:200])
    ticket = call.ticket
    status = call.response.status if call.response is not None else 0
    details: dict[str, Any] = {"outcome": call.outcome, **_ids(call)}
    if is_public_id(call.upstream_request_id):
        details["upstream_request_id"] = call.upstream_request_id
    if ticket is not None:
        seconds = ticket.stopwatch.seconds
        details |= {"key": shown_name(ticket.key), "model": shown_name(ticket.model)}
        details["priority"] = ticket.priority.name.lower()
        details |= {"attempts": ticket.attempts, "total_seconds": round(sum(seconds.values()), 4)}
        parts = {f"{part}_seconds": spent for part, spent in seconds.items()}
        causes = {f"{cause}_seconds": spent for cause, spent in (ticket.cause_seconds or {}).items() if spent}
        details |= {name: round(spent, 4) for name, spent in (parts | causes).items()}
    method = call.http.method if call.http.method in _METHODS else "*"
    log.info("%s %s %d", method, path, status, extra=details)


def _ids(call: Call) -> dict[str, str]:
    """Return the ids that identify a request in the log: the request id and, if known, the trace id."""
    ids = {"request_id": call.request_id}
    if trace := TRACE.match(call.http.headers.get("traceparent", "")):
        ids["trace_id"] = trace[1]
    return ids
