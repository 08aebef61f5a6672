"""The engine thread. Only this thread uses the model. It takes rows (requests) from its mailbox and serves batches.

    event loop ── mailbox ──▶ collect → prepare → encode → generate ──▶ call_soon_threadsafe: events of rows

There is no lock, because requests wait in the mailbox instead. The lock wait of a row ends with its `Started` event.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from backends.base import BackendError, Rejected, ServerFailed, Usage
from backends.local.prompts import Prompt, data_url_bytes, invalid
from backends.local.rows import Done, Draw, Event, Piece, Row, Started
from backends.local.text import AnswerText

if TYPE_CHECKING:
    from PIL.Image import Image

    from backends.local.model import Batch, VisionModel

_log = logging.getLogger("backends.local")


@dataclass(slots=True, eq=False)
class _Job:
    """A row that the engine has taken from the mailbox."""

    row: Row
    rendered: str
    images: list[Image]
    answer: AnswerText
    seed: int
    buffered: list[str]
    """The text so far of a row that does not stream."""
    finished: bool = False
    """Whether the row is answered, failed or abandoned. No more events follow."""
    steps: int = 0
    """Decode steps of the current run.

    A run after a failed run first repeats the tokens that the answer already has; these steps add no token.
    """


class Engine:
    """Loads a model in its own thread and serves rows until it is stopped or dies."""

    def __init__(
        self,
        load: Callable[[Callable[[str], None]], VisionModel],
        *,
        max_batch: int,
        batch_wait_seconds: float,
        queued: Callable[[], int],
        on_batch: Callable[[int], None],
    ) -> None:
        """Start the thread. Must be called on the event loop. All events and calls of `on_batch` happen on that loop.

        The engine thread calls `queued`.
        """
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        """Done when the model is loaded and has answered its first image."""
        self.exited: asyncio.Future[str | None] = self._loop.create_future()
        """Done when the thread has ended. The result is None after `stop`, else one line with the error."""
        self.max_batch = max_batch
        """The largest batch. It becomes smaller when the memory runs out, and never grows again."""
        self._load = load
        self._batch_wait_seconds = batch_wait_seconds
        self._queued = queued
        self._on_batch = on_batch
        self._mailbox: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._waiting: deque[Row] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="local-engine", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Put a row into the mailbox of the thread."""
        self._mailbox.put(row)

    def stop(self) -> None:
        """Ask the thread to end, at the next decode step at the latest. `exited` is done when it has ended."""
        self._stopping = True
        self._mailbox.put(None)

    # --- all methods below run in the engine thread ---

    def _call(self, function: Callable[[], object]) -> None:
        # The loop may be closed already, because `close` does not wait for a model that is still loading.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def _post(self, *events: tuple[Row, Event]) -> None:
        """Send events to rows. All events together wake the loop only once."""
        if events:
            self._call(partial(_deliver, events))

    def _run(self) -> None:
        ended_by: str | None = None
        try:
            self._model = self._load(_log.info)
            self._warm_up()
            self._call(partial(self.ready.set_result, None))
            while jobs := self._collect():
                self._serve(jobs)
        except BackendError as error:
            ended_by = error.message
        except BaseException as error:  # noqa: BLE001 - `exited` reports it to the owner of the engine
            ended_by = f"the engine died: {_kind_and_place(error)}"
        self._call(partial(self.exited.set_result, ended_by))

    def _warm_up(self) -> None:
        """Answer one small image, so that the first caller does not wait for lazy initialisation."""
        began = time.monotonic()
        part = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
        prompt = Prompt(messages=[{"role": "user", "content": part}], images=(), max_tokens=2)
        try:
            job = self._make_job(Row(prompt), [(self._model.sample_image(), "image")])
            failed = self._run_batch([job])
        except Exception as error:  # noqa: BLE001 - raised below, with its cause
            failed = error
        if failed is not None:
            raise BackendError(f"the model was loaded but cannot answer: {type(failed).__name__}: {failed}") from failed
        _log.info("ready: the first answer took %.1f s", time.monotonic() - began)

    def _collect(self) -> list[_Job]:
        """Wait for the next batch: the oldest row, and the rows that can share its batch. Empty after `stop`.

        A batch starts when it is full, or when rows wait in the mailbox but none of them can share it. If the mailbox
        is empty, the engine waits up to `batch_wait_seconds` for more rows, while requests still wait in the sidecar's
        queue (`queued` is not 0). Rows that arrive while images are decoded join the batch.
        """
        jobs: list[_Job] = []
        until = 0.0
        while not self._stopping and len(jobs) < self.max_batch:
            while not self._mailbox.empty():
                self._take(self._mailbox.get())
            row = self._next(jobs)
            if row is not None:
                self._post((row, Started()))
                job = self._prepare(row)
                if job is not None:
                    jobs.append(job)
                    until = until or time.monotonic() + self._batch_wait_seconds
            elif not jobs:
                self._take(self._mailbox.get())
            else:
                left = until - time.monotonic()
                if self._waiting or left <= 0 or not self._queued():
                    break
                try:
                    self._take(self._mailbox.get(timeout=left))
                except queue.Empty:
                    break
        return [] if self._stopping else jobs

    def _take(self, row: Row | None) -> None:
        if row is not None:
            self._waiting.append(row)

    def _next(self, jobs: list[_Job]) -> Row | None:
        """Remove and return the oldest waiting row that is not abandoned and can share a batch with `jobs`."""
        for row in list(self._waiting):
            if self._is_abandoned(row):
                self._waiting.remove(row)
            # Rows with different numbers of images cannot share a batch: each model family pads them differently.
            elif not jobs or len(row.prompt.images) == len(jobs[0].images):
                self._waiting.remove(row)
                return row
        return None

    def _is_abandoned(self, row: Row) -> bool:
        """Return whether the caller has gone or the deadline has passed. Reports a passed deadline to the row."""
        if row.gone:
            return True
        if row.deadline is None or time.monotonic() < row.deadline:
            return False
        self._post((row, ServerFailed("the deadline passed", status=504, code="deadline_exceeded")))
        return True

    def _prepare(self, row: Row) -> _Job | None:
        """Decode a row's images and render its prompt. On an error, report it to the row and return None."""
        try:
            files = [
                (row.fetched.get(image.field) or data_url_bytes(image), image.field) for image in row.prompt.images
            ]
            return self._make_job(row, files)
        except Rejected as error:
            self._post((row, error))
        except Exception as error:  # noqa: BLE001 - reported to the row's caller
            self._post((row, self._as_backend_error(error)))
        return None

    def _make_job(self, row: Row, files: list[tuple[bytes, str]]) -> _Job:
        prompt = row.prompt
        rendered, images = self._model.prepare(prompt, files)
        answer = AnswerText(
            self._model.decode, end_tokens=self._model.end_tokens, stop=prompt.stop, max_tokens=prompt.max_tokens
        )
        seed = secrets.randbits(63) if prompt.seed is None else prompt.seed
        return _Job(row, rendered, images, answer, seed, buffered=[])

    def _serve(self, jobs: list[_Job], *, is_retry: bool = False) -> bool:
        """Answer every row, even if some rows break the batch. Return whether a row alone ran out of memory.

        If a batch fails, its two halves are served separately, until the row that breaks it is alone. Only the caller
        of this row receives the error. If the memory ran out, half of the batch's size becomes the new `max_batch`,
        unless a row ran out of memory alone: such a row does not show how large a batch of other rows can be.
        `is_retry` means that these rows have failed before.
        """
        for job in jobs:
            job.finished = self._is_abandoned(job.row)
        jobs = [job for job in jobs if not job.finished]
        if not jobs:
            return False
        size = len(jobs)
        self._call(partial(self._on_batch, size))
        error = self._run_batch(jobs)
        jobs = [job for job in jobs if not job.finished]
        if error is None or not jobs:
            return False
        if self._model.is_fatal(error):
            raise error
        if out_of_memory := self._model.is_out_of_memory(error):
            error = ServerFailed("the model ran out of memory", status=503, code="out_of_memory")
            self._model.free()  # nothing refers to the first error any more, so the tensors in its frames can be freed
        if len(jobs) == 1 and (is_retry or not out_of_memory):
            self._post((jobs[0].row, self._as_backend_error(error)))
            return out_of_memory
        half = (len(jobs) + 1) // 2
        too_large = [self._serve(part, is_retry=True) for part in (jobs[:half], jobs[half:])]
        if out_of_memory and size > 1 and not any(too_large):
            self.max_batch = min(self.max_batch, (size + 1) // 2)
            _log.warning("out of memory with a batch of %d: from now on at most %d", size, self.max_batch)
        return any(too_large)

    def _as_backend_error(self, error: BaseException) -> BackendError:
        """Return the error for one row. An unexpected error is named by its type only: its text may quote a prompt."""
        if isinstance(error, BackendError):
            return error
        _log.error("the model failed on one request: %s", _kind_and_place(error))
        kind = type(error).__name__
        return ServerFailed(f"the model failed on this request ({kind})", status=500, code="local_model_failed")

    def _run_batch(self, jobs: list[_Job]) -> Exception | None:
        """Run one batch to its end. An error is returned, not raised, so that its stack frames can be freed."""
        try:
            batch = self._model.encode([job.rendered for job in jobs], [job.images for job in jobs])
            room = [self._model.context_tokens - tokens for tokens in batch.prompt_tokens]
            if min(room) < 1:
                return self._without_too_long(jobs, room)
            draws = [
                Draw(job.row.prompt.temperature, job.row.prompt.top_p, job.seed, tuple(job.answer.tokens))
                for job in jobs
            ]
            for job, tokens in zip(jobs, room, strict=True):
                job.steps = 0
                job.answer.max_tokens = min(job.row.prompt.max_tokens, tokens)
            steps = max(job.answer.max_tokens for job in jobs)
            self._model.generate(batch, draws, steps, partial(self._step, jobs, batch))
        except Exception as error:  # noqa: BLE001 - the caller handles it
            return error
        return None

    def _without_too_long(self, jobs: list[_Job], room: list[int]) -> Exception | None:
        """Refuse the prompts that leave no room for an answer in the context, and run a batch with the other rows."""
        for job, tokens in zip(jobs, room, strict=True):
            if tokens < 1:
                job.finished = True
                limit = self._model.context_tokens
                self._post((job.row, invalid(f"{limit - tokens} LLM tokens, the model takes {limit}", "messages")))
        rest = [job for job in jobs if not job.finished]
        return self._run_batch(rest) if rest else None

    def _step(self, jobs: list[_Job], batch: Batch, tokens: list[int]) -> list[bool]:
        """Process the newest token of every row. Return which rows are finished."""
        events: list[tuple[Row, Event]] = []
        for job, token, prompt_tokens in zip(jobs, tokens, batch.prompt_tokens, strict=True):
            if job.finished:
                continue
            if self._stopping or self._is_abandoned(job.row):
                job.finished = True
                continue
            job.steps += 1
            if job.steps > len(job.answer.tokens):
                self._advance(job, token, prompt_tokens, events)
        self._post(*events)
        return [job.finished for job in jobs]

    def _advance(self, job: _Job, token: int, prompt_tokens: int, events: list[tuple[Row, Event]]) -> None:
        text = job.answer.push(token)
        if job.answer.finish_reason is not None:
            job.finished = True
            usage = Usage(prompt_tokens, len(job.answer.tokens))
            events.append((job.row, Done("".join([*job.buffered, text]), job.answer.finish_reason, usage)))
        elif text and job.row.prompt.stream:
            events.append((job.row, Piece(text)))
        elif text:
            job.buffered.append(text)


def _deliver(events: Sequence[tuple[Row, Event]]) -> None:
    for row, event in events:
        row.events.put_nowait(event)


def _kind_and_place(error: BaseException) -> str:
    """Return the type and the place of an unexpected error. The message is left out: it may quote a prompt."""
    last = traceback.extract_tb(error.__traceback__, limit=-1)
    place = f" at {Path(last[0].filename).name}:{last[0].lineno}" if last else ""
    return f"{type(error).__name__}{place}"
