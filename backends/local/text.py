"""Tokens to text, piece by piece: whole characters only, and nothing past a stop sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

FinishReason = Literal["stop", "length"]

#: What a decoder writes for bytes that are no character, or not one yet.
_BROKEN = "\ufffd"
#: A UTF-8 character has up to four bytes, so up to three of its bytes, each shown as one broken character by some
#: decoders, can be waiting for the last.
_MAX_PENDING = 3
#: Decode at most this many tokens again for a new one; then start over from the last few, which give the decoder its
#: context (SentencePiece drops a leading space).
_WINDOW = 48
_CONTEXT = 6


class AnswerText:
    """The text of one answer while it is generated."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        end_tokens: frozenset[int],
        stop: tuple[str, ...],
        max_tokens: int,
    ) -> None:
        self.tokens: list[int] = []
        """Every generated token, the end token included."""
        self.finish_reason: FinishReason | None = None
        self._decode = decode
        self._end_tokens = end_tokens
        self._stop = stop
        self.max_tokens = max_tokens
        """The answer ends with this many tokens."""
        self._start = 0  # of the window in tokens
        self._taken = 0  # characters of the window that are in _held or were given out
        self._held = ""  # text that may be the beginning of a stop sequence

    def push(self, token: int) -> str:
        """Take the next token and give the text that is now certain, often none. Sets `finish_reason` at the end."""
        self.tokens.append(token)
        if token in self._end_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"
        text = self._held + self._new_text()
        cut = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.finish_reason = "stop"
            return text[:cut]
        keep = 0 if self.finish_reason else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _new_text(self) -> str:
        """Text of the window that was not taken yet, without what may be half a character."""
        window = self.tokens[self._start :]
        text = self._decode(window)
        ended = self.finish_reason is not None
        pending = 0 if ended else min(_MAX_PENDING, len(text) - len(text.rstrip(_BROKEN)))
        certain = len(text) - pending
        new = text[self._taken : certain]
        self._taken = max(self._taken, certain)
        if len(window) >= _WINDOW and pending == 0:
            self._start = len(self.tokens) - _CONTEXT
            self._taken = len(self._decode(self.tokens[self._start :]))
        return new


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
