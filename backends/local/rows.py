"""The data that the event loop and the engine thread exchange: rows, and events about them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from backends.base import BackendError, Usage
from backends.local.prompts import Prompt
from backends.local.text import FinishReason


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has taken the row from its mailbox. The lock wait of the row ends here."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next text of a streaming row. It is never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The answer of the row is complete."""

    text: str
    """The text that was in no `Piece`. For a row that does not stream, it is the whole answer."""
    finish_reason: FinishReason
    usage: Usage


#: The events of a row, in order: `Started`, then each `Piece` if the row streams, then `Done`. An error may replace any
#: of them, and no event follows an error.
Event = Started | Piece | Done | BackendError


@dataclass(slots=True, eq=False)
class Row:
    """One request that the engine serves. In a batch it is one row of the tensors."""

    prompt: Prompt
    fetched: Mapping[str, bytes] = field(default_factory=dict)
    """The bytes of the images that are not data URLs, by the field of the request that contains the URL."""
    deadline: float | None = None
    """On the clock `time.monotonic`. After this time the row is not started, or it ends at the next decode step.

    The event loop removes it at the first content of a stream, and then ends the row by `gone`.
    """
    gone: bool = False
    """Whether the caller has gone. The event loop sets it, and the engine reads it at every decode step."""
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    """The events from the engine. Only the event loop puts them into this queue."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How to sample the tokens of one row."""

    temperature: float
    top_p: float
    seed: int
    forced: Sequence[int] = ()
    """Tokens that the row already has. They are repeated first, so that an answer can continue after a failed batch."""
