"""What travels between the event loop and the engine thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from backends.base import BackendError, Usage
from backends.local.prompts import Prompt
from backends.local.text import FinishReason


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has taken the row up: its wait is over."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a streaming row, never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The row is answered."""

    text: str
    """What no `Piece` has brought: for a row that does not stream, the whole answer."""
    finish_reason: FinishReason
    usage: Usage


#: For each row `Started`, then pieces if it streams, then `Done`; an error may take the place of any and is the last.
Event = Started | Piece | Done | BackendError


@dataclass(slots=True, eq=False)
class Row:
    """One request on its way through the engine."""

    prompt: Prompt
    fetched: Mapping[str, bytes] = field(default_factory=dict)
    """File bytes of the images that are no data URL, by the field that names them."""
    deadline: float | None = None
    """On `time.monotonic`: after it the row is not begun, or ends at the next step."""
    gone: bool = False
    """Set on the loop when nobody waits for the answer any more, read by the engine at every step."""
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    """Filled on the loop with what the engine says."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row of a batch chooses its tokens."""

    temperature: float
    top_p: float
    seed: int
    forced: Sequence[int] = ()
    """Tokens that the row has already: an answer begun in a batch that failed goes on where it was."""
