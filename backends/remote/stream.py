"""The stream of an accepted answer, from its first byte to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from backends.base import MAX_ANSWER_BYTES, BackendError, OnPiece, Progress, Reply, ServerFailed
from backends.http1.errors import HttpError
from backends.http1.interface import Response
from backends.remote.answers import StreamWatch, judge
from backends.remote.error_bodies import lenient_json
from backends.remote.events import begins_like_events
from backends.remote.refusals import classify

#: Seconds after the head of an event stream in which a stream without content is held back, so that a refusal in it is
#: an ordinary refusal and the request can be sent again. Then the caller gets the head, because callers and the proxies
#: before them give up on a silent connection.
HOLD_SECONDS = 2.0
#: Seconds without a byte of the provider, before the first content, after which the caller gets a comment.
COMMENT_SECONDS = 10.0
#: One line end: with an empty line behind it, openai-python (3.57) would read it as an event if an earlier event of the
#: stream had an id.
COMMENT = b": the upstream is working\n"
#: Bytes that are held at most before the first content.
_PREFACE_LIMIT = 1024 * 1024


class Stream:
    """The unchanged bytes of a stream. Data that the consumer has not read yet stays in the socket's buffers.

    Before the first content only whole events are passed on: a comment of ours can follow, or an error event.
    """

    def __init__(
        self,
        response: Response,
        watch: StreamWatch | None,
        error_of: Callable[[HttpError | BackendError], BackendError],
        *,
        must_end: bool = False,
        request_body: bytes = b"",
        keeps_all: bool = False,
    ) -> None:
        """`watch`: None if the stream cannot be read, because it is compressed.

        `error_of` returns the error that the sidecar gets. `must_end`: the stream must say at its end that it has
        ended, as a chat does. `keeps_all`: see `Request.keeps_stream`.
        """
        self._response = response
        self._watch = watch
        self._error_of = error_of
        self.first = b""
        """What `begins_like_events` has read."""
        self._must_end = must_end
        self._keeps_all = keeps_all
        self._request_body = request_body
        self._held = bytearray()  # not a list of pieces: tiny ones would need many times their bytes
        self._comment_at = 0.0  # loop time at which the caller gets a comment, if nothing else can be passed on
        self._clock = asyncio.get_running_loop().time
        self._unread_bytes = 0
        self._reply: Reply | None = None

    def reply(self, headers: dict[str, str]) -> Reply:
        """Return the reply with this stream."""
        progress = Progress() if self._watch is None else self._watch.progress
        self._reply = reply = Reply(
            self._response.status,
            headers,
            chunks=self,
            deliver=self.deliver,
            progress=progress,
            closer=self.aclose,
        )
        return reply

    # -- before the first content --------------------------------------------------------------------------------------

    async def begins_like_events(self) -> bool:
        """Read until it is known whether this is an event stream, or else a whole answer."""
        while (begins := begins_like_events(self.first)) is None and len(self.first) < _PREFACE_LIMIT:
            piece = await self._read()
            if not piece:
                return self._response.content_type == "text/event-stream"
            self.first += piece
        return bool(begins)

    async def until_content(self) -> None:
        """Read and hold what precedes the first content. Raises the error that comes in its place."""
        watch = self._watch
        while watch is not None and not watch.has_content:
            await self._read_before_content(watch)

    async def _read_before_content(self, watch: StreamWatch) -> None:
        piece, self.first = self.first or await self._read(), b""
        if not piece:
            watch.end()
            if not watch.has_content:
                raise watch.failure or self._no_content(watch)
            return
        self._held += piece
        watch.feed(piece)
        if watch.has_content:
            return
        if watch.failure is not None:
            raise watch.failure
        if len(self._held) - watch.open_bytes > _PREFACE_LIMIT:
            if watch.has_data:  # a model that thinks for long sends events with empty texts: begin to deliver
                watch.has_content = True
                return
            error = ServerFailed(f"the provider's stream held no content in its first {len(self._held)} bytes")
            error.may_resend = False  # the provider is answering, so that it charges
            raise error

    def _no_content(self, watch: StreamWatch) -> BackendError:
        """Return the error of a stream that has ended before any content. It may have been no stream at all."""
        held = bytes(self._held)
        payload = lenient_json(held) if begins_like_events(held) is False else None
        if isinstance(payload, dict) and judge(payload, is_chat=self._must_end) != "answer":
            return classify(0, self._response.headers, held, request_body=self._request_body, payload=payload)
        error = ServerFailed("the provider's stream ended before any content")
        error.may_resend = not watch.is_complete
        return error

    async def _next_before_content(self, watch: StreamWatch) -> bytes:
        """Return the next whole events without content, or a comment after `COMMENT_SECONDS` without any.

        The first piece comes at once, because the caller gets the head together with it.
        """
        piece = COMMENT
        try:
            async with asyncio.timeout_at(self._comment_at):
                while not watch.has_content and (watch.open_bytes or not self._held):
                    await self._read_before_content(watch)
            piece = self._take_held()
        except TimeoutError:
            pass
        self._comment_at = self._clock() + COMMENT_SECONDS
        return piece

    def _take_held(self) -> bytes:
        held, self._held = bytes(self._held), bytearray()
        self._release()
        return held

    async def _read(self) -> bytes:
        """Return everything that has arrived; wait for the first byte. Raises `ServerFailed` if too much is held."""
        content = self._response.content
        if self._response.held_bytes > MAX_ANSWER_BYTES:
            error = ServerFailed(f"the provider's stream is longer than {MAX_ANSWER_BYTES} bytes")
            error.may_resend = False
            raise error
        piece = await content.readany()
        with contextlib.suppress(HttpError):  # the next call raises it again
            while more := content.read_nowait():  # the parser may go on only after a read
                piece += more
        return piece

    def _release(self) -> None:
        """Count only what is held of what was read."""
        if not self._keeps_all:
            self._response.keep(0 if self._watch is None else self._watch.held_bytes)

    # -- as an iterator, or with a callback ----------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        watch = self._watch
        try:
            if watch is not None and not watch.has_content:
                return await self._next_before_content(watch)
            if self._held:
                return self._take_held()
            piece = self.first or await self._read()
            self.first = b""
        except HttpError as error:
            self._settle()
            raise self._error_of(error) from error
        except BackendError as error:
            self._error_of(error)
            raise
        if not piece:
            self._end()
            raise StopAsyncIteration
        self._note(piece)
        self._release()
        return piece

    async def deliver(self, on_piece: OnPiece) -> bool:
        """See `Reply.deliver`."""
        watch = self._watch
        while self._held or self.first or (watch is not None and not watch.has_content):
            if not on_piece(await self.__anext__()):
                return False
        note = self._note if watch is None else watch.feed

        def note_and_deliver(piece: bytes) -> bool:
            note(piece)
            if watch is not None and (held_bytes := watch.held_bytes):
                self._response.keep(held_bytes)
            return on_piece(piece)

        try:
            whole = await self._response.deliver(note_and_deliver)
        except HttpError as error:
            self._settle()
            raise self._error_of(error) from error
        if whole:
            self._end()
        return whole

    async def aclose(self) -> None:
        """See `Reply.aclose`."""
        self._settle()
        self._reply = None  # it refers to this object
        self._response.close_unless_read()

    def _note(self, piece: bytes) -> None:
        if self._watch is not None:
            self._watch.feed(piece)
        elif self._reply is not None and self._reply.progress is not None:
            self._unread_bytes += len(piece)
            self._reply.progress.content_at = self._clock()

    def _end(self) -> None:
        """Process the end of the stream. Raise `ServerFailed` if the stream did not say that it has ended."""
        watch = self._watch
        if watch is not None:
            watch.end()
        self._release()
        self._settle()
        if watch is not None and self._must_end and watch.failure is None and not watch.is_complete:
            raise ServerFailed("the provider's stream ended in the middle: no finish_reason and no [DONE] came")

    def _settle(self) -> None:
        reply, watch = self._reply, self._watch
        if reply is None:
            return
        if watch is None:
            reply.output_bytes = float(self._unread_bytes) or None  # compressed: about the length of the text alone
            return
        reply.usage, reply.failure = watch.usage, watch.failure
        if watch.failure is not None:
            self._error_of(watch.failure)
        reply.ended_within_event = watch.open_bytes > 0 and not self._held
        reply.output_bytes = watch.output_bytes
