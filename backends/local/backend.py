"""The local backend: the event loop's interface to a model in this process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from backends.base import BackendError, Progress, Rejected, Reply, Request, Timings, Unreachable
from backends.local.answers import OpenAIAnswer
from backends.local.engine import Engine
from backends.local.prompts import parse
from backends.local.rows import Done, Event, Piece, Row, Started
from backends.local.sources import ImageSources
from backends.remote.native import send_native

if TYPE_CHECKING:
    from backends.local.model import VisionModel

_log = logging.getLogger("backends.local")

#: Minimum seconds between two restarts of a dead engine; the first restart is immediate. Without this bound, a
#: permanent fault would make the machine load the model continuously.
RESTART_INTERVAL_SECONDS = 60
#: Seconds between two log lines while a model is loading.
_PROGRESS_SECONDS = 10


class LocalBackend:
    """Serves a transformers vision-language model from a thread of this process."""

    has_native_api = False

    def __init__(
        self,
        model: str,
        *,
        name: str = "local",
        device: str = "auto",
        max_batch: int = 8,
        batch_wait_seconds: float = 0.005,
        image_urls: Sequence[str] = (),
        queued: Callable[[], int] = lambda: 0,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Store the options. `model` is a folder, or an id that transformers finds in its hub.

        `queued` returns the number of requests that wait to be sent to this backend. While it is 0, the engine does not
        wait for a batch to fill. The engine thread calls it. `on_batch` is called on the event loop with the size of
        each batch when the batch starts.

        Images are accepted as data URLs, and from URLs below one of `image_urls`. Raises `ValueError` if one of
        `image_urls` is neither http(s) nor file.
        """
        self.name = name
        self.slots = max_batch * 2
        """Maximum number of requests in flight: one batch at work, and one batch that is ready to start."""
        self._queued = queued
        self._on_batch = on_batch
        self.model_id = Path(model).name if Path(model).exists() else model
        """The name of the model in answers and in `/v1/models`. It must not contain a path of this machine."""
        self._load = partial(_load, model, device)
        self._max_batch = max_batch
        self._batch_wait_seconds = batch_wait_seconds
        self._sources = ImageSources(image_urls)
        self._rows: set[Row] = set()
        self._engine: Engine | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._unready: str | None = "the model is not loaded"

    def account(self) -> str:
        """Return the backend's name, because this process uses no account, see `Backend.account`."""
        return self.name

    def unready_reason(self) -> str | None:
        """Return one line that says why requests cannot be served now; None if they can be served."""
        return self._unready

    async def start(self) -> None:
        """Load the model and let it answer one small image.

        Raises `BackendError` with a message that an operator can understand.
        """
        failed = await self._launch("the model is being loaded")
        if failed is not None:
            raise BackendError(failed)
        self._supervisor = asyncio.create_task(self._supervise(), name="local-engine-supervisor")

    async def close(self) -> None:
        """Stop the engine thread. If the model is still loading, this does not wait for the thread to end."""
        self._unready = "closed"
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        await self._sources.close()
        for row in self._rows:
            row.gone = True
            row.events.put_nowait(Unreachable("the local backend is closed", status=503, code="engine_down"))
        if self._engine is not None:
            self._engine.stop()
            if self._engine.ready.done():
                await self._engine.exited

    async def models(self) -> bytes:
        """Return a list with the one model."""
        entry = {"id": self.model_id, "object": "model", "created": 0, "owned_by": "local"}
        return orjson.dumps({"object": "list", "data": [entry]})

    async def send(self, request: Request, timings: Timings) -> Reply:
        """Answer one chat completion. If the call is cancelled, its row ends at the next decode step."""
        if request.dialect == "native":
            return await send_native(self.send, request, timings)
        loop = asyncio.get_running_loop()
        if request.path != "/chat/completions":
            raise Rejected(f"the local model answers /chat/completions, not {request.path}", status=404)
        prompt = parse(request.body)
        fetched = await self._sources.fetch(prompt.images)
        engine = self._engine
        if engine is None or self._unready is not None:
            raise Unreachable(f"the local model cannot answer: {self._unready}", status=503, code="engine_down")
        # The engine thread cannot use the clock of the event loop, so the deadline is converted to `time.monotonic`.
        left = None if request.deadline is None else request.deadline - loop.time()
        row = Row(prompt, fetched, deadline=None if left is None else time.monotonic() + left)
        answer = OpenAIAnswer(self.model_id, include_usage=prompt.include_usage)
        self._rows.add(row)
        streaming = False
        try:
            engine.put(row)
            event = await self._event(row)
            if isinstance(event, Started):
                timings.work_started = loop.time()
                event = await self._event(row)
            timings.first_byte = loop.time()
            if isinstance(event, Done) and not prompt.stream:
                body = answer.whole(event.text, event.finish_reason, event.usage)
                return Reply(200, {"Content-Type": "application/json"}, body, usage=event.usage)
            row.deadline = None  # it holds until the first content; the caller of `send` ends a stream by closing it
            reply = Reply(200, {"Content-Type": answer.content_type}, closer=partial(self._release, row))
            reply.progress = Progress(loop.time())
            reply.chunks = self._chunks(row, reply, answer, event)
            streaming = True
            return reply
        finally:
            if not streaming:
                await self._release(row)

    async def _event(self, row: Row) -> Event:
        event = await row.events.get()
        if isinstance(event, BackendError):
            raise event
        return event

    async def _release(self, row: Row) -> None:
        row.gone = True
        self._rows.discard(row)

    async def _chunks(self, row: Row, reply: Reply, answer: OpenAIAnswer, event: Event) -> AsyncIterator[bytes]:
        opening, progress, clock = answer.first(), reply.progress, asyncio.get_running_loop().time
        while isinstance(event, Piece):
            if progress is not None:
                progress.content_at = clock()
            reply.output_bytes = (reply.output_bytes or 0) + len(event.text.encode("utf-8", "surrogatepass"))
            yield opening + answer.piece(event.text)
            opening = b""
            event = await row.events.get()
        if isinstance(event, Done):
            reply.usage = event.usage
            piece = answer.piece(event.text) if event.text else b""
            yield opening + piece + answer.last(event.finish_reason, event.usage)
        elif isinstance(event, BackendError):
            reply.failure = event
            yield answer.failed(event)

    async def _launch(self, unready: str) -> str | None:
        """Start an engine and wait until it is ready or has failed. Returns None, or the reason of the failure.

        `unready` is the value of `unready_reason` while the engine starts.
        """
        self._unready = unready
        engine = self._engine = Engine(
            self._load,
            max_batch=self._max_batch,
            batch_wait_seconds=self._batch_wait_seconds,
            queued=self._queued,
            on_batch=self._on_batch,
        )
        loop = asyncio.get_running_loop()
        began = loop.time()
        outcomes: list[asyncio.Future[Any]] = [engine.ready, engine.exited]
        try:
            while not any(outcome.done() for outcome in outcomes):
                _, missing = await asyncio.wait(
                    outcomes, timeout=_PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if len(missing) == len(outcomes):
                    _log.info("still loading the model, %.0f s so far", loop.time() - began)
        except asyncio.CancelledError:
            engine.stop()
            raise
        if engine.exited.done():
            return engine.exited.result()
        self._unready = None
        return None

    async def _supervise(self) -> None:
        """Restart the engine whenever it dies, at most once per `RESTART_INTERVAL_SECONDS`."""
        loop = asyncio.get_running_loop()
        next_start = loop.time()
        cause: str | None = None
        while True:
            if cause is None and self._engine is not None:
                # If this task is cancelled, `wait` does not cancel the future; `await exited` would.
                await asyncio.wait([self._engine.exited])
                cause = self._engine.exited.result()
            wait = max(0.0, next_start - loop.time())
            self._unready = f"{cause}; it is started again in {wait:.0f} s"
            _log.error("%s", self._unready)
            for row in self._rows:
                row.events.put_nowait(Unreachable(f"{cause}", status=503, code="engine_down"))
            await asyncio.sleep(wait)
            next_start = loop.time() + RESTART_INTERVAL_SECONDS
            cause = await self._launch(f"{cause}; the model is being loaded again")


def _load(model: str, device: str, log: Callable[[str], None]) -> VisionModel:
    """Load the model in the engine thread. The import of torch takes seconds, and here it does not block the loop."""
    try:
        from backends.local.model import load  # noqa: PLC0415
    except ImportError as error:
        raise BackendError(
            f"the local backend needs torch, transformers and pillow ({error.name} is missing):"
            " pip install 'vlm-sidecar[local]'"
        ) from error
    return load(model, device, log)
