"""The list of models: kept for some seconds, and asked for by one call at a time, however many callers want it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import inf

from backends.base import Backend, BackendError, Reply, Request, Timings
from sidecar.admission import NO_MODEL, Admission, NotAdmitted, Ticket
from sidecar.dispatch.dispatcher import DeadlineExceeded, Dispatcher
from sidecar.observe.metrics import Metrics

#: Seconds for which a list is given without asking again. (The product's contract sets both.)
FRESH_SECONDS = 10.0
#: Seconds for which the last list is given while no upstream answers.
STALE_SECONDS = 600.0
#: A caller who could get the last list, or that of a model in this process, waits for a new list for at most this many
#: seconds. Providers answer within one second.
PATIENCE_SECONDS = 3.0


class ModelList:
    """The list of models of the first backend that answers. Create and use it in one event loop.

    The call to an upstream is a ticket like every other: it waits for a permit, counts as one attempt in flight, and is
    repeated after a refusal. It belongs to no caller, so a caller who leaves does not end it.
    """

    def __init__(self, admission: Admission, backends: Sequence[Backend], metrics: Metrics) -> None:
        """`backends`: in order of preference."""
        self._now = admission.loop.time
        self._names = ",".join(backend.name for backend in backends)
        remote = [_Lister(backend) for backend in backends if backend.model_id is None]
        self._dispatcher = Dispatcher(admission, remote, metrics) if remote else None
        self._in_process = next((backend for backend in backends if backend.model_id is not None), None)
        """The first backend that knows its one model without a call to anybody."""
        if backends[0].model_id is not None:
            self._dispatcher = None
        self._list = b""
        self._listed_at = self._asked_at = -inf
        self._asking: asyncio.Task[bytes] | None = None

    def __repr__(self) -> str:
        return f"<ModelList {self._names} bytes={len(self._list)} asking={self._asking is not None}>"

    async def get(self, seconds: float, *, max_seconds: float) -> bytes:
        """Return the body of `GET /v1/models`.

        `seconds`: how long this caller waits at most. `max_seconds`: how long the call to the upstream may take.
        Raises `BackendError`, `NotAdmitted` or `DeadlineExceeded` if there is no list, not even an old one.
        """
        if self._dispatcher is None:
            assert self._in_process is not None  # noqa: S101  there is at least one backend
            return await self._in_process.models()
        now = self._now()
        if now - self._listed_at < FRESH_SECONDS:
            return self._list
        has_old = now - self._listed_at < STALE_SECONDS
        if self._asking is None:
            if has_old and now - self._asked_at < FRESH_SECONDS:  # the last call failed: do not ask for each caller
                return self._list
            self._asked_at = now
            self._asking = asyncio.create_task(self._ask(self._dispatcher, now + max_seconds))
            self._asking.add_done_callback(self._on_end)
        has_other = has_old or self._in_process is not None
        try:
            async with asyncio.timeout(min(seconds, PATIENCE_SECONDS) if has_other else seconds):
                return await asyncio.shield(self._asking)
        except (BackendError, NotAdmitted, DeadlineExceeded, TimeoutError) as error:
            if has_old:
                return self._list
            if self._in_process is not None:
                return await self._in_process.models()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    f"no list of models within {seconds:g} s: ask again, or allow more time, in X-Request-Timeout and "
                    "SIDECAR_DEADLINE"
                ) from error
            raise

    async def _ask(self, dispatcher: Dispatcher, deadline: float) -> bytes:
        ticket = Ticket(now=self._now(), deadline=deadline, model=NO_MODEL)
        request = Request("openai", "/models", b"", NO_MODEL, deadline=deadline, method="GET")
        self._list = (await dispatcher.run(ticket, request)).body
        self._listed_at = self._now()
        return self._list

    def _on_end(self, asking: asyncio.Task[bytes]) -> None:
        self._asking = None
        if not asking.cancelled():
            asking.exception()  # every caller may have left: then nobody else looks at it

    async def close(self) -> None:
        """End the call in progress, if there is one."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])


class _Lister:
    """A backend as the retry loop uses it, which answers everything with its list of models."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self._backend = backend

    async def send(self, request: Request, timings: Timings) -> Reply:
        """Ask the backend for its list."""
        del request, timings
        return Reply(200, {}, await self._backend.models())
