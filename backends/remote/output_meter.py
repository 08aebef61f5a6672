"""Measures the text that a stream brings, without parsing each of its events.

The providers that report no usage leave only this measure of the work that they charge. An event consists of the text
and of an envelope (ids, the model's name, punctuation) of nearly constant length. A few events are parsed to learn this
length; of all others only the length is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backends.base import Progress
from backends.remote.error_bodies import lenient_json
from backends.remote.events import events_in

#: Seconds between two events that are parsed. In between, each block counts as content. So the end of the content is
#: noticed at most so much later; `Progress.content_at` allows this.
_MEASURE_SECONDS = 1.0
#: The length of `data: ` and of the empty line after an event.
_FRAME_BYTES = 8


class OutputMeter:
    """Counts the text of one stream in bytes, and notes the time of its newest content."""

    __slots__ = ("_clock", "_envelope", "_measure_at", "_text_of", "output_bytes", "progress")

    def __init__(self, clock: Callable[[], float], text_of: Callable[[object], int]) -> None:
        """`clock` returns the loop time. `text_of` returns the length of the text in an event's JSON; 0: no content."""
        self.progress = Progress()
        self.output_bytes = 0.0
        """The length of the text so far: measured in some events, estimated in the others."""
        self._clock = clock
        self._text_of = text_of
        self._envelope = 0
        self._measure_at = 0.0

    def start(self, data: bytes, payload: object) -> None:
        """Note the first event with content. Its block must follow with `feed`."""
        self._envelope = len(data) + _FRAME_BYTES - self._text_of(payload)
        # If it names the role, its envelope is longer than the others.
        self._measure_at = 0.0 if b'"role"' in data else self._clock() + _MEASURE_SECONDS

    def feed(self, block: bytes) -> None:
        """Process a block of complete events."""
        now = self._clock()
        if now >= self._measure_at:
            self._measure(block, now)
            return
        text = len(block) - self._envelope
        if text > self._envelope:  # perhaps several events
            text = len(block) - block.count(b"data:") * self._envelope
        if text > 0:
            self.output_bytes += text
        self.progress.content_at = now

    def _measure(self, block: bytes, now: float) -> None:
        text = events = 0
        for event in events_in(block):
            if event.data:
                events += 1
                text += self._text_of(lenient_json(event.data))
        if text:
            self._envelope = (len(block) - text) // events
            self._measure_at = now + _MEASURE_SECONDS
            self.output_bytes += text
            self.progress.content_at = now

    def skip(self) -> None:
        """Note an event with data that is too long to be parsed. Its length says nothing: it may be a picture."""
        self.progress.content_at = self._clock()


def text_bytes(choice: Mapping[str, Any], fields: tuple[str, ...]) -> int:
    """Return the length in bytes of what a choice contains in these fields of its message: texts, tool calls."""
    values = [choice.get("text")]
    for key in ("message", "delta"):
        if isinstance(message := choice.get(key), dict):
            values += map(message.get, fields)
    return sum(len(str(value).encode("utf-8", "surrogatepass")) for value in values if value)
